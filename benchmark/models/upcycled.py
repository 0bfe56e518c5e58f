"""A mixture of experts that writes text: a Llama model whose MLPs become experts with some noise.

    python -m benchmark.models.upcycled SmolLM2-FOLDER FOLDER [--experts 8] [--noise 0.05]

Mixtral's layout. An expert is the MLP plus noise, so that it matters which one a token gets. The
router is random: nothing keeps its scores apart, and with a small spread many are near-ties.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmark.bench import checkpoints
from benchmark.bench.checkpoints import Tensors

PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Llama's names and Mixtral's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    checkpoints.add_folders(parser, "a Llama model's folder")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top", type=int, default=2, help="experts that a token gets")
    parser.add_argument("--noise", type=float, default=0.05, help="relative to a weight's RMS")
    parser.add_argument("--spread", type=float, default=0.5, help="standard deviation of scores")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config, tensors = checkpoints.read(args.source)
    if config["model_type"] != "llama":
        raise SystemExit(f"{args.source} has a {config['model_type']} model: give a llama model's.")
    torch.manual_seed(args.seed)
    made = upcycle(tensors, args.experts, args.noise, args.spread)
    config = mixtral(config, args.experts, args.top)
    checkpoints.write(args.folder, args.source, config, made)


def mixtral(config: dict[str, Any], experts: int, top: int) -> dict[str, Any]:
    """The configuration of the mixture; the head is a tensor of its own."""
    own = checkpoints.of_family(config, "mixtral", "MixtralForCausalLM")
    counts = {"num_local_experts": experts, "num_experts_per_tok": top}
    return own | counts | {"tie_word_embeddings": False, "sliding_window": None}


def upcycle(tensors: Tensors, experts: int, noise: float, spread: float) -> Tensors:
    """Mixtral's tensors from Llama's, in the same dtype. Draws from torch's generator."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        layer, mlp, part = name.removesuffix(".weight").partition(".mlp.")
        if not mlp:
            made[name] = tensor
            continue
        for expert in range(experts):
            moved = noise * rms(tensor) * torch.randn(tensor.shape)
            own = f"{layer}.block_sparse_moe.experts.{expert}.{PARTS[part]}.weight"
            made[own] = (tensor.float() + moved).to(tensor.dtype)
    for name in [n for n in tensors if n.endswith(".post_attention_layernorm.weight")]:
        router = f"{name.removesuffix('.post_attention_layernorm.weight')}.block_sparse_moe.gate"
        made[f"{router}.weight"] = random_router(tensors[name], experts, spread)
    made.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    return made


def random_router(norm: torch.Tensor, experts: int, spread: float) -> torch.Tensor:
    """[experts, hidden], whose scores of what a norm with these weights lets through have `spread`.

    norm: [hidden]. The norm's output has the RMS of its weights, where no column stands out.
    """
    scale = spread / (rms(norm) * len(norm) ** 0.5)
    return (scale * torch.randn(experts, len(norm))).to(norm.dtype)


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())


if __name__ == "__main__":
    main()
