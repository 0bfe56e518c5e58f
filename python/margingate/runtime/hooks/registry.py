"""The ledger of every patch: what is hooked, why, and when the hook can go.

SGLang logs a hook that cannot be applied and serves on; a gate that is not there must not be
noticed by a wrong answer. So every target is compared with what this version was written for
before it is registered, and looked up again after it was applied.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from margingate.config import GateError
from margingate.runtime.compat import release
from margingate.runtime.compat.release import SGLANG_VERSION
from margingate.runtime.request import guard
from margingate.runtime.request.guard import Policy

AFTER, AROUND, BEFORE = HookType.AFTER, HookType.AROUND, HookType.BEFORE
_SRT = "sglang.srt."
OR_MORE = " ..."  # ends `parameters`: others may follow that a caller can leave out
# SGLang sets it while a plugin loads; most hooks are registered later, and its log names it.
_SOURCE = HookSource(plugin_name="margingate", dist_name="margingate")


@dataclass(frozen=True)
class Hook:
    """One patch: `function` around, before or after `target`."""

    target: str  # dotted path below sglang.srt
    kind: HookType
    function: Callable[..., Any]
    # The target's names in the newest release; None: not compared. Those of a function that we
    # call or whose arguments we take one by one are exact; one that is only handed on may be
    # given more: OR_MORE.
    parameters: str | None
    why: str
    remove_when: str
    policy: Policy = Policy.FATAL  # what an exception in it ends
    instead: Callable[..., Any] | None = None  # of the original then, where AROUND; as `function`

    @property
    def path(self) -> str:
        return _SRT + self.target


def resolve(hook: Hook) -> Any:
    """The hook's target as it is now; raises GateError when it does not exist."""
    try:
        return pkgutil.resolve_name(hook.path)
    except (ImportError, AttributeError, ValueError):
        raise GateError(
            f"--deterministic-gate needs {hook.path}, which SGLang {SGLANG_VERSION} has and this "
            f"installation does not: reinstall sglang=={SGLANG_VERSION}."
        ) from None


def check_target(hook: Hook) -> None:
    """Whether the target is there, is what SGLang calls, and has the ledger's parameters.

    Raises:
        GateError: it is missing, or a method that its class does not run itself, or its parameters
            are others.
    """
    target = resolve(hook)
    _check_class(hook)
    expected = release.parameters(hook.target, hook.parameters)
    if expected is None:
        return
    taken = inspect.signature(inspect.unwrap(target)).parameters
    if not _fits(taken, expected):
        raise GateError(
            f"--deterministic-gate cannot patch {hook.path}: its parameters are "
            f"({' '.join(taken)}) instead of ({expected}); reinstall sglang=={SGLANG_VERSION}, or "
            "remove the plugin that replaces it."
        )


def _check_class(hook: Hook) -> None:
    """A generated `__init__` is never called, and one that is inherited is another class's."""
    above, _, name = hook.path.rpartition(".")
    owner = pkgutil.resolve_name(above)
    if not inspect.isclass(owner) or not (name.startswith("__") and name.endswith("__")):
        return
    if name not in vars(owner) or issubclass(owner, msgspec.Struct):
        raise GateError(
            f"--deterministic-gate cannot patch {hook.path}: SGLang makes a {owner.__name__} "
            f"without calling it; reinstall sglang=={SGLANG_VERSION}."
        )


def _fits(taken: Mapping[str, inspect.Parameter], expected: str) -> bool:
    names = expected.removesuffix(OR_MORE).split()
    if names[:1] == ["cls"] and "cls" not in taken:  # a bound classmethod hides it
        names = names[1:]
    more = list(taken.values())[len(names) :]
    if list(taken)[: len(names)] != names or (more and not expected.endswith(OR_MORE)):
        return False
    varying = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in varying for p in more)


def register(hooks: Iterable[Hook]) -> None:
    """Check each hook's target and hand it to SGLang's registry (applied by `apply_hooks`)."""
    hooks = tuple(hooks)
    for hook in hooks:
        check_target(hook)
    for hook in hooks:
        around = hook.kind is AROUND
        function = guard.wrap(
            hook.target, hook.function, hook.policy, around=around, instead=hook.instead
        )
        HookRegistry.register(hook.path, function, hook.kind, source=_SOURCE)


def is_applied(hook: Hook) -> bool:
    """Whether the hook's guarded function is in the chain of wrappers around its target."""
    layer: Any = resolve(hook)
    layer = getattr(layer, "__func__", layer)
    while layer is not None:
        cells = getattr(layer, "__closure__", None) or ()
        if any(_guards(cell.cell_contents, hook.function) for cell in cells):
            return True
        layer = getattr(layer, "__wrapped__", None)
    return False


def _guards(held: Any, function: Callable[..., Any]) -> bool:
    return inspect.isfunction(held) and getattr(held, "__wrapped__", None) is function


def install(hooks: Iterable[Hook]) -> None:
    """Register and apply hooks late (in a gated scheduler), and confirm every one.

    Raises:
        GateError: naming the first hook that is not in place afterwards.
    """
    hooks = tuple(hooks)
    register([hook for hook in hooks if not is_applied(hook)])
    HookRegistry.apply_hooks()
    for hook in hooks:
        if not is_applied(hook):
            raise GateError(
                f"--deterministic-gate could not patch {hook.path}, probably because another "
                "SGLang plugin patched it first: restrict the plugins with SGLANG_PLUGINS."
            )
