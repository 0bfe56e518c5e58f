"""A command with a time limit: ended with all that it started when the limit is up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

GRACE_S = 15.0  # to write results and end servers after an interrupt
POLL_S = 0.05
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
            preexec_fn=_take_interrupts,  # noqa: PLW1509 (no other thread runs)
        )
    try:
        in_time = _ended_within(process, limit_s)
        if not in_time:
            os.kill(process.pid, signal.SIGINT)  # send_signal would reap it if it just ended
            _ended_within(process, GRACE_S)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # also what a command left behind
        status = process.wait()
    if not in_time:
        time.sleep(SERVERS_S)
    return Ended(status if in_time else None, time.monotonic() - begun)


def _take_interrupts() -> None:
    """In a new process: what nohup or a shell's `&` started ignores SIGINT, and so would it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ended_within(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Whether it ends in time. It is not reaped, so its group's number is nobody else's yet."""
    deadline = time.monotonic() + limit_s
    ended = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while os.waitid(os.P_PID, process.pid, ended) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True
