"""Whether a model takes embeddings in the place of tokens, as some of SGLang's classes do not.

SGLang hands them to any model, and its scheduler ends where the model knows no such argument, or
where it is to replace tokens and the model does not say where its embeddings are.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

_ARGUMENT, _LAYER = "input_embeds", "get_input_embeddings"
_NONE = "this model takes no embeddings in the place of tokens: send a text or token ids."


class Taken(NamedTuple):
    """What a client may bring."""

    prompts: bool = True  # `input_embeds`
    overrides: bool = True  # `positional_embed_overrides`


def taken_by(model: type[Any]) -> Taken:
    """Of SGLang's class of a model."""
    parameters = inspect.signature(model.forward).parameters
    named = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    prompts = named or _ARGUMENT in parameters
    return Taken(prompts, prompts and hasattr(model, _LAYER))


def refusal(req: Any, taken: Taken) -> str:
    """The sentence for a request, gated or not, whose embeddings the model does not take."""
    prompt = req.input_embeds is not None and not taken.prompts
    override = req.positional_embed_overrides is not None and not taken.overrides
    return _NONE if prompt or override else ""
