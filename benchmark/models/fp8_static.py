"""A model in FP8 with one scale for each weight and one for each layer's inputs, by plain rounding.

    python -m benchmark.models.fp8_static SOURCE FOLDER [--largest 32]

What SGLang serves as `fp8` with `activation_scheme` static, the layout of many Llama checkpoints.
The scales of inputs are calibrated on nothing: numbers beyond `--largest` are cut off. Such a model
is one to compare answers with, and not one to read them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmark.bench import checkpoints
from benchmark.models.fp8_blocks import FP8, LARGEST, quantized

METHOD = {"quant_method": "fp8", "activation_scheme": "static"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    checkpoints.add_folders(parser)
    parser.add_argument("--largest", type=float, default=32, help="of a layer's inputs")
    args = parser.parse_args()
    make(args.source, args.folder, args.largest)


def make(source: Path, folder: Path, largest: float = 32) -> None:
    """`folder`, of the model in `source`."""
    config, tensors = checkpoints.read(source)
    config["quantization_config"] = METHOD
    made = quantized(tensors, to_one_scale, "weight_scale")
    for layer in checkpoints.linear_layers(tensors):
        made[f"{layer}.input_scale"] = torch.tensor(largest / LARGEST)
    checkpoints.write(folder, source, config, made)


def to_one_scale(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 [outputs, inputs] and a float32 scale: a weight is about its FP8 times the scale."""
    scale = weight.float().abs().max().clamp(min=1e-12) / LARGEST
    return (weight.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


if __name__ == "__main__":
    main()
