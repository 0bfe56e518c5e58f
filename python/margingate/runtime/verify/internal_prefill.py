"""Prefill forwards that no client asked for: for the check at start, and for audits."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.managers.overlap_utils import resolve_forward_inputs
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.sampling.sampling_params import SamplingParams

from margingate.runtime.compat.compute.forward import fence
from margingate.runtime.compat.kv import columns, tree, window_pool
from margingate.runtime.request.record import GateRequest


def internal_request(name: str, prompt: Sequence[int], images: Any = None) -> Any:
    """A request that no queue, client or counter knows of; it carries the prompt.

    Args:
        images: SGLang's MultimodalInputs; None: the prompt is text.
    """
    params = SamplingParams(temperature=0, max_new_tokens=1)
    req = Req(name, "", array("q", prompt), params)
    req.gate = GateRequest(req.rid, True)  # gated, so that its columns are freed as such
    req.full_untruncated_fill_ids = array("q", prompt)
    req.multimodal_inputs = images
    return req


def extend(scheduler: Any, parts: Sequence[tuple[Any, int, int]]) -> torch.Tensor:
    """One prefill forward by SGLang's own means.

    Args:
        parts: internal requests, each with the positions from and up to which it is prefilled;
            what is before was prefilled earlier.

    Returns:
        The logits [parts, vocab] of each one's last row; perhaps a view that the next forward
        overwrites.
    """
    for req, start, end in parts:
        columns.set_extend(req, start, end)
    batch = ScheduleBatch.init_new(
        [req for req, _, _ in parts],
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        scheduler.enable_overlap,
        scheduler.spec_algorithm,
    )
    batch.prepare_for_extend()
    resolve_forward_inputs(batch, scheduler.future_map)
    # "Verify" leaves the sampler out.
    result = scheduler.tp_worker.forward_batch_generation(batch, is_verify=True)
    fence(scheduler.tp_worker.model_runner)
    logits: torch.Tensor = result.logits_output.next_token_logits
    return logits


def release(scheduler: Any, req: Any) -> None:
    """Free an internal request's slots, if it has any."""
    tree.release(req, scheduler.tree_cache, checkpoint=False)


def stored(scheduler: Any, req: Any, length: int) -> list[torch.Tensor]:
    """Copies of an internal request's first `length` columns, keys and values, layer by layer."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    slots = scheduler.req_to_token_pool.req_to_token[columns.row(req), :length].to(torch.int64)
    layers = range(pool.start_layer, pool.start_layer + pool.layer_num)
    return [
        part[window_pool.slots_in(pool, i, slots)] for i in layers for part in pool.get_kv_buffer(i)
    ]
