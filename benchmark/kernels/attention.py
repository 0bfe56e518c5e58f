"""Times margingate's attention kernels, and holds their bits to what they promise.

Run on one GPU, with nothing else on it; SGLang is not needed:

    PYTHONPATH=sgl-kernel-patches python -m benchmark.kernels.attention --out attention.json

Microseconds a layer: the median over replays of a CUDA graph of a few calls, which decode over
different parts of a K/V pool. Slots are in random order. A case is requests x tokens of each, in
extend behind so many cached ones. What is timed:

    read        not timed: bytes of the keys and values / bandwidth of a large copy in the same run
                (a copy also writes, and short rows fit into the L2 cache: less is possible)
    margingate  `decode_attention` without `plan_decode`, once a forward; `extend_attention`
    flashinfer  where it is installed: its wrappers for decode with its own split, which depends on
                the batch, and for prefill. Its first use may compile for minutes

Before that, `check` compares bits: a prompt prefilled in chunks, beside others, and decoded row by
row, alone and in batches, against the same prompt in one forward. `--sweep` does all of it for a
few other ways to cut the work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton

from benchmark.bench.gpu_timing import bandwidth, microseconds
from margingate_kernels import (
    PLAIN,
    Chunks,
    Columns,
    Rules,
    attention,
    attention_reference,
    extend_attention,
)
from margingate_kernels.attention import Blocks, Cut

SHAPES = {"8b": (32, 8, 128), "14b": (40, 8, 128), "smollm2": (9, 3, 64)}  # heads, K/V heads, size
DECODES = (  # requests, tokens
    *((1, 300), (1, 2100), (1, 8200), (1, 32000), (8, 2100), (8, 8200)),
    *((32, 300), (32, 2100), (64, 300), (128, 300), (128, 2100)),
)
EXTENDS = (  # requests, tokens, cached tokens
    *((1, 256, 0), (32, 256, 0), (8, 1024, 0), (2, 4096, 0), (1, 8192, 0), (1, 512, 3584)),
    *((1, 16, 32000), (1, 64, 8192), (1, 64, 32000), (1, 64, 128000), (1, 128, 32000)),
)
POOL = 300_000  # tokens
SEGMENTS = 2 * POOL // 256  # of which a server has room for sums
CALLS = 8  # of a graph
BF16 = torch.bfloat16


class Variant(NamedTuple):
    """A way to cut the work; None is the kernels' own. Triton's kernels alone take `blocks`."""

    name: str
    blocks: Blocks | None = None
    programs: int | None = None  # of decode, per SM


OWN = Variant("margingate")
SWEEP = (
    Variant("extend by Triton", attention.blocks_for(128)),
    Variant("extend by 128 rows", Blocks(64, 256, Cut(128, 8, 3), Cut(16, 2, 3))),
    Variant("segments of 512", Blocks(64, 512, Cut(64, 4, 3), Cut(16, 2, 3))),
    Variant("tiles of 128 keys", attention.blocks_for(128, wide=True)),
    Variant("decode by 1 warp", Blocks(64, 256, Cut(64, 4, 3), Cut(16, 1, 2))),
    Variant("4 programs per SM", programs=4),
)


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmark.kernels.attention needs a CUDA device and torch sees none.")
    gb_s = bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {gb_s:.0f} GB/s; microseconds a layer")
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gb_s": gb_s,
        "command": sys.argv,
        "decode_cases": DECODES,
        "extend_cases": EXTENDS,
        "results": [],
    }
    for name in args.shapes:
        pool = Pool(*SHAPES[name])
        for result in measure(pool, gb_s, (OWN, *(SWEEP if args.sweep else ()))):
            record["results"].append({"shape": name, **result})
            if args.out:
                args.out.write_text(json.dumps(record, indent=1) + "\n")
        print_tables([result for result in record["results"] if result["shape"] == name])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8b"], help="of a model")
    parser.add_argument("--sweep", action="store_true", help="also other ways to cut the work")
    return parser.parse_args()


def measure(pool: Pool, gb_s: float, variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """A row of times by kernel; what fails is said and left out."""
    token = 2 * pool.kv_heads * pool.head_size * BF16.itemsize  # bytes of its keys and values
    read = [rows * tokens * token / gb_s / 1e3 for rows, tokens in DECODES]
    yield {"kernel": "read", "decode": read}
    for variant in variants:
        try:
            with cut(variant):
                yield {
                    "kernel": variant.name,
                    "blocks": attention.blocks_for(pool.head_size)._asdict(),
                    "programs": attention.PROGRAMS_PER_SM,
                    "check": check(pool),
                    "decode": [time_decode(pool, *case) for case in DECODES],
                    "extend": [time_extend(pool, *case) for case in EXTENDS],
                }
        except Exception as problem:
            print(f"{variant.name} failed: {problem!r:.300}", flush=True)
    result: dict[str, Any] = {"kernel": "flashinfer"}
    for kind, time, cases in (
        ("decode", time_flashinfer_decode, DECODES),
        ("extend", time_flashinfer_extend, EXTENDS),
    ):
        try:
            result[kind] = [time(pool, *case) for case in cases]
        except Exception as problem:
            print(f"flashinfer's {kind} is left out: {problem!r:.300}", flush=True)
    if len(result) > 1:
        yield result


def print_tables(results: Sequence[dict[str, Any]]) -> None:
    """The times of one shape, and what its bits did."""
    for kind, cases in (
        ("decode", [f"{n}x{tokens}" for n, tokens in DECODES]),
        ("extend", [f"{n}x{tokens}" + f"@{old}" * (old > 0) for n, tokens, old in EXTENDS]),
    ):
        print(f"\n{results[0]['shape'] + ' ' + kind:20}" + "".join(f"{case:>11}" for case in cases))
        for result in results:
            if kind in result:
                times = "".join(f"{us:11.1f}" for us in result[kind])
                print(f"{result['kernel']:20}" + times)
    for result in results:
        if "check" in result:
            print(f"\n{result['kernel']}: {result['check']}", flush=True)


# ---- times -------------------------------------------------------------------------------------


def layer_us(call: Callable[[int], Any]) -> float:
    """Median time of a call within a CUDA graph of CALLS; `call` gets the number of an input."""
    return statistics.median(microseconds(call, range(CALLS), replays=10, warm_up=2))


class Pool:
    """K/V pools of random numbers, and rows of slots in them."""

    def __init__(self, heads: int, kv_heads: int, head_size: int, tokens: int = POOL) -> None:
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.scale, self.tokens = head_size**-0.5, tokens
        shape = (tokens, kv_heads, head_size)
        self.k, self.v = (torch.randn(shape, device="cuda", dtype=BF16) for _ in range(2))
        self.order = torch.randperm(tokens, device="cuda").to(torch.int32)

    def table(self, requests: int, tokens: int, layer: int = 0) -> torch.Tensor:
        """Page table [requests, tokens]; requests share slots only where the pool is too small."""
        at = torch.arange(requests * tokens, device="cuda")
        at = (at + layer * requests * tokens) % self.tokens
        return self.order[at].view(requests, tokens).contiguous()

    def queries(self, tokens: int) -> torch.Tensor:
        return torch.randn((tokens, self.heads, self.head_size), device="cuda", dtype=BF16)

    def columns(self, slots: torch.Tensor) -> Columns:
        """For a prefill of tokens that have these slots."""
        return Columns(self.k, self.v, self.k[slots.long()], self.v[slots.long()])

    def paged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as FlashInfer takes them: in pages of one token."""
        return self.k.unsqueeze(1), self.v.unsqueeze(1)


