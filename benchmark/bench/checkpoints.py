"""Model folders: read whole, and written from tensors and another folder's tokenizer."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from margingate.harness.embedded_model import MANIFEST

Tensors = dict[str, torch.Tensor]
_LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")  # of a configuration
_OWN = {"config.json", "model.safetensors.index.json", MANIFEST}  # never copied
_KEPT = ("embed_tokens", "lm_head", "shared_expert_gate", "mlp.gate.", "block_sparse_moe.gate.")


def add_folders(parser: argparse.ArgumentParser, source: str = "a model's folder") -> None:
    """The arguments `source`, described so, and `folder`."""
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("folder", type=Path, help="what is made")


def read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """A folder's configuration and tensors, by the checkpoint's names. Raises SystemExit."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as err:
        said = f"{folder}/config.json cannot be read ({err.strerror}): name a model's folder."
        raise SystemExit(said) from None
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        raise SystemExit(f"{folder} has no .safetensors file: name a folder with weights.")
    return config, tensors


def write(folder: Path, source: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """Make `folder` of these, and of the tokenizer and the other small files in `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in _OWN:
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves 0600


def of_family(config: dict[str, Any], model_type: str, architecture: str) -> dict[str, Any]:
    """A Llama model's configuration as that of another family, without what is Llama's alone."""
    kept = {name: value for name, value in config.items() if name not in _LLAMA_ONLY}
    return kept | {"model_type": model_type, "architectures": [architecture]}


def linear_layers(tensors: Tensors) -> list[str]:
    """The layers that checkpoints quantize: not embeddings, head and routers. Less `.weight`."""
    names = [n for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2]
    return [n.removesuffix(".weight") for n in names if not any(kept in n for kept in _KEPT)]
