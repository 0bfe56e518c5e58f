"""Every attribute of SGLang's objects that the gate reads or writes is looked up at start.

SGLang has no interface for what the gate does. An attribute that a release renames would be found
by what then goes wrong: late, or never where it is written, since most classes take any name.
"""

from __future__ import annotations

import dis
import inspect
import pkgutil
from collections.abc import Iterator
from types import CodeType
from typing import Any

from margingate.config import GateError
from margingate.runtime.compat import release
from margingate.runtime.compat.release import SGLANG_VERSION
from margingate.runtime.compat.surface_table import SURFACE

_STORE_ATTR, _EXTENDED_ARG = dis.opmap["STORE_ATTR"], dis.EXTENDED_ARG
# A start loads those that it uses, and `check_instance` looks at what it replaces there.
_SOME_SERVERS = "layers.attention."


def check() -> None:
    """Raises GateError naming what this SGLang does not have, of all that a start loads."""
    found = [path for path in missing() if not path.startswith(_SOME_SERVERS)]
    if found:
        raise GateError(
            f"--deterministic-gate needs {', '.join(found)} of SGLang, which {SGLANG_VERSION} has "
            f"and this installation does not: reinstall sglang=={SGLANG_VERSION}."
        )


def missing() -> list[str]:
    """Dotted paths below sglang.srt of attributes and of whole classes; loads all of them."""
    absent: frozenset[str] = release.of_release("ABSENT_ATTRIBUTES", frozenset())
    return [found for path in SURFACE for found in _missing_in(path) if found not in absent]


def _missing_in(path: str) -> list[str]:
    kind = class_of(path)
    if kind is None:
        return [path]
    there = members(kind)
    return [f"{path}.{name}" for name in SURFACE[path].split() if name not in there]


def class_of(path: str) -> type | None:
    """The class at a dotted path below sglang.srt; None where there is none."""
    try:
        found: type = pkgutil.resolve_name(f"sglang.srt.{path}")
    except (ImportError, AttributeError, ValueError):
        return None
    return found


def members(kind: type) -> set[str]:
    """What objects of a class have: methods, values, fields, and what its functions set."""
    names: set[str] = set()
    for each in kind.__mro__[:-1]:
        names |= {*vars(each), *vars(each).get("__annotations__", {})}
        for value in vars(each).values():
            for code in _code(value):
                names |= set(_stored(code))
    return names


def _code(value: Any) -> Iterator[CodeType]:
    """Of a function, method or property, and of what it wraps."""
    if isinstance(value, property):
        value = value.fget
    value = inspect.unwrap(getattr(value, "__func__", value))
    if inspect.isfunction(value):
        yield value.__code__


def _stored(code: CodeType) -> Iterator[str]:
    """Names of the attributes that a function sets, on whatever object."""
    argument = 0
    for at in range(0, len(code.co_code), 2):
        argument |= code.co_code[at + 1]
        if code.co_code[at] == _STORE_ATTR:
            yield code.co_names[argument]
        argument = argument << 8 if code.co_code[at] == _EXTENDED_ARG else 0
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _stored(constant)
