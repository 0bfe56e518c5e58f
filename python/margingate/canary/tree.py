"""The modules of an unpacked SGLang, read by their syntax: nothing of it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Definition:
    """A function, a class or a module: `node` is None for a module."""

    module: str
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | None
    place: str  # file:line below the tree

    @property
    def body(self) -> str:
        """The code as Python would print it, without comments and docstrings."""
        if self.node is None:
            return ""
        return "\n".join(ast.unparse(each) for each in _without_docstrings(self.node).body)

    @property
    def parameters(self) -> str:
        """Names of a function's parameters, separated by spaces; of others empty."""
        if not isinstance(self.node, _FUNCTION):
            return ""
        taken = self.node.args
        named = [*taken.posonlyargs, *taken.args, taken.vararg, *taken.kwonlyargs, taken.kwarg]
        return " ".join(each.arg for each in named if each is not None)


class Tree:
    """`root` is a folder that holds `sglang/`: an unpacked wheel, or a site-packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, ast.Module | None] = {}

    @cached_property
    def version(self) -> str:
        return self._metadata("Version")[0]

    @cached_property
    def pins(self) -> set[str]:
        """What the release requires, extras aside."""
        return {pin for pin in self._metadata("Requires-Dist") if "extra ==" not in pin}

    def _metadata(self, key: str) -> list[str]:
        (info,) = self.root.glob("sglang-*.dist-info/METADATA")
        head = info.read_text(errors="replace").partition("\n\n")[0].splitlines()
        return [line.split(": ", 1)[1] for line in head if line.startswith(f"{key}: ")]

    def find(self, dotted: str) -> Definition | None:
        """By dotted path, imports followed; a member also in a class's bases."""
        parts = dotted.split(".")
        for cut in range(len(parts), 0, -1):
            if self._parsed(".".join(parts[:cut])) is not None:
                found: Definition | None = self._module(".".join(parts[:cut]))
                for part in parts[cut:]:
                    found = None if found is None else self._inside(found, part)
                return found
        return None

    def _inside(self, found: Definition, name: str) -> Definition | None:
        if found.node is None:
            return self._bound(found.module, name, frozenset())
        if isinstance(found.node, ast.ClassDef):
            return self._member(found, name)
        return None

    def _bound(self, module: str, name: str, seen: frozenset[str]) -> Definition | None:
        """What a module binds, in whatever block; the last binding counts."""
        parsed = self._parsed(module)
        if parsed is None or f"{module}.{name}" in seen:
            return None
        for node in reversed(list(_statements(parsed.body))):
            if isinstance(node, (*_FUNCTION, ast.ClassDef)) and node.name == name:
                return Definition(module, node, self._place(module, node.lineno))
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        source = self._absolute(module, node)
                        found = self._bound(source, alias.name, seen | {f"{module}.{name}"})
                        return found or self._module(f"{source}.{alias.name}")
        return self._module(f"{module}.{name}")

    def _member(self, owner: Definition, name: str) -> Definition | None:
        assert isinstance(owner.node, ast.ClassDef)
        for node in _statements(owner.node.body):
            if isinstance(node, (*_FUNCTION, ast.ClassDef)) and node.name == name:
                return Definition(owner.module, node, self._place(owner.module, node.lineno))
        for base in owner.node.bases:
            kind = self._base(owner.module, base)
            if kind is not None and (found := self._member(kind, name)):
                return found
        return None

    def _base(self, module: str, base: ast.expr) -> Definition | None:
        first, *rest = ast.unparse(base).partition("[")[0].split(".")
        found = self._bound(module, first, frozenset())
        for part in rest:
            found = None if found is None else self._inside(found, part)
        return found if found is not None and isinstance(found.node, ast.ClassDef) else None

    def _module(self, module: str) -> Definition | None:
        if self._parsed(module) is None:
            return None
        return Definition(module, None, self._place(module, 1))

    def _parsed(self, module: str) -> ast.Module | None:
        if module not in self._modules:
            path = self._file(module)
            text = None if path is None else path.read_text(errors="replace")
            self._modules[module] = None if text is None else ast.parse(text)
        return self._modules[module]

    def _file(self, module: str) -> Path | None:
        base = self.root / module.replace(".", "/")
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        return None

    def _place(self, module: str, line: int) -> str:
        path = self._file(module)
        assert path is not None
        return f"{path.relative_to(self.root)}:{line}"

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self._file(module)
        up = node.level - (path is not None and path.name == "__init__.py")
        package = module.rsplit(".", up)[0] if up else module
        return f"{package}.{node.module}" if node.module else package


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module or class, those within if, try and with included."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                for inner in getattr(node, name, []):
                    yield from _statements(
                        inner.body if isinstance(inner, ast.ExceptHandler) else [inner]
                    )


def _without_docstrings(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
) -> ast.Module:
    copy = ast.parse(ast.unparse(node))
    for inner in ast.walk(copy):
        if isinstance(inner, (*_FUNCTION, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return copy
