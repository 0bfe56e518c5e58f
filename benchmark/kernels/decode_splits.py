"""Triton decode attention by how the K/V is split: tokens a split covers, and splits at most.

    python -m benchmark.kernels.decode_splits --out splits.json

A fixed split must serve one long request and many short ones. Each pair is timed on SGLang's own
kernel, as a CUDA graph, for batches of rows of one length; microseconds a layer. The default is of
the shape of Llama-3.1-8B.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

from benchmark.bench.gpu_timing import microseconds

TILES = (32, 64, 128, 256, 512)
CAPS = (8, 16, 32, 64)
POINTS = (  # rows, tokens each
    *((1, 300), (1, 1000), (1, 2100), (1, 8200), (1, 32000), (8, 300), (8, 2100), (8, 8200)),
    *((32, 300), (32, 2100), (64, 300), (128, 300), (128, 2100)),
)
SLOTS = 300_000
CALLS = 30  # in a graph
REPLAYS = 4  # the best counts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def measure(args: argparse.Namespace, rows: int, length: int) -> dict[str, float]:
    """Times by `tile x cap` for `rows` rows of `length` tokens, at random slots."""
    size = (SLOTS, args.kv_heads, args.head_size)
    keys, values = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    slots = torch.randint(0, SLOTS, (rows * length,), device="cuda")
    starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * length
    query = torch.randn(rows, args.heads, args.head_size, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(query)
    found = {}
    for tile in TILES:
        for cap in CAPS:
            count = min(cap, math.ceil(length / tile))
            splits = torch.full((rows,), count, device="cuda", dtype=torch.int32)
            partial = torch.zeros(rows, args.heads, cap, args.head_size, device="cuda")
            sums = torch.zeros(rows, args.heads, cap, device="cuda")
            given = (query, keys, values, out, starts, slots, partial, sums, splits, cap)
            scale = args.head_size**-0.5
            times = microseconds(
                lambda _, given=given, scale=scale: decode_attention_fwd(*given, scale, 1.0, 1.0),
                *(range(CALLS), REPLAYS),
                warm_up=0,
            )
            found[f"{tile} x {cap}"] = min(times)
    return found


def main() -> None:
    args = arguments()
    results = {}
    for rows, length in POINTS:
        results[f"{rows} of {length}"] = found = measure(args, rows, length)
        best = min(found.values())
        cells = [f"{pair}: {us:.1f}" for pair, us in found.items() if us < 1.3 * best]
        print(f"{rows:4} rows of {length:6}", "  ".join(cells), flush=True)
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "command": sys.argv,
        "microseconds": results,
    }
    args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
