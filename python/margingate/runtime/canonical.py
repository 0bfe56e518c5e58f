"""Which decode steps are canonical: measured on the whole model, against the verifier.

The same rows are decoded in steps of every row count, over the same slots; a count is canonical
when each row's logits have the bits that a verify pass gives it. Runs once, before the first
request, on free slots.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import torch

from margingate.config import GateError
from margingate.runtime.ranks import agreed
from margingate.runtime.verifier import RowInput, Verifier, scratch_rows

logger = logging.getLogger(__name__)

SEED = 20260530
EAGER_COUNTS = (1, 2, 3, 5, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64)
LEAST_ROWS = 16  # compared at every row count


class CanonicalSteps:
    """The row counts whose decode steps leave canonical columns and settled rows."""

    def __init__(self, measured: dict[int, bool], graphs: bool) -> None:
        """`measured`: by row count; `graphs`: a step counts only if a graph ran it."""
        self._counts = sorted(measured)
        self._measured = measured
        self._graphs = graphs
        self._everywhere = False

    def extend(self) -> None:
        """Prefill was found to give a row the bits that decode does, and it runs with any number of
        rows and without a graph: so steps of any size count, if all that were measured do.
        """
        self._everywhere = all(self._measured.values())

    def holds(self, rows: int, by_graph: bool) -> bool:
        """Whether a decode step of `rows` requests is canonical.

        A count that was not measured is, when the measured ones around it both are.
        """
        if self._everywhere:
            return True
        if self._graphs and not by_graph:
            return False
        at = bisect_left(self._counts, rows)
        if at == len(self._counts):
            return False
        low = self._counts[at] if self._counts[at] == rows else self._counts[max(at - 1, 0)]
        return self._measured[low] and self._measured[self._counts[at]]

    def record(self) -> dict[str, Any]:
        """For `/server_info`: the counts that were measured, and what was found."""
        found = [[count, self._measured[count]] for count in self._counts]
        return {"measured": found, "graphs": self._graphs, "everywhere": self._everywhere}

    def __str__(self) -> str:
        good = [str(count) for count in self._counts if self._measured[count]]
        return f"{len(good)} of {len(self._counts)} measured row counts ({', '.join(good)})"


def measure(verifier: Verifier, scheduler: Any, largest: int) -> CanonicalSteps:
    """Compare decode steps of every row count up to `largest` with verify passes.

    Raises:
        GateError: the verifier's own rows depend on the padding beside them.
    """
    graphs = verifier.graph_sizes(largest)
    counts = graphs or [count for count in EAGER_COUNTS if count <= largest]
    rows = _made_up_rows(scheduler, max([verifier.rows, LEAST_ROWS, *counts]))
    with scratch_rows(verifier.runner, len(rows)):
        reference = _reference(verifier, rows)
        found = [_agree(reference, _logits(verifier, rows, n)) for n in counts]
    measured = dict(zip(counts, agreed(scheduler, found), strict=True))
    steps = CanonicalSteps(measured, bool(graphs))
    logger.info("margingate: decode steps are canonical at %s", steps)
    return steps


def check_padding(verifier: Verifier, scheduler: Any) -> None:
    """Raises GateError where a verify pass depends on how many of its rows are padding."""
    rows = _made_up_rows(scheduler, max(verifier.rows, LEAST_ROWS))
    with scratch_rows(verifier.runner, len(rows)):
        _reference(verifier, rows)


def _reference(verifier: Verifier, rows: list[RowInput]) -> torch.Tensor:
    """What verify passes give, full and half full."""
    reference = _logits(verifier, rows, verifier.rows)
    padded = _logits(verifier, rows, max(verifier.rows // 2, 1), verifier.rows)
    if not _agree(reference, padded):
        size = verifier.runner.server_args.tp_size
        ranks = f", and --tp-size {size} sums in an order that depends on a row's place"
        raise GateError(
            f"--deterministic-gate found that a verify pass of {verifier.rows} rows depends on its "
            f"padding with this model{ranks if size > 1 else ''}: choose other --gate-rows"
            f"{' or --tp-size 1' if size > 1 else ''}, or serve without the flag."
        )
    return reference


def _made_up_rows(scheduler: Any, count: int) -> list[RowInput]:
    """Rows of one request of random tokens."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(3, scheduler.model_config.vocab_size, (count,), generator=generator)
    return [RowInput(1, position, token) for position, token in enumerate(tokens.tolist())]


def _logits(
    verifier: Verifier, rows: list[RowInput], count: int, padded: int | None = None
) -> torch.Tensor:
    """Logits of the first rows, decoded `count` at a time in order; on the CPU."""
    used = max(count, LEAST_ROWS // count * count)
    steps: Iterable[list[RowInput]] = (rows[i : i + count] for i in range(0, used, count))
    found = [verifier.forward(step, padded or len(step))[: len(step)].cpu() for step in steps]
    return torch.cat(found)


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    shared = min(len(one), len(other))
    return torch.equal(one[:shared], other[:shared])
