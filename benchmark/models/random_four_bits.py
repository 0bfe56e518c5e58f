"""A folder of made-up 4-bit weights of a usual scale, for a configuration in AWQ or GPTQ.

    python -m benchmark.models.random_four_bits benchmark/models/configs/qwen3-8b-awq FOLDER
    python -m benchmark.models.random_four_bits benchmark/models/configs/qwen3-30b-a3b FOLDER \
        --format gptq --layers 4 --device cuda

SGLang's `--load-format dummy` leaves packed weights as it finds the memory: of zeros any kernel
makes the same bits in any order, and the probe of the gate would learn nothing. Experts are in 4
bits too; a folder of GPTQ's says float16, in which SGLang keeps their scales. The tokenizer is
SmolLM2's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch

from benchmark.bench import checkpoints
from benchmark.bench.checkpoints import Tensors
from benchmark.models import four_bits
from benchmark.models.four_bits import BITS, MIDDLE, PACK, packed
from margingate.harness import tiny_models
from margingate.harness.embedded_model import ensure_model

SEED = 20
LOGITS = 3.0  # their standard deviation
SPREAD = 4.6  # of whole numbers from 0 to 15
GROUP = 128  # inputs that share a scale, where the configuration does not say
DTYPE = torch.bfloat16
WORDS = (-(2**31), 2**31)
# Of transformers' stacks [experts, outputs, inputs]: an expert's layers, one above the other.
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    checkpoints.add_folders(parser, "a folder with config.json")
    parser.add_argument("--format", choices=four_bits.FORMATS, help="the configuration's, if left")
    parser.add_argument("--layers", type=int, help="fewer than the configuration has")
    parser.add_argument("--device", default="cpu", help="where weights are drawn")
    args = parser.parse_args()
    config = configured(json.loads((args.source / "config.json").read_text()), args.format)
    if args.layers is not None:
        config |= {"num_hidden_layers": args.layers, "max_window_layers": args.layers}
    checkpoints.write(args.folder, args.source, config, made_up(config, args.device))
    tiny_models.copy_tokenizer(ensure_model("smollm2"), args.folder)


def configured(config: dict[str, Any], form: str | None) -> dict[str, Any]:
    """A configuration in this form, or in its own."""
    if form is not None:
        config = config | {"quantization_config": four_bits.method(form, GROUP)}
    has_experts = any("num" in name and name.endswith("experts") for name in config)
    if has_experts and config["quantization_config"]["quant_method"] == "gptq":
        config = config | {"torch_dtype": "float16"}
    return config


def made_up(config: dict[str, Any], device: str = "cpu") -> Tensors:
    """All tensors of the configuration's model: norms of one, the others at random."""
    draw, made = torch.Generator(device).manual_seed(SEED), {}
    shapes = shapes_of(config)
    layers = {f"{name}.weight" for name in checkpoints.linear_layers(shapes)}
    for name, like in shapes.items():
        if name in layers:
            of = layer(*like.shape, config["quantization_config"], draw)
            made |= {name.removesuffix("weight") + part: tensor for part, tensor in of.items()}
        elif like.dim() == 1:
            made[name] = torch.ones(like.shape, dtype=DTYPE)
        else:
            scale = LOGITS * like.shape[1] ** -0.5 if "lm_head" in name else 1.0
            if name.endswith("mlp.gate.weight"):  # a router's scores, of normed rows
                scale = like.shape[1] ** -0.5
            drawn = torch.randn(like.shape, generator=draw, dtype=DTYPE, device=device)
            made[name] = (drawn * scale).cpu()
    return made


def shapes_of(config: dict[str, Any]) -> Tensors:
    """The parameters of a configuration's model by checkpoints' names, without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    said = {name: value for name, value in config.items() if name != "quantization_config"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**said))
    return {
        name: like
        for whole, tensor in model.state_dict().items()
        for name, like in _of_experts(whole, tensor)
    }


def _of_experts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter as it is; a stack of experts' as the layers of each."""
    above, _, last = name.rpartition(".")
    if tensor.dim() != 3 or last not in STACKS:
        yield name, tensor
        return
    for expert, whole in enumerate(tensor):
        for part, like in zip(STACKS[last], whole.chunk(len(STACKS[last])), strict=True):
            yield f"{above}.{expert}.{part}.weight", like


def layer(outputs: int, inputs: int, method: dict[str, Any], draw: torch.Generator) -> Tensors:
    """One layer's tensors: weights about as large as the inverse root of the inputs' number."""
    form, groups = method["quant_method"], inputs // method["group_size"]
    shape = (inputs // PACK, outputs) if form == "gptq" else (inputs, outputs // PACK)
    scales = torch.rand(groups, outputs, generator=draw, device=draw.device) + 0.5
    zeros = torch.full((groups, outputs), MIDDLE - 1)  # as GPTQ has it
    if form == "awq":
        zeros += torch.randint(2, zeros.shape, generator=draw, device=draw.device).cpu()
    words = torch.randint(*WORDS, shape, generator=draw, dtype=torch.int32, device=draw.device)
    made = {
        "qweight": words.cpu(),
        "qzeros": packed(zeros),
        "scales": (scales * inputs**-0.5 / SPREAD).to(DTYPE).cpu(),
    }
    if form == "gptq":
        made["g_idx"] = torch.arange(inputs, dtype=torch.int32) // method["group_size"]
    assert method["bits"] == BITS
    return made


if __name__ == "__main__":
    main()
