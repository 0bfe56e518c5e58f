"""A model in FP8 with a scale for each block of 128 x 128 weights, by plain rounding.

    python -m benchmark.models.fp8_blocks SOURCE FOLDER

The layout of DeepSeek-V3 and Qwen3-FP8: e4m3 weights, `weight_scale_inv` in float32, and scales of
activations that the server computes. Embeddings, head and routers stay as they are. SGLang wants
outputs of merged layers in whole blocks: `benchmark.models.padded` gives SmolLM2 such sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmark.bench import checkpoints
from benchmark.bench.checkpoints import Tensors

BLOCK = 128  # rows and columns
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
Rounded = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    checkpoints.add_folders(parser)
    args = parser.parse_args()
    make(args.source, args.folder)


def make(source: Path, folder: Path) -> None:
    """`folder`, of the model in `source`."""
    config, tensors = checkpoints.read(source)
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    config["quantization_config"] = method | {"weight_block_size": [BLOCK, BLOCK]}
    checkpoints.write(folder, source, config, quantized(tensors))


def quantized(
    tensors: Tensors, rounded: Rounded | None = None, name: str = "weight_scale_inv"
) -> Tensors:
    """`tensors` with the weights of linear layers in FP8, each with its scales beside it.

    Args:
        rounded: a layer's weight in FP8 and its scales; default: those of blocks.
        name: of the scales in the checkpoint.
    """
    made, rounded = dict(tensors), rounded or to_blocks
    for layer in checkpoints.linear_layers(tensors):
        weight, scales = rounded(tensors[f"{layer}.weight"])
        made |= {f"{layer}.weight": weight, f"{layer}.{name}": scales}
    return made


def to_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 [outputs, inputs] and float32 scales, one a block; blocks at the edges may be smaller.

    A weight is about its FP8 times its block's scale.
    """
    rows, columns = weight.shape
    sides = [-(-size // BLOCK) for size in (rows, columns)]
    whole = weight.new_zeros(sides[0] * BLOCK, sides[1] * BLOCK, dtype=torch.float32)
    whole[:rows, :columns] = weight
    largest = whole.view(sides[0], BLOCK, sides[1], BLOCK).abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    rounded = (weight.float() / spread(scales, rows, columns)).clamp(-LARGEST, LARGEST).to(FP8)
    return rounded, scales


def from_blocks(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 [outputs, inputs] of what `to_blocks` returned."""
    return weight.float() * spread(scales, *weight.shape)


def spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Scales of blocks as [rows, columns]: one for each weight."""
    wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return wide[:rows, :columns]


if __name__ == "__main__":
    main()
