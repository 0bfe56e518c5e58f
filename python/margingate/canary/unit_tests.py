"""The tests that start no server, beside another SGLang: `python -m ... VERSION FILES`.

The release is taken for one that is served, so that the tests speak of what differs and not of the
version.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_SERVERS = re.compile(r"test_(server_\w+|engine|scripts|docs|layering|cli_model|made_models)\.py")
_TOUCHES = re.compile(r"sglang|margingate\.runtime")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?)(?: - (.*))?$", re.MULTILINE)


def files(checkout: Path) -> list[Path]:
    """The modules that start no server and have to do with SGLang, the largest first."""
    found = [
        path
        for path in (checkout / "test").glob("test_*.py")
        if not _SERVERS.fullmatch(path.name) and _TOUCHES.search(path.read_text())
    ]
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


def failures(checkout: Path, version: str, environment: dict[str, str]) -> list[tuple[str, str]]:
    """(test, first line of what went wrong) of those that fail; a process on each of two cores."""
    chosen = [str(path.relative_to(checkout)) for path in files(checkout)]
    command = (sys.executable, "-m", "margingate.canary.unit_tests", version)
    running = [
        subprocess.Popen(
            [*command, *chosen[i::2]],
            cwd=checkout,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate()[0] for process in running]
    found = [pair for text in said for pair in _FAILED.findall(text)]
    for process, text in zip(running, said, strict=True):
        if process.returncode not in (0, 1):  # 1: tests failed, which is said above
            last = (text.strip().splitlines() or ["nothing was said"])[-1]
            found.append(("pytest", f"status {process.returncode}: {last}"))
    return found


def main() -> int:
    """Run pytest on the files given; its exit status."""
    import pytest

    from margingate.runtime.compat import release

    version, *chosen = sys.argv[1:]
    if version not in release.SERVED:
        release.SERVED = (version, *release.SERVED)
        release.SGLANG_VERSION = version
    os.environ["COLUMNS"] = "200"  # of the short summary, which is read
    # One process: the workers of pytest-xdist would not take the release for served.
    options = ("-n0", "-q", "-rfE", "--no-header", "--tb=no", "-pno:cacheprovider", "-Wignore")
    return int(pytest.main([*options, *chosen]))


if __name__ == "__main__":
    sys.exit(main())