@contextmanager
def cut(variant: Variant) -> Iterator[None]:
    """The variant in place of the kernels' own constants, meanwhile."""
    blocks = variant.blocks
    with ExitStack() as stack:
        if blocks is not None:
            stack.enter_context(patch.object(attention, "blocks_for", lambda *_, **__: blocks))
            narrow = patch.object(attention, "has_wide_tiles", lambda *_: False)
            stack.enter_context(narrow)
        if variant.programs is not None:
            stack.enter_context(patch.object(attention, "PROGRAMS_PER_SM", variant.programs))
        yield


def indptr_of(requests: int, tokens: int) -> torch.Tensor:
    return (torch.arange(requests + 1, device="cuda") * tokens).to(torch.int32)


def time_decode(pool: Pool, rows: int, tokens: int, rules: Rules = PLAIN) -> float:
    indptr = indptr_of(rows, tokens)
    tables = [pool.table(rows, tokens, i).flatten().long() for i in range(CALLS)]
    queries = [pool.queries(rows) for _ in range(CALLS)]
    out = torch.empty_like(queries[0])
    space = space_for(pool, [tokens] * rows, rules)
    attention.plan_decode(indptr, space)

    def call(i: int) -> None:
        paged = attention.Paged(pool.k, pool.v, tables[i], indptr)
        attention.decode_attention(queries[i], paged, pool.scale, out, space, rules)

    return layer_us(call)


def space_for(pool: Pool, lengths: Sequence[int], rules: Rules) -> attention.DecodeWorkspace:
    """Room for a decode batch of rows with so many keys."""
    size, window = pool.head_size, rules.window
    segments = sum(attention.segments_of(length, size, window) for length in lengths)
    space = attention.decode_workspace(len(lengths), segments, pool.heads, size, "cuda")
    return space if window is None else attention.with_window(space, window)


def time_extend(pool: Pool, requests: int, tokens: int, cached: int, rules: Rules = PLAIN) -> float:
    rows = torch.arange(requests, device="cuda")
    chunks = Chunks(
        pool.table(requests, cached + tokens),
        rows,
        indptr_of(requests, tokens),
        torch.full_like(rows, cached),
        tokens,
        cached + tokens,
    )
    queries = pool.queries(requests * tokens)
    columns = pool.columns(chunks.page_table[:, cached:].flatten())
    out = torch.empty_like(queries)
    room = attention.decode_workspace(1, SEGMENTS, pool.heads, pool.head_size, "cuda").segments

    def call(_: int) -> None:
        extend_attention(queries, columns, chunks, pool.scale, out, rules, room)

    return layer_us(call)


