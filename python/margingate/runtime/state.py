"""The one controller of this scheduler process.

SGLang's result processor and stream accumulator cannot carry a reference, so hooks reach the
controller through here; there is one scheduler per process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from margingate.runtime.controller import GateController

_controller: GateController | None = None


def set_controller(controller: GateController | None) -> None:
    global _controller  # noqa: PLW0603
    _controller = controller


def controller() -> GateController:
    """The controller; raises RuntimeError where a hook runs without one."""
    if _controller is None:
        raise RuntimeError("margingate: a gate hook ran before the gate was set up")
    return _controller


def active() -> GateController | None:
    return _controller
