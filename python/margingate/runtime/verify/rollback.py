"""Taking a request back to the row whose token flipped: in place, without a new prefill."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import torch

from margingate.runtime.compat.kv import columns, tree
from margingate.runtime.compat.model import weights
from margingate.runtime.request.record import logprob_lists
from margingate.runtime.verify.verifier import RowResult


def to_row(scheduler: Any, batches: Iterable[Any], req: Any, row: int, result: RowResult) -> bool:
    """Make `row` (from 1) the request's last output token, with the verifier's token.

    Frees the slots behind it, corrects lengths, log-probs and what the next decode step reads; what
    constrains the next row is the caller's. Mutates `req`, the page table's allocator, the token
    relay and the request's row in `batches`, each of which is there once.
    Returns whether any of the batches holds the request.
    """
    count = len(req.origin_input_ids) + row - 1  # the new last token has no column yet
    _free_columns(scheduler, req, count)
    req.decode_batch_idx -= len(req.output_ids) - row
    req.output_ids = array("q", [*req.output_ids[: row - 1], result.token])
    req.full_untruncated_fill_ids = array("q")  # SGLang rebuilds it from the parts
    req.finished_reason = req.finished_len = None
    weights.forget_versions(req, row - 1)
    _cut_logprobs(req, row, result)
    recount_reasoning(scheduler, req)
    scheduler.future_map.output_tokens_buf[columns.row(req)] = result.token
    return _set_length(batches, req, count)


def _free_columns(scheduler: Any, req: Any, count: int) -> None:
    """Free the slots of positions from `count` on."""
    end = columns.allocated(req)
    if count < end:
        slots = scheduler.req_to_token_pool.req_to_token[columns.row(req), count:end]
        scheduler.token_to_kv_pool_allocator.free_segment(slots, start_pos=count)
    columns.set_columns(req, count)


def drop_last_column(scheduler: Any, req: Any) -> None:
    """Free the column of a row whose token is not wanted, of a request that leaves its batch."""
    _free_columns(scheduler, req, columns.allocated(req) - 1)
    req.decode_batch_idx -= 1


def _set_length(batches: Iterable[Any], req: Any, count: int) -> bool:
    """Set the sequence length of the request's row; new tensors, never written in place."""
    found = False
    for batch in batches:
        index = next((i for i, other in enumerate(batch.reqs) if other is req), None)
        if index is None:
            continue
        found = True
        for name in ("seq_lens", "seq_lens_cpu", "orig_seq_lens"):
            lengths = getattr(batch, name).clone()
            lengths[index] = count
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
    """After the output was changed: the tokens of its reasoning, for `usage`.

    SGLang counts: by the request's own end of reasoning, or by what the model opens itself.
    """
    req.reasoning_tokens, req._is_reasoning_over = 0, False
    req._think_end_match_len = req._think_start_match_len = 0
    counter = scheduler.batch_result_processor
    counter._maybe_update_reasoning_tokens(req, list(req.output_ids))


def rejoin(scheduler: Any, running: Any, reqs: list[Any]) -> Any:
    """Put requests that own their columns, and are in no batch, back to decoding.

    Returns the batch to run: `running` with the requests merged in, or a new one.
    """
    batch = scheduler._build_hisparse_decode_batch(reqs)
    batch.multimodal_inputs = [req.multimodal_inputs for req in reqs]
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
    tree.evict(scheduler.tree_cache, count)
    slots: torch.Tensor | None = scheduler.token_to_kv_pool_allocator.alloc(count)
    if slots is None:
        return False
    start = columns.allocated(req)
    target = (columns.row(req), slice(start, start + count))
    scheduler.req_to_token_pool.write(target, slots.to(torch.int32))
    columns.set_columns(req, start + count)
    return True


def set_running_tail(scheduler: Any, batches: Iterable[Any], req: Any) -> None:
    """Make the next decode step of `req` continue from its last output token."""
    scheduler.future_map.output_tokens_buf[columns.row(req)] = req.output_ids[-1]
    _set_length(batches, req, columns.allocated(req))
