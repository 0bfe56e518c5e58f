"""Verify passes that ride in a decode step.

On the stock fast path a pass of V rows costs about what a decode step does, however few of its rows
are wanted: both read the whole model. So a pass that is due waits for the next decode step and
takes its place: one forward of V rows, the step's own first, then those to be verified. For these
nothing is different, as a row of a V-row forward does not depend on the others. The step's rows are
rows of the fast path as ever. A forward writes the columns of all its rows before it attends, so
they see the repaired ones.

With --gate-max-delay 0 nothing rides: flagged rows are verified at once. Else nothing waits for a
pass, under overlap scheduling either: the verdicts come with the step's results. Where they agree
they are entered at once; a flip is entered with nothing in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic as now
from typing import TYPE_CHECKING, Any

from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.model_runner import ModelRunnerOutput

from margingate.core.costs import has_room
from margingate.core.ledger import Row
from margingate.runtime import constraints, own_attention, state, verdicts
from margingate.runtime.verifier import RowResult
from margingate_kernels import Top2, softmax_top2

if TYPE_CHECKING:
    from margingate.runtime.controller import GateController

PATIENCE = 8  # batches that a due pass waits for a decode step; prompts may come first
IN_FLIGHT = 2  # tokens of a request, at most, that the CPU does not know of yet


@dataclass(slots=True)
class Ride:
    """A pass on its way; with the step's logits, as `logits_output.gate_ride`."""

    rows: tuple[Row, ...]
    due: str
    start: float  # request.now
    best: Top2  # of the rows with an input, by the verifier's logits
    on_device: Top2 | None = None  # what `best` is copied from

    def results(self) -> list[RowResult | None]:
        """Of each row, as `verdicts.by_row`; what they are read from is on the CPU by now."""
        pairs = zip(self.best.ids.tolist(), self.best.margin.tolist(), strict=True)
        return verdicts.by_row(self.rows, (RowResult(*pair, None) for pair in pairs))


class Rides:
    """The passes of one controller that ride, and those whose verdicts are to be entered."""

    def __init__(self, controller: GateController) -> None:
        self._controller = controller
        # Where steps are canonical there is hardly a pass.
        self.serves = controller.canonical is None and not controller.observes_only
        self.landed: list[tuple[Ride, list[RowResult | None]]] = []
        self.count = 0  # passes that rode
        self._due_since: int | None = None

    def expected(self, due: str | None) -> bool:
        """Whether what is due now, if anything is, will soon be carried by a decode step."""
        controller = self._controller
        running = controller.scheduler.running_batch
        if (
            due is None
            or not self.serves
            or all(controller.is_held(req) for req in running.reqs)
            or not self._room(running.reqs)
        ):
            self._due_since = None
            return False
        if self._due_since is None:
            self._due_since = controller.step
        return controller.step - self._due_since <= PATIENCE

    def board(self, batch: Any) -> tuple[tuple[Row, ...], str] | None:
        """The rows that this decode forward is to carry, and why; None if no pass is due."""
        controller = self._controller
        if not self.serves or not batch.forward_mode.is_decode():
            return None
        due = controller.queue.due(controller.ledger, controller.step, idle=False)
        room = 0 if due is None else self._room(controller.scheduler.running_batch.reqs)
        room = min(room, controller.verifier.rows - batch.batch_size)
        if due is None or room <= 0:
            return None
        self._due_since = None
        self.count += 1
        return controller.queue.next_batch(controller.ledger, room), due

    def land(self, result: Any) -> None:
        """A step's results are in: enter the verdicts it carried, unless one takes tokens back.

        Behind verdicts that wait for their moment, the next ones wait too.
        """
        ride: Ride | None = getattr(getattr(result, "logits_output", None), "gate_ride", None)
        if ride is None:
            return
        results = ride.results()
        pairs = zip(ride.rows, results, strict=True)
        waiting = bool(self.landed)
        self.landed.append((ride, results))
        if not waiting and all(
            verdicts.matches(self._controller, row, each) for row, each in pairs
        ):
            self.enter()

    def enter(self) -> None:
        """Enter the verdicts that came. Nothing may be in flight if one of them is a flip."""
        landed, self.landed = self.landed, []
        for ride, results in landed:
            verdicts.enter(self._controller, ride.rows, results, ride.start, ride.due)

    def _room(self, decoding: list[Any]) -> int:
        """Rows of a pass that a step of these requests has room for; 0 where it should not wait
        for one.
        """
        controller = self._controller
        rows = controller.verifier.rows
        if not controller.queue.max_delay or not has_room(len(decoding), rows):
            return 0
        # What the CPU would have to wait for is verified in a pass of its own.
        waiting = [controller.requests[key] for key in controller.queue.waiting(controller.ledger)]
        if any(
            req.return_logprob or req.gate.draw is not None or constraints.constrained(req)
            for req in waiting
        ):
            return 0
        alone, room = rows, rows - len(decoding)
        own = own_attention.of(controller.verifier.backend)
        if own is not None:  # its forwards have room for so many keys
            longest = max(map(_most_keys, waiting), default=1)
            alone = min(alone, own.room // longest)
            room = min(room, (own.room - sum(map(_most_keys, decoding))) // longest)
        return room if 2 * room >= alone else 0


def _most_keys(req: Any) -> int:
    """Keys that a row of this request may see; tokens whose results are in flight come on top."""
    return len(req.origin_input_ids) + len(req.output_ids) + IN_FLIGHT


def forward(original: Any, runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ModelRunner._forward_raw: a decode step that carries a pass."""
    controller = state.active()
    boarded = None if controller is None else controller.rides.board(batch)
    if controller is None or boarded is None:
        return original(runner, batch, *args, **kwargs)
    start = now()
    rows, due = boarded
    inputs = verdicts.inputs_of(controller, rows)
    verifier = controller.verifier
    logits = verifier.forward(inputs, verifier.rows, beside=batch)
    first, last = batch.batch_size, batch.batch_size + len(inputs)
    best = softmax_top2(logits[first:last])
    output = LogitsProcessorOutput(next_token_logits=logits[:first])
    output.gate_ride = Ride(rows, due, start, best)
    return ModelRunnerOutput(logits_output=output, can_run_graph=verifier.has_graphs)
