"""Operators of a mixture of experts: the router's choice, the experts, and a shared expert's gate.

A row of experts carries its routing: which experts it goes to, with which weights. The rows of an
expert's product are those that chose it, so neighbours decide their number, and the number of rows
of the forward alone says nothing of it. Hence the samples: some rows choose at random, some all
the same experts, and one has an expert for itself; and each row count is also tried with a row
whose neighbours all choose its experts, and with one whose neighbours choose none of them. Experts
in FP8 round their inputs: there the neighbours are much larger too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch

from margingate.runtime.compat.compute import marlin, mxfp4, quantization
from margingate.runtime.compat.compute.routers import routed_experts
from margingate.runtime.probe.operators import fused_gate
from margingate.runtime.probe.operators.observed_calls import Observed, ObservedRows, choice_of
from margingate.runtime.probe.operators.operator import LOUD, SEED, Inputs, Operator, normal_rows

CROWD = 4  # every so many rows of a sample, one chooses the same experts as all such rows
SATURATING = 16.0  # times the usual scale of a router's scores
ALONE = 3  # the row of a sample that has an expert for itself

# Of SGLang's MoeRunnerConfig: what an expert's results depend on.
CONFIGURED = (
    *("runner_backend", "activation", "is_gated", "apply_router_weight_on_input", "no_combine"),
    *("no_combine_keep_router_weight", "routed_scaling_factor", "gemm1_alpha", "gemm1_beta"),
    *("gemm1_clamp_limit", "swiglu_limit", "gate_up_interleaved", "use_tp_all_gather_activation"),
    *("num_fused_shared_experts", "inplace"),
)


@dataclass(frozen=True)
class Rows:
    """Tensors with one row axis, [rows, ...] each."""

    parts: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: Any) -> Rows:
        return Rows(tuple(part[index] for part in self.parts))

    def clone(self) -> Rows:
        """Tensors of their own."""
        return Rows(tuple(part.clone() for part in self.parts))

    def padded(self, rows: int) -> Rows:
        """`rows` rows: the first one repeats behind these, so that no other expert is asked."""
        more = (part[:1].expand(rows - len(part), *part.shape[1:]) for part in self.parts)
        return Rows(tuple(torch.cat(each) for each in zip(self.parts, more, strict=True)))


def together(*some: Rows) -> Rows:
    """The rows of all, in this order."""
    return Rows(tuple(torch.cat(parts) for parts in zip(*(one.parts for one in some), strict=True)))


@dataclass(frozen=True)
class Routed(Operator):
    """An operator of several tensors with a row axis."""

    call: ObservedRows

    def normal(self, rows: int, part: int) -> torch.Tensor:
        """Made-up values of one of the tensors, [rows, width]."""
        width, dtype = self.call.parts[part]
        like = torch.empty(0, dtype=dtype, device=self.device)
        return normal_rows(rows, width, like, SEED + part)

    def sample(self, rows: int) -> Rows:
        return Rows(tuple(self.normal(rows, part) for part, _ in enumerate(self.call.parts)))

    @property
    def device(self) -> torch.device:
        return self.call.device

    @property
    def row_elements(self) -> int:
        return sum(width for width, _ in self.call.parts)

    @property
    def signature(self) -> str:
        return f"{super().signature}, {self.call}"


@dataclass(frozen=True)
class Router(Routed):
    """SGLang's TopK: which experts a row goes to, and with which weights. Nothing keeps it."""

    kind: ClassVar[str] = "router"
    must_agree: ClassVar[bool] = True

    @property
    def is_replicated(self) -> bool:
        return True

    def sample(self, rows: int) -> Rows:
        """Scores of every other row are so large that they may saturate, and tie."""
        hidden, *scores = super().sample(rows).parts
        scores[-1][1::2] *= SATURATING
        return Rows((hidden, *scores))

    def run(self, inputs: Inputs) -> torch.Tensor:
        weights, ids = choice_of(self.name, self.module(*inputs.clone().parts))
        return torch.cat([weights.float(), ids.float()], dim=-1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.call.parts[-1][0], int(self.module.topk_config.top_k))

    @property
    def signature(self) -> str:
        topk_config = self.module.topk_config
        values = (
            *(topk_config.renormalize, topk_config.use_grouped_topk, topk_config.topk_group),
            *(topk_config.num_expert_group, topk_config.scoring_func),
            *(topk_config.routed_scaling_factor, topk_config.output_format),
            *(routed_experts(topk_config), topk_config.custom_routing_function),
            topk_config.apply_routed_scaling_factor_on_output,
        )
        biased = " biased" if topk_config.correction_bias is not None else ""
        return f"{super().signature} {' '.join(map(str, values))}{biased}"


