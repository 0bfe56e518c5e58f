"""Which decode steps are canonical: measured on the whole model, against the verifier.

The same rows are decoded in steps of every row count, over the same slots; a count is canonical
when each row's logits have the bits that a verify pass gives it. Some counts are drawn anew at each
start, so that a fault which the same counts would never show is found by some start. Runs once,
before the first request, on free slots.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

import torch

from margingate.config import GateError
from margingate.core.rowclass import spans
from margingate.runtime.attention import invariant_attention
from margingate.runtime.compat.process import ranks
from margingate.runtime.compat.process.ranks import agreed
from margingate.runtime.probe.checks import drawing
from margingate.runtime.probe.measuring.classes import SEED
from margingate.runtime.probe.planning import execute
from margingate.runtime.verify.verifier import RowInput, Verifier, scratch_rows

logger = logging.getLogger(__name__)

# Without graphs every row count is measured, these and the drawn ones with LEAST_ROWS rows or more.
EAGER_COUNTS = (1, 2, 3, 5, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64)
LEAST_ROWS = 16


class CanonicalSteps:
    """The row counts whose decode steps leave canonical columns and settled rows."""

    def __init__(
        self, measured: dict[int, bool], graphs: bool, eager: dict[int, bool] | None = None
    ) -> None:
        """
        Args:
            measured: by row count.
            graphs: a step counts only if a graph ran it.
            eager: steps beside these that ran without a graph, where there are graphs.
        """
        self._counts = sorted(measured)
        self._measured = measured
        self._graphs = graphs
        self._eager = eager or {}
        self._everywhere = False

    def extend(self) -> None:
        """Prefill was found to give a row the bits that decode does, and it runs with any number of
        rows and without a graph: so steps of any size count, if all that were measured do.
        """
        self._everywhere = all((*self._measured.values(), *self._eager.values()))

    @property
    def everywhere(self) -> bool:
        """Whether steps of any size are canonical."""
        return self._everywhere

    def is_canonical(self, rows: int, by_graph: bool) -> bool:
        """Whether a decode step of `rows` requests is canonical.

        A graph runs it with the rows of the next size that has one, all of which were measured.
        Nothing is concluded from one row count to another.
        """
        if self._everywhere:
            return True
        if not self._graphs:
            return self._measured.get(rows, False)
        at = bisect_left(self._counts, rows)
        return by_graph and at < len(self._counts) and self._measured[self._counts[at]]

    def record(self) -> dict[str, Any]:
        """For `/server_info`: the counts that were measured, and what was found."""
        found = [[count, self._measured[count]] for count in self._counts]
        return {
            "measured": found,
            "graphs": self._graphs,
            "eager": [list(item) for item in self._eager.items()],
            "everywhere": self._everywhere,
        }

    def __str__(self) -> str:
        good = [count for count in self._counts if self._measured[count]]
        said = [f"{low} to {high}" if high > low else str(low) for low, high in spans(good)]
        return f"{len(good)} of {len(self._counts)} measured row counts ({', '.join(said)})"


def measure(verifier: Verifier, scheduler: Any, largest: int) -> CanonicalSteps:
    """Compare decode steps of every row count up to `largest` with verify passes.

    Raises:
        GateError: the verifier's own rows depend on the padding beside them.
    """
    draw = drawing.shared(scheduler)
    room = scheduler.token_to_kv_pool_allocator.available_size()
    largest = int(min(largest, verifier.most_rows, room))
    graphs = verifier.graph_sizes(largest)
    drawn = drawing.row_counts(draw, largest, execute.borders())
    counts = graphs or list(range(1, largest + 1))
    eager = drawn if graphs and invariant_attention.of(verifier.backend) else []
    rows = _made_up_rows(scheduler, max([verifier.rows, LEAST_ROWS, *counts, *eager]))
    with scratch_rows(verifier.runner, len(rows)):
        reference = _reference(verifier, rows)
        thorough = {*graphs, *drawn, *EAGER_COUNTS}
        found = [
            _agree(reference, _logits(verifier, rows, n, least=LEAST_ROWS if n in thorough else n))
            for n in counts
        ]
        found += [_agree(reference, _logits(verifier, rows, n, graph=False)) for n in eager]
    flags = agreed(scheduler, found)
    measured = dict(zip(counts, flags[: len(counts)], strict=True))
    steps = CanonicalSteps(
        measured, bool(graphs), dict(zip(eager, flags[len(counts) :], strict=True))
    )
    logger.info("margingate: decode steps are canonical at %s", steps)
    _log_drawn(drawn, [n for n, same in zip([*counts, *eager], flags, strict=True) if not same])
    return steps


def _log_drawn(drawn: list[int], other: list[int]) -> None:
    logger.info("margingate: row counts of decode drawn anew: %s", ", ".join(map(str, drawn)))
    if other:
        logger.warning(
            "margingate: decode steps of %s rows have other bits than verify passes: such steps "
            "are not taken to be canonical, and their rows are verified by margin.",
            ", ".join(map(str, sorted(set(other)))),
        )


def check_padding(verifier: Verifier, scheduler: Any) -> None:
    """Raises GateError where a verify pass depends on how many of its rows are padding."""
    rows = _made_up_rows(scheduler, max(verifier.rows, LEAST_ROWS))
    with scratch_rows(verifier.runner, len(rows)):
        _reference(verifier, rows)


def digest(verifier: Verifier, scheduler: Any) -> str:
    """Of the bits that a verify pass gives made-up rows, the same rows at each start."""
    rows = _made_up_rows(scheduler, verifier.rows)
    with scratch_rows(verifier.runner, len(rows)):
        logits = _logits(verifier, rows, verifier.rows, least=1)
    raw = logits.contiguous().view(torch.uint8)
    content: Any = raw.numpy()
    return hashlib.sha256(content).hexdigest()


def _reference(verifier: Verifier, rows: list[RowInput]) -> torch.Tensor:
    """What verify passes give, full and half full."""
    reference = _logits(verifier, rows, verifier.rows)
    padded = _logits(verifier, rows, max(verifier.rows // 2, 1), verifier.rows)
    if not _agree(reference, padded):
        size = ranks.tp_size(verifier.runner)
        summed = f", and --tp-size {size} sums in an order that depends on a row's place"
        raise GateError(
            f"--deterministic-gate found that a verify pass of {verifier.rows} rows depends on its "
            f"padding with this model{summed if size > 1 else ''}: choose other --gate-rows"
            f"{' or --tp-size 1' if size > 1 else ''}, or serve without the flag."
        )
    return reference


def _made_up_rows(scheduler: Any, count: int) -> list[RowInput]:
    """Rows of one request of random tokens."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(3, scheduler.model_config.vocab_size, (count,), generator=generator)
    return [RowInput(1, position, token) for position, token in enumerate(tokens.tolist())]


def _logits(
    verifier: Verifier,
    rows: list[RowInput],
    count: int,
    padded: int | None = None,
    *,
    graph: bool = True,
    least: int = LEAST_ROWS,
) -> torch.Tensor:
    """Logits of the first rows, decoded `count` at a time in order; on the CPU.

    Args:
        least: about so many rows, where `count` is less.
    """
    used = max(count, least // count * count)
    steps: Iterable[list[RowInput]] = (rows[i : i + count] for i in range(0, used, count))
    found = [
        verifier.forward(step, padded or len(step), graph=graph)[: len(step)].cpu()
        for step in steps
    ]
    return torch.cat(found)


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    shared = min(len(one), len(other))
    return torch.equal(one[:shared], other[:shared])
