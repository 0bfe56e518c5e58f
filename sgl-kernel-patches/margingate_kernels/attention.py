"""Attention whose bits per row depend on that row's own queries, keys and values alone.

`extend_attention` is for prefill, `decode_attention` for decode; both cut a row's keys into the
same segments, counted from position 0, and add them up in the same order. So a row has the same
bits whatever shares the batch, wherever its prompt was cut into chunks, however much of it was
cached, and on hardware whose matrix unit sums a row alike in both kernels, whether it was prefilled
or decoded (a server measures that at start).

This is attention as it is in every decoder: grouped heads, causal, over paged keys and values of
which a page holds one token, with or without a sliding window, a soft cap on scores and attention
sinks. Sums are in float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from margingate_kernels import attention_decode_triton
from margingate_kernels.attention_checks import (
    PLAIN,
    Rules,
    check_contiguous,
    check_head_size,
    check_heads,
    check_rules,
    check_scale,
)
from margingate_kernels.overlap import launch_options

ARITHMETIC = 5  # counts changes of a row's bits from version to version
GLUON_LANES = 128  # of a head, at most, where the Gluon kernel prefills
PROGRAMS_PER_SM = 16  # of decode, more than fit at once, so that none waits for long
LOG2_E = 1.4426950408889634


class Cut(NamedTuple):
    """What a program works on and with."""

    rows: int  # queries; 64 or more takes the matrix unit's wide instructions
    warps: int
    stages: int  # tiles in flight
    parts: int = 1  # of a head's lanes, by a program each: its sums take fewer registers, and all
    # of them weigh the same keys


class Blocks(NamedTuple):
    """How the work is cut. `keys` and `segment` are part of a row's bits."""

    keys: int  # of a tile
    segment: int  # keys; a multiple of `keys`
    extend: Cut
    decode: Cut  # rows: the heads of a group, padded
    split: Cut = Cut(128, 8, 3)  # rows: tokens in the heads of a group; see attention_split.py


@functools.cache  # asked for in each layer
def blocks_for(head_size: int, wide: bool = False) -> Blocks:
    """`head_size` is 64, 128 or 256; `wide`: see `has_wide_tiles`."""
    if head_size <= GLUON_LANES:
        if wide:
            return Blocks(128, 256, Cut(64, 4, 2), Cut(16, 4, 3))
        stages = 3 if head_size == 64 else 2  # so that two programs fit one of Hopper's SMs
        return Blocks(64, 256, Cut(64, 4, stages), Cut(16, 2, 3), split=Cut(64, 4, stages))
    if wide:
        return Blocks(64, 256, Cut(128, 8, 2, parts=2), Cut(16, 4, 3), split=Cut(64, 8, 2))
    return Blocks(32, 256, Cut(64, 4, 3, parts=2), Cut(16, 4, 2), split=Cut(64, 8, 2))


def has_wide_tiles(device: torch.device, head_size: int, rules: Rules) -> bool:
    """Whether a layer's tiles have twice the keys that they have on other GPUs.

    Sums are rescaled half as often then, and decode waits for memory less often. Hopper's shared
    memory holds them. Heads of up to GLUON_LANES have them where the Gluon kernel prefills: not
    with a cap.
    """
    return _has_warpgroups(device) and (head_size > GLUON_LANES or not rules.cap)


def widest_blocks(device: torch.device, head_size: int) -> Blocks:
    """Those of layers without a cap, whose tiles are not narrower than others'."""
    return blocks_for(head_size, has_wide_tiles(device, head_size, PLAIN))


@functools.cache
def _has_warpgroups(device: torch.device) -> bool:
    """Whether the device is a Hopper, whose instructions the Gluon kernel is made of."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


class Segments(NamedTuple):
    """Device buffers that `plan_decode` and `decode_attention` write, of some capacity."""

    firsts: torch.Tensor  # int32 [rows + 1]: segments before each row's first
    records: torch.Tensor  # int32 [capacity, 4]: of each, its row, its first key, the row's keys,
    # and where the row's slots start
    tops: torch.Tensor  # float32 [capacity, heads, 2]: top and total
    means: torch.Tensor  # float32 [capacity, heads, head_size]


class DecodeWorkspace(NamedTuple):
    """Scratch of `decode_attention` for batches of up to some rows and segments in all."""

    segments: Segments
    programs: int
    blocks: Blocks
    window: int | None = None  # of the plan, as `Rules` has it


class Paged(NamedTuple):
    """The rows' keys and values in a K/V pool, by slot; slots of a row lie behind each other."""

    k_buffer: torch.Tensor  # [pool slots, K/V heads, head_size]
    v_buffer: torch.Tensor  # as k_buffer
    slots: torch.Tensor  # int32 or int64, flat
    indptr: torch.Tensor  # int32 [rows + 1]: a row's keys lie between two, as for `plan_decode`


