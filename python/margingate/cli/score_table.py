"""What `margingate check --scores` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from margingate.study.score_check import RUNS, TOP, changed_names

if TYPE_CHECKING:
    from rich.table import Table


def make_table(result: dict[str, Any]) -> Table:
    """A row per comparison, each with scores alone and nothing cached."""
    from rich.table import Table

    table = Table(title=f"{result['prompts']} prompts, {result['tokens']} tokens decoded of each")
    table.add_column("scored alone, and")
    for words in ("prompts the same", "log-probs that differ", "largest distance", f"top {TOP}"):
        table.add_column(words, justify="right")
    table.add_row(*_cells("decoded", result["decoded"], result["prompts"]))
    for name, words in RUNS.items():
        found = result["runs"][name]
        hits = f" ({found['hits']} hits)" if found["hits"] else ""
        table.add_row(*_cells(words + hits, found, result["prompts"]))
    return table


def _cells(words: str, found: dict[str, Any], prompts: int) -> tuple[str, ...]:
    return (
        words,
        f"{prompts - len(found['prompts'])} of {prompts}",
        f"{found['differ']} of {found['tokens']}",
        f"{found['largest']:.3g}",
        f"{found['lists']} differ",
    )


def meaning(result: dict[str, Any]) -> str:
    """Whether scores depend on the batch, and whether they are those of decoding."""
    names = sorted(changed_names(result))
    if names:
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        return (
            f"Scores of {len(names)} of {result['prompts']} prompts depend on how they are "
            f"computed: {shown}."
        )
    known = result["fingerprint"]
    means = f" The server's fingerprint: {known}." if known else ""
    if result["decoded"]["prompts"]:
        return (
            "Every score was the same alone, in a batch and from the cache. Scores are those of a "
            f"prefill, as the server says, and not bit for bit those of decoding.{means}"
        )
    return f"Every score was that of decoding, alone, in a batch and from the cache.{means}"
