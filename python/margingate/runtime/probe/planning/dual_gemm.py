"""DualGemm: SGLang's one kernel for gate, up and activation of an MLP, in forwards of few rows.

It goes around the linear layer, so no plan of the layer holds for it. It stays where its rows have
the bits that the layer's plan and the activation give them at every row count, and is switched off
elsewhere: then the layer does the work at all row counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from margingate.config import GateError
from margingate.core.rowclass import RowPlan, spans
from margingate.errors import first_line
from margingate.runtime.compat.arguments.environment import choice
from margingate.runtime.probe.measuring.classes import (
    Finding,
    RowDependenceError,
    probe_operator,
    row_counts,
)
from margingate.runtime.probe.operators.operator import MadeUp
from margingate.runtime.probe.planning.execute import differs_in_prefill

logger = logging.getLogger(__name__)

KIND = "dual gemm"
# For benchmarks: `keep` and `off` leave the bits out. Steps of other bits are not canonical then.
FORCED = "MARGINGATE_DUAL_GEMM"


@dataclass(frozen=True)
class FusedMlp:
    """An MLP whose gate, up and activation may run in one kernel."""

    name: str  # of the MLP
    mlp: Any
    kernel: Any  # SGLang's DualGemm

    @property
    def weight(self) -> torch.Tensor:
        """Of gate and up, [2 x inner size, width]."""
        found: torch.Tensor = self.mlp.gate_up_proj.weight
        return found

    @property
    def most(self) -> int:
        """Row counts up to this are the kernel's."""
        return int(self.kernel.max_tokens)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the MLP does with x [rows, width] before its last layer."""
        if self.kernel.can_run(x, self.mlp.gate_up_proj):
            fused: torch.Tensor = self.kernel(x, self.mlp.gate_up_proj)
            return fused
        return self.by_layers(x)

    def by_layers(self, x: torch.Tensor) -> torch.Tensor:
        """The same without the kernel."""
        result: torch.Tensor = self.mlp.act_fn(self.mlp.gate_up_proj(x)[0])
        return result


def members(model: Any) -> Iterator[FusedMlp]:
    """The MLPs whose kernel is on.

    Raises:
        GateError: one is in a module that is not built as SGLang's own MLPs are.
    """
    from sglang.srt.layers.dual_gemm import DualGemm

    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, DualGemm) or value.mode is None:
                continue
            if not (hasattr(module, "gate_up_proj") and hasattr(module, "act_fn")):
                raise GateError(
                    f"--deterministic-gate cannot measure {name}.{attribute}, a DualGemm in a "
                    f"{type(module).__name__} without gate_up_proj and act_fn: serve this model "
                    "without the flag."
                )
            yield FusedMlp(name, module, value)


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Meanwhile all row counts are the layers', which are then seen to be called."""
    kernels = [member.kernel for member in members(model)]
    modes = [kernel.mode for kernel in kernels]
    for kernel in kernels:
        kernel.mode = None
    try:
        yield
    finally:
        for kernel, mode in zip(kernels, modes, strict=True):
            kernel.mode = mode


def settle(model: Any, *, prefill: bool) -> list[Finding]:
    """Measure each distinct kernel once, and switch those off whose bits are others.

    After the layers' plans are in place, which is what their rows are compared with.

    Args:
        prefill: whether prefill is planned for; the layers' own plans say whether it holds.
    """
    groups: dict[tuple[Any, ...], list[FusedMlp]] = {}
    for member in members(model):
        key = (*member.weight.shape, member.weight.dtype, member.most)
        groups.setdefault(key, []).append(member)
    return [_settled(same, prefill) for same in groups.values()]


def _settled(same: Sequence[FusedMlp], prefill: bool) -> Finding:
    start, first = time.monotonic(), same[0]
    classes = _classes(first)
    wanted = choice(FORCED, ("measure", "keep", "off"))
    same_bits = len(set(classes.values())) == 1
    same_bits &= not differs_in_prefill(first.mlp.gate_up_proj)
    keeps = wanted == "keep" or (wanted == "measure" and same_bits)
    if not keeps:
        logger.info("margingate: DualGemm is off: its rows have other bits than the layers'.")
        for member in same:
            member.kernel.mode = None
    plan = RowPlan(spans(range(1, first.most + 1))) if keeps else None
    seconds = time.monotonic() - start
    name, shape = f"{first.name}.dual_gemm", tuple(first.weight.shape)
    return Finding(KIND, name, shape, len(same), classes, plan, seconds, prefill)


def _classes(first: FusedMlp) -> dict[int, int]:
    """Classes of the row counts up to the first that is the layers'.

    A row count at which the kernel does not give the layers' own results is in none of theirs.
    """
    most, width, weight = first.most, first.weight.shape[-1], first.weight
    counts = row_counts(most + 1)
    with torch.inference_mode():
        try:
            operator = MadeUp(first.name, first.mlp, function=first, width=width, like=weight)
            found = probe_operator(operator, counts)
        except RowDependenceError as error:
            logger.info("margingate: a row of DualGemm depends on the other %d.", error.rows - 1)
            return {count: min(count - 1, 1) for count in counts}
        except RuntimeError as error:
            logger.info("margingate: DualGemm does not run: %s", first_line(error))
            return {count: int(count > most) for count in counts}
        for count in [count for count in counts[:-1] if found[count] == found[most + 1]]:
            sample = torch.randn(count, width, device=weight.device).to(weight.dtype)
            if not torch.equal(first(sample), first.by_layers(sample)):
                found[count] = max(found.values()) + 1
    return found
