"""What several commands take from the user, checked: prompts, addresses, keys, files to write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from margingate.errors import CliError

MOST_SAID = 200  # characters of a server's answer that a sentence quotes


def read_pairs(path: Path, count: int | None = None) -> list[tuple[str, str]]:
    """The first `count` (id, text) pairs of a --prompts file; raises CliError."""
    from margingate.harness.client import read_prompts

    try:
        return read_prompts(path, count)
    except OSError as err:
        raise CliError(
            f"--prompts {path} cannot be read ({err.strerror}): check the path."
        ) from err
    except UnicodeDecodeError as err:
        raise CliError(f"--prompts {path} is not UTF-8 text ({err.reason}): convert it.") from err
    except ValueError as err:
        raise CliError(f"--prompts: {err}") from err


def refuse_twins(files: Mapping[Path, Sequence[tuple[str, str]]]) -> None:
    """Raises CliError where two prompts have one id: answers are told apart by it.

    Args:
        files: (id, text) pairs by the file they came from.
    """
    seen: dict[str, Path] = {}
    for path, pairs in files.items():
        for name, _ in pairs:
            if seen.get(name) == path:
                raise CliError(
                    f"--prompts {path} has two prompts with the id {name!r}: rename one."
                )
            if name in seen:
                raise CliError(
                    f"--prompts: {seen[name]} and {path} have two prompts with the id {name!r}: "
                    "rename one."
                )
            seen[name] = path


def refuse_one(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Raises CliError where there is no batch: one prompt at once is that prompt alone."""
    if len(pairs) == 1:
        raise CliError(f"--prompts {path} has one prompt, which makes no batch: add another.")


def refuse_key(root: str, status: int) -> None:
    """Raises CliError where this HTTP status says that the server wants another key."""
    if status in (401, 403):
        raise CliError(f"{root} answered {status}: give --api-key the server's key.")


def api_key(text: str) -> str:
    """--api-key without space around it; raises CliError where no HTTP header can carry it."""
    key = text.strip()
    if not (key.isascii() and key.isprintable()):
        raise CliError(
            "--api-key has a line break, or another character that no HTTP header can carry: give "
            "the key alone."
        )
    return key


def server_root(url: str) -> str:
    """--base-url without what is added to it; raises CliError where it is no HTTP address."""
    why = ""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as err:  # .port raises too
        known, why = None, f" ({str(err)[:80]})"
    if not known or parts.query or parts.fragment or any(map(str.isspace, url)):
        raise CliError(f"--base-url is {url!r}{why}: give http://HOST:PORT.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def in_a_line(text: str) -> str:
    """What a server said, fit for a sentence: an HTML page or a traceback is many lines."""
    line = " ".join(text.split()) or "nothing"
    return line if len(line) <= MOST_SAID else f"{line[:MOST_SAID]}..."


def refuse_out(path: Path) -> None:
    """Raises CliError where --out cannot become a file, before anything is measured for it."""
    if path.is_dir():
        raise CliError(f"--out {path} is a folder: name a file in it.")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise CliError(f"--out {path} cannot be written: name a file in a folder that can.")


def make_folder(option: str, folder: Path) -> None:
    """Make a folder that an option names, where there is none; raises CliError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CliError(
            f"{option} {folder} cannot be made ({err.strerror}): name another folder."
        ) from err


def make_writable_folder(option: str, folder: Path) -> None:
    """The same, and raises CliError too where no file can be made in it."""
    make_folder(option, folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise CliError(
            f"{option} {folder} cannot be written ({err.strerror}): name another folder."
        ) from err
