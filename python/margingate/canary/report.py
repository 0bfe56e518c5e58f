"""What another SGLang release would break, and which functions have to be read again."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from margingate.canary import asked, unit_tests
from margingate.canary.tree import Tree
from margingate.errors import CliError
from margingate.markdown import table

Row = tuple[str, str, str]


def installed() -> Tree:
    """The SGLang that this Python has. Raises CliError where it is not the newest one served."""
    from margingate.runtime.compat import release

    found = release.installed()
    if found != release.NEWEST:
        raise CliError(
            f"the canary compares with SGLang {release.NEWEST}, but SGLang is {found}: "
            f"pip install sglang=={release.NEWEST}."
        )
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    return Tree(Path(spec.submodule_search_locations[0]).parent)


def is_served(version: str) -> bool:
    """Whether its bodies were read and its fields looked at."""
    from margingate.runtime.compat import release

    return version in release.SERVED


def changes(other: Tree, base: Tree) -> Iterator[Row]:
    """What the start would refuse beside `other`, and pins that differ from those of `base`."""
    found = list(_beside(other))
    yield from found
    if any(what in ("canary", "import") for what, _, _ in found):
        yield from _hooks_by_syntax(other)  # those of modules that were not looked at, too
    if not is_served(other.version):
        yield from (("pin", pin, "new") for pin in sorted(other.pins - base.pins))
        yield from (("pin", pin, "gone") for pin in sorted(base.pins - other.pins))


def failed_tests(other: Tree, checkout: Path) -> Iterator[Row]:
    """Tests that start no server and fail beside `other`."""
    for test, how in unit_tests.failures(checkout, other.version, environment(other)):
        yield "test", test, how or "failed"


def bodies(other: Tree, base: Tree) -> Iterator[Row]:
    """(what we do with it, function, how it differs) of those that have to be read again."""
    if is_served(other.version):
        return
    for path, use in sorted(asked.functions().items()):
        before, after = base.find(path), other.find(path)
        short = path.removeprefix("sglang.srt.")
        if before is None:  # made by a decorator or by Python: the start's checks see it
            continue
        if after is None:
            yield use, short, "gone"
        elif lines := _changed(before.body, after.body):
            yield use, short, f"{lines} lines differ, {after.place}"


def _changed(before: str, after: str) -> int:
    """Lines that were added or removed."""
    marks = [line[:2] for line in difflib.ndiff(before.splitlines(), after.splitlines())]
    return marks.count("+ ") + marks.count("- ")


def environment(other: Tree) -> dict[str, str]:
    """Of a Python that finds the other SGLang, and this margingate, before anything installed."""
    ours = Path(__file__).parents[2]
    places = [str(other.root), str(ours), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


def _beside(other: Tree) -> Iterator[Row]:
    command = (sys.executable, "-m", "margingate.canary.beside")
    done = subprocess.run(
        command, env=environment(other), capture_output=True, check=False, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        yield "canary", "margingate.canary.beside", f"status {done.returncode}: {last}"
        return
    yield from (tuple(row) for row in json.loads(done.stdout.splitlines()[-1]))


def _hooks_by_syntax(other: Tree) -> Iterator[Row]:
    for path, expected in asked.hooked().items():
        found, short = other.find(path), path.removeprefix("sglang.srt.")
        if found is None:
            yield "hook", short, "gone"
        elif expected not in (None, found.parameters):
            yield "hook", short, f"its parameters are ({found.parameters}), not ({expected})"


def written(found: list[Row], to_read: list[Row]) -> str:
    """Both tables as Markdown; `nothing` where there is nothing to do."""
    parts = []
    if found:
        parts.append("\n".join(table(("What", "Where", "How"), found)))
    if to_read:
        head = f"{len(to_read)} functions to read again:"
        parts.append("\n".join([head, "", *table(("Use", "Function", "How"), to_read)]))
    return "\n\n".join(parts) or "nothing"
