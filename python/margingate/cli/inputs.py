"""What several commands take from the user, checked: prompt files and addresses of servers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from margingate.cli.errors import CliError


def read_pairs(path: Path, count: int | None = None) -> list[tuple[str, str]]:
    """The first `count` (id, text) pairs of a --prompts file; raises CliError."""
    from margingate.client import read_prompts

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


def refuse_twins(pairs: Iterable[tuple[str, str]]) -> None:
    """Raises CliError where two prompts have one id: answers are told apart by it."""
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise CliError(f"--prompts has two prompts with the id {name!r}: rename one.")
        seen.add(name)


def refuse_key(root: str, status: int) -> None:
    """Raises CliError where this HTTP status says that the server wants another key."""
    if status in (401, 403):
        raise CliError(f"{root} answered {status}: give --api-key the server's key.")


def server_root(url: str) -> str:
    """--base-url without what is added to it; raises CliError where it is no HTTP address."""
    if not url.startswith(("http://", "https://")):
        raise CliError(f"--base-url is {url!r}: give http://HOST:PORT.")
    return url.rstrip("/").removesuffix("/v1")
