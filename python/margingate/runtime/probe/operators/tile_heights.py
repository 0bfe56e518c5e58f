"""Tiles of experts in MXFP4: of one height, where a row's bits depend on it.

`triton_kernels` cuts the rows of an expert into tiles, taller ones for a forward of more rows. If a
row has the same bits in tiles of each height, SGLang chooses as ever. Otherwise all forwards get
tiles of FIXED rows. Whether that makes one class is then measured, as for any operator.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from margingate.runtime.compat import instance_patches
from margingate.runtime.compat.compute import mxfp4

logger = logging.getLogger(__name__)

HEIGHTS = (16, 32, 64, 128)  # rows of a tile, all that the kernels have
FIXED = 64
ROWS = 64  # of the forwards that are compared

_fixed: dict[int, int] = {}  # rows of a tile, by id of SGLang's FusedMoE


def of(module: Any) -> int | None:
    """The height that the tiles of these experts have in all forwards; None: as SGLang chooses."""
    return _fixed.get(id(module))


def settle(groups: Mapping[str, Sequence[Any]]) -> int:
    """Fix the height of tiles where it matters. Mutates the modules of such operators.

    Args:
        groups: operators by signature.

    Returns:
        How many modules were fixed: their operators are others now.
    """
    fixed = 0
    for same in groups.values():
        first = same[0]
        if apart := differing(first) if has_tiles(first) else []:
            said = "margingate: %s has other bits in tiles of %s rows: all get tiles of %d."
            logger.info(said, first.name, ", ".join(map(str, apart)), FIXED)
            fix(each.module for each in same)
            fixed += len(same)
    return fixed


def has_tiles(operator: Any) -> bool:
    """Whether these are experts in MXFP4 that `triton_kernels` runs; a CPU has a stand-in."""
    return mxfp4.are_experts(operator.module) and operator.device.type == "cuda"


def differing(operator: Any) -> list[int]:
    """The heights at which rows have other bits than with FIXED, of HEIGHTS."""
    with torch.inference_mode():
        samples = operator.samples(ROWS)
        found = {height: [_run(operator, each, height) for each in samples] for height in HEIGHTS}
    expected = found[FIXED]
    return [
        height for height, results in found.items() if not all(map(torch.equal, results, expected))
    ]


def fix(modules: Iterable[Any]) -> None:
    """Have these experts' tiles FIXED rows high from now on."""
    for module in modules:
        instance_patches.check_instance(module, instance_patches.ON_EXPERTS)
        module.run_moe_core = partial(run_with_tiles, module.run_moe_core, FIXED)
        _fixed[id(module)] = FIXED


def run_with_tiles(original: Any, height: int, dispatch_output: Any) -> Any:
    """Around the `run_moe_core` of experts."""
    with mxfp4.tile_height(height):
        return original(dispatch_output=dispatch_output)


def _run(operator: Any, inputs: Any, height: int) -> torch.Tensor:
    with mxfp4.tile_height(height):
        found: torch.Tensor = operator.run(inputs)
    return found
