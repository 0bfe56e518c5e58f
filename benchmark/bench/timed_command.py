"""A command with a time limit: ended with all that it started when the limit is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

GRACE_S = 15.0  # to write results and end servers after an interrupt
SERVERS_S = 6.0  # servers have sessions of their own, and end this long behind a killed command


class Ended(NamedTuple):
    """How a command ended."""

    status: int | None  # its exit status; None: the limit was up
    seconds: float


def run(
    command: Sequence[str], log: Path, limit_s: float, env: Mapping[str, str] | None = None
) -> Ended:
    """Run `command` in a session of its own; stdout and stderr replace `log`.

    Args:
        limit_s: seconds. Then it gets SIGINT, GRACE_S later SIGKILL, and so does its group.
        env: added to this process's environment.
    """
    begun = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            start_new_session=True,
        )
    try:
        status: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        status = None
        _interrupt(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a command left behind
        process.wait()
    if status is None:
        time.sleep(SERVERS_S)
    return Ended(status, time.monotonic() - begun)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