@dataclass(frozen=True)
class Experts(Routed):
    """SGLang's FusedMoE, of rows [hidden], their k weights and ids, and the router's logits.

    The sum over tensor-parallel ranks comes after it, once, whatever pieces each rank runs.
    """

    kind: ClassVar[str] = "experts"
    is_planned: ClassVar[bool] = True
    is_capped: ClassVar[bool] = True
    instead: ClassVar[str] = (
        "serve packed experts by Triton (--quantization moe_wna16 for GPTQ, --moe-runner-backend "
        "triton for compressed-tensors)"
    )

    def sample(self, rows: int) -> Rows:
        return self.routed(self._choices(rows))

    def samples(self, rows: int) -> list[Inputs]:
        """A crowd besides: all rows choose the same experts, so that each place of one is taken."""
        mixed = self.sample(rows)
        return [mixed, self.routed(self.chosen_by(mixed)[:1].expand(rows, -1).contiguous())]

    def run(self, inputs: Inputs) -> torch.Tensor:
        return call_experts(self.module.run_moe_core, inputs.clone())

    def company(self, sample: Inputs, row: int, count: int) -> list[tuple[Inputs, int]]:
        """Among rows that all choose its experts; among rows that choose none of them.

        And among both where they are much larger, if the experts round them: a scale that they
        share would round the row away.
        """
        place, one = row % count, sample[row : row + 1]
        others = sample[self._indices(count) % len(sample)]
        taken = self.chosen_by(one)
        choices = (taken.expand(count, -1), self._others(taken[0], count))
        found: list[tuple[Inputs, int]] = []
        for size, ids in product((1, LOUD) if self.rounds_rows else (1,), choices):
            hidden, *more = self.choosing(others, ids).parts
            beside = Rows((hidden * size, *more))
            found.append((together(beside[:place], one, beside[place + 1 :]), place))
        return found

    def chosen_by(self, rows: Rows) -> torch.Tensor:
        """[rows, k] experts that these rows go to."""
        return rows.parts[2]

    def choosing(self, rows: Rows, ids: torch.Tensor) -> Rows:
        """These rows with a choice [rows, k] of other experts."""
        hidden, weights, before, *more = rows.parts
        return Rows((hidden, weights, ids.to(before), *more))

    @property
    def rounds_rows(self) -> bool:
        """Whether inputs are rounded, by scales that they may share."""
        return quantization.are_rounded(self.module)

    @property
    def chosen(self) -> int:
        """How many experts a row goes to."""
        return self.call.parts[2][0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts on this rank, outputs of the first product, and inputs."""
        experts, outputs, inputs = self.module.w13_weight.shape
        return experts, outputs, inputs

    @property
    def experts(self) -> int:
        """How many there are on this rank."""
        return self.sizes[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.sizes, self.chosen)

    @property
    def row_elements(self) -> int:
        _, outputs, inputs = self.sizes
        return super().row_elements + self.chosen * (2 * outputs + inputs)

    @property
    def signature(self) -> str:
        module, config = self.module, self.module.moe_runner_config
        values = [str(getattr(config, name, None)) for name in CONFIGURED]
        biased = getattr(module, "w13_weight_bias", None) is not None
        return f"{super().signature} {self.described} {' '.join(values)}{' biased' * biased}"

    @property
    def described(self) -> str:
        """What chooses the kernels of the weights."""
        module = self.module
        said = f"{list(module.w2_weight.shape)} {type(module.quant_method).__name__}"
        rounded = f" {quantization.describe_experts(module)}" if self.rounds_rows else ""
        return f"{said} {module.w13_weight.dtype}{rounded}"

    def routed(self, ids: torch.Tensor) -> Rows:
        """Rows with these choices [rows, k]; their other parts depend on the row's index alone."""
        rows, dtypes = len(ids), [dtype for _, dtype in self.call.parts]
        weights = torch.softmax(self.normal(rows, 1).float(), dim=-1).to(dtypes[1])
        more = tuple(self.normal(rows, part) for part in range(3, len(dtypes)))
        return Rows((self.normal(rows, 0), weights, ids.to(self.device, dtypes[2]), *more))

    def _choices(self, rows: int) -> torch.Tensor:
        """[rows, k] distinct experts: at random, all the same ones, or one of its own."""
        wanted, last = self.chosen, self.experts - 1
        generator = torch.Generator().manual_seed(SEED)
        free = max(last, wanted)  # the last one is kept for one row, where there are enough
        ids = torch.rand(rows, free, generator=generator).argsort(dim=-1)[:, :wanted]
        ids[::CROWD] = torch.arange(wanted)
        ids[ALONE : ALONE + 1, 0] = last
        return ids

    def _others(self, taken: torch.Tensor, rows: int) -> torch.Tensor:
        """[rows, k] experts that are not among `taken`, as far as there are enough."""
        free = torch.ones(self.experts, dtype=torch.bool, device=self.device)
        free[taken.long()] = False
        rest = torch.cat([free.nonzero().flatten(), taken.long()])
        rest = rest[: max(len(taken), self.experts - len(taken))]
        first = self._indices(rows)[:, None] * len(taken)
        return rest[(first + self._indices(len(taken))) % len(rest)]

    def _indices(self, count: int) -> torch.Tensor:
        return torch.arange(count, device=self.device)


@dataclass(frozen=True)
class PackedExperts(Experts):
    """Experts that Marlin, or a Triton kernel, unpacks the weights of; rows stay as they are.

    Marlin's blocks share out the sums over inputs by how many experts the rows of a forward choose,
    and by which: of more than one row each may depend on the others. A tile of Triton's has all of
    a sum.
    """

    @property
    def rounds_rows(self) -> bool:
        return False

    @property
    def sizes(self) -> tuple[int, int, int]:
        return marlin.experts_shape(self.module)

    @property
    def described(self) -> str:
        return marlin.describe_experts(self.module)


@dataclass(frozen=True)
class SharedGate(Routed):
    """A shared expert's gate where one kernel multiplies by it and adds to the experts' rows."""

    kind: ClassVar[str] = "shared gate"
    is_planned: ClassVar[bool] = True

    def run(self, inputs: Inputs) -> torch.Tensor:
        return call_shared_gate(fused_gate.kernel(), self.module.weight, inputs.clone())


def call_shared_gate(kernel: Any, weight: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The last part, to which the kernel of `fused_gate` has added in place."""
    hidden, shared, result = rows.parts
    kernel(hidden, weight.squeeze(), shared, result)
    return result


def call_experts(run_moe_core: Any, rows: Rows) -> torch.Tensor:
    """Results [rows, hidden] of a FusedMoE's `run_moe_core`, before ranks add theirs."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    hidden, weights, ids, *logits = rows.parts
    chosen = StandardTopKOutput(weights, ids, logits[0] if logits else None)
    dispatched = StandardDispatchOutput(hidden, None, chosen)
    result: torch.Tensor = run_moe_core(dispatch_output=dispatched).hidden_states
    return result


def routed_operators(model: Any, seen: Mapping[int, Observed]) -> Iterator[Operator]:
    """Routers, gates of shared experts, and experts of a known kind, that a forward called."""
    kinds = {"TopK": Router, "Linear": SharedGate}
    for name, module in model.named_modules():
        call = seen.get(id(module))
        if not isinstance(call, ObservedRows) or call.router is not None:
            continue
        if kind := kinds.get(type(module).__name__):
            yield kind(name, module, call)
        elif quantization.are_known(module) or mxfp4.are_widened(module):
            yield Experts(name, module, call)
        elif marlin.are_experts_by_triton(module) or (
            marlin.are_experts(module) and marlin.experts_are_served()
        ):
            yield PackedExperts(name, module, call)
