"""A folder of Qwen3-VL-8B's shapes with random weights of a usual scale, and few layers of text.

    python -m benchmark.models.random_vision FOLDER --layers 8

The tower is whole. Tokenizer and vocabulary are SmolLM2's, with the marks of images behind it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from margingate.harness import tiny_models
from margingate.harness.embedded_model import ensure_model

FAMILY = "qwen3_vl"
TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 4096,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what is made")
    parser.add_argument("--layers", type=int, default=8, help="of the text; the model has 36")
    args = parser.parse_args()
    make(args.folder, {**TEXT, "num_hidden_layers": args.layers}, TOWER)


def make(folder: Path, text: dict[str, object], tower: dict[str, object]) -> None:
    """`folder`, in BF16, of these sizes."""
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    donor = ensure_model("smollm2")
    kind, config = tiny_models.vision_config(FAMILY, donor, text, tower, folder)
    model = kind.from_config(config, dtype=torch.bfloat16)
    tiny_models.fill(model, tiny_models.SEED)
    model.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
