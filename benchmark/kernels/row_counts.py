"""Which row counts of a linear layer give a row other bits, and what avoiding them would cost.

One process on one GPU, no server:

    PYTHONPATH=python:sgl-kernel-patches python -m benchmark.kernels.row_counts \
        --out row_counts.json

For the linear layers of three models (`--models`), with made-up BF16 weights, it does two things.

Classes: the same 64 rows are multiplied at every row count of 1 to 1,024 and every multiple of 8 up
to 8,192, with and without a bias. Counts at which these rows get the same bits are one class,
contiguous or not. It prints the classes as runs of counts, `uneven` counts (a row's bits depend on
where in the batch it stands), decode counts at which a CUDA graph gives other bits than eager, and
seconds and memory of the scan. "holes" are counts of a class other than that of their neighbours on
both sides, where these two are in one class.

Times: microseconds of one GEMM at prefill sizes, replayed in a CUDA graph that walks through more
weights than the L2 cache holds: `as_is`; `pad16` to `pad128`, where the input of a count that is no
multiple is copied into a buffer with rows up to the next one (`-`: it is a multiple);
`invariant`, SGLang's batch-invariant matmul. The table sums a layer's GEMMs and divides by `as_is`.
DeepGEMM compiles some kernels for seconds: `invariant` goes through --invariant-tokens in their
order and ends at --budget-s. Seconds of each first call are in the JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from benchmark.bench.gpu_timing import microseconds

SHAPES = {  # (outputs, inputs) of a layer's GEMMs; SGLang fuses q, k, v and gate, up
    "llama-3.1-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "qwen2.5-1.5b": {
        "qkv": (2048, 1536),
        "o": (1536, 1536),
        "gate_up": (17920, 1536),
        "down": (1536, 8960),
    },
    "llama-3.2-1b": {
        "qkv": (3072, 2048),
        "o": (2048, 2048),
        "gate_up": (16384, 2048),
        "down": (2048, 8192),
    },
    "tiny": {"qkv": (96, 64), "down": (64, 128)},  # for a trial without a GPU
}
ROWS = 64  # rows whose bits are compared, at every count
DENSE, MOST, STEP = 1024, 8192, 8  # every count up to DENSE, then each STEP up to MOST
DECODE = (*range(1, 17), *range(24, 257, 8))
TOKENS = (128, 244, 256, 388, 512, 1000, 1024, 2048, 3001, 4096, 8192)
INVARIANT = (1000, 4096, 128, 3001, 8192, 256, 512, 2048, 388)
PADS = (16, 32, 64, 128)
REPLAYS = 5
COLD = 128 << 20  # bytes of weights that a graph walks through: more than any L2

Run = tuple[int, int, int]  # class, first count, last count


class Layer(NamedTuple):
    """A linear layer with made-up weights."""

    weight: torch.Tensor  # bfloat16 [outputs, inputs]
    bias: torch.Tensor  # bfloat16 [outputs]
    rows: torch.Tensor  # bfloat16 [MOST, inputs]: the same ROWS rows again and again


def main() -> None:
    args = arguments()
    report: dict[str, Any] = {**environment(), "command": sys.argv, "classes": [], "times": []}
    began = time.monotonic()
    try:
        with torch.inference_mode():
            fill(report, args, began)
    finally:  # what was measured before an error counts
        report["seconds"] = round(time.monotonic() - began, 1)
        args.out.write_text(json.dumps(report, indent=1))
    print(f"done after {report['seconds']} s")


def fill(report: dict[str, Any], args: argparse.Namespace, began: float) -> None:
    """Measure everything into the report, and print it."""
    for name in args.models:
        for layer, shape in SHAPES[name].items():
            for biased in (False, True):
                found = scan(shape, biased, args)
                print(describe(name, layer, shape, found), flush=True)
                report["classes"].append({"model": name, "layer": layer, **found})
    print(f"classes after {time.monotonic() - began:.0f} s", flush=True)
    for name in args.models:
        report["times"] += times(name, args)
    print_times(report["times"])
    add_invariant(report["times"], args, began)
    print_times(report["times"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=models)
    parser.add_argument("--dense", type=int, default=DENSE, help="every row count up to here")
    parser.add_argument("--most", type=int, default=MOST, help="the largest row count")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="prefill sizes")
    parser.add_argument("--invariant-tokens", type=int, nargs="*", default=INVARIANT)
    parser.add_argument("--budget-s", type=float, default=100, help="`invariant` ends after it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def environment() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: metadata.version(name) for name in ("torch", "sglang")},
        "cuda": torch.version.cuda,
    }


# -- classes


def scan(shape: tuple[int, int], biased: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Multiply at every count; the classes as runs, and what the scan took."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    layer = make(shape, args.most, args.device)
    counts = [*range(1, args.dense + 1)]
    counts += range(args.dense // STEP * STEP + STEP, args.most + 1, STEP)
    bits, even = zip(*(measure(layer, biased, count) for count in counts), strict=True)
    classes = label(torch.stack(bits).cpu())
    flat = torch.stack(even).cpu().tolist()
    seconds = time.monotonic() - began
    return {
        "biased": biased,
        "shape": shape,
        "runs": runs(counts, classes),
        "holes": holes(counts, classes),
        "uneven": [count for count, same in zip(counts, flat, strict=True) if not same],
        "graph_differs": captured(layer, biased) if args.device == "cuda" else None,
        "seconds": round(seconds, 2),
        "peak_mib": torch.cuda.max_memory_allocated() >> 20 if args.device == "cuda" else None,
    }


def make(shape: tuple[int, int], most: int, device: str) -> Layer:
    outputs, inputs = shape
    source = torch.Generator(device).manual_seed(3)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=source, device=device)

    weight = (normal(outputs, inputs) * inputs**-0.5).bfloat16()
    rows = normal(ROWS, inputs).bfloat16().repeat(-(-most // ROWS), 1)
    return Layer(weight, normal(outputs).bfloat16(), rows)


def measure(layer: Layer, biased: bool, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At a row count: a hash of each of the ROWS rows' bits, and whether later rows agree.

    Fewer than ROWS rows are multiplied in several calls, the last of which overlaps.
    """
    bias = layer.bias if biased else None
    if count >= ROWS:
        out = linear(layer.rows[:count], layer.weight, bias)
        first, whole = out[:ROWS], count // ROWS * ROWS
        same = (out[:whole].view(-1, ROWS, out.shape[1]) == first).all()
        return row_hashes(first), same & (out[whole:] == first[: count - whole]).all()
    out = layer.weight.new_empty(ROWS, layer.weight.shape[0])
    same = torch.ones((), dtype=torch.bool, device=out.device)
    done = 0
    for start in (*range(0, ROWS - count, count), ROWS - count):
        piece = linear(layer.rows[start : start + count], layer.weight, bias)
        same &= (out[start:done] == piece[: done - start]).all()
        out[start : start + count] = piece
        done = start + count
    return row_hashes(out), same


