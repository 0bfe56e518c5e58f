"""What each kind of option takes; each check raises GateError, which names the option."""

from __future__ import annotations

import math
import re
from typing import Any

from margingate.errors import GateError

_ENDPOINT = re.compile(r"tcp://(?:\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+):(\d{1,5})|ipc://(\S+)")


def check_choice(option: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of the choices."""
    if value not in choices:
        raise GateError(f"{option} is {value!r}: choose one of {', '.join(choices)}.")


def check_range(option: str, value: Any, low: int, high: int) -> None:
    """A whole number, both ends included, or None."""
    if value is None:  # chosen when the device is known
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise GateError(f"{option} is {value!r}: give a whole number from {low} to {high}.")


def check_router_threshold(value: Any) -> None:
    """A positive number, or None: a threshold of 0 would flag nothing, and look like one."""
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise GateError(
            f"--gate-router-threshold is {value!r}, but the margin of a router's choice is "
            "compared with it: give a number > 0, or use --gate-policy always to verify every row."
        )


def check_share(option: str, value: Any) -> None:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise GateError(f"{option} is {value!r}: give a number from 0 to 1.")


def check_endpoint(option: str, value: Any) -> None:
    """An address that ZeroMQ events can have."""
    found = _ENDPOINT.fullmatch(value) if isinstance(value, str) else None
    if found is None or (found[2] is None and not 0 < int(found[1]) < 1 << 16):
        raise GateError(
            f"{option} is {value!r}: give tcp://HOST:PORT, with a port from 1 to 65535, or "
            "ipc://PATH."
        )


def check_switch(option: str, value: Any) -> None:
    """A truth value, and no number that stands for one."""
    if not isinstance(value, bool):
        raise GateError(f"{option} is {value!r}: give True or False.")
