"""Prefill attention of few rows with many keys: programs share the keys of a row.

A prefill's other kernels give a block of rows to one program. A short turn behind a long cached
prompt has few blocks, so most of the GPU would wait for programs that read all keys one after the
other. Here a program has some segments of the keys, as in decode, and a second launch adds them
up. The bits are the same.
"""

from __future__ import annotations

import functools

import torch
import triton

from margingate_kernels import attention, attention_split_triton
from margingate_kernels.attention import Segments
from margingate_kernels.attention_checks import Chunks, Columns, Rules

FEWEST_SEGMENTS = 64  # of the sequence with most keys; below, one loop takes up to 0.3 ms a layer
LEAST_ROOM = 16  # segments of each row whose sums fit at a time
SHARE = 3  # of the GPU's processors, one in so many at most would have a block of rows
PER_PROCESSOR = 4  # programs, if there are as many segments


def shares_keys(q: torch.Tensor, chunks: Chunks, room: Segments, rules: Rules) -> bool:
    """Whether programs are to share the keys of a row: few rows, many keys, and room for sums."""
    if rules.window is not None:
        return False
    tokens, heads, head_size = q.shape
    segments = attention.segments_of(chunks.most_keys, head_size)
    if segments < FEWEST_SEGMENTS or len(room.means) < LEAST_ROOM * tokens:
        return False
    blocks = triton.cdiv(chunks.longest, 64) * len(chunks.prefix_lens) * triton.cdiv(heads, 2)
    return blocks * SHARE <= _processors(q.device)


def launch(  # noqa: PLR0917
    q: torch.Tensor,
    columns: Columns,
    chunks: Chunks,
    multiply: tuple[float, float | None],
    out: torch.Tensor,
    rules: Rules,
    room: Segments,
) -> None:
    """As `extend_attention`, where `shares_keys`. Overwrites the sums in `room`."""
    tokens, heads, head_size = q.shape
    sequences, group = len(chunks.prefix_lens), heads // columns.k_buffer.shape[1]
    blocks = attention.blocks_for(head_size, attention.has_wide_tiles(q.device, head_size, rules))
    every = attention.segments_of(chunks.most_keys, head_size)
    together = len(room.means) // tokens  # segments of which the sums fit
    if together < every:
        together -= 1  # the sums of those before
    row_blocks = triton.cdiv(chunks.longest * group, blocks.split.rows) * heads // group
    for first in range(0, every, together):
        count = min(together, every - first)
        per = max(1, row_blocks * sequences * count // (_processors(q.device) * PER_PROCESSOR))
        grid = row_blocks, triton.cdiv(count, per), sequences
        attention_split_triton.sum_segments[grid](
            q,
            columns.k_buffer,
            columns.v_buffer,
            chunks.page_table,
            chunks.page_table.stride(0),
            chunks.table_rows,
            chunks.starts,
            chunks.prefix_lens,
            room.tops,
            room.means,
            first,
            count,
            per,
            tokens,
            *multiply,
            q.stride(0),
            columns.k_buffer.stride(0),
            columns.v_buffer.stride(0),
            heads,
            group,
            head_size,
            blocks.split.rows,
            blocks.keys,
            blocks.segment,
            num_warps=blocks.split.warps,
            num_stages=blocks.split.stages,
        )
        attention_split_triton.add_segments[chunks.longest, heads, sequences](
            out,
            chunks.starts,
            chunks.prefix_lens,
            room.tops,
            room.means,
            rules.sinks,
            first,
            count,
            together,
            tokens,
            out.stride(0),
            heads,
            head_size,
            blocks.segment,
            first == 0,
            first + count == every,
            num_warps=1,
        )


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
