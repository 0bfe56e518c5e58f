"""Attention whose bits per row depend on that row's own queries, keys and values alone.

`extend_attention` is for prefill, `decode_attention` for decode; both cut a row's keys into the
same segments, counted from position 0, and add them up in the same order. So a row has the same
bits whatever shares the batch, wherever its prompt was cut into chunks, however much of it was
cached, and on hardware whose matrix unit sums a row alike in both kernels, whether it was prefilled
or decoded (a server measures that at start).

This is attention as it is in every decoder: grouped heads, causal, over paged keys and values of
which a page holds one token. Sums are in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from margingate_kernels import attention_triton

_DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 128, 256)
MOST_GROUPED = 16  # heads that share a K/V head
PROGRAMS_PER_SM = 16  # of decode, more than fit at once, so that none waits for long
_LOG2_E = 1.4426950408889634


class Cut(NamedTuple):
    """What a program works on and with."""

    rows: int  # queries; 64 or more takes the matrix unit's wide instructions
    warps: int
    stages: int  # tiles in flight


class Blocks(NamedTuple):
    """How the work is cut. `keys` and `segment` are part of a row's bits."""

    keys: int  # of a tile
    segment: int  # keys; a multiple of `keys`
    extend: Cut
    decode: Cut  # rows: the heads of a group, padded


def blocks_for(head_size: int) -> Blocks:
    """`head_size` is 64, 128 or 256."""
    if head_size <= 128:
        return Blocks(64, 256, Cut(64, 4, 3), Cut(16, 2, 3))
    return Blocks(32, 256, Cut(64, 8, 2), Cut(16, 4, 2))


class Segments(NamedTuple):
    """Device buffers that `plan_decode` and `decode_attention` write, of some capacity."""

    firsts: torch.Tensor  # int32 [rows + 1]: segments before each row's first
    owners: torch.Tensor  # int32 [capacity]: the row of each segment
    tops: torch.Tensor  # float32 [capacity, heads, 2]: top and total
    means: torch.Tensor  # float32 [capacity, heads, head_size]


class DecodeWorkspace(NamedTuple):
    """Scratch of `decode_attention` for batches of up to some rows and segments in all."""

    segments: Segments
    programs: int
    blocks: Blocks


class Paged(NamedTuple):
    """The rows' keys and values in a K/V pool, by slot; slots of a row lie behind each other."""

    k_buffer: torch.Tensor  # [pool slots, K/V heads, head_size]
    v_buffer: torch.Tensor  # as k_buffer
    slots: torch.Tensor  # int32 or int64, flat
    indptr: torch.Tensor  # int32 [rows + 1]: where each row's slots start


