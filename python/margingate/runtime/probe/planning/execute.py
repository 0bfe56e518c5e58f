"""How operators are called while the server serves: within the class that was planned at start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from margingate.core.rowclass import RowPlan
from margingate.runtime.compat import instance_patches
from margingate.runtime.compat.compute import mxfp4
from margingate.runtime.compat.compute.batch_invariant_matmul import invariant_matmul
from margingate.runtime.probe.operators import forward_phase, fused_gate, unpacked
from margingate.runtime.probe.operators.observed_calls import routing_tensors
from margingate.runtime.probe.operators.operator import Inputs, Operator, Plain, Quantized, Run
from margingate.runtime.probe.operators.routed import (
    Experts,
    Rows,
    SharedGate,
    call_experts,
    call_shared_gate,
)
from margingate.runtime.probe.operators.scored import ScoredExperts, call_scored

ALIGNED = 16  # bytes

_plans: dict[int, RowPlan] = {}  # by id of the module
_prefill_plans: dict[int, RowPlan] = {}  # of modules that have another one in prefills
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


def keep_prefills_to(model: Any, planned: Mapping[int, RowPlan]) -> None:
    """Call these modules as planned in the prefills of a model from now on, and not as `keep_to`.

    Args:
        planned: by id of the module.
    """
    _prefill_plans.update(planned)
    if planned:
        forward_phase.watch(model)


def differs_in_prefill(module: Any) -> bool:
    """Whether it has a plan of its own in prefills."""
    return id(module) in _prefill_plans


def some_differ_in_prefill() -> bool:
    """Whether some module runs otherwise in prefills, so that decoded columns have other bits."""
    return bool(_prefill_plans) or unpacked.are_some()


def covers_prefill() -> bool:
    """Whether the plans of this process hold for prefill forwards of any size."""
    return math.isinf(_limit)


def borders() -> set[int]:
    """First and last row counts of the spans that plans keep to."""
    every = (*_plans.values(), *_prefill_plans.values())
    return {end for plan in every for span in plan.counts for end in span}


def _plan_for(layer: Any, rows: int) -> RowPlan | None:
    """How a call of this layer with so many rows is made; None: as it is.

    So is one of more rows than plans hold for: a prefill that is canonical by its shape.
    """
    plan = _plans.get(id(layer))
    if _prefill_plans and forward_phase.is_prefill():
        plan = _prefill_plans.get(id(layer), plan)
    return None if plan is None or rows > _limit or plan.runs_as_is(rows) else plan


def apply_linear(original: Any, method: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> Any:
    """AROUND UnquantizedLinearMethod.apply, and that of a quantized layer's method: stay within the
    operator's class of row counts.
    """
    if x.dim() != 2:
        return original(method, layer, x, bias)
    if forward_phase.is_prefill() and (kind := unpacked.kind_of(layer)) is not None:
        return apply_unpacked(kind, layer, x, bias)
    plan = _plan_for(layer, x.shape[0])
    if plan is None:
        return original(method, layer, x, bias)
    return run_in_class(
        plan,
        x,
        lambda piece: original(method, layer, piece, bias),
        lambda piece: invariant_matmul(piece, weight=layer.weight, bias=bias),
    )


def apply_unpacked(
    kind: unpacked.UnpackedLayers, layer: Any, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A prefill's product with a layer's weights, unpacked for it; plus the bias, as by Marlin."""
    plan = _plan_for(kind, x.shape[0])
    weight = unpacked.unpacked(layer)

    def product(piece: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(piece, weight)

    found = (
        product(x)
        if plan is None
        else run_in_class(plan, x, product, partial(invariant_matmul, weight=weight, bias=None))
    )
    return found if bias is None else found.add_(bias)


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
    plan = _plan_for(lm_head, hidden.shape[0])
    if plan is None:
        return original(processor, hidden, lm_head, bias, **buffer)
    weight = lm_head.weight
    return run_in_class(
        plan,
        hidden,
        lambda piece: original(processor, piece, lm_head, bias),
        lambda piece: invariant_matmul(piece.to(weight.dtype), weight=weight, bias=bias),
    )


def redirect(operators: Mapping[str, Sequence[Operator]], planned: Mapping[int, RowPlan]) -> None:
    """Have calls of modules that SGLang calls themselves, and by no method, come by here first.

    Replaces `forward`, `run_moe_core` or their method's `apply` on these objects, where there is a
    plan for them, and the kernel of shared experts' gates.
    """
    every = [each for same in operators.values() for each in same]
    gates = {
        each.module.weight.data_ptr(): each.module for each in every if isinstance(each, SharedGate)
    }
    if gates:
        fused_gate.replace_kernel(partial(apply_shared_gate, fused_gate.kernel(), gates))
    for operator in every:
        module = operator.module
        if id(module) in planned and isinstance(operator, Plain):
            module.forward = partial(apply_plain, module.forward, module)
        elif id(module) in planned and isinstance(operator, ScoredExperts):
            _redirect_scored(operator.module, operator.call.router)
        elif id(module) in planned and isinstance(operator, Experts):
            instance_patches.check_instance(module, instance_patches.ON_EXPERTS)
            module.run_moe_core = partial(apply_experts, module.run_moe_core, module)
        elif id(module) in planned and isinstance(operator, Quantized):
            method = module.quant_method
            instance_patches.check_instance(method, instance_patches.on_quantized(method))
            method.apply = partial(apply_linear, type(method).apply, method)


def _redirect_scored(module: Any, router: Any) -> None:
    """Experts whose rows are told by their scores, which their router hands on."""
    instance_patches.check_instance(module, instance_patches.ON_EXPERTS)
    instance_patches.check_instance(router, instance_patches.ON_ROUTERS)
    module.run_moe_core = partial(apply_scored, module.run_moe_core, (module, router))
    router.forward = partial(hand_on_scores, router.forward)


def apply_plain(original: Any, module: Any, x: torch.Tensor) -> torch.Tensor:
    """Around the `forward` of a plain linear layer."""
    plan = _plan_for(module, x.shape[0]) if x.dim() == 2 else None
    if plan is None:
        unplanned: torch.Tensor = original(x)
        return unplanned
    return run_in_class(plan, x, original)


def apply_experts(original: Any, module: Any, dispatch_output: Any) -> Any:
    """Around the `run_moe_core` of experts, whose tokens stay on their rank."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

    hidden = dispatch_output.hidden_states
    plan = _plan_for(module, len(hidden)) if len(hidden) else None
    if plan is None:
        return original(dispatch_output=dispatch_output)
    inputs = Rows(tuple(routing_tensors("experts", hidden, dispatch_output.topk_output)))
    return StandardCombineInput(run_in_class(plan, inputs, partial(call_experts, original)))


def hand_on_scores(
    original: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, **more: Any
) -> Any:
    """Around the `forward` of a router whose choice has no row axis."""
    found = original(hidden_states, router_logits, **more)
    return mxfp4.with_scores(found, router_logits) if mxfp4.is_table(found) else found


def apply_scored(original: Any, pair: tuple[Any, Any], dispatch_output: Any) -> Any:
    """Around the `run_moe_core` of experts, of the pair (experts, router): a piece is routed anew.

    Raises:
        RuntimeError: the choice comes from elsewhere.
    """
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

    (module, router), hidden = pair, dispatch_output.hidden_states
    scores = mxfp4.scores_of(dispatch_output.topk_output)
    plan = _plan_for(module, len(hidden)) if len(hidden) else None
    if plan is None:
        return original(dispatch_output=dispatch_output)
    call = partial(call_scored, original, router)
    return StandardCombineInput(run_in_class(plan, Rows((hidden, scores)), call))


def apply_shared_gate(
    kernel: fused_gate.Kernel,
    gates: Mapping[int, Any],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *more: torch.Tensor,
) -> None:
    """Around the kernel of `fused_gate`, whose last argument [rows, hidden] it adds to."""
    plan = _plan_for(_gate_of(weight, gates), hidden.shape[0])
    if plan is None:
        kernel(hidden, weight, *more)
        return
    operator = partial(call_shared_gate, kernel, weight)
    more[-1].copy_(run_in_class(plan, Rows((hidden, *more)).clone(), operator))


def _gate_of(weight: torch.Tensor, gates: Mapping[int, Any]) -> Any:
    """The layer that a kernel reads this weight of; an update may have moved it."""
    address = weight.data_ptr()
    found = gates.get(address)
    if found is not None and found.weight.data_ptr() == address:
        return found
    for gate in gates.values():
        if gate.weight.data_ptr() == address:
            return gate
    raise RuntimeError("a kernel reads a shared expert's gate that was not measured at start")


def run_in_class(
    plan: RowPlan, x: Inputs, operator: Run, kernel: Run | None = None
) -> torch.Tensor:
    """The operator's results of the rows of `x`, by calls within the class.

    Args:
        kernel: the batch-invariant one; None for a plan without it.
    """
    outputs = []
    for start, stop, made, by_kernel in plan.calls(len(x)):
        piece, rows = x[start:stop], stop - start
        piece = _with_room(piece, made) if made > rows else _aligned(piece)
        call = kernel if by_kernel else operator
        assert call is not None, f"{plan} needs the batch-invariant kernel"
        outputs.append(call(piece)[:rows])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _with_room(piece: Inputs, made: int) -> Inputs:
    """`made` rows. Rows leave each other alone, whatever is in the unused ones."""
    if isinstance(piece, Rows):
        return piece.padded(made)
    room = piece.new_empty(made, *piece.shape[1:])
    room[: len(piece)].copy_(piece)
    return room


def _aligned(piece: Inputs) -> Inputs:
    """A library may look at the address; inputs are measured aligned."""
    parts = piece.parts if isinstance(piece, Rows) else (piece,)
    return piece.clone() if any(part.data_ptr() % ALIGNED for part in parts) else piece
