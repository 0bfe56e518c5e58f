"""A gpt-oss folder of made-up weights of a usual scale, its experts in MXFP4.

    python -m benchmark.models.random_mxfp4 benchmark/models/configs/gpt-oss-20b FOLDER \
        [--layers 4] [--device cuda]

With `--load-format dummy` SGLang leaves packed weights zero: any kernel makes the same bits of them
in any order, and the probe of the gate would learn nothing. Here weights are normal, with the
inverse root of the inputs' number as deviation, and rounded as a checkpoint's are. Each layer has a
file; one of gpt-oss-20b takes 0.5 GB. The tokenizer is SmolLM2's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmark.bench.checkpoints import Tensors
from benchmark.models import mxfp4
from margingate.harness import tiny_models
from margingate.harness.embedded_model import ensure_model

DTYPE = torch.bfloat16
LAYER = "model.layers."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configuration", type=Path, help="a folder with config.json")
    parser.add_argument("folder", type=Path, help="what is made")
    parser.add_argument("--layers", type=int, help="fewer than the configuration has")
    parser.add_argument("--device", default="cpu", help="where weights are drawn and rounded")
    args = parser.parse_args()
    make(args.configuration, args.folder, args.layers, args.device)


def make(configuration: Path, folder: Path, layers: int | None, device: str) -> None:
    """`folder`, of the configuration's sizes; with so many layers, where given."""
    said = configured(json.loads((configuration / "config.json").read_text()), layers)
    shapes = shapes_of(said)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {}
    for name in shapes:
        files.setdefault(_file(name), []).append(name)
    draw, index = torch.Generator(device).manual_seed(tiny_models.SEED), {}
    for file, names in files.items():
        made: Tensors = {}
        for name in names:
            made |= tensors_of(name, shapes[name], draw)
        kept = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
        save_file(kept, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(kept, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    tiny_models.copy_tokenizer(ensure_model("smollm2"), folder)


def configured(said: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """A configuration in MXFP4, cut to so many layers, where given."""
    if layers is not None:
        said |= {"num_hidden_layers": layers, "layer_types": said["layer_types"][:layers]}
    return said | {"quantization_config": mxfp4.METHOD}


def shapes_of(said: dict[str, Any]) -> dict[str, torch.Size]:
    """The parameters of a configuration's model, by name, before they are rounded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {name: value for name, value in said.items() if name != "quantization_config"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def tensors_of(name: str, shape: torch.Size, draw: torch.Generator) -> Tensors:
    """The tensors of a checkpoint for this parameter: norms of one, the others at random."""
    if "norm" in name:
        return {name: torch.ones(shape, dtype=DTYPE)}
    experts = name.endswith(mxfp4.EXPERTS)  # [experts, inputs, outputs]
    if experts:
        shape = torch.Size((shape[0], shape[2], shape[1]))
    scale = tiny_models.BIAS if name.endswith("bias") else shape[-1] ** -0.5
    if name.endswith("sinks"):
        scale = tiny_models.SINKS
    elif "embed_tokens" in name:
        scale = 1.0
    elif "lm_head" in name:
        scale *= tiny_models.LOGITS
    drawn = torch.randn(shape, generator=draw, device=draw.device, dtype=torch.float32) * scale
    return mxfp4.of_layer(name, drawn) if experts else {name: drawn.to(DTYPE)}


def _file(name: str) -> str:
    """The file that a parameter goes to: one for each layer, and one for what is in none."""
    layer = name.removeprefix(LAYER).partition(".")[0] if name.startswith(LAYER) else "rest"
    return f"model-{layer}.safetensors"


if __name__ == "__main__":
    main()
