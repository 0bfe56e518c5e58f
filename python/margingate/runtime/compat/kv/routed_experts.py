"""SGLang's record of the experts that each K/V column was computed with, by slot, on the host.

SGLang enters what its own forwards choose, and reads it as a request ends. A verify pass is a
forward that it does not know of: it rewrites columns, and so their experts are entered here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.runtime.compat.kv import columns


class ChosenExperts:
    """Those of some rows of one forward, on their way to the record."""

    def __init__(self, output: Any) -> None:
        """`output`: SGLang's, of slots [rows] and experts [rows, layers, experts of a token]."""
        self._output = output

    def to_cpu(self) -> list[torch.Tensor]:
        """Start copies from a GPU. Returns what must live until they have ended."""
        copied: list[torch.Tensor] = []

        def start(tensor: torch.Tensor) -> torch.Tensor:
            copied.append(tensor)
            return tensor.to("cpu", non_blocking=True)

        self._output.map_device_tensors(start)
        return copied

    def store(self) -> None:
        """Enter them; of two forwards that wrote a slot, the later one comes later here.

        Waits for the device, unless the copies were started and have ended.
        """
        self._output.map_device_tensors(torch.Tensor.cpu)
        self._output.finalize()


def _capturer() -> Any:
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    return get_global_experts_capturer()


def are_kept() -> bool:
    """Whether this process keeps them: with --enable-return-routed-experts, once it serves."""
    return _capturer() is not None


def of_last_forward(slots: torch.Tensor, first: int) -> ChosenExperts:
    """What the forward that ran last chose for its rows from `first` on. They must be kept.

    Args:
        slots: int64 [rows], that these rows wrote.
    """
    from sglang.srt.state_capturer.base import TopkCaptureOutput

    capturer = _capturer()
    rows = slice(first, first + len(slots))
    chosen = capturer.device_cache.buffer[rows, :, : capturer.topk_size].clone()
    return ChosenExperts(TopkCaptureOutput(slots, chosen, capturer.host_cache))


def keep(req: Any, tree: Any) -> None:
    """Let a request that ends have its experts, if it wants them, while it has its columns."""
    if not (are_kept() and req.return_routed_experts and columns.holds(req)):
        return
    req.routed_experts = _capturer().get_topk(
        req_pool_idx=columns.row(req),
        seqlen=len(req.origin_input_ids) + len(req.output_ids_through_stop),
        req_to_token_pool=tree.req_to_token_pool,
        start_len=req.routed_experts_start_len,
    )


def fit(req: Any) -> None:
    """As a request's end is sent: a row for each token that is sent, less the last one.

    Mutates the request: an abort may have cut its tokens to the settled ones. One that was aborted
    without columns has no rows.

    Raises:
        RuntimeError: there are other rows than tokens.
    """
    if not (are_kept() and req.return_routed_experts):
        return
    aborted = isinstance(req.finished_reason, FINISH_ABORT)
    if aborted and req.routed_experts is None:
        return
    tokens = len(req.origin_input_ids) + len(req.output_ids_through_stop)
    rows = max(tokens - 1 - req.routed_experts_start_len, 0)
    found = 0 if req.routed_experts is None else len(req.routed_experts)
    if found < rows or (found > rows and not aborted):
        raise RuntimeError(f"there are experts of {found} tokens, and {rows} were to be sent")
    if req.routed_experts is not None:
        req.routed_experts = req.routed_experts[:rows]


@contextmanager
def unrecorded() -> Iterator[None]:
    """Forwards meanwhile leave nothing, and may have more rows than SGLang has room for."""
    from sglang.srt.state_capturer.routed_experts import set_global_experts_capturer

    before = _capturer()
    set_global_experts_capturer(None)
    try:
        yield
    finally:
        set_global_experts_capturer(before)
