"""Attention of prefill; see attention.py, whose decode gives a row the same bits."""

from __future__ import annotations

import functools

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from margingate_kernels import (
    attention,
    attention_gluon,
    attention_prefill_gluon,
    attention_prefill_triton,
    attention_split,
    attention_triton,
    gluon_rings,
)
from margingate_kernels.attention_checks import (
    PLAIN,
    Chunks,
    Columns,
    Rules,
    check_contiguous,
    check_heads,
    check_rules,
    check_scale,
)

STAGES = 3  # of the Gluon kernel, see `gluon_launch`


def extend_attention(  # noqa: PLR0917
    q: torch.Tensor,
    columns: Columns,
    chunks: Chunks,
    scale: float,
    out: torch.Tensor,
    rules: Rules = PLAIN,
    room: attention.Segments | None = None,
) -> torch.Tensor:
    """Attend the tokens of some chunks of prompts, each to its own and earlier keys.

    Neither allocates nor synchronises.

    Not checked, since only the device could tell: that `chunks.starts` ascend and end within q,
    that `chunks.longest` is enough (tokens beyond it may be left alone), that `chunks.most_keys` is
    (rows that see more may come out as NaN), that slots and rows are within their tables, and that
    `columns.k` and `columns.v` have the bits that the pool has at the chunks' own slots. Nor are
    the dtypes of the tensors in `chunks`, and the devices.

    Args:
        q: bfloat16 or float16 [tokens, heads, head_size], heads and lanes contiguous, any row
            stride.
        columns: keys and values of q's dtype, in the pool and beside it.
        chunks: which tokens are whose, with the dtypes that are given there.
        scale: of the scores, above 0.
        out: as q; overwritten and returned. Tokens behind the last sequence are left alone.
        rules: of the layer.
        room: sums of a decode workspace for these heads, overwritten where few rows see many keys:
            programs then share a row's keys, which changes no bit. None: they never do.

    Raises:
        TypeError, ValueError: q, out or a tensor of `columns` of a wrong dtype or shape, room for
            other heads, numbers of sequences that disagree, gaps, a scale that is not above 0, or
            rules that no kernel follows.
    """
    check_heads(q, out, columns.k_buffer, columns.v_buffer)
    check_scale(scale)
    check_rules(rules, q.shape[1])
    own = (len(q), *columns.k_buffer.shape[1:])
    for name, tensor in (("k", columns.k), ("v", columns.v)):
        if tensor.shape != own or tensor.dtype != q.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; these tokens need {q.dtype} "
                f"{list(own)}."
            )
    sequences = len(chunks.prefix_lens)
    if len(chunks.starts) != sequences + 1 or len(chunks.table_rows) != sequences:
        raise ValueError(
            f"{sequences} sequences need as many table_rows, not {len(chunks.table_rows)}, and one "
            f"entry more of starts, not {len(chunks.starts)}."
        )
    check_contiguous(
        k=columns.k,
        v=columns.v,
        table_rows=chunks.table_rows,
        starts=chunks.starts,
        prefix_lens=chunks.prefix_lens,
    )
    if chunks.page_table.stride(1) != 1:
        raise ValueError("page_table has gaps along its positions; pass it contiguous.")
    if room is not None and room.means.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"room is for [heads, head_size] {list(room.means.shape[1:])}, not {list(q.shape[1:])}."
        )
    if not len(q):  # no tile can be copied of nothing
        return out
    multiply = attention.factors(scale, rules)
    if room is not None and attention_split.shares_keys(q, chunks, room, rules):
        attention_split.launch(q, columns, chunks, multiply, out, rules, room)
    else:
        _launch_extend(q, columns, chunks, multiply, out, rules)
    return out