def flashinfer_space() -> torch.Tensor:
    return torch.empty(512 << 20, dtype=torch.uint8, device="cuda")


def time_flashinfer_decode(pool: Pool, rows: int, tokens: int) -> float:
    """As stock SGLang runs it; a wrapper a call, since a plan holds its slots."""
    import flashinfer

    space, wrappers = flashinfer_space(), []
    for i in range(CALLS):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
        slots = pool.table(rows, tokens, i).flatten()
        wrapper.plan(
            *(indptr_of(rows, tokens), slots, torch.ones_like(slots[:rows])),
            *(pool.heads, pool.kv_heads, pool.head_size, 1),
            q_data_type=BF16,
            kv_data_type=BF16,
        )
        wrappers.append(wrapper)
    queries = [pool.queries(rows) for _ in range(CALLS)]
    return layer_us(lambda i: wrappers[i].run(queries[i], pool.paged()))


def time_flashinfer_extend(pool: Pool, requests: int, tokens: int, cached: int) -> float:
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(flashinfer_space(), "NHD")
    slots = pool.table(requests, cached + tokens).flatten()
    wrapper.plan(
        *(indptr_of(requests, tokens), indptr_of(requests, cached + tokens)),
        *(slots, torch.ones_like(slots[:requests])),
        *(pool.heads, pool.kv_heads, pool.head_size, 1),
        causal=True,
        q_data_type=BF16,
        kv_data_type=BF16,
    )
    queries = pool.queries(requests * tokens)
    return layer_us(lambda _: wrapper.run(queries, pool.paged()))


# ---- bits --------------------------------------------------------------------------------------

TOKENS = 1100
CUTS = (0, 1, 77, 256, 300, 811, TOKENS)
ALONE = (0, 1, 63, 64, 255, 256, 511, 513, 1099)  # positions decoded in a batch of their own


def check(pool: Pool) -> dict[str, Any]:
    """What the bits do: prefill in one, in chunks, beside others; decode; and the distance."""
    table, queries = pool.table(3, TOKENS), pool.queries(TOKENS)
    whole = extend_rows(pool, table, queries, [(1, 0, TOKENS)])
    pieces = [extend_rows(pool, table, queries[a:b], [(1, a, b)]) for a, b in pairwise(CUTS)]
    both = torch.cat([pool.queries(500), queries])
    beside = extend_rows(pool, table, both, [(2, 0, 500), (1, 0, TOKENS)])[500:]
    rows = torch.arange(TOKENS, device="cuda")
    decoded = torch.cat([decode_rows(pool, table[1], queries, some) for some in rows.split(100)])
    alone = [decode_rows(pool, table[1], queries, rows[i : i + 1]) for i in ALONE]
    slots = table[1].long()
    truth = attention_reference(queries, pool.k[slots], pool.v[slots], pool.scale)
    return {
        "chunks": torch.equal(torch.cat(pieces), whole),
        "beside others": torch.equal(beside, whole),
        "decode alone": torch.equal(torch.cat(alone), decoded[list(ALONE)]),
        "decode = extend": torch.equal(decoded, whole),
        "rows that differ": int((decoded != whole).any(-1).any(-1).sum()),
        "extend error": error(whole, truth),
        "decode error": error(decoded, truth),
    }


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def extend_rows(
    pool: Pool,
    table: torch.Tensor,
    queries: torch.Tensor,
    pieces: list[tuple[int, int, int]],
    rules: Rules = PLAIN,
) -> torch.Tensor:
    """In one forward, the positions from a to b of sequences (row of the table, a, b)."""
    rows, begins = (torch.tensor([piece[i] for piece in pieces], device="cuda") for i in (0, 1))
    counts = [b - a for _, a, b in pieces]
    starts = torch.tensor([0, *counts], device="cuda").cumsum(0)
    chunks = Chunks(table, rows, starts, begins, max(counts))
    columns = pool.columns(torch.cat([table[i, a:b] for i, a, b in pieces]))
    out = torch.empty_like(queries)
    return extend_attention(queries, columns, chunks, pool.scale, out, rules)


def decode_rows(
    pool: Pool,
    slots: torch.Tensor,
    queries: torch.Tensor,
    rows: torch.Tensor,
    rules: Rules = PLAIN,
) -> torch.Tensor:
    """The rows at these positions, each as a request of its own in one decode batch."""
    counts = [row + 1 for row in rows.tolist()]
    indptr = torch.tensor([0, *counts], device="cuda").cumsum(0).to(torch.int32)
    flat = torch.cat([slots[:count] for count in counts]).long()
    space = space_for(pool, counts, rules)
    attention.plan_decode(indptr, space)
    q = queries[rows]
    paged = attention.Paged(pool.k, pool.v, flat, indptr)
    return attention.decode_attention(q, paged, pool.scale, torch.empty_like(q), space, rules)


if __name__ == "__main__":
    main()
