"""`--gate-fast-path invariant`: what makes the decode step itself canonical, measured at start.

Linear layers whose bits depend on the number of rows are padded up to, or run in pieces of, one
class of row counts; decode attention gets a split of the K/V that depends on the length alone.
Whether that is enough is then measured on the whole model: only row counts whose rows have the
verifier's bits count as canonical.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from margingate.config import GateConfig, GateError
from margingate.runtime.attention import fixed_split, invariant_attention
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.arguments.server_args import gate_config
from margingate.runtime.compat.compute.routers import use_linear_kernels
from margingate.runtime.compat.kv import routed_experts
from margingate.runtime.compat.process import ranks, replicas
from margingate.runtime.probe.checks import loaded_model
from margingate.runtime.probe.measuring import cache, classes
from margingate.runtime.probe.measuring.attention_operator import probe_attention
from margingate.runtime.probe.measuring.classes import Finding
from margingate.runtime.probe.operators import marlin_tiles, tile_heights, unpacked
from margingate.runtime.probe.operators.observed_calls import (
    ROWS,
    Observed,
    observing,
    refuse_bypassed,
    refuse_unmeasured,
)
from margingate.runtime.probe.operators.operator import HEAD, Operator
from margingate.runtime.probe.operators.routed import Experts, Router
from margingate.runtime.probe.planning import (
    all_reduce,
    dual_gemm,
    execute,
    invariant_kernel,
    plans,
    shared_plans,
)
from margingate.runtime.probe.planning.capped import decodes_only
from margingate.runtime.verify.verifier import RowInput, Verifier, places, scratch_rows

logger = logging.getLogger(__name__)

LARGEST = {"cpu": 64}  # rows up to which linear layers are probed and planned, by device
LARGEST_ON_GPU = 256

MOST_PREFILLED = 16384  # rows of a prefill up to which layers are probed; more run in pieces

_findings: list[classes.Finding] = []


def largest_rows(device: str) -> int:
    """Row counts above this are left alone, and their steps are not canonical."""
    return LARGEST.get(device, LARGEST_ON_GPU)


def records() -> list[dict[str, Any]]:
    """What the probe of this process found, for JSON; empty on the stock fast path."""
    return [finding.record() for finding in _findings]


@routed_experts.unrecorded()
def before_graphs(runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE ModelRunner.init_cuda_graphs: plan the operators that the graphs will hold."""
    if runner.is_draft_worker:
        return
    loaded_model.refuse(runner)  # before minutes of measuring
    config, decoded = gate_config(runner.server_args), largest_rows(runner.device)
    fixed_split.fix_split(runner.attn_backend, runner)
    operators = _operators(runner)
    prefill = _prefill_counts(runner, config, operators, decoded)
    fresh = config is not None and config.probe == "fresh"
    _findings[:] = _find(runner, operators, decoded, prefill, fresh=fresh)
    _plan(runner, operators, decoded, prefill)


def _operators(runner: Any) -> dict[str, list[Operator]]:
    """The operators that a first decode step calls, by kind. Raises GateError for unknown ones."""
    use_linear_kernels(runner.model)
    logger.info(
        "margingate: runs a first decode step; kernels that this machine has not compiled yet, as "
        "Marlin's for AWQ and GPTQ, can take minutes."
    )
    seen = observe(runner)
    operators = classes.groups(runner.model, seen)
    refuse_unknown(runner.model, operators, seen)
    if any([tile_heights.settle(operators), marlin_tiles.settle(operators)]):  # both
        operators = classes.groups(runner.model, seen)
    return unpacked.settle(runner.model, operators)


def _plan(
    runner: Any, operators: dict[str, list[Operator]], decoded: int, prefill: list[int]
) -> None:
    """From what was found of operators: how each is run from here on, up to which row count.

    All-reduce and the dual GEMM are measured here, within the plans, and their findings added.
    """
    summed = all_reduce.settle(runner, classes.row_counts(decoded), prefill)
    for finding in summed:
        logger.info("margingate: %s", finding)
    _findings.extend(summed)
    planned, limit = plans.plans(operators, _findings), float(decoded)
    probed = {finding.name for finding in _findings}
    holds = bool(prefill) and HEAD in probed and hold_for_prefill(_findings, max(prefill))
    execute.keep_to(planned, limit)
    if holds:
        execute.keep_prefills_to(runner.model, plans.prefill_plans(operators, _findings))
    execute.redirect(operators, planned)
    _settle_dual_gemm(runner, bool(prefill))
    if holds:
        limit = math.inf
    if not invariant_kernel.settle_kernels(operators, planned, decoded):
        logger.warning(
            "margingate: the batch-invariant matmul gives a row other bits at some row counts of "
            "prefill: gated prompts are prefilled one at a time."
        )
        limit = decoded
    execute.keep_to(planned, limit)
    unpacked.release()


def hold_for_prefill(findings: Sequence[Finding], largest: int) -> bool:
    """Whether all operators have one class in prefills; a warning names those that have not."""
    apart = [finding.name for finding in findings if not finding.prefill]
    if apart:
        logger.warning(
            "margingate: nothing keeps %s to one class in prefills of up to %d rows: gated prompts "
            "are prefilled one at a time and answers are not cached; choose a "
            "--chunked-prefill-size up to which the list above has one class.",
            ", ".join(apart),
            largest,
        )
    return not apart


