"""`sglang.Engine(deterministic_gate=True)`: our keywords are taken, and never lost."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import ServerArgs

from margingate.config import GateConfig, GateError
from margingate.runtime.compat.arguments.server_args import gate_config
from margingate.runtime.compat.instance_patches import ON_ENGINE, check_instance
from margingate.runtime.start import arguments


def take_keywords() -> None:
    """Engines make their ServerArgs by `make` from now on.

    An Engine loads the plugins itself before it makes them, so this serves the first one too;
    a hook on `Engine.__init__` would not.
    """
    for patch in ON_ENGINE:
        check_instance(Engine, patch)
        setattr(Engine, patch.name, staticmethod(make))


def make(*args: Any, **kwargs: Any) -> Any:
    """In place of ServerArgs, which takes no keywords of ours; raises GateError."""
    options = arguments.pop_options(kwargs)
    made = ServerArgs(*args, **kwargs)
    if options.pop("enabled"):
        arguments.attach(made, options)
    return made


def gate_to_launch(server_args: Any) -> GateConfig | None:
    """The gate's settings of a server that is about to be launched, or None where it has none.

    Raises:
        GateError: the Engine being made was given the flag, and these arguments have no settings.
    """
    config = gate_config(server_args)
    if config is None and arguments.pop_options(_keywords())["enabled"]:
        raise GateError(
            "deterministic_gate was given to an Engine whose server_args carry no settings of it: "
            "give all arguments as keywords, without server_args."
        )
    return config


def _keywords() -> dict[str, Any]:
    """Those of the Engine that is being made, which ignores ours where it is given `server_args`.

    Read where it keeps them, since it may have begun before there was any hook.
    """
    code = inspect.unwrap(Engine.__init__).__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return {} if frame is None else dict(frame.f_locals["kwargs"])
