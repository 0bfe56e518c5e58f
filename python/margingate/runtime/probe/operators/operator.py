"""The operators of a model that are measured at start: whatever has a row axis and parameters.

An operator makes its own inputs, runs any rows of them in one call, and says what else may take its
place. Modules that run the same code on the same shapes and dtypes have one signature, and are
measured once. Routed layers are in `routed`; what runs while the server serves is in `execute`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from margingate.runtime.compat.compute import marlin, marlin_rows, quantization
from margingate.runtime.compat.model import vision
from margingate.runtime.probe.operators.observed_calls import (
    AS_WEIGHT,
    Observed,
    ObservedCall,
    ObservedHead,
)

HEAD = "lm_head"
LOUD = 1024  # times a row's size: FP8 has no room for both
SEED = 20260530  # of the inputs of all measurements at start; arbitrary, and always the same
Inputs = Any  # a tensor [rows, width], or a `routed.Rows`: both have len() and take row indices
Run = Callable[[Inputs], torch.Tensor]  # inputs of n rows -> results [n, outputs], in one call

# By class name: modules that are called with rows and give rows, by a matrix alone.
PLAIN_LAYERS = ("Linear", "Glm4MoeGate")


def normal_rows(rows: int, width: int, like: torch.Tensor, seed: int = SEED) -> torch.Tensor:
    """Made-up inputs [rows, width] of the dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator).to(like)


@dataclass(frozen=True)
class Operator:
    """One module's work on rows. Raises whatever the module raises."""

    name: str  # of the module
    module: Any
    kind: ClassVar[str] = "operator"
    is_planned: ClassVar[bool] = False  # whether something keeps it to row counts: see `execute`
    is_capped: ClassVar[bool] = False  # it may depend on neighbours above some row count
    instead: ClassVar[str] = "serve this model in BF16 or FP8"  # of a capped one with few rows
    must_agree: ClassVar[bool] = False  # whether several classes end the start

    @property
    def sees_prefill(self) -> bool:
        """Whether all rows of a prefill forward reach it."""
        return True

    @property
    def differs_by_place(self) -> bool:
        """Whether few rows of a call may have other bits than the others, by where they are."""
        return False

    @property
    def is_replicated(self) -> bool:
        """Whether each tensor-parallel rank runs all of it, on the same rows."""
        return type(self.module).__name__ == "ReplicatedLinear"

    def sample(self, rows: int) -> Inputs:
        """Made-up inputs as the module gets them."""
        raise NotImplementedError

    def run(self, inputs: Inputs) -> torch.Tensor:
        """Results [rows, outputs] of one call; the inputs are not changed."""
        raise NotImplementedError

    def samples(self, rows: int) -> list[Inputs]:
        """All inputs that row counts are classed by, `sample` first; each of so many rows."""
        return [self.sample(rows)]

    def company(self, sample: Inputs, row: int, count: int) -> list[tuple[Inputs, int]]:
        """Inputs of `count` rows, with row `row` of the sample at the index that is beside them.

        Its neighbours are chosen to disturb it, where more than their number may matter.
        """
        del sample, row, count
        return []

    @property
    def weight(self) -> torch.Tensor | None:
        """[outputs, inputs], where the operator is a product with it and nothing else."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its parameters, for reports."""
        return tuple(self.module.weight.shape)

    @property
    def device(self) -> torch.device:
        """Of its inputs."""
        found: torch.device = self.module.weight.device
        return found

    @property
    def row_elements(self) -> int:
        """Elements that a call needs for each row at most."""
        return sum(self.shape)

    @property
    def signature(self) -> str:
        """The same for modules whose operators are one: layers of a model repeat."""
        return f"{self.kind} {self.name.rsplit('.', 1)[-1]} {list(self.shape)}"


@dataclass(frozen=True)
class Layer(Operator):
    """An operator of one input, with a `weight`."""

    call: ObservedCall = AS_WEIGHT

    @property
    def like(self) -> torch.Tensor:
        """Of the dtype of its inputs, where nothing else was seen, and on their device."""
        found: torch.Tensor = self.module.weight
        return found

    @property
    def device(self) -> torch.device:
        return self.like.device

    def sample(self, rows: int) -> torch.Tensor:
        width = int(self.call.width or self.shape[-1])
        like = torch.empty(0, dtype=self.call.dtype or self.like.dtype, device=self.device)
        return normal_rows(rows, width, like)

    @property
    def signature(self) -> str:
        return f"{super().signature} {self.like.dtype}{self.call}"


@dataclass(frozen=True)
class Linear(Layer):
    """A linear layer, by the method that SGLang applies."""

    kind: ClassVar[str] = "linear"
    is_planned: ClassVar[bool] = True

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        call, method = self.call, self.module.quant_method
        result: torch.Tensor = method.apply(
            self.module, call.laid_out(inputs), call.bias_of(self.module)
        )
        return result.reshape(len(inputs), -1)

    @property
    def weight(self) -> torch.Tensor | None:
        found: torch.Tensor = self.module.weight
        return None if self.call.bias is True else found


