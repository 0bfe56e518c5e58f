"""SGLang's detokenizer process with our hooks: SGLang loads no plugins in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from margingate.runtime import hooks
from margingate.runtime.tokenizer_hooks import DETOKENIZER_HOOKS


def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of SGLang's function for that process, given as `original`."""
    hooks.install(DETOKENIZER_HOOKS)
    return original(*args, **kwargs)
