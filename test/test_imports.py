"""Names that tests and benchmarks import from other files of the repository are there.

Read from the source: mypy reads the package alone, and modules of tests that start servers are
imported only where those tests run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As in pyproject.toml.
SEARCHED = [ROOT / "test", ROOT, ROOT / "python", ROOT / "sgl-kernel-patches"]
RESULTS = ROOT / "benchmark" / "results"  # scripts of earlier versions, kept beside their figures
FILES = [
    path
    for folder in ("test", "benchmark", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.is_relative_to(RESULTS)
]


def source(module: str, folders: list[Path]) -> Path | None:
    """The file or the folder behind a dotted name, if it is below one of the folders."""
    for folder in folders:
        path = folder.joinpath(*module.split("."))
        for found in (path.with_suffix(".py"), path / "__init__.py", path):
            if found.exists():
                return found
    return None


def bound(path: Path) -> set[str]:
    """What a module binds at its top level, in branches too; what a package has as modules."""
    names: set[str] = set()
    if path.name == "__init__.py" or path.is_dir():
        folder = path if path.is_dir() else path.parent
        names |= {child.stem for child in folder.iterdir()}
    if path.is_file():
        names |= set(_bound(ast.parse(path.read_text()).body))
    return names


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (found for target in targets for found in ast.walk(target)):
                if isinstance(name, ast.Name):
                    yield name.id
        else:  # if, try, with, for: what their branches bind
            for field in ("body", "orelse", "finalbody"):
                yield from _bound(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _bound(handler.body)


def missing(path: Path, folders: list[Path]) -> list[str]:
    """Imports of a file from files below the folders, of names that are not there."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
            continue
        if origin := source(node.module, folders):
            names = bound(origin)
            found += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if alias.name not in names and alias.name != "*"
            ]
        elif source(node.module.split(".")[0], folders):
            found.append(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imported_names_are_there(path):
    assert missing(path, SEARCHED) == []


def test_missing_names_are_found(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "part.py").write_text("import os\nif os.name:\n    a, b = 1, 2\n")
    (tmp_path / "user.py").write_text(
        "from json import anything\n"
        "from pack import part, gone\n"
        "from pack.part import a, b, c, os\n"
        "def f():\n    from pack.lost import d\n"
    )
    wanted = ["pack.gone", "pack.part.c", "pack.lost"]
    assert missing(tmp_path / "user.py", [tmp_path]) == wanted
