"""The SGLang releases that are served, and which one this process has.

All code is written for the newest. What differs in an older one is in a module of that release,
under the names that `of_release` is asked for, and goes with it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType
from typing import TypeVar

from margingate.config import GateError

T = TypeVar("T")

NEWEST = "0.5.23"
OLDER = {"0.5.22": "margingate.runtime.compat.v0_5_22"}  # release -> what differs from the newest
SERVED: tuple[str, ...] = (NEWEST, *OLDER)


def installed() -> str:
    """The version of the installed SGLang, or a remark that there is none."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def check_version() -> None:
    """Raises GateError unless the installed SGLang is one that is served."""
    found = installed()
    if found not in SERVED:
        raise GateError(
            f"--deterministic-gate patches SGLang {' or '.join(SERVED)}, but SGLang is {found}: "
            f"pip install sglang=={NEWEST}."
        )


# The release that this process is written for: the installed one, where it is served.
SGLANG_VERSION = NEWEST if (_installed := installed()) not in SERVED else _installed


def _differences() -> ModuleType | None:
    """The module of this release; None for the newest."""
    name = OLDER.get(SGLANG_VERSION)
    return None if name is None else importlib.import_module(name)


_DIFFERENT = _differences()


def of_release(name: str, newest: T) -> T:
    """What this release has in place of a function or a value that is written for the newest."""
    found: T = getattr(_DIFFERENT, name, newest)
    return found


def absent(name: str) -> frozenset[str]:
    """Fields of a class of this name that the tables have and this release has not."""
    others: dict[str, frozenset[str]] = of_release("ABSENT", {})
    return others.get(name, frozenset())


def parameters(target: str, newest: str | None) -> str | None:
    """Names of the parameters of a hook's target in this release.

    Args:
        target: dotted path below sglang.srt.
        newest: as the tables of hooks have them.
    """
    others: dict[str, str] = of_release("PARAMETERS", {})
    return others.get(target, newest)
