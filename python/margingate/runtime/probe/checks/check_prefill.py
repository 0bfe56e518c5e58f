"""How gated prompts may be prefilled: measured on the whole model, before the first request.

Where attention and linear layers give a row the same bits in a forward of any size, prompts need
not be prefilled alone on a grid. That is looked for on made-up prompts: one alone, beside others,
in chunks cut elsewhere, and its last rows once more as decode rows of a verify pass. What agrees in
all of its K/V columns and in its logits holds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from margingate.runtime.attention import layer_rules
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.kv import columns
from margingate.runtime.compat.process.ranks import agreed
from margingate.runtime.probe.checks import drawing
from margingate.runtime.probe.measuring.classes import SEED
from margingate.runtime.probe.planning import execute
from margingate.runtime.verify import rollback
from margingate.runtime.verify.internal_prefill import extend, internal_request, release, stored
from margingate.runtime.verify.verifier import RowInput, Verifier

logger = logging.getLogger(__name__)

LONGEST = 900  # tokens of the prompt that is compared, where no layer has a wider window
BEHIND = 200  # tokens more than the widest window has


@dataclass(frozen=True)
class Prefill:
    """What a gated prompt's columns depend on besides its tokens: nothing, where `together`."""

    together: bool = False  # prompts may share a forward, and be cut and cached anywhere
    as_decoded: bool = False  # decoded columns have the same bits

    def record(self) -> dict[str, bool]:
        """For `/server_info` and the fingerprint."""
        return asdict(self)


def measure(scheduler: Any, verifier: Verifier, wanted: bool) -> Prefill:
    """Compare prefills of the same prompt; alone on the grid where they are not `wanted`."""
    if not agreed(scheduler, [wanted and execute.covers_prefill()])[0]:
        logger.info(
            "margingate: gated prompts are prefilled alone, %s.",
            "since operators are not measured for prefills here"
            if wanted
            else "as --gate-prefill or --gate-fast-path has it",
        )
        return Prefill()
    check = _Check(scheduler, verifier)
    # All of them, whatever the first says: ranks must run the same forwards.
    seen = [check.beside_others(), check.in_the_largest(), check.in_chunks(), check.drawn()]
    # Its few rows need not show what more rows of a layer were measured to have.
    decoded = check.decoded() and not execute.some_differ_in_prefill()
    *together, decoded = agreed(scheduler, [*seen, decoded])
    found = Prefill(all(together), all(together) and decoded)
    logger.info(
        "margingate: gated prompts are prefilled %s; decoded columns have %s bits.",
        "together"
        if found.together
        else "alone, since their bits depend on what shares the forward",
        "the same" if found.as_decoded else "other (or it was not asked)",
    )
    return found


