"""Whether a model takes embeddings in the place of tokens, as some of SGLang's classes do not.

SGLang hands them to any model, and its scheduler ends where the model knows no such argument, or
where it is to replace tokens and the model does not say where its embeddings are. A whole prompt of
them it makes bfloat16, which layers of another type do not multiply.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch

_ARGUMENT, _LAYER = "input_embeds", "get_input_embeddings"
_NONE = "this model takes no embeddings in the place of tokens: send a text or token ids."


class Taken(NamedTuple):
    """Why a client's embeddings are not taken: sentences, empty where they are."""

    prompts: str = ""  # `input_embeds`
    overrides: str = ""  # `positional_embed_overrides`


def taken_by(model: type[Any], dtype: torch.dtype) -> Taken:
    """Of SGLang's class of a model, which computes in this type."""
    parameters = inspect.signature(model.forward).parameters
    named = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if not named and _ARGUMENT not in parameters:
        return Taken(_NONE, _NONE)
    other = "" if dtype == torch.bfloat16 else _of_another_type(dtype)
    return Taken(other, "" if hasattr(model, _LAYER) else _NONE)


def _of_another_type(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return (
        f"this server computes in {name}, and SGLang gives it input_embeds in bfloat16: send a "
        "text or token ids, or start it with --dtype bfloat16."
    )


def refusal(req: Any, taken: Taken) -> str:
    """The sentence for a request, gated or not, whose embeddings the model does not take."""
    prompt = "" if req.input_embeds is None else taken.prompts
    override = "" if req.positional_embed_overrides is None else taken.overrides
    return prompt or override
