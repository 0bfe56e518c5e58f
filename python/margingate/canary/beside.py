"""The start's own checks, in a Python that finds the other SGLang first. Prints JSON on stdout.

Run by `canary/report.py`; what is wrong is a list of [what, where, how].
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from typing import Any

Row = tuple[str, str, str]


def broken_imports() -> Iterator[Row]:
    """Modules of the runtime that cannot be imported beside this SGLang."""
    from margingate import runtime

    for each in pkgutil.walk_packages(runtime.__path__, "margingate.runtime."):
        try:
            importlib.import_module(each.name)
        except Exception as error:
            yield "import", each.name, f"{type(error).__name__}: {_first_line(error)}"


def broken_hooks() -> Iterator[Row]:
    """Hooks that the start would refuse."""
    from margingate.config import GateError
    from margingate.runtime.hooks import registry
    from margingate.runtime.start import startup_hooks

    for hook in startup_hooks.ALL_HOOKS:
        try:
            registry.check_target(hook)
        except GateError as error:
            yield "hook", hook.target, str(error)


def missing_attributes() -> Iterator[Row]:
    """Attributes that the start would refuse, and those of parts that a start may not load."""
    from margingate.runtime.compat import surface
    from margingate.runtime.compat.instance_patches import INSTANCE_PATCHES

    for path in surface.missing():
        yield "attribute", path, "gone"
    for patch in INSTANCE_PATCHES:
        if patch.kind == "module":  # bound where there is a GPU; `asked` looks into the source
            continue
        kind = surface.class_of(patch.owner)
        if kind is None or patch.name not in surface.members(kind):
            yield "attribute", f"{patch.owner}.{patch.name}", "gone"


def fields() -> Iterator[Row]:
    """Fields of settings and requests that nobody has looked at, or that are no more."""
    from margingate.runtime.compat.arguments.fields import differences

    for path, (unseen, gone) in differences().items():
        yield from (("field", f"{path}.{name}", "nobody has looked at it") for name in unseen)
        yield from (("field", f"{path}.{name}", "gone") for name in gone)


def rows() -> Iterator[Row]:
    """All of it; a part that fails is a row itself, since the others still say something."""
    for part in (broken_imports, broken_hooks, missing_attributes, fields):
        try:
            yield from part()
        except Exception as error:
            yield "canary", part.__name__, f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def main() -> None:
    """Print the rows as JSON."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(sys.stderr):
        found: list[Any] = list(rows())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
