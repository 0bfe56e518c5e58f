"""Which requests the next batch may hold: none that waits for its end, all that rejoined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from margingate.runtime import ends, guard, rollback
from margingate.runtime.radix import is_gated

if TYPE_CHECKING:
    from margingate.runtime.controller import GateController


REAP_EVERY = 64  # batches


def next_batch(controller: GateController, original: Any, running: Any, last: Any) -> Any:
    """AROUND Scheduler.get_next_batch_to_run: batches hold only what may decode on."""
    controller.in_flight.bring_in_prefill()
    if controller.step % REAP_EVERY == 0:
        ends.reap_dropped(controller)
    if controller.in_flight.overlaps and (controller.waits() or _any_kept(last)):
        controller.in_flight.bring_in()
        controller.settle(last, list(controller.requests.values()))
    if controller.failed:
        controller.in_flight.bring_in()
        ends.end_failed(controller)
    if controller.held:
        for batch in (running, last):
            if batch is not None and batch.reqs:
                _eject(controller, batch)
        if _memory_is_short(controller, running):
            controller.settle_all()
    if controller.rejoining:
        reqs, controller.rejoining = controller.rejoining, []
        running = rollback.rejoin(controller.scheduler, running, reqs)
    plan = original(controller.scheduler, running_batch=running, last_batch=last)
    if plan.batch_to_run is not None and plan.batch_to_run.forward_mode.is_extend():
        controller.penalties.admit(plan.batch_to_run)
    if plan.batch_to_run is None and (controller.held or controller.queue_waits()):
        controller.settle_all()  # nobody will join them: verify now, decode on in the next turn
    guard.tell(controller.observers, "turned")
    return plan


def _any_kept(batch: Any) -> bool:
    """Whether a request in `batch` was retracted and waits for its output to be given back."""
    return batch is not None and any(is_gated(r) and r.gate.kept is not None for r in batch.reqs)


def _eject(controller: GateController, batch: Any) -> None:
    stay = [i for i, req in enumerate(batch.reqs) if not controller.is_held(req)]
    if len(stay) < len(batch.reqs):
        batch.filter_batch(keep_indices=stay)
        batch.batch_is_full = False


def _memory_is_short(controller: GateController, running: Any) -> bool:
    """Whether SGLang would soon retract requests for columns that held ones could free."""
    tree = controller.scheduler.tree_cache
    free = controller.scheduler.token_to_kv_pool_allocator.available_size()
    return free + tree.evictable_size() < 2 * len(running.reqs)
