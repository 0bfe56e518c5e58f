"""SGLang engines with dummy weights, a process each, all up at once and asked point by point.

A script that uses this starts itself once more for each engine, with `--one MODE`. The parent then
measures every point engine by engine, so that a drift of the machine meets them all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from determinism import processor

from margingate.servers import CPU_ENV

CPU = {"device": "cpu", "mem_fraction_static": 0.3}
LONGEST = 16384  # tokens of a request
MARK = "@@ "  # before a line that is meant for the parent


def add_options(parser: argparse.ArgumentParser, budget_s: float, kv_tokens: int) -> None:
    """The options that all such scripts have."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--kv-tokens", type=int, default=kv_tokens)
    parser.add_argument("--budget-s", type=float, default=budget_s, help="no new point after this")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", help=argparse.SUPPRESS)


def start(model: str, kv_tokens: int, largest: int, **options: Any) -> Any:
    """A `sglang.Engine` for up to `largest` requests at once; `options` are its own."""
    import sglang

    return sglang.Engine(
        model_path=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        cuda_graph_max_bs_decode=largest,
        cuda_graph_backend_prefill="disabled",  # a start of minutes; decode is what is timed
        context_length=context(model),
        max_total_tokens=kv_tokens,
        log_level="info",
        **_machine(),
        **options,
    )


def context(model: str) -> int:
    """LONGEST, or less where the model's positions end before."""
    config: dict[str, int] = json.loads((Path(model) / "config.json").read_text())
    return min(LONGEST, config.get("max_position_embeddings", LONGEST))


def _machine() -> dict[str, Any]:
    return {"mem_fraction_static": 0.95} if on_gpu() else CPU


def on_gpu() -> bool:
    """Whether CUDA is found."""
    import torch

    return torch.cuda.is_available()


def gate_state(engine: Any) -> dict[str, Any] | None:
    """The gate's counters; None for an engine without it."""
    state: dict[str, Any] = engine.get_server_info()["internal_states"][0]
    return state.get("margingate")


def serve(engine: Any, measure: Callable[..., Any]) -> None:
    """Answer each line of stdin, a point, with `measure(engine, *point)`; return at its end."""
    tell("up")
    for line in sys.stdin:
        tell(measure(engine, *json.loads(line)))


def tell(answer: Any) -> None:
    """Say something to the parent."""
    print(MARK + json.dumps(answer), flush=True)


class Worker:
    """The process of one engine."""

    def __init__(self, mode: str, log: Path) -> None:
        command = [sys.executable, *sys.argv, "--one", mode]
        self.mode = mode
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=os.environ if on_gpu() else {**CPU_ENV, **os.environ},
            text=True,
        )

    def answer(self) -> Any:
        """The next marked line; None when the process ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        return None

    def ask(self, *point: Any) -> Any:
        """Have a point measured; None when the process ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(point) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer()

    def end(self) -> Any:
        """Have it shut down; what it says last, or None."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        said = self.answer()
        self.process.wait(60)
        return said


def all_up(modes: Sequence[str], out: Path) -> list[Worker]:
    """A worker for each mode, started side by side; those that came up, in order.

    Their logs lie beside `out`.
    """
    begun = time.monotonic()
    workers = [Worker(mode, out.with_suffix(f".{mode}.log")) for mode in modes]
    workers = [worker for worker in workers if worker.answer() == "up"]
    print("up:", *(worker.mode for worker in workers), f"{time.monotonic() - begun:.0f} s")
    return workers


def write(out: Path, results: Any) -> None:
    """Write `results` with device, versions and command."""
    import torch

    record = {
        "device": torch.cuda.get_device_name() if on_gpu() else processor(),
        "versions": {name: metadata.version(name) for name in ("torch", "sglang")},
        "command": sys.argv,
        "results": results,
    }
    out.write_text(json.dumps(record, indent=1))
