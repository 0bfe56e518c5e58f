"""Embeddings that a client brings, of another form than the model's: HTTP 400.

SGLang takes them as they are, and its scheduler ends as it puts them beside the model's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sglang.srt.managers.embed_types import PositionalEmbeds


def refusal(obj: Any, width: int) -> str:
    """The sentence for those of one prompt's request, gated or not, or an empty one.

    Args:
        width: numbers of one embedding of the model.
    """
    prompt = getattr(obj, "input_embeds", None)
    overrides = getattr(obj, "positional_embed_overrides", None)
    return _not_a_prompt(prompt, width) or _not_overrides(overrides, width)


def _not_a_prompt(embeds: Any, width: int) -> str:
    """The sentence for a prompt in embeddings that is no list of as many numbers a token."""
    if embeds is None:
        return ""
    try:
        found = np.asarray(embeds)
    except (ValueError, TypeError):  # lists of several lengths, or numbers that NumPy has not
        found = np.empty(0, object)
    if found.dtype.kind not in "iuf":
        said = "is no list of equally many numbers for each token"
    elif found.ndim == 2 and len(found) and found.shape[1] == width:
        return ""
    else:
        said = f"has the shape {list(found.shape)}"
    return f"input_embeds {said}: give {width} numbers for each token of the prompt."


def _not_overrides(overrides: Any, width: int) -> str:
    """The sentence for embeddings in the place of tokens that came as JSON, or are of another
    width.
    """
    if overrides is None:
        return ""
    if not isinstance(overrides, PositionalEmbeds):
        return "positional_embed_overrides are tensors, which cannot come as JSON: drop them."
    found = overrides.embeds.shape[-1]
    if found == width:
        return ""
    has = f"an embedding that replaces a token has {found} numbers"
    return f"{has}: give {width}, as the model has."


def is_empty(embeds: Any) -> bool:
    """Whether SGLang would look for the first number of the first token in vain: HTTP 500."""
    return isinstance(embeds, list) and (not embeds or embeds[0] == [])