def _launch_extend(  # noqa: PLR0917
    q: torch.Tensor,
    columns: Columns,
    chunks: Chunks,
    multiply: tuple[float, float | None],
    out: torch.Tensor,
    rules: Rules,
) -> None:
    heads, head_size = q.shape[1:]
    wide = attention.has_wide_tiles(q.device, head_size, rules)
    if wide and head_size <= attention.GLUON_LANES:
        _launch_gluon(q, columns, chunks, multiply[0], out, rules)
        return
    blocks = attention.blocks_for(head_size, wide)
    parts = blocks.extend.parts
    tiles, kind = (columns.k, columns.v), attention_triton.FLAT
    if _copies_tiles(q.device):
        shapes = [blocks.keys, head_size], [blocks.keys, head_size // parts]
        tiles = tuple(map(_tiles, tiles, shapes))
        kind = attention_triton.TILES
    row_blocks = triton.cdiv(chunks.longest, blocks.extend.rows)
    attention_prefill_triton.extend[(heads * parts, row_blocks, len(chunks.prefix_lens))](
        q,
        out,
        *columns,
        *tiles,
        chunks.page_table,
        chunks.page_table.stride(0),
        chunks.table_rows,
        chunks.starts,
        chunks.prefix_lens,
        rules.sinks,
        *multiply,
        q.stride(0),
        out.stride(0),
        *(each.stride(0) for each in columns),
        heads // columns.k_buffer.shape[1],
        head_size,
        parts,
        blocks.extend.rows,
        blocks.keys,
        blocks.segment,
        rules.window,
        kind,
        num_warps=blocks.extend.warps,
        num_stages=blocks.extend.stages,
    )


def _launch_gluon(  # noqa: PLR0917
    q: torch.Tensor,
    columns: Columns,
    chunks: Chunks,
    scale: float,
    out: torch.Tensor,
    rules: Rules,
) -> None:
    grid, constants = gluon_launch(q, columns, chunks, out)
    attention_prefill_gluon.extend[grid](
        q,
        out,
        columns.k_buffer,
        columns.v_buffer,
        *(_gluon_tiles(each) for each in (columns.k, columns.v)),
        chunks.page_table,
        chunks.page_table.stride(0),
        chunks.table_rows,
        chunks.starts,
        chunks.prefix_lens,
        rules.sinks,
        scale,
        *constants,
        rules.window,
        num_warps=attention_gluon.WARPS.value,
    )


def gluon_launch(
    q: torch.Tensor, columns: Columns, chunks: Chunks, out: torch.Tensor, stages: int = STAGES
) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """The grid, and what is constant of the Gluon kernel's arguments, in their order.

    Args:
        stages: tiles of keys, and as many of values, in shared memory; no part of a row's bits.
    """
    heads, head_size = q.shape[1:]
    group = heads // columns.k_buffer.shape[1]
    together = 2 if group % 2 == 0 else 1
    rows = gluon_rings.READERS.value * attention_gluon.ROWS.value // together
    grid = heads // together, triton.cdiv(chunks.longest, rows), len(chunks.prefix_lens)
    strides = (each.stride(0) for each in (q, out, columns.k_buffer, columns.v_buffer))
    segment = attention.blocks_for(head_size, wide=True).segment
    return grid, (*strides, group, head_size, segment, together, stages)


@functools.cache
def _copies_tiles(device: torch.device) -> bool:
    """Whether the device copies a tile to shared memory by itself, as Hopper does."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _tiles(tensor: torch.Tensor, shape: list[int]) -> TensorDescriptor:
    """[tokens, heads, lanes] as a matrix of which tiles of some keys and lanes are copied."""
    return TensorDescriptor(tensor, *_matrix(tensor), shape)


def _gluon_tiles(tensor: torch.Tensor) -> hopper.TensorDescriptor:
    """As `_tiles`, with how a tile lies in shared memory."""
    tile = [gluon_rings.TILE.value, tensor.shape[2]]
    return hopper.TensorDescriptor(tensor, *_matrix(tensor), tile, _tile_layout(*tile))


@functools.cache
def _tile_layout(keys: int, lanes: int) -> gl.NVMMASharedLayout:
    """That of a ring's tiles; it is the same for bfloat16 and float16, which are as wide."""
    return gl.NVMMASharedLayout.get_default_for([keys, lanes], gl.bfloat16)


def _matrix(tensor: torch.Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of [tokens, heads, lanes], contiguous, as [tokens, heads * lanes]."""
    tokens, heads, lanes = tensor.shape
    return [tokens, heads * lanes], [heads * lanes, 1]
