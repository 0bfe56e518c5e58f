"""`--gate-study`: forced tokens, finer margins, and how far K/V columns are from another run's."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.utils import use_intel_amx_backend

from margingate.runtime.compat.kv import columns
from margingate.runtime.request.forward_record import record_on
from margingate.runtime.request.record import ColumnsWanted, GateRequest

CANDIDATES = 8  # tokens whose logits are computed again in higher precision
ROWS = 1024  # of the buffer that decode graphs write to; larger forwards run without a graph
KEPT = 64  # requests whose columns are kept to compare with


@dataclass(slots=True)
class _LastStates:
    """What lm_head was given in the last forward."""

    buffer: torch.Tensor | None = None  # [ROWS, hidden]; graphs hold its address
    hidden: torch.Tensor | None = None  # [rows, hidden], a view of the buffer or the tensor itself
    head: Any = None
    processor: Any = None


_last = _LastStates()
_columns: OrderedDict[str, torch.Tensor] = OrderedDict()  # by key, oldest first


def keep_states(
    processor: Any, hidden_states: torch.Tensor, lm_head: Any, *_args: Any, **_kwargs: Any
) -> None:
    """BEFORE LogitsProcessor._get_logits: keep the final hidden states, in decode graphs too.

    A graph replays the copy into the buffer and not this function, so `_exact` takes the buffer
    for every forward that fits into it.
    """
    _last.head, _last.processor = lm_head, processor
    rows, width = hidden_states.shape
    if _last.buffer is None:
        with torch.inference_mode(False):
            _last.buffer = hidden_states.new_empty((ROWS, width))
    if rows <= ROWS:
        _last.buffer[:rows].copy_(hidden_states)
        _last.hidden = None
    else:
        _last.hidden = hidden_states


def force(relay: Any, req: Any, result: Any, i: int, margins: tuple[float, float]) -> None:
    """Note what row `i` of a result chose, and emit what it was told to.

    Mutates the request's choices, the result and the token relay.

    Args:
        margins: of the row, and of the routers in it; +inf: the model has none.
    """
    gate: GateRequest = req.gate
    record = record_on(result.logits_output)
    if record.study is None:  # the batch's first row: once for all of them
        record.study = _chosen(result)
    token, *finer = record.study[i]
    margin, router = margins
    known = None if router == math.inf else router
    gate.choices.append((token, margin, len(record.study), known, *finer))
    if len(req.output_ids) < len(gate.forced):
        wanted = gate.forced[len(req.output_ids)]
        if wanted != token:  # each write is a kernel
            result.next_token_ids[i] = wanted
            relay.output_tokens_buf[columns.row(req)] = wanted


def _chosen(result: Any) -> list[tuple[Any, ...]]:
    """Per row: the token, the best logit, and in exact products the best token and its margin.

    Only the token where exact products cannot be had (see `_weight`).
    """
    tokens = result.next_token_ids.tolist()
    logits = result.logits_output.next_token_logits
    exact = _exact(logits, len(tokens))
    if exact is None:
        return [(token,) for token in tokens]
    ids, values = exact
    best, order = values.sort(dim=1, descending=True, stable=True)
    columns = (logits.amax(1), ids.gather(1, order[:, :1]).squeeze(1), best[:, 0] - best[:, 1])
    numbers = torch.stack([column.double() for column in columns], dim=1).tolist()  # one wait
    return [
        (token, top, int(exact_token), float(f"{margin:.4g}"))
        for token, (top, exact_token, margin) in zip(tokens, numbers, strict=True)
    ]


@torch.inference_mode()
def _exact(logits: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The best CANDIDATES tokens of each row by `logits`, ids ascending, and their logits anew.

    The products of the same BF16 hidden states and weights, summed in float64: this is what a
    float32 lm_head computes, without its rounding. int64 and float64, both [rows, CANDIDATES].
    """
    weight = _weight(logits.shape[1])
    if weight is None or logits.shape[0] != rows:
        return None
    assert _last.buffer is not None
    hidden = _last.buffer[:rows] if _last.hidden is None else _last.hidden[:rows]
    ids = logits.topk(min(CANDIDATES, logits.shape[1]), dim=1).indices.sort(dim=1).values
    values = torch.einsum("rh,rkh->rk", hidden.double(), weight[ids].double())
    processor = _last.processor
    if processor.logit_scale is not None:
        values = values * processor.logit_scale
    if cap := processor.final_logit_softcapping:
        values = cap * torch.tanh(values / cap)
    return ids, values


def _weight(vocab: int) -> torch.Tensor | None:
    """lm_head's rows by token id, or None: split over GPUs, packed, or quantized."""
    weight = getattr(_last.head, "weight", None)
    if not isinstance(weight, torch.Tensor) or use_intel_amx_backend(_last.head):
        return None
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[0] < vocab:
        return None
    return weight.data


# -- K/V columns


def before_free(pool: Any, columns_pool: Any, req: Any) -> None:
    """As SGLang frees a request: the columns' slots are free, but hold what they held.

    Args:
        pool: SGLang's ReqToTokenPool.
        columns_pool: its K/V pool.
    """
    gate = getattr(req, "gate", None)
    if gate is None or gate.columns_wanted is None or not columns.holds(req):
        return
    prompt = len(req.origin_input_ids)
    length = prompt + max(len(req.output_ids) - 1, 0)  # the last token has no column
    slots = pool.req_to_token[columns.row(req), :length].to(torch.int64)
    gate.drift = _keep_or_compare(gate.columns_wanted, _gather(columns_pool, slots), prompt)


def _gather(pool: Any, slots: torch.Tensor) -> torch.Tensor:
    """Keys and values of the first, middle and last layer: [layers, positions, features]."""
    last = pool.start_layer + pool.layer_num - 1
    layers = sorted({pool.start_layer, (pool.start_layer + last) // 2, last})
    found = []
    for layer in layers:
        both = pool.get_key_buffer(layer)[slots], pool.get_value_buffer(layer)[slots]
        found.append(torch.cat([part.flatten(1) for part in both], dim=1))
    return torch.stack(found).cpu()


def _keep_or_compare(
    wanted: ColumnsWanted, columns: torch.Tensor, prompt: int
) -> dict[str, Any] | None:
    """Keep them by key, or say how far they are from those kept, up to the shorter one's end.

    Per layer: [max abs, relative L2] over the prompt, and of each decoded column, that of row 2
    first.
    """
    if wanted.keep:
        _columns[wanted.key] = columns
        while len(_columns) > KEPT:
            _columns.popitem(last=False)
        return None
    kept = _columns.get(wanted.key)
    if kept is None:
        return {"unknown": wanted.key}
    length = min(columns.shape[1], kept.shape[1])
    ours, theirs = columns[:, :length].double(), kept[:, :length].double()
    return {
        "prompt": [_distance(a[:prompt], b[:prompt]) for a, b in zip(ours, theirs, strict=True)],
        "rows": [
            [_distance(a[p], b[p]) for p in range(prompt, length)]
            for a, b in zip(ours, theirs, strict=True)
        ],
    }


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    difference = ours - theirs
    most = difference.abs().max().item()
    relative = (difference.norm() / theirs.norm().clamp_min(1e-30)).item()
    return float(f"{most:.4g}"), float(f"{relative:.4g}")