def refuse_unknown(
    model: Any, operators: dict[str, list[Operator]], seen: dict[int, Observed]
) -> None:
    """Raises GateError for parameters that no measured operator, or another besides, works with."""
    members = [member for same in operators.values() for member in same]
    refuse_unmeasured(model, {id(member.module) for member in members})
    planned = (each for each in members if each.is_planned and each.name != HEAD)
    refuse_bypassed(((each.name, each.module) for each in planned), seen)
    experts = [each.name for each in members if isinstance(each, Experts)]
    if len(experts) > sum(isinstance(each, Router) for each in members):
        raise GateError(
            f"--deterministic-gate cannot measure how {experts[-1]} and others get their rows, "
            "because not each has a TopK that a decode step calls: serve this model without the "
            "flag."
        )


def _settle_dual_gemm(runner: Any, prefill: bool) -> None:
    """After the plans: the kernel stays where its rows have the bits that these give."""
    for finding in dual_gemm.settle(runner.model, prefill=prefill):
        logger.info("margingate: %s", finding)
        _findings.append(finding)


def _prefill_counts(
    runner: Any,
    config: GateConfig | None,
    operators: dict[str, list[Operator]],
    decoded: int,
) -> list[int]:
    """The row counts of prefill to probe; none where prompts are prefilled one by one."""
    if (
        invariant_attention.of(runner.attn_backend) is None
        or config is None
        or config.prefill == "alone"
    ):
        return []
    args = settings.view(runner.server_args)
    chunk = args.chunked_prefill_size or -1
    largest = chunk if chunk > 0 else args.max_prefill_tokens
    largest = min(ranks.of_all(min(largest, _rows_in_memory(operators))))
    largest = min(replicas.of_all(runner.server_args, "rows_in_memory", largest))
    graphs = args.cuda_graph_config.prefill.bs or ()
    return classes.prefill_counts(decoded, max(decoded + 1, min(largest, MOST_PREFILLED)), graphs)


def observe(runner: Any) -> dict[int, Observed]:
    """How a decode step calls each module. Writes to slots that are free, before the first request.

    Norms that it does not call are measured as their weights suggest; the check of the whole model
    runs them as they are. Raises GateError where the server runs fewer requests than are observed.
    """
    requests = places(runner, runner.attn_backend)
    if requests < ROWS:
        raise GateError(
            f"--max-running-requests lets the server run {requests} requests at once, but the step "
            f"that is measured at start has {ROWS}: give {ROWS} or more."
        )
    rows = [RowInput(1, position, 3 + position) for position in range(ROWS)]
    with (
        dual_gemm.switched_off(runner.model),
        observing(runner.model, ROWS) as seen,
        scratch_rows(runner, ROWS),
    ):
        Verifier(runner, ROWS).forward(rows, ROWS)
    return seen


def _decode_graphs(runner: Any) -> list[int]:
    """Row counts of the decode graphs that will be made."""
    config = settings.view(runner.server_args).cuda_graph_config
    return sorted(config.decode.bs or ()) if runner.device == "cuda" else []


def _busiest(runner: Any, operators: dict[str, list[Operator]], decoded: int) -> int:
    """Rows of the largest decode step, where plans of some operators depend on it; else `decoded`.

    A step has a row a request. All replicas ask, as an operator may be another in some: one that
    did not would have the others wait, and not say what differs.
    """
    requests = min(ranks.of_all(min(decoded, places(runner, runner.attn_backend))))
    requests = int(min(replicas.of_all(runner.server_args, "busiest", requests)))
    return requests if any(decodes_only(same[0]) for same in operators.values()) else decoded


def _rows_in_memory(operators: dict[str, list[Operator]]) -> int:
    """A power of two of rows that any operator can be run with in the memory that is free."""
    first = [same[0] for same in operators.values()]
    planned = [each for each in first if each.is_planned and each.sees_prefill]
    widest = max((each.row_elements for each in planned), default=1)
    free, _ = torch.cuda.mem_get_info()
    return 1 << max(free // (2 * 2 * widest), 1).bit_length() - 1


def _find(
    runner: Any,
    operators: dict[str, list[Operator]],
    decoded: int,
    prefill: Sequence[int],
    *,
    fresh: bool,
) -> list[classes.Finding]:
    """Findings of an earlier start on the same machine with the same versions, or new ones."""
    graphs, busiest = _decode_graphs(runner), _busiest(runner, operators, decoded)
    key = cache.identity(runner, operators, decoded, prefill, graphs, busiest=busiest)
    source = "as the first replica found"

    def find() -> list[classes.Finding]:
        nonlocal source
        source = f"from {cache.path(key)}"
        if (kept := None if fresh else cache.load(key)) is not None:
            return kept
        source = "measured now"
        logger.info(
            "margingate: measuring %d kinds of operators; kernels that this machine has not "
            "compiled yet can take minutes.",
            len(operators),
        )
        made = plans.probe_groups(operators, decoded, prefill, graphs, busiest)
        made += probe_attention(runner, classes.row_counts(decoded))
        cache.save(key, made)
        return made

    found = shared_plans.of_first_replica(runner.server_args, key, find)
    found = shared_plans.of_all_ranks(found, ranks.of_all(found), operators)
    logger.info("margingate: rows that give one row the same bits, %s:", source)
    for finding in found:
        logger.info("margingate: %s", finding)
    return found
