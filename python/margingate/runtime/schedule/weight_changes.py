"""Around what replaces the weights of a running server, in whatever way and however it is paused.

What waits is settled by the weights that emitted it. Then columns and answers belong to the next
generation: the radix tree is parted, and a request that holds columns is one of both.
"""

from __future__ import annotations

from typing import Any

from margingate.runtime.compat import columns, weights
from margingate.runtime.observe import weight_updates
from margingate.runtime.schedule.controller import GateController
from margingate.runtime.schedule.radix import GateRadixCache


def around(gate: GateController, original: Any, manager: Any, received: Any) -> Any:
    """AROUND what replaces weights in SchedulerWeightUpdaterManager, failures included."""
    if weight_updates.looks_only(received):
        return original(manager, received)
    gate.verify_everything()
    refused = weight_updates.refusal(gate.scheduler, received)
    if refused is not None:
        return refused
    try:
        return original(manager, received)
    finally:
        _changed(gate)


def _changed(gate: GateController) -> None:
    """The weights may be others now."""
    updating = weights.session_is_open(gate.scheduler)
    if not gate.fingerprint.weights_changed(updating=updating):
        return
    generation = gate.fingerprint.generation
    for req in _with_columns(gate):
        req.gate.crosses(generation, len(req.output_ids))
    if isinstance(tree := gate.scheduler.tree_cache, GateRadixCache):
        tree.part(generation)


def _with_columns(gate: GateController) -> list[Any]:
    """The requests that hold columns and compute on with them."""
    scheduler, requests = gate.scheduler, gate.requests
    batches = (scheduler.running_batch, scheduler.last_batch, *gate.in_flight.batches())
    found = [req for batch in batches if batch is not None for req in batch.reqs]
    found += [*requests.held, *requests.rejoining]
    if scheduler.chunked_req is not None:
        found.append(scheduler.chunked_req)
    once = {id(req): req for req in found}.values()
    return [req for req in once if columns.holds(req) and getattr(req, "gate", None) is not None]


def begun(gate: GateController, adder: Any, req: Any) -> None:
    """If `req` was just admitted to a prefill: its columns are of the weights in memory."""
    if not adder.can_run_list or adder.can_run_list[-1] is not req:
        return
    record = req.gate
    tokens = req.output_ids if record.kept is None else record.kept.tokens
    record.begins(gate.fingerprint.admit(), len(tokens))


def relabelled(gate: GateController, label: str | None) -> None:
    """SGLang's label of the weights is about to change: it notes that of the requests in its
    batches and its queue, by their output. What the gate keeps apart is noted here.
    """
    if not weights.is_another(label):
        return
    for req in gate.requests:
        if req.gate.kept is not None:
            weights.note_version(req, len(req.gate.kept.tokens))
    for req in (*gate.requests.held, *gate.requests.rejoining):
        weights.note_version(req, len(req.output_ids))
