"""Serving throughput, TTFT and TPOT: stock, SGLang's deterministic mode, and the gate.

    python -m benchmark.speed.serving --model benchmark/models/configs/llama-3.1-8b \
        --out serving.json

Dummy weights: for speed only. A point is a length mix at a request rate, sent by SGLang's own
benchmark (sglang.benchmark.serving): the same requests at the same times to each server. As many
servers as fit are up at once, and each point is measured server by server, so one has
the machine at a time; with `--together 1` each has the GPU and its memory for itself, one after
another. Ratios are to the first mode, within a group where it is up. At rate inf there are as many
requests as `--tokens` hold, or twice what the K/V pool does, and `--requests` at most. Results are
written after every run.

`stock-default` and `deterministic-default` have the attention that SGLang chooses (on Hopper
FlashAttention 3), `-fa3` and `-triton` what they say, `stock` and `deterministic` FlashInfer. A CPU
has one attention. All servers have CUDA graphs for prefill, as by SGLang's defaults; without them a
server starts faster, and the first token of a short prompt comes later.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from benchmark.bench import engines
from benchmark.bench.load import Load, lengths, requests, vocabulary
from benchmark.bench.serving_table import ratio, short, table
from margingate.harness.client import Client
from margingate.harness.servers import GATE, Server, ServerError, launch

FLASHINFER = ("--attention-backend", "flashinfer")
TRITON = ("--attention-backend", "triton")
FA3 = ("--attention-backend", "fa3")
DETERMINISTIC = "--enable-deterministic-inference"
STOCK_PATH = (GATE, "--gate-fast-path", "stock")
SERVERS: dict[str, tuple[str, ...]] = {
    "stock": FLASHINFER,
    "stock-default": (),
    "stock-triton": TRITON,
    "stock-fa3": FA3,
    "deterministic-default": (DETERMINISTIC,),
    "deterministic": (DETERMINISTIC, *FLASHINFER),
    "deterministic-triton": (DETERMINISTIC, *TRITON),
    "deterministic-fa3": (DETERMINISTIC, *FA3),
    "gate": (GATE,),
    "gate-flashinfer": (GATE, *FLASHINFER),
    "exact": (GATE, "--gate-guarantee", "exact"),
    "margin": (*STOCK_PATH, "--gate-simulate-trigger-rate", "0.1856"),
    "always": (*STOCK_PATH, "--gate-policy", "always", "--gate-max-delay", "0"),
}
SHARES = {"gate-50": 0.5, "gate-10": 0.1}  # of the requests that are gated, on the server "gate"
MODES = (*SERVERS, *SHARES)
USUAL = ("stock-default", "deterministic-default", "gate", "exact", "gate-50", "gate-10", "always")
WARM_UP = ((8, 16), (1, 4))  # requests and tokens of each, of every mix, before anything counts
COUNTED = ("steps", "flagged", "verified", "passes", "flips", "missed", "retractions")
TALLIED = ("decode_steps", "quiet_steps", "pass_rows", "waits", "waited_s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    engines.add_options(parser, budget_s=300, kv_tokens=65_536)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=USUAL)
    parser.add_argument("--mixes", nargs="+", default=["sharegpt", "1k-1k", "4k-1k"])
    parser.add_argument("--rates", nargs="+", type=float, default=[math.inf, 2], help="a second")
    parser.add_argument("--requests", type=int, default=256, help="at most, of a point")
    parser.add_argument("--tokens", type=int, default=200_000, help="of a point at rate inf")
    parser.add_argument("--seconds", type=float, default=8, help="of arrivals at a finite rate")
    parser.add_argument("--repeats", type=int, default=1, help="of each point, servers in turn")
    parser.add_argument("--largest", type=int, default=256, help="requests that run at once")
    parser.add_argument("--start-s", type=float, default=240, help="for servers to come up")
    parser.add_argument("--no-prefill-graphs", action="store_true", help="a faster start")
    parser.add_argument("server_args", nargs="*", help="for all servers, after --")
    return parser.parse_args()


def server_of(mode: str) -> str:
    return "gate" if mode in SHARES else mode


def common_args(args: argparse.Namespace, tokenizer: Path) -> tuple[str, ...]:
    """What all servers are given."""
    gpu = ("--mem-fraction-static", "0.95", "--cuda-graph-max-bs-decode", str(args.largest))
    gpu += ("--cuda-graph-backend-prefill", "disabled") if args.no_prefill_graphs else ()
    return (
        *("--load-format", "dummy", "--tokenizer-path", str(tokenizer)),
        *("--grammar-backend", "none"),  # llguidance refuses that tokenizer
        *("--context-length", str(engines.context(args.model))),
        *("--max-total-tokens", str(args.kv_tokens), "--max-running-requests", str(args.largest)),
        *(gpu if engines.on_gpu() else ("--sleep-on-idle",)),
        *args.server_args,
    )


def own_args(name: str) -> tuple[str, ...]:
    """What one server is given besides; attention backends of GPUs on a GPU only."""
    own = SERVERS[name]
    if engines.on_gpu():
        return own
    return tuple(each for each in own if each not in {*FLASHINFER, *TRITON, *FA3})


@contextlib.contextmanager
def servers(
    args: argparse.Namespace, names: list[str], tokenizer: Path
) -> Iterator[dict[str, Server]]:
    """Those that came up, by name, started side by side; all are ended afterwards."""
    common, begun = common_args(args, tokenizer), time.monotonic()
    made = {}
    for name in names:
        log = args.logs / f"{args.out.stem}.{name}.log"
        made[name] = launch(args.model, log, *common, *own_args(name), start_s=args.start_s)
    try:
        with ThreadPoolExecutor(len(made)) as pool:
            came_up = dict(zip(made, pool.map(_starts, made.values()), strict=True))
        up = {name: server for name, server in made.items() if came_up[name]}
        print("up:", *up, f"{time.monotonic() - begun:.0f} s, K/V {args.kv_tokens}", flush=True)
        yield up
    finally:
        for server in made.values():
            server.stop()


def _starts(server: Server) -> bool:
    try:
        server.start()
    except ServerError as error:
        print(error, flush=True)
        return False
    return True


class Run:
    """The measurements of one invocation."""

    def __init__(self, args: argparse.Namespace, load: Load) -> None:
        self.args, self.load = args, load
        self.results: list[dict[str, Any]] = []
        self._bases: dict[tuple[str, float], dict[str, Any]] = {}  # the first mode's last, by load

    def group(self, names: list[str], seconds: float) -> None:
        """Start these servers, measure their modes at every load for some time, end them.

        At the first load whatever the time: a group that was started shows something.
        """
        with servers(self.args, names, self.load.folder) as up:
            for server in up.values():
                self.warm_up(server)
            modes = [mode for mode in self.args.modes if server_of(mode) in up]
            deadline = time.monotonic() + seconds
            loads = product(self.args.rates, self.args.mixes, range(self.args.repeats))
            for i, (rate, mix, _) in enumerate(loads):
                for mode in modes:
                    if i > 0 and time.monotonic() > deadline:
                        print("out of time before", mix, rate, mode, flush=True)
                        return
                    self.point(mode, up[server_of(mode)], mix, rate)

    def warm_up(self, server: Server) -> None:
        """A burst and a single request of each mix: kernels are compiled."""
        for mix in self.args.mixes:
            for count, tokens in WARM_UP:
                rows = requests(mix, count, count, 1.0)
                for row in rows:
                    row.extra_request_body["sampling_params"]["max_new_tokens"] = tokens
                self.load.run(server.base_url, rows, math.inf, 0)

    def count(self, mix: str, rate: float) -> int:
        """Requests of a point."""
        if not math.isinf(rate):
            return min(self.args.requests, max(4, int(rate * self.args.seconds)))
        some = lengths(mix, 64, 0)
        mean = sum(map(sum, some)) / len(some)
        tokens = min(2 * self.args.kv_tokens, self.args.tokens)
        return min(self.args.requests, max(4, int(tokens / mean)))

    def measure(self, mode: str, server: Server, mix: str, rate: float) -> dict[str, Any]:
        """One server under one load, the cache empty at the start."""
        client = Client(server.base_url, 1)
        gated = GATE in server.args
        seed = len(mix) + int(min(rate, 1000))
        rows = requests(mix, self.count(mix, rate), seed, SHARES.get(mode, 1.0))
        client.flush()
        before = client.gate_state() if gated else {}
        found = self.load.run(server.base_url, rows, rate, seed)
        found |= {"mode": mode, "mix": mix, "rate": rate if math.isfinite(rate) else "inf"}
        if gated:
            found["gate"] = gate_figures(before, client.gate_state(), found["duration"])
            found["gated_share"] = SHARES.get(mode, 1.0)
        return found

    def point(self, mode: str, server: Server, mix: str, rate: float) -> None:
        """Measure, compare with the first mode and write; a failure is a printed line."""
        try:
            found = self.measure(mode, server, mix, rate)
        except Exception as error:
            print(f"{mode} at {mix}, {rate}: {error}", flush=True)
            return
        if mode == self.args.modes[0]:
            self._bases[mix, rate] = found
        found["ratios"] = ratio(found, self._bases.get((mix, rate)))
        self.results.append(found)
        engines.write(self.args.out, self.results)
        print(short(found), flush=True)


def gate_figures(before: dict[str, Any], after: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the gate did in a run, by the counters around it; None where it did nothing."""
    counted = {name: after[name] - before[name] for name in COUNTED}
    tallied = {name: after["tally"][name] - before["tally"][name] for name in TALLIED}
    return {
        **counted,
        "trigger_rate": _part(counted["flagged"], counted["steps"]),
        "quiet_share": _part(tallied["quiet_steps"], tallied["decode_steps"]),
        "passes_per_s": counted["passes"] / seconds,
        "rows_per_pass": _part(tallied["pass_rows"], counted["passes"]),
        "settle_wait_ms": _part(1e3 * tallied["waited_s"], tallied["waits"]),
        "waits": tallied["waits"],
    }


def _part(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def main() -> None:
    args = arguments()
    names = list(dict.fromkeys(server_of(mode) for mode in args.modes))
    turns = engines.turns(args, names)
    with tempfile.TemporaryDirectory() as folder:
        load = Load(Path(folder), vocabulary(args.model), args.logs / f"{args.out.stem}.client.log")
        run = Run(args, load)
        for group, seconds in turns:
            run.group(group, seconds)
    print(table(run.results), flush=True)


if __name__ == "__main__":
    main()
