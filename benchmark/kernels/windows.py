"""Attention with windows, caps and sinks on a GPU: bits, errors and times, beside SGLang's kernels.

    PYTHONPATH=.:python:sgl-kernel-patches python -m benchmark.kernels.windows --out windows.json

`--what bits`: for each window, with and without a cap and sinks, for heads of 64, 128 and 256: a
prompt of 1,100 tokens prefilled in one forward, in chunks and beside another, and each position
decoded, all bit for bit; and the distance from float64, beside that of SGLang's Triton kernels and
of FA3. Each combination compiles kernels of its own, so as many processes as `--jobs` share them.

`--what times`: microseconds a layer, as in `benchmark.kernels.attention`, for decode by window and
context, and for prefill. SGLang's decode gets the keys that its backend hands it: a window's own,
less the first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmark.kernels.attention import (
    CALLS,
    CUTS,
    POOL,
    TOKENS,
    Pool,
    decode_rows,
    error,
    extend_rows,
    indptr_of,
    layer_us,
    time_decode,
    time_extend,
)
from margingate_kernels import Rules, attention_reference

SHAPES = {  # heads, K/V heads, head size
    "gpt-oss-20b": (64, 8, 64),
    "llama-3.1-8b": (32, 8, 128),
    "gemma-3-4b": (8, 4, 256),
}
WINDOWS = (None, 1, 16, 127, 128, 512)
CAPS = (0.0, 30.0)
SPLITS = 8  # of SGLang's decode, by default
TIMED_WINDOWS = (None, 128, 512, 1024, 4096)
DECODES = tuple(itertools.product((1, 8, 32), (2048, 8192, 32_000)))  # requests, tokens
EXTENDS = ((1, 8192, 0), (8, 1024, 0), (1, 512, 31_488))  # requests, tokens, cached tokens


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmark.kernels.windows needs a CUDA device and torch sees none.")
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    record |= {"command": sys.argv, "shapes": SHAPES}

    def keep(name: str, found: Any) -> None:
        record.setdefault(name, []).append(found)
        args.out.write_text(json.dumps(record, indent=1) + "\n")

    if "bits" in args.what:
        cases = [*itertools.product(SHAPES, WINDOWS, CAPS, (False, True))]
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for found in pool.imap_unordered(check, cases):
                print(found, flush=True)
                keep("bits", found)
        wrong = [each["case"] for each in record["bits"] if not each.get("same")]
        print(f"{len(wrong)} of {len(cases)} with other bits or an error: {wrong}", flush=True)
    if "times" in args.what:
        for name in args.shapes:
            for found in times(name):
                print(found, flush=True)
                keep("times", found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file to write")
    parser.add_argument("--what", nargs="+", choices=("bits", "times"), default=("bits", "times"))
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["gpt-oss-20b", "gemma-3-4b"]
    )
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    return parser.parse_args()


def rules_of(heads: int, window: int | None, cap: float, sinks: bool) -> Rules:
    return Rules(window, cap, torch.linspace(-4, 6, heads).cuda() if sinks else None)


# ---- bits and errors ---------------------------------------------------------------------------


def check(case: tuple[str, int | None, float, bool]) -> dict[str, Any]:
    """In a process of its own: what the bits of one combination do, or why that is not known."""
    try:
        return {"case": case, **compared(*case)}
    except Exception:
        return {"case": case, "same": False, "error": traceback.format_exc()[-600:]}


def compared(name: str, window: int | None, cap: float, sinks: bool) -> dict[str, Any]:
    pool = Pool(*SHAPES[name], tokens=4 * TOKENS)
    rules = rules_of(pool.heads, window, cap, sinks)
    table, queries = pool.table(3, TOKENS), pool.queries(TOKENS)
    whole = extend_rows(pool, table, queries, [(1, 0, TOKENS)], rules)
    pairs = itertools.pairwise(CUTS)
    chunks = [extend_rows(pool, table, queries[a:b], [(1, a, b)], rules) for a, b in pairs]
    both = torch.cat([pool.queries(500), queries])
    beside = extend_rows(pool, table, both, [(2, 0, 500), (1, 0, TOKENS)], rules)[500:]
    some = torch.arange(TOKENS, device="cuda").split(100)
    decoded = torch.cat([decode_rows(pool, table[1], queries, rows, rules) for rows in some])
    alone = decode_rows(pool, table[1], queries, some[-1][-1:], rules)
    slots = table[1].long()
    truth = attention_reference(queries, pool.k[slots], pool.v[slots], pool.scale, rules)
    differ = int((decoded != whole).flatten(1).any(1).sum())
    results = {"chunks": torch.cat(chunks), "beside others": beside, "decode": decoded}
    same = {kind: torch.equal(rows, whole) for kind, rows in results.items()}
    same["decode alone"] = torch.equal(alone, decoded[-1:])
    errors = {"margingate": error(whole, truth)}
    for kernel, run in OTHERS.items():
        try:
            errors[kernel] = error(run(pool, slots, queries, rules), truth)
        except Exception as problem:
            errors[kernel] = f"{problem!r:.120}"
    return {"same": all(same.values()), **same, "rows that differ": differ, "errors": errors}


def sglang_extend(
    pool: Pool, slots: torch.Tensor, queries: torch.Tensor, rules: Rules
) -> torch.Tensor:
    """SGLang's Triton prefill of one prompt without a prefix."""
    return sglang_prefill(pool, slots[None], queries, rules)()