def segments_of(tokens: int, head_size: int) -> int:
    """Segments of a row that sees so many keys."""
    return -(-tokens // blocks_for(head_size).segment)


def decode_workspace(
    rows: int, segments: int, heads: int, head_size: int, device: torch.device | str
) -> DecodeWorkspace:
    """Scratch for batches of up to `rows` rows with up to `segments` segments together.

    Raises:
        ValueError: a head size that the kernels do not know.
    """
    _check_head_size(head_size)
    sms = 1
    if torch.device(device).type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    buffers = Segments(
        torch.zeros(rows + 1, dtype=torch.int32, device=device),
        torch.zeros(segments, dtype=torch.int32, device=device),
        torch.zeros((segments, heads, 2), dtype=torch.float32, device=device),
        torch.zeros((segments, heads, head_size), dtype=torch.float32, device=device),
    )
    return DecodeWorkspace(buffers, sms * PROGRAMS_PER_SM, blocks_for(head_size))


def plan_decode(indptr: torch.Tensor, workspace: DecodeWorkspace) -> None:
    """Cut a batch's rows into segments; once for all layers of a forward.

    Neither allocates nor synchronises. Overwrites the workspace's plan. A batch of more segments
    than the workspace holds is not an error here, since only the device knows: the rows that do
    not fit come out as NaN.

    Args:
        indptr: int32 [R + 1], R >= 1; row i has indptr[i + 1] - indptr[i] >= 1 keys.

    Raises:
        ValueError: more rows than the workspace is for.
    """
    rows = len(indptr) - 1
    if not 1 <= rows < len(workspace.segments.firsts):
        most = len(workspace.segments.firsts) - 1
        raise ValueError(f"indptr has {rows} rows; the workspace is for 1 to {most}.")
    segments = workspace.segments
    attention_triton.plan[(rows,)](
        indptr,
        segments.firsts,
        segments.owners,
        rows,
        len(segments.owners),
        workspace.blocks.segment,
        triton.next_power_of_2(rows),
    )


def decode_attention(
    q: torch.Tensor, paged: Paged, scale: float, out: torch.Tensor, workspace: DecodeWorkspace
) -> torch.Tensor:
    """Attend one row per request to all of its keys, after `plan_decode` of the same `indptr`.

    Neither allocates nor synchronises; may be captured into a CUDA graph.

    Args:
        q: bfloat16 or float16 [R, heads, head_size], heads and lanes contiguous.
        paged: keys and values, this row's own included.
        scale: of the scores.
        out: as q; overwritten and returned.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype or shape.
    """
    _check_heads(q, out, paged.k_buffer, paged.v_buffer)
    if len(paged.indptr) != len(q) + 1:
        raise ValueError(f"indptr has {len(paged.indptr)} entries; {len(q)} rows need one more.")
    _check_contiguous(slots=paged.slots, indptr=paged.indptr)
    if workspace.segments.means.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"the workspace is for [heads, head_size] {list(workspace.segments.means.shape[1:])}, "
            f"not {list(q.shape[1:])}."
        )
    _launch_decode(q, paged, scale, out, workspace)
    return out


def _launch_decode(
    q: torch.Tensor, paged: Paged, scale: float, out: torch.Tensor, workspace: DecodeWorkspace
) -> None:
    (rows, heads, head_size), kv_heads = q.shape, paged.k_buffer.shape[1]
    segments, blocks = workspace.segments, workspace.blocks
    capacity = len(segments.owners)
    attention_triton.decode[(min(workspace.programs, capacity * kv_heads),)](
        q,
        *paged,
        *segments,
        rows,
        capacity,
        scale * _LOG2_E,
        q.stride(0),
        paged.k_buffer.stride(0),
        paged.v_buffer.stride(0),
        heads,
        heads // kv_heads,
        head_size,
        blocks.decode.rows,
        blocks.keys,
        blocks.segment,
        num_warps=blocks.decode.warps,
        num_stages=blocks.decode.stages,
    )
    attention_triton.add_up[(rows, heads)](
        out,
        segments.firsts,
        segments.tops,
        segments.means,
        capacity,
        out.stride(0),
        heads,
        head_size,
        32,
        num_warps=1,
    )


class Chunks(NamedTuple):
    """Which tokens of a prefill forward are whose: sequences behind each other."""

    page_table: torch.Tensor  # int32 [requests, positions]: slots
    table_rows: torch.Tensor  # int64 [sequences]: rows of the page table
    starts: torch.Tensor  # int32 or int64 [sequences + 1]: first token of each
    prefix_lens: torch.Tensor  # int32 or int64 [sequences]: positions before that token
    longest: int  # at least the tokens of the longest sequence


