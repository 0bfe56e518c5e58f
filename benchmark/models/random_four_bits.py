"""A folder of made-up 4-bit weights of a usual scale, for a configuration that says AWQ or GPTQ.

    python -m benchmark.models.random_four_bits benchmark/models/configs/qwen3-8b-awq FOLDER

SGLang's `--load-format dummy` leaves packed weights as it finds the memory: of zeros any kernel
makes the same bits in any order, and the probe of the gate would learn nothing. The tokenizer is
SmolLM2's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmark.bench import checkpoints
from benchmark.bench.checkpoints import Tensors
from benchmark.models.four_bits import BITS, MIDDLE, PACK, packed
from margingate.harness import tiny_models
from margingate.harness.embedded_model import ensure_model

SEED = 20
LOGITS = 3.0  # their standard deviation
SPREAD = 4.6  # of whole numbers from 0 to 15
DTYPE = torch.bfloat16
WORDS = (-(2**31), 2**31)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    checkpoints.add_folders(parser, "a folder with config.json")
    args = parser.parse_args()
    config = json.loads((args.source / "config.json").read_text())
    checkpoints.write(args.folder, args.source, config, made_up(args.source, config))
    tiny_models.copy_tokenizer(ensure_model("smollm2"), args.folder)


def made_up(source: Path, config: dict[str, Any]) -> Tensors:
    """All tensors of the configuration's model: norms of one, the others at random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.from_pretrained(source)
    method = config["quantization_config"]
    del known.quantization_config
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(known).state_dict()
    layers = {f"{name}.weight" for name in checkpoints.linear_layers(shapes)}
    draw = torch.Generator().manual_seed(SEED)
    made: Tensors = {}
    for name, like in shapes.items():
        if name in layers:
            of = layer(*like.shape, method, draw)
            made |= {name.removesuffix("weight") + part: tensor for part, tensor in of.items()}
        elif like.dim() == 1:
            made[name] = torch.ones(like.shape, dtype=DTYPE)
        else:
            scale = LOGITS * like.shape[1] ** -0.5 if "lm_head" in name else 1.0
            made[name] = torch.randn(like.shape, generator=draw, dtype=DTYPE) * scale
    return made


def layer(outputs: int, inputs: int, method: dict[str, Any], draw: torch.Generator) -> Tensors:
    """One layer's tensors: weights about as large as the inverse root of the inputs' number."""
    form, groups = method["quant_method"], inputs // method["group_size"]
    shape = (inputs // PACK, outputs) if form == "gptq" else (inputs, outputs // PACK)
    scales = torch.rand(groups, outputs, generator=draw) + 0.5
    zeros = torch.full((groups, outputs), MIDDLE - 1)  # as GPTQ has it
    if form == "awq":
        zeros += torch.randint(2, zeros.shape, generator=draw)
    made = {
        "qweight": torch.randint(*WORDS, shape, generator=draw, dtype=torch.int32),
        "qzeros": packed(zeros),
        "scales": (scales * inputs**-0.5 / SPREAD).to(DTYPE),
    }
    if form == "gptq":
        made["g_idx"] = torch.arange(inputs, dtype=torch.int32) // method["group_size"]
    assert method["bits"] == BITS
    return made


if __name__ == "__main__":
    main()