class _Check:
    """The prompt, and what it gives alone and in one."""

    def __init__(self, scheduler: Any, verifier: Verifier) -> None:
        self._scheduler, self._verifier = scheduler, verifier
        args = settings.view(scheduler.server_args)
        chunk = args.chunked_prefill_size or -1
        self._most = chunk if chunk > 0 else args.max_prefill_tokens  # rows of a forward
        room = min(self._most, scheduler.max_req_len)
        windows = layer_rules.windows_of(scheduler.tp_worker.model_runner.model)
        longest = max([LONGEST, *(window + BEHIND for window in windows)])
        self._length = max(min(longest, room * 2 // 3 - 4), 8)  # and the others fit beside it
        generator = torch.Generator().manual_seed(SEED)
        vocabulary = scheduler.model_config.vocab_size
        tokens = torch.randint(3, vocabulary, (3, self._length), generator=generator).tolist()
        self._prompt, self._other, self._third = tokens
        self._alone = self._prefill([(0, self._length)])

    def beside_others(self) -> bool:
        """Whether the prompt has the same bits between two others in one forward."""
        length = self._length
        reqs = [
            internal_request("margingate-other", self._other[: length // 3]),
            internal_request("margingate-prompt", self._prompt),
            internal_request("margingate-third", self._third[:5]),
        ]
        return self._agrees_among(reqs, 1)

    def in_the_largest(self) -> bool:
        """Whether it has them at the end of a forward with as many rows as one may hold."""
        reqs = self._company(self._room - self._length)
        reqs.append(internal_request("margingate-last", self._prompt))
        return self._agrees_among(reqs, -1)

    def drawn(self) -> bool:
        """Whether it has them in forwards with row counts that this start draws, part by part."""
        draw = drawing.shared(self._scheduler)
        wrong = []
        counts = drawing.row_counts(draw, self._room, execute.borders())
        for count in counts:
            cut = self._length - draw.randint(1, min(count, self._length))
            if not self._agrees_within(count, cut):
                wrong.append(count)
        logger.info("margingate: row counts of prefill drawn anew: %s", ", ".join(map(str, counts)))
        if wrong:
            logger.warning(
                "margingate: a prefill forward of %s rows gives a prompt other bits than it has "
                "alone: gated prompts are prefilled one at a time.",
                ", ".join(map(str, wrong)),
            )
        return not wrong

    @property
    def _room(self) -> int:
        """The most rows of a forward for which there are slots now."""
        slots = self._scheduler.token_to_kv_pool_allocator.available_size()
        return int(max(min(self._most, slots - 1), self._length))

    def _company(self, rows: int) -> list[Any]:
        """Requests with so many rows, as far as requests may be long and there is room for them."""
        length = self._length
        longest = max(min(self._most, self._scheduler.max_req_len), 1)
        sizes = [min(longest, rows - start) for start in range(0, max(rows, 0), longest)]
        sizes = sizes[: self._scheduler.req_to_token_pool.available_size() - 1]
        return [
            internal_request(f"margingate-row-{i}", (self._other * (size // length + 1))[:size])
            for i, size in enumerate(sizes)
        ]

    def _agrees_within(self, count: int, cut: int) -> bool:
        """Whether the rows from `cut` on have their bits at the end of a forward of `count`."""
        req = internal_request("margingate-drawn", self._prompt)
        reqs = [req]
        try:
            if cut:
                extend(self._scheduler, [(req, 0, cut)])
            reqs = [*self._company(min(count, self._room) - (self._length - cut)), req]
            whole = [(each, 0, len(each.full_untruncated_fill_ids)) for each in reqs[:-1]]
            logits = extend(self._scheduler, [*whole, (req, cut, self._length)])
            return self._agrees(logits[-1], self._columns(req))
        finally:
            for each in reqs:
                release(self._scheduler, each)

    def in_chunks(self) -> bool:
        """Whether it has them when it is cut at other places, and one row is left for the end."""
        length = self._length
        cuts = {0, length // 9, length // 2, length - 1, length}  # none twice if it is short
        return self._agrees(*self._prefill(list(pairwise(sorted(cuts)))))

    def decoded(self) -> bool:
        """Whether its last rows have them as decode rows behind a prefill of the rest."""
        count = min(self._verifier.rows, self._length // 2)
        start = self._length - count
        req = internal_request("margingate-decoded", self._prompt[:start])
        try:
            extend(self._scheduler, [(req, 0, start)])
            if not rollback.extend_columns(self._scheduler, req, count):
                return False
            rows = [
                RowInput(columns.row(req), start + i, token)
                for i, token in enumerate(self._prompt[start:])
            ]
            for some in self._verifier.that_fit(rows):
                logits = self._verifier.forward(some, self._verifier.rows)[len(some) - 1]
            return self._agrees(logits, self._columns(req))
        finally:
            release(self._scheduler, req)

    def _agrees_among(self, reqs: Sequence[Any], at: int) -> bool:
        """Whether the request at this place has the bits of the prompt alone, in one forward."""
        whole = [(req, 0, len(req.full_untruncated_fill_ids)) for req in reqs]
        try:
            logits = extend(self._scheduler, whole)
            return self._agrees(logits[at], self._columns(reqs[at]))
        finally:
            for req in reqs:
                release(self._scheduler, req)

    def _prefill(self, cuts: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits of the last row and the columns by layer, prefilled alone in these pieces."""
        req = internal_request("margingate-alone", self._prompt)
        try:
            for start, end in cuts:
                logits = extend(self._scheduler, [(req, start, end)])
            return logits[0].clone(), self._columns(req)
        finally:
            release(self._scheduler, req)

    def _columns(self, req: Any) -> list[torch.Tensor]:
        return stored(self._scheduler, req, self._length)

    def _agrees(self, logits: torch.Tensor, columns: list[torch.Tensor]) -> bool:
        pairs = zip(columns, self._alone[1], strict=True)
        return torch.equal(logits, self._alone[0]) and all(torch.equal(*pair) for pair in pairs)
