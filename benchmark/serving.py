"""Serving throughput, TTFT and TPOT: stock, SGLang's deterministic mode, and the gate.

    python benchmark/serving.py --model benchmark/configs/llama-3.1-8b --out serving.json

Dummy weights: for speed only. All servers are started side by side and stay; then each point, a
length mix at a request rate, is measured server by server with the same requests at the same times
(sglang.benchmark.serving). So one server has the machine at a time. They must fit into the GPU's
memory together: `--kv-tokens` bounds each one's K/V pool, and at rate inf there are as many
requests as fill it twice, `--requests` at most. Ratios are to the first mode. Results are written
after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engines
from serving_load import Load, lengths, requests, vocabulary

from margingate.client import Client
from margingate.servers import GATE, Server, ServerError, launch

TRITON = ("--attention-backend", "triton")
DETERMINISTIC = "--enable-deterministic-inference"
STOCK_PATH = (GATE, "--gate-fast-path", "stock")
SERVERS: dict[str, tuple[str, ...]] = {
    "stock": (),
    "stock-triton": TRITON,
    "deterministic": (DETERMINISTIC,),
    "deterministic-triton": (DETERMINISTIC, *TRITON),
    "gate": (GATE,),
    "gate-flashinfer": (GATE, "--attention-backend", "flashinfer"),
    "exact": (GATE, "--gate-guarantee", "exact"),
    "margin": (*STOCK_PATH, "--gate-simulate-trigger-rate", "0.1856"),
    "always": (*STOCK_PATH, "--gate-policy", "always"),
}
SHARES = {"gate-50": 0.5, "gate-10": 0.1}  # of the requests that are gated, on the server "gate"
MODES = (*SERVERS, *SHARES)
USUAL = ("stock", "deterministic", "gate", "gate-50", "gate-10", "exact", "always")
WARM_UP = ((8, 16), (1, 4))  # requests and tokens of each, of every mix, before anything counts
COUNTED = ("steps", "flagged", "verified", "passes", "flips", "missed", "retractions")
TALLIED = ("decode_steps", "quiet_steps", "pass_rows", "waits", "waited_s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    engines.add_options(parser, budget_s=300, kv_tokens=40_000)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=USUAL)
    parser.add_argument("--mixes", nargs="+", default=["sharegpt", "1k-1k", "4k-1k"])
    parser.add_argument("--rates", nargs="+", type=float, default=[math.inf, 4], help="a second")
    parser.add_argument("--requests", type=int, default=128, help="at most, of a point")
    parser.add_argument("--seconds", type=float, default=10, help="of arrivals at a finite rate")
    parser.add_argument("--largest", type=int, default=128, help="requests that run at once")
    parser.add_argument("--start-s", type=float, default=300, help="for all servers to come up")
    parser.add_argument("server_args", nargs="*", help="for all servers, after --")
    return parser.parse_args()


def server_of(mode: str) -> str:
    return "gate" if mode in SHARES else mode


def common_args(args: argparse.Namespace, tokenizer: Path) -> tuple[str, ...]:
    """What all servers are given."""
    gpu = ("--mem-fraction-static", "0.95", "--cuda-graph-backend-prefill", "disabled")
    return (
        *("--load-format", "dummy", "--tokenizer-path", str(tokenizer)),
        *("--context-length", str(engines.context(args.model))),
        *("--max-total-tokens", str(args.kv_tokens), "--max-running-requests", str(args.largest)),
        *("--cuda-graph-max-bs-decode", str(args.largest)),
        *(gpu if engines.on_gpu() else ("--sleep-on-idle",)),
        *args.server_args,
    )


@contextlib.contextmanager
def servers(args: argparse.Namespace, tokenizer: Path) -> Iterator[dict[str, Server]]:
    """Those that came up, by name, started side by side; all are ended afterwards."""
    common = common_args(args, tokenizer)
    made = {}
    for name in dict.fromkeys(server_of(mode) for mode in args.modes):
        log = args.out.with_suffix(f".{name}.log")
        made[name] = launch(args.model, log, *common, *SERVERS[name], start_s=args.start_s)
    try:
        with ThreadPoolExecutor(len(made)) as pool:
            came_up = dict(zip(made, pool.map(_starts, made.values()), strict=True))
        yield {name: server for name, server in made.items() if came_up[name]}
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

    def __init__(self, args: argparse.Namespace, load: Load, servers: dict[str, Server]) -> None:
        self.args, self.load = args, load
        self.servers = servers
        self.modes = [mode for mode in args.modes if server_of(mode) in servers]
        self.results: list[dict[str, Any]] = []

    def warm_up(self) -> None:
        """A burst and a single request of each mix to each server: kernels are compiled."""
        for name, server in self.servers.items():
            for mix in self.args.mixes:
                for count, tokens in WARM_UP:
                    rows = requests(mix, count, count, 1.0)
                    for row in rows:
                        row.extra_request_body["sampling_params"]["max_new_tokens"] = tokens
                    self.load.run(server.base_url, rows, math.inf, 0)
            print("warm:", name, flush=True)

    def count(self, mix: str, rate: float) -> int:
        """Requests of a point."""
        if not math.isinf(rate):
            return min(self.args.requests, max(4, int(rate * self.args.seconds)))
        some = lengths(mix, 64, 0)
        mean = sum(map(sum, some)) / len(some)
        return min(self.args.requests, max(4, int(2 * self.args.kv_tokens / mean)))

    def measure(self, mode: str, mix: str, rate: float) -> dict[str, Any]:
        """One server under one load, the cache empty at the start."""
        server = self.servers[server_of(mode)]
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

    def point(self, mix: str, rate: float, deadline: float) -> None:
        """Every mode at one load, as long as there is time."""
        base: dict[str, Any] | None = None
        for mode in self.modes:
            if time.monotonic() > deadline:
                print("out of time before", mix, rate, mode)
                return
            try:
                found = self.measure(mode, mix, rate)
            except Exception as error:
                print(f"{mode} at {mix}, {rate}: {error}", flush=True)
                continue
            base = base or found
            found["ratio"] = found["output_throughput"] / base["output_throughput"]
            self.results.append(found)
            engines.write(self.args.out, self.results)
            print(line(found), flush=True)


def gate_figures(before: dict[str, Any], after: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the gate did in a run, by the counters around it; None where it did nothing."""
    counted = {name: after[name] - before[name] for name in COUNTED}
    tallied = {name: after["tally"][name] - before["tally"][name] for name in TALLIED}
    return {
        **counted,
        "trigger_rate": _ratio(counted["flagged"], counted["steps"]),
        "quiet_share": _ratio(tallied["quiet_steps"], tallied["decode_steps"]),
        "passes_per_s": counted["passes"] / seconds,
        "rows_per_pass": _ratio(tallied["pass_rows"], counted["passes"]),
        "settle_wait_ms": _ratio(1e3 * tallied["waited_s"], tallied["waits"]),
        "waits": tallied["waits"],
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


HEAD = (
    f"{'mix':9} {'rate':>5} {'mode':20} {'out tok/s':>9} {'ratio':>6} {'TTFT p50':>9} {'p99':>8}"
    f" {'TPOT p50':>9} {'p99':>8}  gated, quiet steps, passes/s, rows/pass, settle wait (ms)"
)


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    text = (
        f"{found['mix']:9} {found['rate']:>5} {found['mode']:20} {found['output_throughput']:9.1f}"
        f" {found['ratio']:6.3f} {found['median_ttft_ms']:9.1f} {found['p99_ttft_ms']:8.1f}"
        f" {found['median_tpot_ms']:9.2f} {found['p99_tpot_ms']:8.2f}"
    )
    if "gate" not in found:
        return text
    gate = found["gate"]
    names = ("quiet_share", "passes_per_s", "rows_per_pass", "settle_wait_ms")
    cells = ["-" if gate[name] is None else f"{gate[name]:.3g}" for name in names]
    return f"{text}  {found['gated_share']:.0%}, {', '.join(cells)}"


def main() -> None:
    args = arguments()
    deadline = time.monotonic() + args.budget_s
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        load = Load(Path(folder), vocabulary(args.model), args.out.with_suffix(".client.log"))
        with servers(args, load.folder) as up:
            print("up:", *up, f"{time.monotonic() - begun:.0f} s", flush=True)
            run = Run(args, load, up)
            run.warm_up()
            print(f"warm after {time.monotonic() - begun:.0f} s\n{HEAD}", flush=True)
            for rate in args.rates:
                for mix in args.mixes:
                    run.point(mix, rate, deadline)


if __name__ == "__main__":
    main()