def segments_of(tokens: int, head_size: int, window: int | None = None) -> int:
    """Segments of a row with `tokens` keys, its own among them: 256 keys each, the last fewer.

    A decode workspace has to hold the sum of it over the rows of a batch. A window may begin
    anywhere in a segment, so with one it is the most that a row of up to so many keys has.

    Args:
        head_size: 64, 128 or 256; not checked here.
        window: as `Rules` has it.
    """
    segment = blocks_for(head_size).segment
    every = -(-tokens // segment)
    return every if window is None else min(every, -(-window // segment) + 1)


def listed_keys(window: int, head_size: int, device: torch.device | str) -> int:
    """Keys of a row, its own the last, whose slots both kernels may read with this window.

    They read whole tiles, so it is more than the row sees; those before a sequence's first do not
    exist. Slots of keys that the row does not see may be any of the pool's.

    Args:
        window: as `Rules` has it.
        head_size: 64, 128 or 256; not checked here.
        device: that of the queries.
    """
    return window + widest_blocks(torch.device(device), head_size).keys


def decode_workspace(
    rows: int, segments: int, heads: int, head_size: int, device: torch.device | str
) -> DecodeWorkspace:
    """Scratch for batches of up to `rows` rows with up to `segments` segments together.

    It takes some 4 * heads * (head_size + 2) bytes a segment, and holds nothing between forwards.

    Args:
        rows: of a batch, at most.
        segments: the sum of `segments_of` over the rows of a batch, at most.
        heads: of the queries, not the K/V heads.
        device: that of the queries.

    Raises:
        ValueError: a head size that the kernels do not know.
    """
    check_head_size(head_size)
    sms = 1
    if torch.device(device).type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    buffers = Segments(
        torch.zeros(rows + 1, dtype=torch.int32, device=device),
        torch.zeros((segments, 4), dtype=torch.int32, device=device),
        torch.zeros((segments, heads, 2), dtype=torch.float32, device=device),
        torch.zeros((segments, heads, head_size), dtype=torch.float32, device=device),
    )
    # Of a layer whose tiles are narrower a window's plan begins in front of its first tile, with
    # keys that no row sees.
    blocks = widest_blocks(torch.device(device), head_size)
    return DecodeWorkspace(buffers, sms * PROGRAMS_PER_SM, blocks)


def with_window(workspace: DecodeWorkspace, window: int) -> DecodeWorkspace:
    """A plan of its own for layers with this window, and the sums of `workspace`, which it shares.

    Layers use them one after the other. Allocates the plan, 16 bytes a segment.

    Args:
        window: as `Rules` has it.
    """
    plan = (
        torch.zeros_like(workspace.segments.firsts),
        torch.zeros_like(workspace.segments.records),
    )
    segments = workspace.segments._replace(firsts=plan[0], records=plan[1])
    return workspace._replace(segments=segments, window=window)


def plan_decode(
    indptr: torch.Tensor, workspace: DecodeWorkspace, ends: torch.Tensor | None = None
) -> None:
    """Cut a batch's rows into segments; once for all layers of a forward that have its window.

    Neither allocates nor synchronises. Overwrites the workspace's plan. A batch of more segments
    than the workspace holds is not an error here, since only the device knows: the rows that do
    not fit come out as NaN.

    Args:
        indptr: int32 [R + 1], R >= 1, contiguous, on the workspace's device; row i has
            indptr[i + 1] - indptr[i] >= 1 keys. Need not start at 0. Neither the dtype, the device
            nor the values are checked.
        ends: int32 [R + 1], contiguous, where the slots are those of a window alone: the slots of
            row i end at ends[i + 1], as its keys do, and begin `listed_keys` before that or
            earlier, or with key 0. None: all are there, and those of row i start at indptr[i].

    Raises:
        ValueError: no row, more rows than the workspace is for, or ends of another length or for
            a plan without a window.
    """
    rows = len(indptr) - 1
    if not 1 <= rows < len(workspace.segments.firsts):
        most = len(workspace.segments.firsts) - 1
        raise ValueError(f"indptr has {rows} rows; the workspace is for 1 to {most}.")
    if ends is not None and (workspace.window is None or len(ends) != len(indptr)):
        raise ValueError(
            f"ends has {len(ends)} entries, indptr {len(indptr)}, and the plan's window is "
            f"{workspace.window}: slots of a window alone need as many ends, and a window."
        )
    segments = workspace.segments
    attention_decode_triton.plan[(rows,)](
        indptr,
        ends,
        segments.firsts,
        segments.records,
        rows,
        len(segments.records),
        workspace.blocks.keys,
        workspace.blocks.segment,
        workspace.window,
        triton.next_power_of_2(rows),
        **launch_options(indptr.device),
    )


def decode_attention(  # noqa: PLR0917
    q: torch.Tensor,
    paged: Paged,
    scale: float,
    out: torch.Tensor,
    workspace: DecodeWorkspace,
    rules: Rules = PLAIN,
) -> torch.Tensor:
    """Attend each row to its keys, after `plan_decode` of the same `indptr`.

    Neither allocates nor synchronises; may be captured into a CUDA graph. Overwrites the
    workspace's sums. Two rows may belong to one request.

    Not checked, since only the device could tell: that the plan is that of this `indptr`, that
    slots are within the pool, and that the workspace holds all segments (rows that do not fit come
    out as NaN). Nor are the dtypes of `paged.slots` and `paged.indptr`, and the devices.

    Args:
        q: bfloat16 or float16 [R, heads, head_size], heads and lanes contiguous, any row stride.
        paged: keys and values of q's dtype, this row's own included; slots int32 or int64, indptr
            int32 [R + 1].
        scale: of the scores, above 0.
        out: as q; overwritten and returned.
        rules: of the layer. Its window is that of the workspace.

    Raises:
        TypeError, ValueError: q, out or a buffer of a wrong dtype or shape, a scale that is not
            above 0, an indptr of another length, gaps, a workspace for other heads or another
            window, or rules that no kernel follows.
    """
    check_heads(q, out, paged.k_buffer, paged.v_buffer)
    check_scale(scale)
    check_rules(rules, q.shape[1])
    if rules.window != workspace.window:
        raise ValueError(
            f"window is {rules.window}; the workspace is planned for {workspace.window}."
        )
    if len(paged.indptr) != len(q) + 1:
        raise ValueError(f"indptr has {len(paged.indptr)} entries; {len(q)} rows need one more.")
    check_contiguous(slots=paged.slots, indptr=paged.indptr)
    if workspace.segments.means.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"the workspace is for [heads, head_size] {list(workspace.segments.means.shape[1:])}, "
            f"not {list(q.shape[1:])}."
        )
    _launch_decode(q, paged, factors(scale, rules), out, workspace, rules)
    return out


def factors(scale: float, rules: Rules) -> tuple[float, float | None]:
    """What the kernels multiply by: `scale` and `squeeze` of `attention_triton.add_tile`."""
    if not rules.cap:
        return scale * LOG2_E, None
    return rules.cap * LOG2_E, 2 * LOG2_E * scale / rules.cap


def _launch_decode(  # noqa: PLR0917
    q: torch.Tensor,
    paged: Paged,
    multiply: tuple[float, float | None],
    out: torch.Tensor,
    workspace: DecodeWorkspace,
    rules: Rules,
) -> None:
    (rows, heads, head_size), kv_heads = q.shape, paged.k_buffer.shape[1]
    segments = workspace.segments
    blocks = blocks_for(head_size, has_wide_tiles(q.device, head_size, rules))
    capacity, early = len(segments.records), launch_options(q.device)
    attention_decode_triton.decode[(min(workspace.programs, capacity * kv_heads),)](
        q,
        paged.k_buffer,
        paged.v_buffer,
        paged.slots,
        *segments,
        rows,
        capacity,
        *multiply,
        q.stride(0),
        paged.k_buffer.stride(0),
        paged.v_buffer.stride(0),
        heads,
        heads // kv_heads,
        head_size,
        blocks.decode.rows,
        blocks.keys,
        blocks.segment,
        rules.window,
        num_warps=blocks.decode.warps,
        num_stages=blocks.decode.stages,
        **early,
    )
    attention_decode_triton.add_up[(rows, heads)](
        out,
        segments.firsts,
        segments.tops,
        segments.means,
        rules.sinks,
        capacity,
        out.stride(0),
        heads,
        head_size,
        32,
        num_warps=1,
        **early,
    )
