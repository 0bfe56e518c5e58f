"""A model folder with random weights of a usual scale, for the shapes in `configs/`.

    python -m benchmark.models.random_weights benchmark/models/configs/qwen3-30b-a3b FOLDER \
        --layers 4

SGLang's dummy weights are so small that most are zero in FP8, and logits are noise: for speed only.
With these every layer counts and margins are usual ones. A configuration's quantization is left
out; `benchmark.models.fp8_blocks` rounds the folder. The tokenizer is SmolLM2's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from margingate.harness import tiny_models
from margingate.harness.embedded_model import ensure_model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configuration", type=Path, help="a folder with config.json")
    parser.add_argument("folder", type=Path, help="what is made")
    parser.add_argument("--layers", type=int, help="fewer than the configuration has")
    args = parser.parse_args()
    make(args.configuration, args.folder, args.layers)


def make(configuration: Path, folder: Path, layers: int | None = None) -> None:
    """`folder`, in BF16, of the configuration's sizes; with so many layers, where given."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    said = json.loads((configuration / "config.json").read_text())
    said.pop("quantization_config", None)
    if layers is not None:
        said |= {"num_hidden_layers": layers, "max_window_layers": layers}
        if "layer_types" in said:
            said["layer_types"] = said["layer_types"][:layers]
    config = AutoConfig.for_model(**said)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tiny_models.fill(model, tiny_models.SEED)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tiny_models.copy_tokenizer(ensure_model("smollm2"), folder)


if __name__ == "__main__":
    main()
