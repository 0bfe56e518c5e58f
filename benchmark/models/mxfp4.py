"""gpt-oss with experts in MXFP4, by plain rounding, as its published checkpoints have them.

    python -m benchmark.models.mxfp4 SOURCE FOLDER

32 weights of one output share a scale, a power of two in a byte. A weight has 4 bits, two in a
byte, the earlier one lower. All but the experts' two weights are BF16.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmark.bench import checkpoints
from benchmark.bench.checkpoints import Tensors

BLOCK = 32  # weights that share a scale
MIDDLE = 127  # of a scale's byte: one
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 2  # the power of two in the largest number
HALVES = tuple((low + high) / 2 for low, high in pairwise(NUMBERS))
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
METHOD: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
        *("model.embed_tokens", "lm_head"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    checkpoints.add_folders(parser, "a gpt-oss folder in BF16 or FP32")
    args = parser.parse_args()
    make(args.source, args.folder)


def make(source: Path, folder: Path) -> None:
    """`folder`, of the model in `source`. Raises SystemExit where sizes do not fit."""
    config, tensors = checkpoints.read(source)
    # SGLang makes layers of this type, whatever it computes in, and experts in MXFP4 take BF16.
    config |= {"quantization_config": METHOD, "dtype": "bfloat16"}
    checkpoints.write(folder, source, config, quantized(tensors))


def quantized(tensors: Tensors) -> Tensors:
    """`tensors` with the experts' weights, [experts, inputs, outputs], in MXFP4."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(EXPERTS):
            made |= of_layer(name, tensor.transpose(1, 2))
        else:
            made[name] = tensor.to(torch.bfloat16)
    return made


def of_layer(name: str, weight: torch.Tensor) -> Tensors:
    """The tensors of a checkpoint in place of one [experts, outputs, inputs]."""
    if weight.shape[-1] % BLOCK:
        said = f"{name} has {weight.shape[-1]} inputs, not in whole blocks of {BLOCK}"
        raise SystemExit(f"{said}: give a model with such sizes.")
    blocks, scales = to_blocks(weight)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def to_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [..., blocks, 16] and scales [..., blocks] of weights [..., blocks * 32].

    The scale is such that the largest weight of a block is 4 to 8 of it; above 6 it is 6.
    """
    parts = weight.float().unflatten(-1, (-1, BLOCK))
    _, powers = torch.frexp(parts.abs().amax(-1))  # the largest is 0.5 to 1 of that power of two
    powers = (powers - 1 - LARGEST).clamp(-MIDDLE, MIDDLE)
    sizes = parts.abs() / torch.exp2(powers.float())[..., None]
    codes = torch.bucketize(sizes.contiguous(), torch.tensor(HALVES, device=weight.device)).to(
        torch.uint8
    )
    codes += (parts < 0).to(torch.uint8) * 8
    return codes[..., ::2] | (codes[..., 1::2] << 4), (powers + MIDDLE).to(torch.uint8)


def from_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 [..., blocks * 32] of what `to_blocks` returned."""
    signed = torch.tensor([*NUMBERS, *(-each for each in NUMBERS)], device=blocks.device)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    return (signed[codes] * torch.exp2(scales.float() - MIDDLE)[..., None]).flatten(-2)


if __name__ == "__main__":
    main()