def extend_attention(  # noqa: PLR0917
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    chunks: Chunks,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Attend the tokens of some chunks of prompts, each to its own and all earlier keys.

    Neither allocates nor synchronises.

    Args:
        q: bfloat16 or float16 [tokens, heads, head_size], heads and lanes contiguous.
        k_buffer: [pool slots, K/V heads, head_size], the chunks' own keys included.
        v_buffer: as k_buffer.
        scale: of the scores.
        out: as q; overwritten and returned. Tokens behind the last sequence are left alone.

    Raises:
        TypeError, ValueError: an argument of a wrong dtype or shape.
    """
    _check_heads(q, out, k_buffer, v_buffer)
    sequences = len(chunks.prefix_lens)
    if len(chunks.starts) != sequences + 1 or len(chunks.table_rows) != sequences:
        raise ValueError(
            f"{sequences} sequences need as many table_rows, not {len(chunks.table_rows)}, and one "
            f"entry more of starts, not {len(chunks.starts)}."
        )
    _check_contiguous(
        table_rows=chunks.table_rows, starts=chunks.starts, prefix_lens=chunks.prefix_lens
    )
    if chunks.page_table.stride(1) != 1:
        raise ValueError("page_table has gaps along its positions; pass it contiguous.")
    _launch_extend(q, k_buffer, v_buffer, chunks, scale, out)
    return out


def _launch_extend(  # noqa: PLR0917
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    chunks: Chunks,
    scale: float,
    out: torch.Tensor,
) -> None:
    heads, head_size = q.shape[1:]
    blocks = blocks_for(head_size)
    row_blocks = triton.cdiv(chunks.longest, blocks.extend.rows)
    attention_triton.extend[(row_blocks, heads, len(chunks.prefix_lens))](
        q,
        out,
        k_buffer,
        v_buffer,
        chunks.page_table,
        chunks.page_table.stride(0),
        chunks.table_rows,
        chunks.starts,
        chunks.prefix_lens,
        scale * _LOG2_E,
        q.stride(0),
        out.stride(0),
        k_buffer.stride(0),
        v_buffer.stride(0),
        heads // k_buffer.shape[1],
        head_size,
        blocks.extend.rows,
        blocks.keys,
        blocks.segment,
        num_warps=blocks.extend.warps,
        num_stages=blocks.extend.stages,
    )


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """The oracle, in float64: the last len(q) positions of a sequence of len(k).

    Args:
        q: [tokens, heads, head_size]; k, v: [positions, K/V heads, head_size].
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("thd,phd->htp", q.double(), keys) * scale
    tokens, positions = scores.shape[1:]
    last = torch.arange(positions - tokens, positions, device=q.device)
    seen = torch.arange(positions, device=q.device)[None, :] <= last[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("htp,phd->thd", weights, values)


def _check_head_size(head_size: int) -> None:
    if head_size not in HEAD_SIZES:
        raise ValueError(f"head_size is {head_size}; the kernels are for {HEAD_SIZES}.")


def _check_contiguous(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has gaps; pass {name}.contiguous().")


def _check_heads(
    q: torch.Tensor, out: torch.Tensor, k_buffer: torch.Tensor, v_buffer: torch.Tensor
) -> None:
    if q.dtype not in _DTYPES:
        raise TypeError(f"q has dtype {q.dtype}; cast to bfloat16 or float16.")
    for name, tensor in (("out", out), ("k_buffer", k_buffer), ("v_buffer", v_buffer)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, q {q.dtype}; they must agree.")
    for name, tensor in (("q", q), ("out", out), ("k_buffer", k_buffer), ("v_buffer", v_buffer)):
        if tensor.dim() != 3 or tensor.stride()[1:] != (tensor.shape[2], 1):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} and strides {list(tensor.stride())}; pass "
                "[tokens, heads, head_size] with contiguous heads."
            )
    if out.shape != q.shape:
        raise ValueError(f"out has shape {list(out.shape)}, q {list(q.shape)}; they must agree.")
    _check_head_size(q.shape[2])
    heads, kv_heads = q.shape[1], k_buffer.shape[1]
    if heads % kv_heads or heads // kv_heads > MOST_GROUPED:
        raise ValueError(f"{heads} heads cannot share {kv_heads} K/V heads.")
    if not q.shape[2] == k_buffer.shape[2] == v_buffer.shape[2] or v_buffer.shape[1] != kv_heads:
        raise ValueError(
            f"k_buffer is {list(k_buffer.shape)} and v_buffer {list(v_buffer.shape)}; both must "
            f"have the K/V heads and head_size of {q.shape[2]}."
        )
