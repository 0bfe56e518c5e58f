"""Taking a request back to the row whose token flipped: in place, without a new prefill."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import torch

from margingate.runtime.request.record import logprob_lists
from margingate.runtime.verify.verifier import RowResult


def to_row(scheduler: Any, batches: Iterable[Any], req: Any, row: int, result: RowResult) -> bool:
    """Make `row` (from 1) the request's last output token, with the verifier's token.

    Frees the slots behind it, corrects lengths, log-probs and what the next decode step reads; what
    constrains the next row is the caller's. Mutates `req`, the page table's allocator, the token
    relay and the request's row in `batches`, each of which is there once.
    Returns whether any of the batches holds the request.
    """
    columns = len(req.origin_input_ids) + row - 1  # the new last token has no column yet
    _free_columns(scheduler, req, columns)
    req.decode_batch_idx -= len(req.output_ids) - row
    req.output_ids = array("q", [*req.output_ids[: row - 1], result.token])
    req.full_untruncated_fill_ids = array("q")  # SGLang rebuilds it from the parts
    req.finished_reason = req.finished_len = None
    _cut_logprobs(req, row, result)
    recount_reasoning(scheduler, req)
    scheduler.future_map.output_tokens_buf[req.req_pool_idx] = result.token
    return _set_length(batches, req, columns)


def _free_columns(scheduler: Any, req: Any, columns: int) -> None:
    """Free the slots of positions from `columns` on."""
    end = req.kv.kv_allocated_len
    if columns < end:
        slots = scheduler.req_to_token_pool.req_to_token[req.req_pool_idx, columns:end]
        scheduler.token_to_kv_pool_allocator.free_segment(slots, start_pos=columns)
    req.kv_committed_len = req.kv.kv_allocated_len = columns


def drop_last_column(scheduler: Any, req: Any) -> None:
    """Free the column of a row whose token is not wanted, of a request that leaves its batch."""
    _free_columns(scheduler, req, req.kv.kv_allocated_len - 1)
    req.decode_batch_idx -= 1


def _set_length(batches: Iterable[Any], req: Any, columns: int) -> bool:
    """Set the sequence length of the request's row; new tensors, never written in place."""
    found = False
    for batch in batches:
        index = next((i for i, other in enumerate(batch.reqs) if other is req), None)
        if index is None:
            continue
        found = True
        for name in ("seq_lens", "seq_lens_cpu", "orig_seq_lens"):
            lengths = getattr(batch, name).clone()
            lengths[index] = columns
            setattr(batch, name, lengths)
        batch.seq_lens_sum = None
    return found


def _cut_logprobs(req: Any, row: int, result: RowResult) -> None:
    for values in logprob_lists(req).values():
        del values[row:]
    replace_logprobs(req, row, result)


def replace_logprobs(req: Any, row: int, result: RowResult) -> None:
    """Put the canonical log-probs of a verified row in place of the fast path's."""
    if not req.return_logprob:
        return
    kept = req.logprob
    kept.output_token_logprobs_idx[row - 1] = result.token
    found = result.logprobs
    if found is None:
        return
    kept.output_token_logprobs_val[row - 1] = found.token
    if found.top is not None:
        kept.output_top_logprobs_val[row - 1], kept.output_top_logprobs_idx[row - 1] = found.top
    if found.ids is not None:
        kept.output_token_ids_logprobs_val[row - 1] = found.ids


def recount_reasoning(scheduler: Any, req: Any) -> None:
    """After the output was changed: the tokens of its reasoning, for `usage`."""
    if not req.require_reasoning:
        return
    req.reasoning_tokens, req._is_reasoning_over, req._think_end_match_len = 0, False, 0
    if ends := scheduler.model_config.think_end_ids:
        req.update_reasoning_tokens(list(req.output_ids), ends)


def rejoin(scheduler: Any, running: Any, reqs: list[Any]) -> Any:
    """Put requests that own their columns, and are in no batch, back to decoding.

    Returns the batch to run: `running` with the requests merged in, or a new one.
    """
    batch = scheduler._build_hisparse_decode_batch(reqs)
    batch.multimodal_inputs = [None] * len(reqs)
    if batch.return_logprob:
        batch.token_ids_logprobs = [req.logprob.token_ids_logprob for req in reqs]
    if running.is_empty():
        return batch
    running.merge_batch(batch)
    return running


def extend_columns(scheduler: Any, req: Any, count: int) -> bool:
    """Give the request slots for `count` more positions behind those it has.

    Evicts from the radix tree if need be; returns False, changing nothing else, if that is not
    enough.
    """
    from sglang.srt.mem_cache.common import evict_from_tree_cache

    evict_from_tree_cache(scheduler.tree_cache, count)
    slots: torch.Tensor | None = scheduler.token_to_kv_pool_allocator.alloc(count)
    if slots is None:
        return False
    start = req.kv.kv_allocated_len
    target = (req.req_pool_idx, slice(start, start + count))
    scheduler.req_to_token_pool.write(target, slots.to(torch.int32))
    req.kv_committed_len = req.kv.kv_allocated_len = start + count
    return True


def set_running_tail(scheduler: Any, batches: Iterable[Any], req: Any) -> None:
    """Make the next decode step of `req` continue from its last output token."""
    scheduler.future_map.output_tokens_buf[req.req_pool_idx] = req.output_ids[-1]
    _set_length(batches, req, req.kv.kv_allocated_len)
