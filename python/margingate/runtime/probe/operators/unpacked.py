"""Prefills of layers by Marlin: products with weights that are unpacked for each forward.

Above 64 rows Marlin's sums depend on a row's place, so a prefill by Marlin is many small calls.
Instead the weights of a layer are unpacked, to the numbers that Marlin multiplies by, and the
product is one of two plain matrices, whose classes are measured as those of other layers.
Decode steps stay with Marlin, so decoded columns have other bits than prefilled ones.

A start holds the unpacked weights to Marlin's own results: a row with a single 1 in it gives one
input's weights, with nothing to round. A layer whose weights are others stays with Marlin.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from triton.errors import TritonError

from margingate.errors import first_line
from margingate.runtime.compat.compute import marlin
from margingate.runtime.compat.process import ranks
from margingate.runtime.probe.operators import forward_phase
from margingate.runtime.probe.operators.operator import Layer, Operator, Packed
from margingate_kernels.marlin_weights import unpack_marlin

logger = logging.getLogger(__name__)

DEVICES = ("cuda",)
COMPARED = 64  # rows of a call by which weights are compared


class UnpackedLayers:
    """Layers of one kind, by Marlin in decode and unpacked in prefill."""

    def __init__(self, first: Any) -> None:
        self._first = first
        self._held: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """[outputs, inputs] of the first layer, kept until `release`."""
        if self._held is None:
            self._held = unpacked(self._first)
        return self._held

    def release(self) -> None:
        """Give the memory of `weight` back."""
        self._held = None


@dataclass(frozen=True)
class Unpacked(Layer):
    """Such a product, measured with the weights of one layer; its module is UnpackedLayers.

    Without a bias: as with Marlin, that is added to results that are rounded already.
    """

    replicated: bool = False  # as the layers are
    kind: ClassVar[str] = "unpacked linear"
    is_planned: ClassVar[bool] = True

    @property
    def is_replicated(self) -> bool:
        return self.replicated

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        result = torch.nn.functional.linear(self.call.laid_out(inputs), self.module.weight)
        return result.reshape(len(inputs), -1)

    @property
    def weight(self) -> torch.Tensor | None:
        found: torch.Tensor = self.module.weight
        return found


_kinds: dict[int, UnpackedLayers] = {}  # by id of the layer


def kind_of(layer: Any) -> UnpackedLayers | None:
    """What a prefill runs in the place of a layer; None: the layer as it is."""
    return _kinds.get(id(layer))


def are_some() -> bool:
    """Whether prefills run something else in the place of some layers."""
    return bool(_kinds)


def unpacked(layer: Any) -> torch.Tensor:
    """The weights [outputs, inputs] of a layer of `kind_of`, in the dtype of its inputs."""
    weights = marlin.weights(layer)
    assert weights is not None
    return unpack_marlin(weights)


def settle(model: Any, operators: dict[str, list[Operator]]) -> dict[str, list[Operator]]:
    """Unpack what can be; the operators to measure then, with those of prefill beside Marlin's."""
    found: dict[str, list[Operator]] = {}
    for signature, same in operators.items():
        packed = [each for each in same if isinstance(each, Packed)]
        if not packed or not _can_be(packed[0]):
            found[signature] = same
            continue
        first, layers = packed[0], [each.module for each in packed]
        kind = UnpackedLayers(layers[0])
        _kinds.update({id(layer): kind for layer in layers})
        prefilled = Unpacked(
            f"{first.name}, unpacked",
            kind,
            replace(first.call, bias=False),
            replicated=first.is_replicated,
        )
        decoded = [replace(each, decodes_only=True) for each in packed]
        found[decoded[0].signature] = [*decoded]
        # Layers that Marlin tells apart, as by the size of groups, may be one kind here.
        found.setdefault(prefilled.signature, []).append(prefilled)
    if _kinds:
        forward_phase.watch(model)
    return found


def release() -> None:
    """Give back the memory that measuring took: CUDA graphs cannot have what torch keeps."""
    for kind in _kinds.values():
        kind.release()
    if _kinds:
        torch.cuda.empty_cache()


def _can_be(operator: Packed) -> bool:
    """Whether all ranks can unpack this layer's weights, to the numbers that Marlin has."""
    if operator.device.type not in DEVICES:
        return False
    reason = _why_not(operator)
    reasons = [each for each in ranks.of_all(reason) if each]
    if reasons:
        logger.warning(
            "margingate: prefills run %s by Marlin, 64 rows at a time at most: %s.",
            operator.name,
            reasons[0],
        )
    return not reasons


def _why_not(operator: Packed) -> str:
    """What keeps a layer's weights packed, "" if nothing."""
    if marlin.weights(operator.module) is None:
        return "its inputs are reordered or one group"
    try:
        with torch.inference_mode():
            weight = unpacked(operator.module)
            agrees = _agrees(operator, weight)
    # Out of memory, or no such kernel.
    except (RuntimeError, TritonError, ValueError, TypeError) as error:
        return first_line(error)
    return "" if agrees else "unpacked weights are not those that Marlin multiplies by"


def _agrees(operator: Packed, weight: torch.Tensor) -> bool:
    module, inputs = operator.module, weight.shape[1]
    for first in range(0, inputs, COMPARED):
        ones = torch.arange(first, min(first + COMPARED, inputs), device=weight.device)
        rows = torch.nn.functional.one_hot(ones, inputs).to(weight.dtype)
        if not torch.equal(module.quant_method.apply(module, rows), weight[:, ones].T):
            return False
    return True
