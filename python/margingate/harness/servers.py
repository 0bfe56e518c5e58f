"""SGLang servers for the demo, the benchmarks and the tests: started, awaited, always ended."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil  # type: ignore[import-untyped]

PORTS = range(31000, 32768)  # below Linux's ephemeral ports, which any client may hold
SGLANG = (sys.executable, "-m", "sglang.launch_server")
CPU_ARGS = ("--device", "cpu", "--mem-fraction-static", "0.3", "--max-total-tokens", "65536")
# OpenMP threads that spin while they wait starve others: on 2 cores beside another such process a
# decode-like loop took 14 times as long (1.2 times with this; alone, 1.25 times). Results stay.
CPU_ENV = {"OMP_WAIT_POLICY": "PASSIVE"}
GATE = "--deterministic-gate"

# Reads its stdin, which ends with the process that holds the other side, however that ends.
_WATCH = 'read _; kill -s TERM -- "-$0"; sleep "$1"; kill -s KILL -- "-$0"'
_TELLING = re.compile(r"margingate: |\w*(Error|Exception)\b|\berror: ")


def retracting(steps: int) -> dict[str, str]:
    """SGLang's switch, in its environment, that retracts requests every so many decode steps."""
    return {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": str(steps)}


class ServerError(RuntimeError):
    """One sentence: what happened to a server, with a line of its log and the log's path."""


class Server:
    """One server as a context manager.

    Entering starts it, in a session of its own, and returns when GET /health_generate says 200;
    it raises ServerError when the server ends first, or `start_s` pass. Leaving, in whatever way,
    ends its whole process group: SIGTERM, then SIGKILL after `stop_s`. So does the end of this
    process, by SIGKILL too: a shell waits for that. Ctrl-C reaches this process only.

    Args:
        args: for the command, less --port.
        log: its stdout and stderr; folders are made, an older file is replaced.
        port: a free one of PORTS where None.
        command: what is started; SGLang's launcher by default.
        env: added to this process's environment.
        start_s, stop_s: seconds.
    """

    def __init__(
        self,
        args: Sequence[str],
        log: Path | str,
        *,
        port: int | None = None,
        command: Sequence[str] = SGLANG,
        env: Mapping[str, str] | None = None,
        start_s: float = 300,
        stop_s: float = 3,
    ) -> None:
        self.args = tuple(args)
        self.log = Path(log)
        self.port = free_port() if port is None else port
        self.command = (*command, *self.args, "--port", str(self.port))
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.start_s, self.stop_s = start_s, stop_s
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """Without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """The launcher's, which is its process group too; None when it is not started."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it is healthy; on any exception nothing is left running."""
        if self._process is not None:
            raise ServerError(f"the server on port {self.port} is already started: stop it first.")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._spawn()
            self._await_health()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process group; does nothing when nothing was started."""
        if self._process is not None:
            _end_group(self._process.pid, self.stop_s)
            self._process.wait()
            self._process = None
        if self._watch is not None:  # last: until here it covers for us
            self._watch.kill()
            self._watch.communicate()
            self._watch = None

    def running(self) -> bool:
        """Whether the launcher lives."""
        return self._process is not None and self._process.poll() is None

    def healthy(self, timeout_s: float = 30) -> bool:
        """Whether the port answers 200 to a generated token; proxies are not asked."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("GET", "/health_generate")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def error(self, what: str) -> ServerError:
        """A ServerError about this server: `what`, the telling line of its log, the log's path."""
        line = telling_line(self.log) or "the log is empty"
        return ServerError(f"the server on port {self.port} {what} ({line}): see {self.log}.")

    def _spawn(self) -> None:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                start_new_session=True,
            )
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, str(self._process.pid), str(self.stop_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _await_health(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.start_s
        while (left := deadline - time.monotonic()) > 0:
            healthy = self.healthy(min(30, left))
            if (status := self._process.poll()) is not None:
                raise self.error(f"ended at start with status {status}")
            if healthy:
                self._check_port_is_ours()
                return
            time.sleep(0.5)
        raise self.error(f"was not healthy within {self.start_s:g} s")

    def _check_port_is_ours(self) -> None:
        """Raise if another process took the port between `free_port` and the server's bind."""
        assert self._process is not None
        listeners = {
            c.pid
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr.port == self.port
        }
        if listeners and not listeners & set(_members(self._process.pid)):
            raise ServerError(
                f"port {self.port} is answered by another process: start again, on another port."
            )


def launch(
    model: Path | str,
    log: Path | str,
    *extra: str,
    gate: bool = False,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Server:
    """A server of `model`, not started yet, with what this machine needs.

    Args:
        extra: more arguments for SGLang.
        gate: start it with --deterministic-gate.
        env, options: Server's keyword arguments.
    """
    args = machine_args()
    own = CPU_ENV if args else {}
    env = {name: os.environ.get(name, value) for name, value in own.items()} | dict(env or {})
    arguments = ["--model-path", str(model), *args, *([GATE] if gate else []), *extra]
    return Server(arguments, log, env=env, **options)


def machine_args() -> tuple[str, ...]:
    """Nothing where CUDA is found; elsewhere the host as device, with little of its memory."""
    import torch

    return () if torch.cuda.is_available() else CPU_ARGS


def slow_bfloat16() -> bool:
    """Whether models run on a CPU that multiplies bfloat16 in plain loops: one without AVX-512."""
    import torch

    if torch.cuda.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def free_port(ports: Sequence[int] = PORTS) -> int:
    """A port nobody listens on. It is not held: the caller binds it soon. Raises ServerError."""
    for port in random.sample(ports, len(ports)):  # two callers at once rarely get the same
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ServerError(f"no port from {ports[0]} to {ports[-1]} is free: end some servers.")


def telling_line(log: Path) -> str:
    """The last line of `log` that names an error, else its last line, else an empty string."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - (1 << 16)))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip("\0 \t") for line in text.splitlines() if line.strip("\0 \t")]
    telling = [line for line in lines if _TELLING.search(line)]
    return (telling or lines or [""])[-1][:400]


def _end_group(group: int, grace_s: float) -> None:
    """SIGTERM, `grace_s` to leave, SIGKILL; an exception on the way (Ctrl-C) goes to SIGKILL."""
    try:
        _signal(group, signal.SIGTERM)
        _wait_gone(group, grace_s)
    finally:
        _signal(group, signal.SIGKILL)
    _wait_gone(group, 5)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _wait_gone(group: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.1)


def _members(group: int) -> list[int]:
    """The living processes of a group; zombies, which only their parent can end, are not."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members
