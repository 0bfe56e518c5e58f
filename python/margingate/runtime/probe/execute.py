"""How operators are called while the server serves: within the class that was planned at start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from margingate.core.rowclass import RowPlan
from margingate.runtime.compat.batch_invariant_matmul import invariant_matmul

Operator = Callable[[torch.Tensor], torch.Tensor]
ALIGNED = 16  # bytes

_plans: dict[int, RowPlan] = {}  # by id of the module
_limit: float = 0.0  # calls with more rows are left alone


def keep_to(planned: Mapping[int, RowPlan], limit: float) -> None:
    """Call these modules as planned from now on.

    Args:
        planned: by id of the module.
        limit: rows up to which; infinite where plans hold for prefill forwards of any size.
    """
    global _limit  # noqa: PLW0603
    _plans.update(planned)
    _limit = limit


def covers_prefill() -> bool:
    """Whether the plans of this process hold for prefill forwards of any size."""
    return math.isinf(_limit)


def borders() -> set[int]:
    """First and last row counts of the spans that plans keep to."""
    return {end for plan in _plans.values() for span in plan.counts for end in span}


def apply_linear(original: Any, method: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> Any:
    """AROUND UnquantizedLinearMethod.apply: stay within the operator's class of row counts."""
    plan = _plans.get(id(layer))
    if plan is None or x.dim() != 2 or x.shape[0] > _limit or plan.runs_as_is(x.shape[0]):
        return original(method, layer, x, bias)  # more: a prefill that is canonical by its shape
    return run_in_class(
        plan,
        x,
        lambda piece: original(method, layer, piece, bias),
        lambda piece: invariant_matmul(piece, weight=layer.weight, bias=bias),
    )


def compute_lm_head(
    original: Any,
    processor: Any,
    hidden: torch.Tensor,
    lm_head: Any,
    bias: Any = None,
    **buffer: torch.Tensor | None,
) -> Any:
    """AROUND LogitsProcessor._compute_lm_head.

    Args:
        buffer: `out`, where a whole forward's logits may be written. SGLang copies there what is
            returned instead of it.
    """
    plan = _plans.get(id(lm_head))
    if plan is None or hidden.shape[0] > _limit or plan.runs_as_is(hidden.shape[0]):
        return original(processor, hidden, lm_head, bias, **buffer)
    weight = lm_head.weight
    return run_in_class(
        plan,
        hidden,
        lambda piece: original(processor, piece, lm_head, bias),
        lambda piece: invariant_matmul(piece.to(weight.dtype), weight=weight, bias=bias),
    )


def run_in_class(
    plan: RowPlan, x: torch.Tensor, operator: Operator, kernel: Operator | None = None
) -> torch.Tensor:
    """The operator's results of the rows of `x` [rows, inputs], by calls within the class.

    Args:
        kernel: the batch-invariant one; None for a plan without it.
    """
    outputs = []
    for start, stop, made, by_kernel in plan.calls(x.shape[0]):
        piece, rows = x[start:stop], stop - start
        if made > rows:
            # Rows leave each other alone, whatever is in the unused ones.
            room = x.new_empty(made, x.shape[1])
            room[:rows].copy_(piece)
            piece = room
        elif piece.data_ptr() % ALIGNED:
            piece = piece.clone()  # a library may look at the address; inputs are measured aligned
        call = kernel if by_kernel else operator
        assert call is not None, f"{plan} needs the batch-invariant kernel"
        outputs.append(call(piece)[:rows])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
