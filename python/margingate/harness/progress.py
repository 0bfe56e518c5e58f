"""The progress bar of commands that send many requests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Bar(NamedTuple):
    """What the measuring tells the progress bar."""

    say: Callable[[str], None]  # what is being done
    tick: Callable[[], None]  # one more request is answered


@contextlib.contextmanager
def progress(total: int) -> Iterator[Bar]:
    """A bar on stderr over `total` requests; where that is no terminal, a line per stage."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:  # rich would draw one bar, at the end
        yield Bar(_say, lambda: None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield Bar(
            lambda text: bar.update(task, description=text),
            lambda: bar.advance(task),
        )


def _say(text: str) -> None:
    print(f"margingate: {text}", file=sys.stderr, flush=True)
