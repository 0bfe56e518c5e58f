"""Whose manager a hook of the launcher runs for: hooks stay in a process, and servers come and go.

A program may make one Engine behind the other. Behind a gated one, or one that was refused, one
without the gate has the same class of manager, and is left as SGLang made it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from margingate.runtime.compat.arguments.server_args import gate_config


def before_gated(function: Callable[..., None]) -> Callable[..., None]:
    """The BEFORE hook of a method of TokenizerManager, for managers of gated servers."""

    @functools.wraps(function)
    def hook(manager: Any, *args: Any, **kwargs: Any) -> None:
        if gate_config(manager.server_args) is not None:
            function(manager, *args, **kwargs)

    return hook


def around_gated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The AROUND hook of a method of TokenizerManager, for managers of gated servers."""

    @functools.wraps(function)
    def hook(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
        if gate_config(manager.server_args) is None:
            return original(manager, *args, **kwargs)
        return function(original, manager, *args, **kwargs)

    @functools.wraps(function)
    async def waits(*args: Any, **kwargs: Any) -> Any:
        return await hook(*args, **kwargs)

    return waits if inspect.iscoroutinefunction(function) else hook
