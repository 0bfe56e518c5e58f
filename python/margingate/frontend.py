"""For programs in SGLang's frontend language: `Endpoint`, a backend with the gate's switch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from margingate.runtime.client.frontend import Endpoint

__all__ = ["Endpoint"]


def __getattr__(name: str) -> Any:
    """`Endpoint`, whose base class is SGLang's: importing this module alone does not load SGLang.

    Raises:
        AttributeError: another name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from margingate.runtime.client.frontend import Endpoint

    return Endpoint
