"""Small models with random weights, one of each family, as Hugging Face folders in float32.

Two layers that say nonsense with usual margins. A CPU serves one within seconds, and in float32 its
GEMMs give a row other bits at other row counts: for an expert, other bits in other company.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from margingate.errors import CliError
from margingate.harness.embedded_model import MANIFEST, ensure_model

SEED = 20
LOGITS = 3.0  # their standard deviation, near that of a trained model
BIAS = 0.1  # the standard deviation of biases
SINKS = 2.0  # of attention sinks: some take nearly nothing of a row, some most
_COMMON = MappingProxyType(
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 2,
    }
)
_QWEN = MappingProxyType(
    {"num_experts": 8, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
)
# By the configuration's model_type, and behind a dash what sets it apart from another of that type:
# what it has beside _COMMON.
FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen3_moe": {**_QWEN, "norm_topk_prob": True},
        # Sizes that FP8 blocks of 128 x 128 divide, for `benchmark.models.fp8_blocks`.
        "qwen3_moe-blocks": {
            **{**_QWEN, "norm_topk_prob": True, "hidden_size": 128, "moe_intermediate_size": 128},
            **{"head_dim": 32, "num_key_value_heads": 4},
        },
        "mixtral": {"num_local_experts": 8},
        "glm4_moe": {
            # torch takes sigmoids by vectors of up to 32, and those left over one by one, in other
            # bits: with 8 scores a row (checkpoints have 128) a row would depend on its place.
            "n_routed_experts": 32,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": True,
        },
        "qwen3": {  # no mixture; of such sizes too
            **dict.fromkeys(("hidden_size", "intermediate_size"), 128),
            **{"head_dim": 32, "num_key_value_heads": 4},
        },
        "qwen2_moe": {**_QWEN, "norm_topk_prob": False, "shared_expert_intermediate_size": 32},
        # Windows so small that every answer leaves keys behind. SGLang ties its head always.
        "gemma3_text": {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
        },
        # Sinks, and a window on every other layer; experts and router have biases.
        "gpt_oss": {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "intermediate_size": 32,
            "num_local_experts": 8,
            "swiglu_limit": 7.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 64,
            },
        },
    }
)

_TOWER = MappingProxyType(
    {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
    }
)
_SECTIONS = MappingProxyType(
    {"rope_type": "default", "rope_theta": 1e4, "mrope_section": (4, 2, 2)}
)
# Decoders behind a vision tower, by model_type: rotary positions of the text, and the tower.
VISION: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = MappingProxyType(
    {
        "qwen3_vl": (
            {**_SECTIONS, "mrope_interleaved": True},
            {"patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0]},
        ),
        "qwen2_5_vl": (
            _SECTIONS,
            {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]},
        ),
    }
)
# Tokens that SmolLM2 has not: names of the configuration, and what images are written by.
MARKS = MappingProxyType(
    {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    }
)


def tiny_model(family: str, folder: Path) -> Path:
    """The folder of a small model of `family`, made in `folder` where it is absent.

    Its tokenizer is SmolLM2's. Safe to call from several processes at once. Raises CliError for
    a family that is in neither FAMILIES nor VISION, and what ensure_model raises.
    """
    if family not in {**FAMILIES, **VISION}:
        known = ", ".join(sorted({**FAMILIES, **VISION}))
        raise CliError(f"there is no tiny model of the family {family!r}; choose one of: {known}.")
    target = folder / f"tiny-{family}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=folder))
        try:
            _write(family, temp)
            temp.rename(target)
        except OSError:  # where another process was faster: then `target` is not empty
            if not target.exists():
                raise
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return target


def _write(family: str, folder: Path) -> None:
    """The configs, model.safetensors and the tokenizer into `folder`, which is empty."""
    import torch
    from transformers import GenerationConfig

    donor = ensure_model("smollm2")
    own = json.loads((donor / "config.json").read_text())
    same = {name: own[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    if family in VISION:
        kind, config = _vision_config(family, donor, same, folder)
    else:
        kind, config = _text_config(family, same)
        copy_tokenizer(donor, folder)
    model = kind.from_config(config, dtype=torch.float32)
    fill(model, SEED)
    model.save_pretrained(folder)  # by the names of checkpoints, an expert a tensor
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def copy_tokenizer(donor: Path, folder: Path) -> None:
    """The small files of a model's folder, less those that describe the model."""
    left = {MANIFEST, "config.json", "generation_config.json", "model.safetensors"}
    for file in donor.iterdir():
        if file.name not in left:
            shutil.copy(file, folder)


