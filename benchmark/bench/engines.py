"""SGLang engines with dummy weights, a process each, up side by side and asked point by point.

A folder that has weights is served with these.

A script that uses this starts itself once more for each engine, with `--one MODE`. The parent then
measures every point engine by engine, so that a drift of the machine meets them all. Where not all
fit into the GPU's memory, they are up in groups, each with the first mode to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmark.bench.machine import processor

CPU = {"device": "cpu", "mem_fraction_static": 0.3}
LONGEST = 16384  # tokens of a request, where nobody asks for more
MOST_KV = 400_000  # tokens of a K/V pool that is fitted
BESIDE = 6 << 30  # bytes of a server beside weights and K/V: context, graphs, workspaces, prefill
NO_PREFILL_GRAPHS = {"cuda_graph_backend_prefill": "disabled"}  # they take long to capture
MARK = "@@ "  # before a line that is meant for the parent
START_S, ASK_S = 240, 180  # a worker that says nothing for so long is given up


def add_options(parser: argparse.ArgumentParser, budget_s: float, kv_tokens: int) -> None:
    """The options that all such scripts have. `kv_tokens`: the least that is good for measuring."""
    parser.add_argument(
        "--model",
        required=True,
        type=model_folder,
        help="folder with config.json; weights are made up where it has none",
    )
    parser.add_argument(
        "--kv-tokens",
        type=int,
        help=f"of each K/V pool; default: on a GPU what fits, elsewhere {kv_tokens}",
    )
    parser.add_argument(
        "--together",
        type=int,
        help=f"engines at once; default: as many as fit with pools of {kv_tokens} tokens",
    )
    parser.add_argument(
        "--budget-s", type=float, default=budget_s, help="of measuring, for all groups"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, help="folder of the logs; default: that of --out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.set_defaults(least_kv_tokens=kv_tokens)


def model_folder(text: str) -> str:
    """--model as it is, if its config.json can be read; argparse makes a sentence of the error."""
    try:
        json.loads((Path(text) / "config.json").read_text())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(
            f"{text}/config.json cannot be read ({why}): give a folder such as "
            "benchmark/models/configs/llama-3.1-8b"
        ) from None
    return text


def settle(args: argparse.Namespace, modes: Sequence[str]) -> None:
    """Fill in --together, --kv-tokens and --logs, for engines of so many modes."""
    args.logs = args.logs or args.out.parent
    args.logs.mkdir(parents=True, exist_ok=True)
    if on_gpu():
        wanted = args.kv_tokens or args.least_kv_tokens
        fitting = [n for n in range(1, len(modes) + 1) if room(args.model, n) >= wanted]
        args.together = args.together or max(fitting, default=1)
        args.kv_tokens = args.kv_tokens or room(args.model, args.together)
    args.together = args.together or len(modes)
    args.kv_tokens = args.kv_tokens or args.least_kv_tokens


def room(model: str, together: int) -> int:
    """K/V tokens, MOST_KV at most, of each of so many engines that share the GPU; 0: none fits."""
    import torch

    share = torch.cuda.get_device_properties(0).total_memory // together - BESIDE
    weights, token = sizes(json.loads((Path(model) / "config.json").read_text()))
    return max(0, min(MOST_KV, (share - weights) // token // 1000 * 1000))


def sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a decoder's weights, and of one token's keys and values in BF16."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or hidden // heads
    layers = config["num_hidden_layers"]
    attention = hidden * width * (2 * heads + 2 * kv_heads)
    inner = config["intermediate_size"]
    if experts := config.get("num_experts"):
        inner = experts * config["moe_intermediate_size"]
    inner *= config.get("num_local_experts") or 1
    tables = 1 if config.get("tie_word_embeddings") else 2
    each = outside = 2.0  # bytes of a layer's weight in its MLP, and outside
    if method := config.get("quantization_config"):
        packed = method.get("quant_method") == "mxfp4"  # with a scale of a byte for 32
        each, outside = (0.5 + 1 / 32, 2.0) if packed else (1.0, 1.0)
    weights = layers * (outside * attention + each * 3 * hidden * inner)
    return round(
        weights + 2 * tables * config["vocab_size"] * hidden
    ), 4 * layers * kv_heads * width


def groups(modes: Sequence[str], together: int) -> list[list[str]]:
    """Modes that are up at once: `together` at most, and unless that is 1, always the first."""
    first, *others = modes
    if together == 1:
        return [[mode] for mode in modes]
    size = together - 1
    return [[first, *others[i : i + size]] for i in range(0, max(len(others), 1), size)]


def turns(args: argparse.Namespace, modes: Sequence[str]) -> list[tuple[list[str], float]]:
    """`settle`; then the groups of modes that are up at once, each with seconds to measure."""
    settle(args, modes)
    found = groups(modes, args.together)
    return [(group, args.budget_s / len(found)) for group in found]


def start(model: str, kv_tokens: int, largest: int, **options: Any) -> Any:
    """A `sglang.Engine` for up to `largest` requests at once; `options` are its own."""
    import sglang

    return sglang.Engine(
        model_path=model,
        load_format="auto" if has_weights(model) else "dummy",
        skip_tokenizer_init=True,
        cuda_graph_max_bs_decode=largest,
        max_total_tokens=kv_tokens,
        log_level="info",
        **{"context_length": context(model), **_machine(), **NO_PREFILL_GRAPHS, **options},
    )


def has_weights(model: str) -> bool:
    """Whether the folder has its own, as those of `benchmark.models.random_four_bits`."""
    return any(Path(model).glob("*.safetensors"))


def context(model: str, longest: int = LONGEST) -> int:
    """`longest` tokens of a request, or less where the model's positions end before."""
    config: dict[str, int] = json.loads((Path(model) / "config.json").read_text())
    return min(longest, config.get("max_position_embeddings", longest))


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

    def __init__(self, mode: str, args: argparse.Namespace) -> None:
        """Its log is args.logs/MODE.log; K/V pool and logs are as `settle` left them.

        A mode may be NAME@FOLDER: as NAME, with margingate from another checkout.
        """
        fixed = ("--kv-tokens", str(args.kv_tokens), "--one", mode)
        self.mode = mode
        self.log = args.logs / f"{args.out.stem}.{re.sub('[:@/]', '_', mode)}.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", _script(), *sys.argv[1:], *fixed],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=_environment(mode),
            text=True,
        )
        self._said: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self._said.put(json.loads(line.removeprefix(MARK)))
        self._said.put(None)

    def answer(self, seconds: float) -> Any:
        """What it says next; None when it ended, or said nothing for so long and was ended."""
        try:
            said = self._said.get(timeout=seconds)
        except queue.Empty:
            self.process.kill()
            said = None
        if said is None:
            self._said.put(None)  # for whoever asks again
        return said

    def ask(self, *point: Any) -> Any:
        """Have a point measured; None when there is no answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(point) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer(ASK_S)

    def end(self) -> Any:
        """Have it shut down; what it says last, or None."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            return None
        said = self.answer(60)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        return said


def _script() -> str:
    """The module that was started with `python -m`, under the name it has there."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None
    return spec.name


def _environment(mode: str) -> dict[str, str]:
    from margingate.harness.servers import CPU_ENV  # here: another checkout may lack it

    found = dict(os.environ) if on_gpu() else {**CPU_ENV, **os.environ}
    if code := mode.partition("@")[2]:
        first = (f"{code}/python", f"{code}/sgl-kernel-patches")
        found["PYTHONPATH"] = os.pathsep.join((*first, found.get("PYTHONPATH", "")))
    return found


def all_up(modes: Sequence[str], args: argparse.Namespace) -> list[Worker]:
    """A worker for each mode, started side by side; those that came up, in order."""
    from margingate.harness.servers import telling_line

    begun = time.monotonic()
    up = []
    for worker in [Worker(mode, args) for mode in modes]:
        if worker.answer(START_S) == "up":
            up.append(worker)
        else:
            worker.process.kill()
            print(f"{worker.mode} did not start: {telling_line(worker.log)}", flush=True)
    names = (worker.mode for worker in up)
    print("up:", *names, f"{time.monotonic() - begun:.0f} s, K/V {args.kv_tokens}", flush=True)
    return up


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
