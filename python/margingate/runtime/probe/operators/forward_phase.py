"""Whether the forward that runs now is a prefill: some layers run otherwise there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

_BATCH = "forward_batch"  # SGLang's name of the argument in the forward of each model

_NOTING = "_margingate_notes_the_phase"

_prefills = False


def is_prefill() -> bool:
    """Of the forward that runs, or that a CUDA graph is captured of."""
    return _prefills


def watch(model: Any) -> None:
    """Note the phase of each forward of a model. Again for the same one does nothing.

    SGLang calls the whole model, and for the graphs of a prefill the layers without the head.
    """
    for module in model.modules():
        if module is model or hasattr(module, "layers"):
            names = list(inspect.signature(module.forward).parameters)
            if _BATCH in names and not hasattr(module.forward, _NOTING):
                module.forward = _noting(module.forward, names.index(_BATCH))


def _noting(forward: Callable[..., Any], place: int) -> Callable[..., Any]:
    @wraps(forward)  # SGLang looks at its parameters
    def noting(*args: Any, **kwargs: Any) -> Any:
        global _prefills  # noqa: PLW0603
        batch = kwargs[_BATCH] if _BATCH in kwargs else args[place]
        before, _prefills = _prefills, batch.forward_mode.is_extend()
        try:
            return forward(*args, **kwargs)
        finally:
            _prefills = before

    setattr(noting, _NOTING, True)
    return noting