def row_hashes(out: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: of each row's bits."""
    columns = torch.arange(1, out.shape[1] + 1, device=out.device)
    factors = (columns * 0x9E3779B97F4A7C1) ^ (columns << 21)  # wraps
    return (out.view(torch.int16).to(torch.int64) * factors).sum(1)


def label(bits: torch.Tensor) -> list[int]:
    """A class number per count, by first appearance; `bits`: int64 [counts, ROWS]."""
    seen: dict[tuple[int, ...], int] = {}
    return [seen.setdefault(tuple(row), len(seen)) for row in bits.tolist()]


def runs(counts: Sequence[int], classes: Sequence[int]) -> list[Run]:
    """Neighbouring counts of one class put together."""
    found = []
    for cls, group in itertools.groupby(zip(classes, counts, strict=True), key=lambda p: p[0]):
        members = [count for _, count in group]
        found.append((cls, members[0], members[-1]))
    return found


def holes(counts: Sequence[int], classes: Sequence[int]) -> list[tuple[int, int]]:
    """First and last count of each run whose two neighbouring runs are of one class."""
    found = runs(counts, classes)
    triples = zip(found, found[1:], found[2:], strict=False)
    return [here[1:] for before, here, after in triples if before[0] == after[0]]


def captured(layer: Layer, biased: bool) -> list[int]:
    """Decode counts at which a graph's replay gives other bits than an eager call."""
    bias = layer.bias if biased else None
    eager = {n: linear(layer.rows[:n], layer.weight, bias) for n in DECODE}
    torch.cuda.synchronize()
    graph, replayed = torch.cuda.CUDAGraph(), {}
    with torch.cuda.graph(graph):
        for n in DECODE:
            replayed[n] = linear(layer.rows[:n], layer.weight, bias)
    graph.replay()
    return [n for n in DECODE if not torch.equal(eager[n], replayed[n])]


def describe(model: str, layer: str, shape: tuple[int, int], found: dict[str, Any]) -> str:
    ranges = [f"{chr(65 + c) if c < 26 else c}:{span((a, b))}" for c, a, b in found["runs"]]
    shown = " ".join(ranges[:24]) + (f" ... {len(ranges)} runs" if len(ranges) > 24 else "")
    listed = " ".join(map(span, found["holes"])) or "none"
    name = f"{model} {layer} {'x'.join(map(str, shape))}{' bias' if found['biased'] else ''}"
    return (
        f"{name}: {found['seconds']} s, {found['peak_mib']} MiB\n    {shown}\n    holes: {listed}; "
        f"uneven: {brief(found['uneven'])}; graph differs: {brief(found['graph_differs'])}"
    )


def span(run: Iterable[int]) -> str:
    first, last = run
    return str(first) if first == last else f"{first}-{last}"


def brief(counts: Sequence[int] | None) -> str:
    if not counts:
        return "not looked" if counts is None else "none"
    return " ".join(map(str, counts[:12])) + (f" ... {len(counts)}" if len(counts) > 12 else "")


# -- times


def times(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each layer and prefill size: microseconds as it is, and padded."""
    found = []
    for layer, shape in SHAPES[model].items():
        made = make(shape, max(args.tokens), args.device)
        weights = copies(made.weight)
        for tokens in args.tokens:
            record: dict[str, Any] = {"model": model, "layer": layer, "tokens": tokens}
            for way, call in ways(made.rows, tokens).items():
                record[way] = time_calls(call, weights)
            found.append(record)
    return found


def add_invariant(records: list[dict[str, Any]], args: argparse.Namespace, began: float) -> None:
    """Measure `invariant`, size by size, into the records until the budget is spent."""
    if args.device != "cuda":
        return
    for tokens in args.invariant_tokens:
        for record in records:
            if record["tokens"] == tokens and time.monotonic() - began < args.budget_s:
                made = make(SHAPES[record["model"]][record["layer"]], tokens, args.device)
                call, record["first_call_s"] = invariant(made, tokens)
                record["invariant"] = time_calls(call, copies(made.weight))


def copies(weight: torch.Tensor) -> list[torch.Tensor]:
    """Itself and as many copies as make COLD bytes; two at least."""
    count = max(2, -(-COLD // (weight.numel() * 2))) if weight.is_cuda else 2
    return [weight, *(weight.clone() for _ in range(count - 1))]


Call = Callable[[torch.Tensor], torch.Tensor]  # a GEMM with a weight [outputs, inputs]


def ways(rows: torch.Tensor, tokens: int) -> dict[str, Call]:
    """As it is, and padded to each of PADS of which `tokens` is no multiple."""
    x = rows[:tokens].clone()
    calls: dict[str, Call] = {"as_is": lambda weight: linear(x, weight)}
    for pad in PADS:
        if tokens % pad:
            buffer = rows.new_zeros(-(-tokens // pad) * pad, rows.shape[1])
            calls[f"pad{pad}"] = padded(x, buffer)
    return calls


def padded(x: torch.Tensor, buffer: torch.Tensor) -> Call:
    def call(weight: torch.Tensor) -> torch.Tensor:
        buffer[: len(x)].copy_(x)
        return linear(buffer, weight)[: len(x)]

    return call


def invariant(layer: Layer, tokens: int) -> tuple[Call, float]:
    """SGLang's batch-invariant matmul, and the seconds of its first call."""
    from margingate.runtime.compat.compute.batch_invariant_matmul import invariant_matmul

    x = layer.rows[:tokens].clone()
    began = time.monotonic()
    invariant_matmul(x, weight=layer.weight, bias=None)
    torch.cuda.synchronize()
    return lambda w: invariant_matmul(x, weight=w, bias=None), round(time.monotonic() - began, 2)


def time_calls(call: Call, weights: list[torch.Tensor]) -> float:
    """Microseconds of one call: the median over graph replays that use every weight once."""
    if not weights[0].is_cuda:
        began = time.perf_counter()
        call(weights[0])
        return round((time.perf_counter() - began) * 1e6, 2)
    taken = microseconds(call, weights, REPLAYS)
    return round(statistics.median(taken), 2)


def print_times(records: list[dict[str, Any]]) -> None:
    """A line for each model and size: a layer's GEMMs together, and ratios to them as they are."""
    columns = [*(f"pad{pad}" for pad in PADS), "invariant"]
    print(f"{'model':14}{'tokens':>7}{'as is us':>11}", *(f"{name:>9}" for name in columns))
    for (model, tokens), group in grouped(records).items():
        base = sum(record["as_is"] for record in group)
        cells = [ratio(group, name, base) for name in columns]
        print(f"{model:14}{tokens:>7}{base:>11.1f}", *(f"{cell:>9}" for cell in cells))


def grouped(records: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["model"], record["tokens"]), []).append(record)
    return groups


def ratio(group: list[dict[str, Any]], name: str, base: float) -> str:
    """To the sum as it is; `-` where nothing was measured or nothing is to pad."""
    if not all(name in record for record in group):
        return "-"
    return f"{sum(record[name] for record in group) / base:.3f}"


if __name__ == "__main__":
    main()
