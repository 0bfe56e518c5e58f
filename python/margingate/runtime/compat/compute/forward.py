"""Forwards that SGLang's scheduler did not ask for: batch, context, graphs, and what one leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from margingate.runtime.compat import release
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.model import vision

_forward_context = release.of_release("forward_context", forward_context)


class DecodeRows(NamedTuple):
    """The rows of a decode forward, int64 [rows] on the device, lengths on the CPU."""

    pool: torch.Tensor  # of the page table
    positions: torch.Tensor  # of the input tokens
    rotary: torch.Tensor  # those that they are rotated by, which images shift
    tokens: torch.Tensor  # the input tokens' ids
    slots: torch.Tensor  # that are written
    seq_lens_cpu: torch.Tensor  # positions + 1

    def behind(self, other: ForwardBatch) -> DecodeRows:
        """These rows after those of a decode batch of SGLang's."""
        known = other.seq_lens_cpu
        lengths = other.seq_lens.cpu() if known is None else known
        firsts = (
            *(other.req_pool_indices, other.positions, other.positions, other.input_ids),
            *(other.out_cache_loc, lengths),
        )
        pairs = zip(firsts, self, strict=True)
        return DecodeRows(*(torch.cat([one.to(torch.int64), its]) for one, its in pairs))


def decode_batch(
    runner: Any, rows: DecodeRows, attended: int, beside: ForwardBatch | None = None
) -> ForwardBatch:
    """A decode batch of these rows, of which attention is told the first `attended`.

    Args:
        beside: the batch of SGLang's that the first rows are of, if any.
    """
    count = len(rows.positions)
    seq_lens = rows.positions + 1
    seq_lens_cpu = rows.seq_lens_cpu[:attended]
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=count,
        input_ids=rows.tokens,
        req_pool_indices=rows.pool[:attended],
        seq_lens=seq_lens[:attended],
        seq_lens_cpu=seq_lens_cpu,
        seq_lens_sum=int(seq_lens_cpu.sum()),
        orig_seq_lens=seq_lens.to(torch.int32),
        out_cache_loc=rows.slots,
        positions=rows.positions,
        mrope_positions=vision.section_positions(runner.model_config, rows.rotary, beside),
        spec_algorithm=SpeculativeAlgorithm.NONE,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        global_num_token_non_padded_cpu=count,
    )
    plan_slots(runner, batch)
    return batch


def as_extend(batch: ForwardBatch, prefix: int, count: int) -> ForwardBatch:
    """The same rows as one chunk of one request, `prefix` columns of it being there."""
    lengths = {
        "seq_lens": [prefix + count],
        "extend_seq_lens": [count],
        "extend_prefix_lens": [prefix],
        "extend_start_loc": [0],
    }
    device = batch.seq_lens.device
    return replace(
        batch,
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        req_pool_indices=batch.req_pool_indices[:1],
        seq_lens_cpu=torch.tensor([prefix + count]),
        seq_lens_sum=prefix + count,
        extend_num_tokens=count,
        extend_seq_lens_cpu=[count],
        extend_prefix_lens_cpu=[prefix],
        **{name: torch.tensor(value, device=device) for name, value in lengths.items()},
    )


def plan_slots(runner: Any, batch: ForwardBatch) -> None:
    """Say what slots the batch reads and writes, as SGLang does for each batch that it makes."""
    translator = runner.kv_index_translator
    translator.own_plan(batch).bind(batch, translator)


@contextmanager
def context(runner: Any, backend: Any, batch: ForwardBatch) -> Iterator[None]:
    """What SGLang sets around a call of the model: attention, and the layout of its experts."""
    from sglang.srt.runtime_context import get_model

    with ExitStack() as stack:
        # Set by SGLang's loader.
        experts = getattr(runner.model, "shared_experts_config", None)
        if experts is not None:
            stack.enter_context(get_model().override(shared_experts=experts))
        stack.enter_context(
            _forward_context(ForwardContext(attn_backend=backend), forward_batch=batch)
        )
        yield


def fence(runner: Any) -> None:
    """After a forward that was no step of the scheduler's: forget when its reads end.

    The scheduler writes behind the reads of the last forward that published their end, be it a
    decode graph or a prefill. Without one it writes behind all of them.
    """
    runner.shared_read_done_event = None


@contextmanager
def captures(sizes: Sequence[int]) -> Iterator[None]:
    """Decode graph runners made meanwhile have graphs of these row counts."""
    config = copy.deepcopy(settings.in_effect("cuda_graph_config"))
    config.decode.bs, config.decode.max_bs = list(sizes), max(sizes)
    with settings.overridden(cuda_graph_config=config):
        yield
