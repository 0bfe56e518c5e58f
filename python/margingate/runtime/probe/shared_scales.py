"""Experts whose rows share a scale, which no plan makes independent of each other: refused."""

from __future__ import annotations

from typing import Any

from margingate.config import GateError
from margingate.runtime.compat import quantization
from margingate.runtime.compat.routers import experts

SHARED = "rounds the inputs of experts in {} to FP8 by one scale for all rows of a forward"
BY_ROW = (
    "use a checkpoint with a weight_block_size, or with a scale for each channel of weights and "
    "each token (compressed-tensors), or serve it without the flag"
)


def refuse(model: Any) -> None:
    """Check a loaded model. Raises GateError naming experts whose rows share a scale."""
    for name, module in experts(model):
        if quantization.are_known(module) and quantization.rounding(module) == quantization.BATCH:
            raise GateError(
                f"--deterministic-gate does not serve this model yet, because it "
                f"{SHARED.format(name)}: {BY_ROW}."
            )
