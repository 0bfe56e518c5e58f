"""What the attention kernels take, and the oracle that they are held to."""

from __future__ import annotations

from typing import NamedTuple

import torch

_DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (64, 128, 256)
MOST_GROUPED = 16  # heads that share a K/V head


class Rules(NamedTuple):
    """What a layer's attention does besides weighing all keys up to a row's own."""

    window: int | None = None  # keys before its own that a row sees, 0 or more; None: all
    cap: float = 0.0  # of scores, which become cap * tanh(score / cap); 0: none
    sinks: torch.Tensor | None = None  # [heads], bfloat16, float16 or float32: of each head a
    # score, neither scaled nor capped, of a key whose value is 0


PLAIN = Rules()


class Chunks(NamedTuple):
    """Which tokens of a prefill forward are whose: sequences behind each other."""

    page_table: torch.Tensor  # int32 [requests, positions]: slots
    table_rows: torch.Tensor  # int64 [sequences]: rows of the page table
    starts: torch.Tensor  # int32 or int64 [sequences + 1]: first token of each
    prefix_lens: torch.Tensor  # int32 or int64 [sequences]: positions before that token
    longest: int  # at least the tokens of the longest sequence
    most_keys: int = 0  # at least the positions of any sequence, its last token's among them; 0:
    # not known


class Columns(NamedTuple):
    """A layer's keys and values in a prefill forward."""

    k_buffer: torch.Tensor  # [pool slots, K/V heads, head_size], the chunks' own included
    v_buffer: torch.Tensor  # as k_buffer
    k: torch.Tensor  # [tokens, K/V heads, head_size], contiguous: the chunks' own, the same bits
    v: torch.Tensor  # as k


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rules: Rules = PLAIN
) -> torch.Tensor:
    """The oracle, in float64: causal attention of the last len(q) positions of one sequence.

    Args:
        q: [tokens, heads, head_size], any floating dtype; tokens <= positions.
        k, v: [positions, K/V heads, head_size]. Heads are a multiple of the K/V heads: head h
            reads K/V head h // (heads // K/V heads).
        scale: of the scores.

    Returns:
        float64 [tokens, heads, head_size].
    """
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("thd,phd->htp", q.double(), keys) * scale
    tokens, positions = scores.shape[1:]
    last = torch.arange(positions - tokens, positions, device=q.device)
    ages = last[:, None] - torch.arange(positions, device=q.device)[None, :]
    if rules.cap:
        scores = rules.cap * (scores / rules.cap).tanh()
    seen = (ages >= 0) & (ages <= (positions if rules.window is None else rules.window))
    scores = scores.masked_fill(~seen, -torch.inf)
    if rules.sinks is not None:
        sinks = rules.sinks.double()[:, None, None].expand(-1, tokens, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., :positions]
    return torch.einsum("htp,phd->thd", weights, values)


def check_head_size(head_size: int) -> None:
    """Raises ValueError where the kernels do not know it."""
    if head_size not in HEAD_SIZES:
        raise ValueError(f"head_size is {head_size}; the kernels are for {HEAD_SIZES}.")


def check_scale(scale: float) -> None:
    """Raises ValueError."""
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be above 0.")


def check_rules(rules: Rules, heads: int) -> None:
    """Raises TypeError or ValueError where the kernels cannot follow them with so many heads."""
    if rules.window is not None and rules.window < 0:
        raise ValueError(f"window is {rules.window}; it must be 0 or more, or None for all keys.")
    if not rules.cap >= 0:
        raise ValueError(f"cap is {rules.cap}; it must be above 0, or 0 for none.")
    if rules.sinks is None:
        return
    if rules.sinks.dtype not in (*_DTYPES, torch.float32):
        raise TypeError(f"sinks have dtype {rules.sinks.dtype}; cast them to float32.")
    if rules.sinks.shape != (heads,):
        raise ValueError(
            f"sinks have shape {list(rules.sinks.shape)}; {heads} heads need one each."
        )
    check_contiguous(sinks=rules.sinks)


def check_contiguous(**tensors: torch.Tensor) -> None:
    """Raises ValueError, naming the tensor."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has gaps; pass {name}.contiguous().")


def check_heads(
    q: torch.Tensor, out: torch.Tensor, k_buffer: torch.Tensor, v_buffer: torch.Tensor
) -> None:
    """Raises TypeError or ValueError where the tensors do not fit each other or the kernels."""
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
    check_head_size(q.shape[2])
    heads, kv_heads = q.shape[1], k_buffer.shape[1]
    if heads % kv_heads or heads // kv_heads > MOST_GROUPED:
        raise ValueError(f"{heads} heads cannot share {kv_heads} K/V heads.")
    if not q.shape[2] == k_buffer.shape[2] == v_buffer.shape[2] or v_buffer.shape[1] != kv_heads:
        raise ValueError(
            f"k_buffer is {list(k_buffer.shape)} and v_buffer {list(v_buffer.shape)}; both must "
            f"have the K/V heads and head_size of {q.shape[2]}."
        )
