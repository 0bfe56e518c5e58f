"""Verify passes that are merged into a decode step.

On the stock fast path a pass of V rows costs about what a decode step does, however few of its rows
are wanted: both read the whole model. So a pass that is due waits for the next decode step and
takes its place: one forward of V rows, the step's own first, then those to be verified. For these
nothing is different, as a row of a V-row forward does not depend on the others. The step's rows are
rows of the fast path as ever. A forward writes the columns of all its rows before it attends, so
they see the repaired ones.

With --gate-max-delay 0 none is merged: flagged rows are verified at once. Else nothing waits for a
pass, under overlap scheduling either: the verdicts come with the step's results. Where they agree
they are entered at once; a flip is entered with nothing in flight.
"""

from __future__ import annotations

from time import monotonic as now
from typing import Any

from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.model_runner import ModelRunnerOutput

from margingate.core.costs import has_room
from margingate.core.ledger import Row
from margingate.runtime.attention import invariant_attention
from margingate.runtime.request.forward_record import MergedPass, record_of, record_on
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.sampling import constraints
from margingate.runtime.verify.passes import Passes, by_row
from margingate.runtime.verify.verifier import RowResult, Verifier
from margingate_kernels import softmax_top2

PATIENCE = 8  # batches that a due pass waits for a decode step; prompts may come first
IN_FLIGHT = 2  # tokens of a request, at most, that the CPU does not know of yet


def results_of(merged: MergedPass) -> list[RowResult | None]:
    """Of each row, as `passes.by_row`; what they are read from is on the CPU by now."""
    pairs = zip(merged.best.ids.tolist(), merged.best.margin.tolist(), strict=True)
    return by_row(merged.rows, (RowResult(*pair, None) for pair in pairs))


class MergedPasses:
    """The passes of one scheduler that are merged, and those whose verdicts are to be entered."""

    def __init__(
        self,
        scheduler: Any,
        requests: OpenRequests,
        passes: Passes,
        verifier: Verifier,
        *,
        serves: bool,
    ) -> None:
        """`serves`: whether any is. On the invariant path too few rows are flagged for that."""
        self._scheduler, self._requests = scheduler, requests
        self._passes, self._verifier = passes, verifier
        self.serves = serves
        self.waiting: list[tuple[MergedPass, list[RowResult | None]]] = []
        self.count = 0  # passes that were merged
        self._due_since: int | None = None

    def note_due(self, due: str | None) -> None:
        """What is due now, if anything is: counts how long it waits for a step to carry it."""
        if due is None or not self._may_wait():
            self._due_since = None
        elif self._due_since is None:
            self._due_since = self._requests.step

    def will_merge(self) -> bool:
        """Whether a decode step will soon carry what was noted as due."""
        since = self._due_since
        return since is not None and self._requests.step - since <= PATIENCE

    def _may_wait(self) -> bool:
        if not self.serves:
            return False
        decoding = self._scheduler.running_batch.reqs
        return not all(map(self._requests.is_held, decoding)) and self._room(decoding) > 0

    def take_rows(self, batch: Any) -> tuple[tuple[Row, ...], str] | None:
        """The rows that this decode forward is to carry, and why; None if no pass is due."""
        if not self.serves or not batch.forward_mode.is_decode():
            return None
        due = self._requests.due(idle=False)
        room = 0 if due is None else self._room(self._scheduler.running_batch.reqs)
        room = min(room, self._verifier.rows - batch.batch_size)
        if due is None or room <= 0:
            return None
        self._due_since = None
        self.count += 1
        return self._requests.next_batch(room), due

    def forward(self, original: Any, runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """AROUND ModelRunner._forward_raw: a decode step that carries a pass."""
        taken = self.take_rows(batch)
        if taken is None:
            return original(runner, batch, *args, **kwargs)
        rows, due = taken
        try:
            return self._merged(batch, rows, due)
        except Exception as error:
            self._passes.failed(rows, error)
            return original(runner, batch, *args, **kwargs)

    def _merged(self, batch: Any, taken: tuple[Row, ...], due: str) -> ModelRunnerOutput:
        """What SGLang's forward of `batch` would return; verdicts on `taken` come with it."""
        start = now()
        rows, inputs = self._passes.inputs_of(taken)
        verifier = self._verifier
        logits = verifier.forward(inputs, verifier.rows, beside=batch)
        first, last = batch.batch_size, batch.batch_size + len(inputs)
        best = softmax_top2(logits[first:last])
        output = LogitsProcessorOutput(next_token_logits=logits[:first])
        experts = verifier.experts_of(inputs, first)
        record_on(output).merged = MergedPass(rows, due, start, best, experts)
        return ModelRunnerOutput(logits_output=output, can_run_graph=verifier.has_graphs)

    def process_results(self, result: Any) -> None:
        """A step's results are in: enter the verdicts it carried, unless one takes tokens back.

        Behind verdicts that wait for their moment, the next ones wait too.
        """
        record = record_of(result)
        if record is None or record.merged is None:
            return
        if record.merged.experts is not None:  # their columns are written, whatever the verdicts
            record.merged.experts.store()
        results = results_of(record.merged)
        pairs = zip(record.merged.rows, results, strict=True)
        behind = bool(self.waiting)
        self.waiting.append((record.merged, results))
        if not behind and all(self._passes.matches(row, each) for row, each in pairs):
            self.enter()

    def put_back(self, result: Any) -> None:
        """Something raised as a step's results were processed: the rows that it carried are to be
        verified anew, but for those whose verdicts were entered or wait for that.
        """
        record = record_of(result)
        carried = None if record is None else record.merged
        if carried is None or any(carried is merged for merged, _ in self.waiting):
            return
        requests = self._requests
        for row in {row.rid: row for row in carried.rows}.values():
            if requests.of_row(row) is not None and requests.is_current(row):
                requests.put_back(row.rid)

    def enter(self) -> None:
        """Enter the verdicts that came. Nothing may be in flight if one of them is a flip."""
        waiting, self.waiting = self.waiting, []
        for merged, results in waiting:
            self._passes.enter(merged.rows, results, merged.start, merged.due)

    def _room(self, decoding: list[Any]) -> int:
        """Rows of a pass that a step of these requests has room for; 0 where it should not wait
        for one.
        """
        rows = self._verifier.rows
        if not self._requests.queue.max_delay or not has_room(len(decoding), rows):
            return 0
        # What the CPU would have to wait for is verified in a pass of its own.
        waiting = self._requests.waiting()
        if any(
            req.return_logprob or req.gate.draw is not None or constraints.constrained(req)
            for req in waiting
        ):
            return 0
        alone, room = rows, rows - len(decoding)
        own = invariant_attention.of(self._verifier.backend)
        if own is not None:  # its forwards have room for so many keys
            longest = max(map(_most_keys, waiting), default=1)
            alone = min(alone, own.room // longest)
            room = min(room, (own.room - sum(map(_most_keys, decoding))) // longest)
        return room if 2 * room >= alone else 0


def _most_keys(req: Any) -> int:
    """Keys that a row of this request may see; tokens whose results are in flight come on top."""
    return len(req.origin_input_ids) + len(req.output_ids) + IN_FLIGHT