@dataclass(frozen=True)
class Quantized(Linear):
    """A linear layer in FP8, whose method rounds its inputs too, with scales that it makes."""

    kind: ClassVar[str] = "quantized linear"

    def company(self, sample: torch.Tensor, row: int, count: int) -> list[tuple[Inputs, int]]:
        """Among rows that are much larger: a scale that they share would round it away."""
        place = row % count
        beside = sample[torch.arange(count, device=sample.device) % len(sample)] * LOUD
        beside[place] = sample[row]
        return [(beside, place)]

    @property
    def weight(self) -> torch.Tensor | None:
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return quantization.shape(self.module)

    @property
    def described(self) -> str:
        """What chooses its kernels."""
        return quantization.describe(self.module)

    @property
    def signature(self) -> str:
        return f"{super().signature} {self.described}"


@dataclass(frozen=True)
class Packed(Quantized):
    """A linear layer that Marlin unpacks the weights of; its inputs stay as they are.

    Above some row count Marlin's blocks share out the sums over inputs by where a row is.
    """

    decodes_only: bool = False  # prefills multiply by its weights unpacked: see `unpacked`
    kind: ClassVar[str] = "packed linear"
    is_capped: ClassVar[bool] = True

    @property
    def sees_prefill(self) -> bool:
        return not self.decodes_only

    @property
    def differs_by_place(self) -> bool:
        """Rows behind the last whole 64 of a call go to a kernel for so many."""
        return self.device.type == "cuda"

    @property
    def like(self) -> torch.Tensor:
        return marlin.scales(self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        return marlin.shape(self.module)

    @property
    def described(self) -> str:
        said = marlin.describe(self.module) + (" in decode" if self.decodes_only else "")
        return f"{said}, in one tile" if marlin_rows.serves(self.module) else said


@dataclass(frozen=True)
class Head(Layer):
    """lm_head, which sees one row a request."""

    processor: Any = None  # SGLang's LogitsProcessor
    kind: ClassVar[str] = "linear"
    is_planned: ClassVar[bool] = True

    @property
    def sees_prefill(self) -> bool:
        return False

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.processor is None:
            return inputs @ self.module.weight.T
        logits: torch.Tensor = self.processor._compute_lm_head(inputs, self.module)
        return logits

    @property
    def is_widened(self) -> bool:
        """Whether it computes in float32 from a weight of another dtype."""
        names = ("use_fp32_lm_head", "use_fp32_lm_head_output")
        return any(getattr(self.processor, name, False) for name in names)

    @property
    def weight(self) -> torch.Tensor | None:
        found: torch.Tensor = self.module.weight
        return None if self.is_widened else found

    @property
    def signature(self) -> str:
        return super().signature + (" in float32" if self.is_widened else "")


@dataclass(frozen=True)
class Plain(Layer):
    """One of PLAIN_LAYERS: a router's linear layer, or the gate of a shared expert."""

    kind: ClassVar[str] = "plain linear"
    is_planned: ClassVar[bool] = True

    @property
    def is_replicated(self) -> bool:
        return True

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.module(self.call.laid_out(inputs))
        return result.reshape(len(inputs), -1)


@dataclass(frozen=True)
class Norm(Layer):
    """A norm, with or without a residual. Nothing keeps it to row counts."""

    kind: ClassVar[str] = "norm"

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        given = self.call.laid_out(inputs.clone())
        if not self.call.residual:
            result: torch.Tensor = self.module(given)
            return result.reshape(len(inputs), -1)
        results = self.module(given, self.call.laid_out(inputs.flip(-1)))
        return torch.cat([part.reshape(len(inputs), -1) for part in results], dim=-1)


@dataclass(frozen=True)
class MadeUp(Operator):
    """Any function of rows [n, width]: a sum over ranks, a kernel in the place of a layer."""

    function: Run = field(kw_only=True)
    width: int = field(kw_only=True)
    like: torch.Tensor = field(kw_only=True)

    def sample(self, rows: int) -> torch.Tensor:
        return normal_rows(rows, self.width, self.like)

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.function(inputs)

    @property
    def device(self) -> torch.device:
        return self.like.device


def dense_operators(model: Any, seen: Mapping[int, Observed]) -> Iterator[Operator]:
    """Every layer and norm of an SGLang model that has one input, lm_head included.

    Args:
        seen: how a forward called each of them, by id of the module.
    """
    from sglang.srt.layers import layernorm
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    of_gemma = (layernorm.GemmaRMSNorm, layernorm.Gemma3RMSNorm)
    norms = (layernorm.RMSNorm, *of_gemma, torch.nn.RMSNorm, torch.nn.LayerNorm)
    for name, module in vision.text_modules(model):
        call = seen.get(id(module), AS_WEIGHT)
        if not isinstance(call, ObservedCall):
            continue
        if isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod):
            yield Linear(name, module, call)
        elif quantization.is_fp8_layer(module):
            yield Quantized(name, module, call)
        elif marlin.is_layer(module):
            yield Packed(name, module, call)
        elif isinstance(module, norms) and isinstance(module.weight, torch.Tensor):
            yield Norm(name, module, call)
        elif type(module).__name__ in PLAIN_LAYERS:
            yield Plain(name, module, call)
    head, processor = _head(model, seen)
    if head is not None and hasattr(head, "weight"):
        yield Head(HEAD, head, processor=processor)


def _head(model: Any, seen: Mapping[int, Observed]) -> tuple[Any, Any]:
    """What makes logits, and SGLang's processor: as a forward did it, or as most models name it."""
    for call in seen.values():
        if isinstance(call, ObservedHead):
            return call.module, call.processor
    return getattr(model, "lm_head", None), getattr(model, "logits_processor", None)