def sglang_prefill(
    pool: Pool, table: torch.Tensor, queries: torch.Tensor, rules: Rules
) -> Callable[[], torch.Tensor]:
    """A call of SGLang's Triton prefill of whole prompts, of which nothing is cached."""
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    requests, tokens = table.shape
    out, columns = torch.empty_like(queries), pool.columns(table.flatten())
    none = torch.zeros(requests + 1, dtype=torch.int32, device="cuda")

    def call() -> torch.Tensor:
        extend_attention_fwd(
            *(queries, columns.k, columns.v, out, pool.k, pool.v),
            *(indptr_of(requests, tokens), none, none[:0].long(), None, True, None, tokens),
            *(1.0, 1.0, pool.scale),
            logit_cap=rules.cap,
            sliding_window_size=-1 if rules.window is None else rules.window,
            sinks=rules.sinks,
        )
        return out

    return call


def sglang_decode(
    pool: Pool, slots: torch.Tensor, queries: torch.Tensor, rules: Rules
) -> torch.Tensor:
    """SGLang's Triton decode of each position, with all keys that a window has."""
    counts = [row + 1 for row in range(len(queries))]
    firsts = [0 if rules.window is None else max(0, n - 1 - rules.window) for n in counts]
    flat = torch.cat([slots[a:b] for a, b in zip(firsts, counts, strict=True)])
    lengths = [b - a for a, b in zip(firsts, counts, strict=True)]
    indptr = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    return sglang_step(pool, flat, indptr, rules)(queries)


