"""What the gate asks of SGLang: functions that it hooks, overrides, replaces and calls."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def functions() -> dict[str, str]:
    """Dotted path of each of SGLang's functions -> what the gate does with it."""
    found = {name: "called" for name in imports() if _is_function(name)}
    found |= dict.fromkeys(overridden(), "overridden")
    found |= dict.fromkeys(replaced(), "replaced on an object")
    return found | dict.fromkeys(hooked(), "hooked")


def hooked() -> dict[str, str | None]:
    """The targets of all hooks -> the parameters that the newest release has; None: any."""
    from margingate.runtime.start import startup_hooks

    return {hook.path: hook.parameters for hook in startup_hooks.ALL_HOOKS}


def replaced() -> list[str]:
    """Methods that are replaced on one object."""
    from margingate.runtime.compat.instance_patches import INSTANCE_PATCHES

    return [f"sglang.srt.{patch.owner}.{patch.name}" for patch in INSTANCE_PATCHES]


def imports() -> list[str]:
    """Every name that the runtime imports of SGLang, and every module."""
    return sorted({name for module in _modules() for name in _imported(module)})


def overridden() -> list[str]:
    """Methods of SGLang's classes that a subclass in the runtime has too."""
    return sorted({name for module in _modules() for name in _overridden(module)})


def _modules() -> Iterator[ModuleType]:
    from margingate import runtime

    yield runtime
    for each in pkgutil.walk_packages(runtime.__path__, "margingate.runtime."):
        yield importlib.import_module(each.name)


def _imported(module: ModuleType) -> Iterator[str]:
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "sglang")


def _overridden(module: ModuleType) -> Iterator[str]:
    for kind in vars(module).values():
        if inspect.isclass(kind) and kind.__module__ == module.__name__:
            for base in kind.__mro__[1:]:
                if base.__module__.split(".")[0] == "sglang":
                    shared = vars(kind).keys() & {n for n, v in vars(base).items() if callable(v)}
                    yield from (f"{base.__module__}.{base.__qualname__}.{name}" for name in shared)


def _is_function(name: str) -> bool:
    try:
        return inspect.isroutine(pkgutil.resolve_name(name))
    except (ImportError, AttributeError, ValueError):
        return False
