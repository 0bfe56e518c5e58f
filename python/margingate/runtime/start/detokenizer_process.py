"""SGLang's detokenizer process with our hooks: SGLang loads no plugins in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from margingate.runtime.hooks import registry
from margingate.runtime.hooks.launcher_table import DETOKENIZER_HOOKS


def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of SGLang's function for that process, given as `original`."""
    registry.install(DETOKENIZER_HOOKS)
    return original(*args, **kwargs)
