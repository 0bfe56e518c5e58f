"""`--gate-fast-path invariant`: the decode step itself becomes canonical, at almost no cost.

Linear layers whose bits depend on the number of rows are padded up to, or run in pieces of, one
class of row counts; decode attention gets a split of the K/V that depends on the length alone.
Whether that is enough is then measured on the whole model: only row counts whose rows have the
verifier's bits count as canonical.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from margingate.core.rowclass import RowPlan
from margingate.runtime import attention, probe, probe_cache
from margingate.runtime.arguments import gate_config
from margingate.runtime.probe_attention import probe_attention

logger = logging.getLogger(__name__)

LARGEST = {"cpu": 64}  # rows up to which linear layers are probed and planned, by device
LARGEST_ON_GPU = 256

_plans: dict[int, RowPlan] = {}
_limit = LARGEST_ON_GPU  # of this process's device
_findings: list[probe.Finding] = []


def largest_rows(device: str) -> int:
    """Row counts above this are left alone, and their steps are not canonical."""
    return LARGEST.get(device, LARGEST_ON_GPU)


def records() -> list[dict[str, Any]]:
    """What the probe of this process found, for JSON; empty on the stock fast path."""
    return [finding.record() for finding in _findings]


def before_graphs(runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE ModelRunner.init_cuda_graphs: plan the operators that the graphs will hold."""
    if runner.is_draft_worker:
        return
    global _limit  # noqa: PLW0603
    _limit = largest_rows(runner.device)
    attention.fix_split(runner.attn_backend)
    config = gate_config(runner.server_args)
    operators = probe.groups(runner.model)
    _findings[:] = _find(runner, operators, fresh=config is not None and config.probe == "fresh")
    _plans.update(probe.plans(operators, _findings))


def _find(
    runner: Any, operators: dict[str, list[probe.Member]], *, fresh: bool
) -> list[probe.Finding]:
    """Findings of an earlier start on the same machine with the same versions, or new ones."""
    key = probe_cache.identity(runner, operators, _limit)
    found = None if fresh else probe_cache.load(key)
    source = f"from {probe_cache.path(key)}"
    if found is None:
        source = "measured now"
        found = probe.probe_groups(operators, _limit)
        found += probe_attention(runner, probe.row_counts(_limit))
        probe_cache.save(key, found)
    logger.info("margingate: rows that give one row the same bits, %s:", source)
    for finding in found:
        logger.info("margingate: %s", finding)
    return found


def apply_linear(original: Any, method: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> Any:
    """AROUND UnquantizedLinearMethod.apply: stay within the operator's class of row counts."""
    plan = _plans.get(id(layer))
    if plan is None or x.dim() != 2 or x.shape[0] > _limit or plan.holds(x.shape[0]):
        return original(method, layer, x, bias)  # more rows: a prefill, canonical by its shape
    if plan.own_kernel:
        return probe.invariant_matmul(x, weight=layer.weight, bias=bias)
    return _in_class(plan, x, lambda piece: original(method, layer, piece, bias))


def compute_lm_head(
    original: Any, processor: Any, hidden: torch.Tensor, lm_head: Any, bias: Any = None
) -> Any:
    """AROUND LogitsProcessor._compute_lm_head."""
    plan = _plans.get(id(lm_head))
    if plan is None or hidden.shape[0] > _limit or plan.holds(hidden.shape[0]):
        return original(processor, hidden, lm_head, bias)
    if plan.own_kernel:
        weight = lm_head.weight
        return probe.invariant_matmul(hidden.to(weight.dtype), weight=weight, bias=bias)
    return _in_class(plan, hidden, lambda piece: original(processor, piece, lm_head, bias))


def _in_class(plan: RowPlan, x: torch.Tensor, operator: probe.Operator) -> torch.Tensor:
    outputs = []
    for start, stop in plan.pieces(x.shape[0]):
        piece, missing = x[start:stop], plan.low - (stop - start)
        if missing > 0:
            piece = torch.nn.functional.pad(piece, (0, 0, 0, missing))
        outputs.append(operator(piece)[: stop - start])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
