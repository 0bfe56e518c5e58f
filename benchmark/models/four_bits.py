"""A model with 4-bit weights in the layout of GPTQ or AWQ, by plain rounding.

    python -m benchmark.models.four_bits gptq SOURCE FOLDER [--group 128]

A group of inputs of one output has a scale; AWQ's has a zero point too, GPTQ's is symmetric and in
the order of the inputs. Embeddings, head and routers stay as they are. Marlin wants inputs in whole
128s: `benchmark.models.padded` gives SmolLM2 such sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmark.bench import checkpoints
from benchmark.bench.checkpoints import Tensors

BITS, PACK = 4, 8  # of a value; values in an int32
MIDDLE, TOP = 8, 15  # GPTQ's zero point; the largest value
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 columns is in the n-th 4 bits
FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {"sym": True, "desc_act": False, "checkpoint_format": "gptq", "lm_head": False},
    "awq": {"zero_point": True, "version": "gemm", "modules_to_not_convert": None},
}


class Groups(NamedTuple):
    """A weight as whole numbers: about (values - zeros) * scales, by group of inputs."""

    values: torch.Tensor  # int32 [inputs, outputs], 0 to TOP
    zeros: torch.Tensor  # int32 [groups, outputs], 0 to TOP
    scales: torch.Tensor  # [groups, outputs], in the weight's dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("format", choices=FORMATS)
    checkpoints.add_folders(parser)
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale")
    args = parser.parse_args()
    make(args.format, args.source, args.folder, args.group)


def make(form: str, source: Path, folder: Path, group: int) -> None:
    """`folder`, of the model in `source`. SystemExit where sizes do not fit."""
    config, tensors = checkpoints.read(source)
    config["quantization_config"] = method(form, group)
    checkpoints.write(folder, source, config, quantized(tensors, form, group))


def method(form: str, group: int) -> dict[str, Any]:
    """What a configuration says of such weights."""
    return {"quant_method": form, "bits": BITS, "group_size": group} | FORMATS[form]


def quantized(tensors: Tensors, form: str, group: int) -> Tensors:
    """`tensors` with the weights of linear layers in 4 bits. SystemExit where sizes do not fit."""
    layers = set(checkpoints.linear_layers(tensors))
    made = {n: t for n, t in tensors.items() if n.removesuffix(".weight") not in layers}
    for layer in layers:
        weight = tensors[f"{layer}.weight"]
        if weight.shape[1] % group or any(size % PACK for size in weight.shape):
            said = f"{layer} has {weight.shape[1]} inputs, not in whole groups of {group}"
            raise SystemExit(f"{said}: give another --group, or benchmark.models.padded's folder.")
        groups = to_groups(weight, group, symmetric=form == "gptq")
        packed = pack_gptq(groups) if form == "gptq" else pack_awq(groups)
        made |= {f"{layer}.{name}": tensor for name, tensor in packed.items()}
    return made


def to_groups(weight: torch.Tensor, group: int, *, symmetric: bool) -> Groups:
    """Round [outputs, inputs] to the nearest of 16 steps that span each group."""
    parts = weight.float().t().reshape(-1, group, weight.shape[0])
    low, high = parts.amin(1).clamp(max=0), parts.amax(1).clamp(min=0)
    below = -low / MIDDLE  # which has one step more than there is above
    step = torch.maximum(high / (TOP - MIDDLE), below) if symmetric else (high - low) / TOP
    scales = torch.where(step > 0, step, 1.0).to(weight.dtype)
    wide = scales.float()
    zeros = torch.full_like(low, MIDDLE) if symmetric else (-low / wide).round().clamp(0, TOP)
    values = (parts / wide[:, None]).round() + zeros[:, None]
    values = values.clamp(0, TOP).int().flatten(0, 1)
    return Groups(values, zeros.int(), scales)


def from_groups(groups: Groups) -> torch.Tensor:
    """Float32 [outputs, inputs]."""
    size = len(groups.values) // len(groups.zeros)
    zeros, scales = (part.repeat_interleave(size, 0) for part in groups[1:])
    return ((groups.values - zeros).float() * scales.float()).t()


def pack_gptq(groups: Groups) -> Tensors:
    """Values 8 inputs an int32, the first lowest; zeros 8 outputs, each less one."""
    size = len(groups.values) // len(groups.zeros)
    return {
        "qweight": packed(groups.values.t()).t(),
        "qzeros": packed(groups.zeros - 1),
        "scales": groups.scales,
        "g_idx": torch.arange(len(groups.values), dtype=torch.int32) // size,
    }


def pack_awq(groups: Groups) -> Tensors:
    """Values and zeros 8 outputs an int32, in AWQ's order."""
    ordered = [
        part.view(len(part), -1, PACK)[..., AWQ_ORDER].flatten(1)
        for part in (groups.values, groups.zeros)
    ]
    return {"qweight": packed(ordered[0]), "qzeros": packed(ordered[1]), "scales": groups.scales}


def packed(values: torch.Tensor) -> torch.Tensor:
    """Int32 [rows, columns / 8] of whole numbers from 0 to TOP, the first of 8 lowest."""
    eights = values.reshape(len(values), -1, PACK).long() << (BITS * torch.arange(PACK))
    return eights.sum(-1).to(torch.int32)  # wraps above 2**31, as the format's sign bit does


if __name__ == "__main__":
    main()
