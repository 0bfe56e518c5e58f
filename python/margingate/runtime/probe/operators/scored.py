"""Experts in MXFP4, whose choice is one table of all rows: an operator of rows and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from margingate.runtime.compat.compute import mxfp4
from margingate.runtime.compat.compute.routers import routed_experts
from margingate.runtime.probe.operators import tile_heights
from margingate.runtime.probe.operators.observed_calls import Observed, ObservedRows
from margingate.runtime.probe.operators.operator import Inputs, Operator
from margingate.runtime.probe.operators.routed import Experts, Rows

BELOW = 16.0  # scores of experts that a row does not choose, under what they would be


@dataclass(frozen=True)
class ScoredExperts(Experts):
    """SGLang's FusedMoE, of rows [hidden] and the router's scores [experts] of each.

    Its choice of experts is made inside: SGLang's TopK hands over one table of all rows, sorted by
    expert, and no part of it is a row's.
    """

    def run(self, inputs: Inputs) -> torch.Tensor:
        return call_scored(self.module.run_moe_core, self.call.router, inputs.clone())

    def routed(self, ids: torch.Tensor) -> Rows:
        """As of Experts; the scores are such that these are chosen."""
        return self.choosing(Rows((self.normal(len(ids), 0),)), ids)

    def chosen_by(self, rows: Rows) -> torch.Tensor:
        return rows.parts[1].float().topk(self.chosen).indices

    def choosing(self, rows: Rows, ids: torch.Tensor) -> Rows:
        scores, ids = self.normal(len(ids), 1), ids.to(self.device, torch.int64)
        # The lower ones give way, since numbers near zero are finer.
        found = (scores - BELOW).scatter(1, ids, scores.gather(1, ids))
        return Rows((rows.parts[0], found))

    @property
    def rounds_rows(self) -> bool:
        return False

    @property
    def chosen(self) -> int:
        return routed_experts(self.call.router.topk_config)

    @property
    def sizes(self) -> tuple[int, int, int]:
        experts, inputs, outputs = mxfp4.shapes(self.module)[0]
        return experts, outputs, inputs

    @property
    def shape(self) -> tuple[int, ...]:
        return (*mxfp4.shapes(self.module)[0], self.chosen)

    @property
    def described(self) -> str:
        height = tile_heights.of(self.module)
        said = f"{mxfp4.shapes(self.module)[1]} {mxfp4.describe(self.module)}"
        return f"{said}{'' if height is None else f' in tiles of {height} rows'}"


def call_scored(run_moe_core: Any, router: Any, rows: Rows) -> torch.Tensor:
    """Results [rows, hidden] of a FusedMoE's `run_moe_core`, before ranks add theirs.

    Args:
        router: SGLang's TopK, which makes one table of all rows.
        rows: hidden states and scores.
    """
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput

    hidden, scores = rows.parts
    dispatched = StandardDispatchOutput(hidden, None, router(hidden, scores))
    result: torch.Tensor = run_moe_core(dispatch_output=dispatched).hidden_states
    return result


def scored_operators(model: Any, seen: Mapping[int, Observed]) -> Iterator[Operator]:
    """Experts of this kind, that a forward called with a router's table."""
    for name, module in model.named_modules():
        call = seen.get(id(module))
        if not isinstance(call, ObservedRows) or call.router is None:
            continue
        if mxfp4.are_experts(module):
            yield ScoredExperts(name, module, call)
