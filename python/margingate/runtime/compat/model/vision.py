"""Vision models that are served: a decoder behind a tower that text never reaches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

# By architecture, which is SGLang's class of the model: the module that images and videos run
# through, and nothing else does.
TOWERS: Mapping[str, str] = MappingProxyType(
    {
        "Qwen2VLForConditionalGeneration": "visual",
        "Qwen2_5_VLForConditionalGeneration": "visual",
        "Qwen3VLForConditionalGeneration": "visual",
        "Qwen3VLMoeForConditionalGeneration": "visual",
    }
)
SERVED = "Qwen2-VL, Qwen2.5-VL and Qwen3-VL"  # TOWERS in words


def is_known(model_config: Any) -> bool:
    """Whether SGLang's ModelConfig is of a model with one of TOWERS."""
    return any(name in TOWERS for name in model_config.hf_config.architectures or ())


def text_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of all modules of a model that text may run through; the tower is left out.

    Rows of a decoder must not depend on others; an image has a forward of the tower to itself.
    """
    tower = TOWERS.get(type(model).__name__)
    for name, module in model.named_modules():
        if tower is None or not (name == tower or name.startswith(f"{tower}.")):
            yield name, module


def section_positions(
    model_config: Any, positions: torch.Tensor, beside: Any = None
) -> torch.Tensor | None:
    """Rotary positions [3, rows] where the model has one for each section, else None.

    Those of decode rows are one number, three times.

    Args:
        positions: int64 [rows], rotary ones.
        beside: a batch of SGLang's whose rows come first, with their own; None: there is none.
    """
    if not model_config.model_is_mrope:
        return None
    sections = positions.unsqueeze(0).repeat(3, 1)
    if beside is None:
        return sections
    count = beside.batch_size
    return torch.cat([beside.mrope_positions[:, :count], sections[:, count:]], dim=1)


def has_tower(model: Any) -> bool:
    """Whether an SGLang model is one of TOWERS, and was loaded with its tower."""
    return getattr(model, TOWERS.get(type(model).__name__, ""), None) is not None


def patch_width(model_config: Any) -> int:
    """Numbers of a patch of an image, as the tower takes it."""
    tower = model_config.hf_config.vision_config
    channels = getattr(tower, "in_channels", None) or tower.in_chans
    return int(channels * tower.temporal_patch_size * tower.patch_size**2)


def tokens_of(model_config: Any, grid: tuple[int, int, int]) -> int:
    """Tokens of an image of so many frames, rows and columns of patches."""
    tower = model_config.hf_config.vision_config
    return int(math.prod(grid) // tower.spatial_merge_size**2)


def has_media(req: Any) -> bool:
    """Whether a request that was made brings images, video or sound."""
    return req.multimodal_inputs is not None


def warm_up_with_text(model_config: Any) -> None:
    """Before SGLang warms the server up: it would send an image, which may be answered 400.

    `/model_info` says `has_image_understanding: false` from then on. Nothing else reads it.
    """
    model_config.is_image_understandable_model = False
