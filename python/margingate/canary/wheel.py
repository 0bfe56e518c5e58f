"""A release's wheel: fetched without its dependencies, and unpacked beside nothing."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from margingate.canary.tree import Tree
from margingate.errors import CliError


def unpacked(release: str, work: Path) -> Tree:
    """The tree of a release, made in `work`.

    Args:
        release: a version, as 0.5.24, or the path of a wheel.

    Raises:
        CliError: the wheel cannot be had.
    """
    wheel = Path(release) if release.endswith(".whl") else _download(release, work)
    root = work / wheel.name.removesuffix(".whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root)
    except (OSError, zipfile.BadZipFile) as error:
        raise CliError(
            f"{wheel} cannot be unpacked ({error}): give a version or a wheel."
        ) from None
    return Tree(root)


def _download(version: str, work: Path) -> Path:
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check")
    wanted = ("--dest", str(work), f"sglang=={version}")
    command = (sys.executable, "-m", "pip", "download", *options, *wanted)
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    found = sorted(work.glob("sglang-*.whl"))
    if done.returncode or not found:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise CliError(f"sglang=={version} cannot be fetched ({said[-1]}): check the version.")
    return found[-1]
