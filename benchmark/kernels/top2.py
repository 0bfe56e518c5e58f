"""Times softmax_top2 against one read of the logits and against torch.topk + log_softmax.

Run on one GPU, with nothing else on it:

    PYTHONPATH=sgl-kernel-patches python -m benchmark.kernels.top2 --out top2.json

Per vocabulary, dtype and row count it times, each as a CUDA graph of many calls that walk
through input sets of three times the L2 cache in all, so that each call reads from memory:

    top2    softmax_top2 with its buffers given
    amax    torch.amax over the vocabulary: a kernel that also reads the logits once
    topk    torch.topk(2), log_softmax in float32, gather: what the kernel replaces
    read    not timed: bytes of the logits / bandwidth that a large copy reached

Times are microseconds per call: the median over the replays of the graph's time / calls.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmark.bench.gpu_timing import bandwidth, microseconds
from margingate_kernels import (
    empty_top2,
    softmax_top2,
    softmax_top2_reference,
    top2_workspace,
)

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
VOCABS = (128256, 49152)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MIN_CALLS = 20  # per graph, to amortise its launch
ATOL, RTOL = 2e-6, 4e-7  # of logprob, as softmax_top2_reference states

Call = Callable[[torch.Tensor], object]  # on one set of logits [rows, vocab]


class Timing(NamedTuple):
    """Microseconds per call over the replays of one graph."""

    median: float
    least: float
    most: float


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmark.kernels.top2 needs a CUDA device and torch sees none.")
    copied = bandwidth(args.replays)
    report = {**describe_run(args), "copy_bandwidth_gb_s": copied, "results": []}
    print(f"{report['device']}, copy {copied:.0f} GB/s; microseconds per call")
    print_header()
    for vocab in args.vocab:
        for dtype in args.dtype:
            for rows in args.rows:
                result = measure(rows, vocab, dtype, copied, args.replays)
                report["results"].append(result)
                print_result(result)
                if args.out:  # after every line, so that a run cut short leaves what it has
                    args.out.write_text(json.dumps(report, indent=1) + "\n")
    if not all(result["matches_oracle"] for result in report["results"]):
        sys.exit("softmax_top2 differs from its oracle in a line above; do not use these times.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--replays", type=int, default=15, help="timed replays of each graph")
    return parser.parse_args()


def describe_run(args: argparse.Namespace) -> dict:
    device = torch.cuda.get_device_properties(0)
    return {
        "benchmark": "top2_kernel",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "replays": args.replays,
        "unit": "microseconds per call",
    }


def measure(rows: int, vocab: int, dtype: str, gb_s: float, replays: int) -> dict:
    """One line of the table: every method on the same inputs."""
    sets = input_sets(rows, vocab, DTYPES[dtype])
    out, workspace = empty_top2(rows, "cuda"), top2_workspace(rows, vocab, "cuda")
    methods: dict[str, Call] = {
        "top2": lambda logits: softmax_top2(logits, out, workspace),
        "amax": lambda logits: logits.amax(1),
        "topk": topk_and_log_softmax,
    }
    bytes_read = rows * vocab * sets.element_size()
    result = {
        "rows": rows,
        "vocab": vocab,
        "dtype": dtype,
        "input_sets": len(sets),
        "bytes": bytes_read,
        "matches_oracle": matches_oracle(sets[0]),
        "read": bytes_read / gb_s * 1e-3,  # bytes / (GB/s) is nanoseconds
    }
    for name, call in methods.items():
        result[name] = time_calls(call, sets, replays)._asdict()
    torch.cuda.empty_cache()
    return result


def input_sets(rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Random logits [sets, rows, vocab] of at least three times the L2 cache, two sets or more."""
    size = rows * vocab * dtype.itemsize
    sets = max(2, -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // size))
    generator = torch.Generator(device="cuda").manual_seed(0)
    pool = torch.empty((sets, rows, vocab), dtype=dtype, device="cuda")
    return pool.normal_(std=6.0, generator=generator)


def topk_and_log_softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values, ids = torch.topk(logits, 2, dim=1)
    values = values.float()
    logprob = torch.log_softmax(logits, dim=1, dtype=torch.float32).gather(1, ids[:, :1])
    return ids, values[:, 0] - values[:, 1], logprob


def matches_oracle(logits: torch.Tensor) -> bool:
    got, want = softmax_top2(logits), softmax_top2_reference(logits)
    return (
        torch.equal(got.ids, want.ids)
        and torch.equal(got.runner_up, want.runner_up)
        and torch.equal(got.margin, want.margin)
        and torch.allclose(got.logprob, want.logprob, rtol=RTOL, atol=ATOL)
    )


def time_calls(call: Call, sets: torch.Tensor, replays: int) -> Timing:
    """Time `call` on each set in turn, as often as it takes for MIN_CALLS calls."""
    passes = -(-MIN_CALLS // len(sets))
    views = [sets[index] for index in range(len(sets))] * passes
    micros = microseconds(call, views, replays, warm_up=3)
    return Timing(statistics.median(micros), min(micros), max(micros))


def print_header() -> None:
    print(
        f"{'vocab':>7} {'dtype':>9} {'rows':>5} {'read':>8} {'amax':>8} {'top2':>8} {'topk':>9} "
        f"{'top2/read':>10} {'topk/top2':>10}  oracle"
    )


def print_result(result: dict) -> None:
    read, amax, top2, topk = (
        result["read"],
        *(result[name]["median"] for name in ("amax", "top2", "topk")),
    )
    print(
        f"{result['vocab']:>7} {result['dtype']:>9} {result['rows']:>5} {read:8.2f} {amax:8.2f} "
        f"{top2:8.2f} {topk:9.2f} {top2 / read:10.2f} {topk / top2:10.2f}  "
        f"{'equal' if result['matches_oracle'] else 'DIFFERS'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
