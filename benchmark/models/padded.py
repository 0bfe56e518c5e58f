"""A Llama model with sizes in whole 128s, by rows, columns and heads of zeros: the same function.

    python -m benchmark.models.padded SmolLM2-FOLDER FOLDER

SmolLM2's hidden size of 576 becomes 768, its 9 query and 3 K/V heads of 64 become 12 and 4. FP8 by
blocks and Marlin ask for this. `--qwen2` writes it as a Qwen2 model, whose biases are zeros: SGLang
does not load the scales of FP8 blocks of a Llama model.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from benchmark.bench import checkpoints
from benchmark.bench.checkpoints import Tensors

UNIT = 128
HEADS = {"q_proj": "num_attention_heads", "o_proj": "num_attention_heads"}
HEADS |= dict.fromkeys(("k_proj", "v_proj"), "num_key_value_heads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    checkpoints.add_folders(parser, "a Llama model's folder")
    parser.add_argument("--qwen2", action="store_true", help="written as a Qwen2 model")
    args = parser.parse_args()
    config, tensors = checkpoints.read(args.source)
    if config["model_type"] != "llama":
        raise SystemExit(f"{args.source} has a {config['model_type']} model: give a llama model's.")
    wide = padded_config(config)
    whole_tensors = padded(tensors, config, wide)
    if args.qwen2:
        wide, whole_tensors = as_qwen2(wide, whole_tensors)
    checkpoints.write(args.folder, args.source, wide, whole_tensors)


def padded_config(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes in whole units. Heads come with their group, behind the others.

    transformers wants a hidden size that the heads divide. Means of squares are taken over more
    columns, and the norms' epsilon is among them.
    """
    kv, group = config["num_key_value_heads"], config["num_attention_heads"]
    group //= kv
    while kv * config["head_dim"] % UNIT or kv * group * config["head_dim"] % UNIT:
        kv += 1
    hidden = whole(config["hidden_size"], math.lcm(UNIT, kv * group))
    eps = config["rms_norm_eps"] * config["hidden_size"] / hidden
    sizes = {"hidden_size": hidden, "intermediate_size": whole(config["intermediate_size"])}
    heads = {"num_key_value_heads": kv, "num_attention_heads": kv * group}
    return config | sizes | heads | {"rms_norm_eps": eps}


def whole(size: int, unit: int = UNIT) -> int:
    """`size` up to the next multiple of `unit`."""
    return -(-size // unit) * unit


def padded(tensors: Tensors, config: dict[str, Any], wide: dict[str, Any]) -> Tensors:
    """Tensors for `wide` of those for `config`, with zeros behind their rows and columns."""
    sizes = {config[n]: wide[n] for n in ("hidden_size", "intermediate_size")}
    shrink = (config["hidden_size"] / wide["hidden_size"]) ** 0.5  # of a norm's divisor
    made = {}
    for name, tensor in tensors.items():
        shape = [sizes.get(size, size) for size in tensor.shape]
        if "embed_tokens" in name or "lm_head" in name:
            shape[0] = len(tensor)  # the vocabulary
        elif (heads := HEADS.get(name.split(".")[-2])) is not None:
            shape["o_proj" in name] = wide[heads] * wide["head_dim"]
        whole_tensor = tensor.new_zeros(shape)
        kept = tensor.float() * shrink if "norm" in name else tensor
        whole_tensor[tuple(slice(size) for size in tensor.shape)] = kept.to(tensor.dtype)
        made[name] = whole_tensor
    return made


def as_qwen2(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """The same function in Qwen2's layout, which has biases of queries, keys and values."""
    biases = {
        name.removesuffix("weight") + "bias": tensor.new_zeros(len(tensor))
        for name, tensor in tensors.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    return checkpoints.of_family(config, "qwen2", "Qwen2ForCausalLM"), tensors | biases


if __name__ == "__main__":
    main()