def sglang_step(
    pool: Pool, slots: torch.Tensor, indptr: torch.Tensor, rules: Rules
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A call of SGLang's Triton decode with its most splits, which a batch of few rows gets."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    rows = len(indptr) - 1
    shape = (rows, pool.heads, SPLITS)
    logits = torch.empty((*shape, pool.head_size), dtype=torch.float32, device="cuda")
    lse = torch.empty(shape, dtype=torch.float32, device="cuda")
    splits = torch.full((rows,), SPLITS, dtype=torch.int32, device="cuda")
    out = torch.empty((rows, pool.heads, pool.head_size), dtype=pool.k.dtype, device="cuda")

    def call(queries: torch.Tensor) -> torch.Tensor:
        decode_attention_fwd(
            *(queries, pool.k, pool.v, out, indptr, slots, logits, lse, splits, SPLITS),
            *(pool.scale, 1.0, 1.0),
            logit_cap=rules.cap,
            sinks=rules.sinks,
        )
        return out

    return call


def fa3(
    pool: Pool, table: torch.Tensor, tokens: int, rules: Rules
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A call of FA3 for the last `tokens` positions of each sequence, a row of the table each."""
    from sglang.kernels.ops.attention.flash_attention import flash_attn_with_kvcache

    requests, length = table.shape
    lengths = torch.full((requests,), length, dtype=torch.int32, device="cuda")
    sinks = None if rules.sinks is None else rules.sinks.to(torch.bfloat16)
    k, v = pool.paged()
    starts = indptr_of(requests, tokens)

    def call(queries: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = flash_attn_with_kvcache(
            **{"q": queries, "k_cache": k, "v_cache": v, "page_table": table},
            **{"cache_seqlens": lengths, "cu_seqlens_q": starts, "max_seqlen_q": tokens},
            softmax_scale=pool.scale,
            causal=True,
            window_size=(-1, -1) if rules.window is None else (rules.window, 0),
            softcap=rules.cap,
            sinks=sinks,
            ver=3,
        )
        return found

    return call


def fa3_extend(
    pool: Pool, slots: torch.Tensor, queries: torch.Tensor, rules: Rules
) -> torch.Tensor:
    return fa3(pool, slots[None].int(), len(queries), rules)(queries)


OTHERS: dict[str, Callable[[Pool, torch.Tensor, torch.Tensor, Rules], torch.Tensor]] = {
    "sglang extend": sglang_extend,
    "sglang decode": sglang_decode,
    "fa3": fa3_extend,
}


# ---- times -------------------------------------------------------------------------------------


def times(name: str) -> Iterator[dict[str, Any]]:
    """Each case, with each window; sinks where the shape's model has them."""
    pool = Pool(*SHAPES[name])
    for window in TIMED_WINDOWS:
        rules = rules_of(pool.heads, window, 0.0, name.startswith("gpt-oss"))
        for rows, tokens in DECODES:
            if rows * tokens <= POOL:
                found = timed(DECODE, pool, (rows, tokens), rules)
                yield {"shape": name, "window": window, "decode": [rows, tokens], "us": found}
        for case in EXTENDS:
            found = timed(EXTEND, pool, case, rules)
            yield {"shape": name, "window": window, "extend": case, "us": found}


def timed(
    kernels: dict[str, Callable[..., float]], pool: Pool, case: tuple[int, ...], rules: Rules
) -> dict[str, Any]:
    """Microseconds by kernel, or why there are none."""
    found: dict[str, Any] = {}
    for kernel, time in kernels.items():
        try:
            found[kernel] = round(time(pool, *case, rules), 2)
        except Exception as problem:
            found[kernel] = f"{problem!r:.120}"
    return found


def time_fa3_decode(pool: Pool, rows: int, tokens: int, rules: Rules) -> float:
    calls = [fa3(pool, pool.table(rows, tokens, i), 1, rules) for i in range(CALLS)]
    queries = pool.queries(rows)
    return layer_us(lambda i: calls[i](queries))


def time_sglang_decode(pool: Pool, rows: int, tokens: int, rules: Rules) -> float:
    seen = tokens if rules.window is None else min(tokens, rules.window)
    indptr, queries = indptr_of(rows, seen), pool.queries(rows)
    tables = [pool.table(rows, tokens, i)[:, tokens - seen :].flatten() for i in range(CALLS)]
    calls = [sglang_step(pool, slots.long(), indptr, rules) for slots in tables]
    return layer_us(lambda i: calls[i](queries))


def time_fa3_extend(pool: Pool, requests: int, tokens: int, cached: int, rules: Rules) -> float:
    call = fa3(pool, pool.table(requests, cached + tokens), tokens, rules)
    queries = pool.queries(requests * tokens)
    return layer_us(lambda _: call(queries))


def time_sglang_extend(pool: Pool, requests: int, tokens: int, cached: int, rules: Rules) -> float:
    if cached:
        raise ValueError("only prompts of which nothing is cached")
    queries = pool.queries(requests * tokens)
    call = sglang_prefill(pool, pool.table(requests, tokens), queries, rules)
    return layer_us(lambda _: call())


DECODE = {"margingate": time_decode, "fa3": time_fa3_decode, "sglang": time_sglang_decode}
EXTEND = {"margingate": time_extend, "fa3": time_fa3_extend, "sglang": time_sglang_extend}


if __name__ == "__main__":
    main()