def _text_config(family: str, same: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class that makes the model, and its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {**_COMMON, **FAMILIES[family]}
    kind = family.partition("-")[0]
    return AutoModelForCausalLM, AutoConfig.for_model(kind, **own, **same)


def _vision_config(
    family: str, donor: Path, same: Mapping[str, Any], folder: Path
) -> tuple[Any, Any]:
    """The same of a vision model; writes its processor, with MARKS behind SmolLM2's tokens."""
    return vision_config(family, donor, {**_COMMON, **same}, _TOWER, folder)


def vision_config(
    family: str, donor: Path, text: Mapping[str, Any], tower: Mapping[str, Any], folder: Path
) -> tuple[Any, Any]:
    """The class that makes a vision model of these sizes, and its configuration.

    Writes its processor into `folder`, with MARKS behind the tokens of the tokenizer in `donor`.

    Args:
        text, tower: entries of the configuration, over those that VISION has for the family.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = _write_processor(family, donor, folder)
    marks = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(list(MARKS.values())), strict=True))
    positions, own = VISION[family]
    positions = {**positions, "mrope_section": list(positions["mrope_section"])}
    size = (len(tokenizer) + 63) // 64 * 64
    config = AutoConfig.for_model(
        family,
        text_config={"rope_parameters": positions, **text, "vocab_size": size},
        vision_config={**own, **tower},
        tie_word_embeddings=False,
        **marks,
    )
    return AutoModelForImageTextToText, config


def _write_processor(family: str, donor: Path, folder: Path) -> Any:
    """Of images, videos and text; returns its tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(donor)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS.values())})
    patch = VISION[family][1]["patch_size"]
    images = transformers.Qwen2VLImageProcessor(patch_size=patch)
    if family == "qwen3_vl":
        kind, videos = transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor()
    else:
        kind, videos = transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor()
    kind(image_processor=images, tokenizer=tokenizer, video_processor=videos).save_pretrained(
        folder
    )
    return tokenizer


def fill(model: Any, seed: int) -> None:
    """Overwrites all weights of a transformers model: norms with what leaves rows as they are, the
    others at random, at a scale that layers keep.

    A matrix, or each matrix of a stack, has a standard deviation of its inputs' number ** -0.5,
    embeddings have one, and the head, or embeddings in its place, LOGITS times that of a matrix.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    buffers = [(n, b) for n, b in model.named_buffers() if n.endswith("correction_bias")]
    head = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    gemma = model.config.model_type.startswith("gemma")
    for name, weight in sorted([*model.named_parameters(), *buffers]):
        if "norm" in name:
            weight.data.fill_(_norm_of_gemma(name) if gemma else 1.0)
            continue
        scale = BIAS if weight.dim() == 1 else weight.shape[-1] ** -0.5
        if name.endswith("sinks"):
            scale = SINKS
        if "embed_tokens" in name and head != "embed_tokens":
            scale = 1.0
        if head in name:
            scale *= LOGITS
        weight.data.normal_(0, scale, generator=generator)


def _norm_of_gemma(name: str) -> float:
    """The weight of a norm, to which Gemma adds one.

    Norms behind a sublayer make it louder than the embedding: with a tied head a model that keeps
    its input says it again.
    """
    return 3.0 if "post_" in name else 0.0
