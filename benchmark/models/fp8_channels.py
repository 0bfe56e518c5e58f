"""A model in FP8 with a scale for each output of a layer, by plain rounding.

    python -m benchmark.models.fp8_channels SOURCE FOLDER

What SGLang serves as `w8a8_fp8`: e4m3 weights, `weight_scale` in float32, and scales of activations
that the server computes, one a token. Embeddings, head and routers stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmark.bench import checkpoints
from benchmark.models.fp8_blocks import FP8, LARGEST, quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    checkpoints.add_folders(parser)
    args = parser.parse_args()
    make(args.source, args.folder)


def make(source: Path, folder: Path) -> None:
    """`folder`, of the model in `source`."""
    config, tensors = checkpoints.read(source)
    config["quantization_config"] = {"quant_method": "w8a8_fp8"}
    made = quantized(tensors, to_channels, "weight_scale")
    checkpoints.write(folder, source, config, made)


def to_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 [outputs, inputs] and float32 scales [outputs, 1].

    A weight is about its FP8 times its output's scale.
    """
    largest = weight.float().abs().amax(-1, keepdim=True)
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (weight.float() / scales).clamp(-LARGEST, LARGEST).to(FP8), scales


if __name__ == "__main__":
    main()
