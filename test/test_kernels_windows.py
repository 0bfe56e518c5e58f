"""Attention with windows, soft caps and sinks: the same bits in both kernels, and the oracle's.

As in test_kernels_attention.py, `python test/test_kernels_windows.py` runs the checks in Triton's
interpreter.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from attention_world import DTYPES, SHAPE, World, assert_close, exact_dot
from jit_bodies import checks_in, for_hopper, jit_tests, run_checks

from margingate.runtime.probe.checks import attention_error
from margingate.runtime.probe.checks.attention_error import LayerKind, measure, spans_of
from margingate_kernels import (
    PLAIN,
    Rules,
    attention,
    attention_checks,
    attention_decode_triton,
    attention_gluon,
    attention_prefill,
    attention_prefill_triton,
    attention_triton,
    decode_workspace,
    gluon_rings,
    plan_decode,
    segments_of,
    with_window,
)

WINDOWS = (1, 16, 127, 128, 512)
CAP = 2.0  # low enough to bend most scores of the tests
SEED = 7


def sinks(device: str, heads: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A sink a head, from one that takes nearly nothing to one that takes most."""
    return torch.linspace(-4.0, 6.0, heads, dtype=dtype).to(device)


def every_rule(device: str, heads: int) -> Iterator[tuple[int, Rules]]:
    """With and without each of a window, a cap and sinks, and each head size with each window."""
    of_each = itertools.product((None, *WINDOWS), (0.0, CAP), (False, True))
    for size, (window, cap, sink) in zip(itertools.cycle(attention_checks.HEAD_SIZES), of_each):
        yield size, Rules(window, cap, sinks(device, heads) if sink else None)


# ---- checks of the jit bodies; each takes the device -------------------------------------------


def check_any_cuts_and_company(device: str) -> None:
    """Drawn lengths, cuts, neighbours and rows, for all rules and head sizes.

    Rows of one block of queries have other windows, and other rows beside them in each forward.
    """
    draw = random.Random(SEED)
    for size, rules in every_rule(device, 1):
        lengths = [(rules.window or 0) + draw.randint(2, 200), draw.randint(1, 50)]
        world = World(device, lengths, (1, 1, size), rules)
        start = max(0, lengths[0] - draw.randint(2, 80))
        cut = draw.randint(start + 1, lengths[0] - 1)
        other = world.whole(1)
        one, beside = world.extend((0, start, lengths[0]), other)
        (first,) = world.extend((0, start, cut))
        beside_again, second = world.extend(other, (0, cut, lengths[0]))
        note = (size, rules, lengths, start, cut)
        assert torch.equal(torch.cat([first, second]), one), note
        assert torch.equal(beside, beside_again), note
        assert_close(one, world.oracle(0)[start:], note)
        assert_close(beside, world.oracle(1), note)
        at = sorted({start, cut, lengths[0] - 1, draw.randrange(start, lengths[0])})
        rows = [(0, position) for position in at] + [(1, lengths[1] - 1)]
        decoded = world.decode(rows)
        assert torch.equal(decoded[:-1], one[[i - start for i in at]]), note
        assert torch.equal(decoded[-1], beside[-1]), note
        assert torch.equal(world.decode(rows[:1])[0], decoded[0]), note


def check_edges_of_windows(device: str) -> None:
    """Every position around where a window leaves the first key, a tile and a segment behind."""
    for window in WINDOWS:
        world = World(device, (window + 330,), (1, 1, 64), Rules(window))
        firsts = [window + first - 1 for first in (0, 64, 256)]
        pieces = world.extend(*((0, first, first + 4) for first in firsts))
        edges = [first + i for first in firsts for i in range(4)]
        decoded = world.decode([(0, position) for position in edges])
        assert torch.equal(decoded, torch.cat(pieces)), window
        assert_close(decoded, world.oracle(0)[edges], window)


def check_a_thousand_positions(device: str) -> None:
    """Each position decoded once, in any order and company, under all rules at once."""
    length = 1000
    world = World(device, (length, 37), (1, 1, 64), Rules(127, CAP, sinks(device, 1)))
    (rows,) = world.extend(world.whole(0))
    assert_close(rows, world.oracle(0))
    order = random.Random(SEED).sample(range(length), length)
    for batch in (order[i : i + 125] for i in range(0, length, 125)):
        decoded = world.decode([(1, 36), *((0, position) for position in batch)], 600)
        assert torch.equal(decoded[1:], rows[batch])


def check_one_key_more_than_the_window_is_seen(device: str) -> None:
    """Of all values one is not 0: the row `window` behind its key sees it, the next does not."""
    for window in (1, 16, 128):
        world = World(device, (window + 40,), (1, 1, 64), Rules(window))
        world.v.zero_()
        world.v[world.slots(0)[20]] = 1.0
        (rows,) = world.extend(world.whole(0))
        sees = rows.abs().amax((1, 2)) > 0
        assert sees.nonzero().flatten().tolist() == list(range(20, 20 + window + 1)), window


def check_chunks_cut_anywhere(device: str) -> None:
    """Keys from the pool, from the chunk and by descriptor; cuts left and right of a window."""
    world = World(device, (30, 560), (1, 1, 64), Rules(150, CAP, sinks(device, 1)))
    start, cuts = 300, (300, 301, 410, 511, 512, 513, 560)
    (whole,) = world.extend((1, start, 560))
    assert_close(whole, world.oracle(1)[start:])
    pieces = [world.extend((0, 0, 30), (1, a, b))[1] for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), whole)
    with patch.object(attention_prefill, "_copies_tiles", lambda _: True):
        _, rows = world.extend((0, 0, 30), (1, 130, 560))
    assert torch.equal(rows[start - 130 :], whole)


def check_slots_of_a_window_alone(device: str) -> None:
    """Both kernels look up no slot that the lists of a pool of windows have not."""
    for window, size in ((16, 64), (127, 64), (128, 128), (70, 256)):
        hold_to_the_lists(device, window, size)
    with patch.object(attention, "has_wide_tiles", lambda *_: True):  # as on Hopper
        hold_to_the_lists(device, 70, 256)


def hold_to_the_lists(device: str, window: int, size: int) -> None:
    """Rows, and chunks cut at several places, by all slots and by those of a window alone."""
    world = World(device, (window + 300, 40), (1, 1, size), Rules(window))
    at = [0, 1, window, window + 1, window + 64, window + 255, window + 299]
    rows = [(0, position) for position in at] + [(1, 39)]
    assert torch.equal(world.decode(rows, listed=True), world.decode(rows)), (window, size)
    for cut in (0, 64, window + 130, window + 299):
        pieces = (0, cut, window + 300), (1, 20, 40)
        listed, told = world.extend(*pieces, listed=True), world.extend(*pieces)
        assert all(map(torch.equal, listed, told)), (window, size, cut)
        assert_close(listed[0], world.oracle(0)[cut:], (window, size, cut))


def check_far_scores(device: str) -> None:
    """Scores, and a sink, hundreds of powers of two apart."""
    far = torch.tensor([300.0, -300.0]).to(device)
    for rules in (Rules(100), Rules(300, 0.0, far), Rules(None, 500.0, far)):
        world = World(device, (500,), SHAPE, rules)
        world.q[0] *= 40
        (rows,) = world.extend((0, 430, 500))
        assert rows.isfinite().all()
        assert_close(rows, world.oracle(0)[430:], rules)
        at = [430, 447, 448, 449, 499]
        assert torch.equal(world.decode([(0, i) for i in at]), rows[[i - 430 for i in at]]), rules


def check_sinks_of_each_dtype(device: str) -> None:
    """Each head has its own, as the checkpoint stores it."""
    for dtype in (torch.float32, torch.float16):
        rules = Rules(None, 0.0, sinks(device, 3, dtype=dtype))
        world = World(device, (90,), (3, 1, 64), rules)
        (rows,) = world.extend(world.whole(0))
        assert_close(rows, world.oracle(0), dtype)
        assert torch.equal(world.decode([(0, 89)])[0], rows[-1])


def check_a_window_of_everything_is_none(device: str) -> None:
    """A window wider than the sequence has the bits of no window."""
    plain = World(device, (300,), SHAPE)
    (want,) = plain.extend((0, 200, 300))
    plain.rules = Rules(300)
    (got,) = plain.extend((0, 200, 300))
    assert torch.equal(got, want)
    assert torch.equal(plain.decode([(0, 299)])[0], want[-1])


def check_a_plan_leaves_out_what_no_row_sees(device: str) -> None:
    """The first key of each segment, and how many there are."""
    lengths, window = (1, 200, 700, 1500, 513), 300
    indptr = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    whole = decode_workspace(5, 40, 2, 64, device)
    space = with_window(whole, window)
    assert space.segments.means is whole.segments.means
    plan_decode(indptr, whole)
    plan_decode(indptr, space)
    firsts = space.segments.firsts.tolist()
    begins = space.segments.records[:, 1].tolist()
    found = [begins[a:b] for a, b in itertools.pairwise(firsts)]
    assert found == [[0], [0], [384, 512], [1152, 1280], [192, 256, 512]]
    assert whole.segments.firsts.tolist() == [0, 1, 2, 5, 11, 14], "the other plan stays"
    most = [segments_of(length, 64, window) for length in lengths]
    assert all(len(each) <= bound for each, bound in zip(found, most))


def check_what_a_start_measures(device: str) -> None:
    """Well below the bound, with the same bits; one key less is seen, and so is no number."""
    bound = {"cpu": 1e-3, "cuda": 8e-3}[device]
    rules = Rules(40, 30.0, sinks(device, 1))
    kind = LayerKind(1, 1, 64, 0.125, rules)
    with patch.object(attention_error, "TAIL", 12):  # for the interpreter is slow
        found = measure(kind, DTYPES[device], device, 120)
        assert found.same_bits and found.error < 0.6 * bound, (kind, found)
        short = rules._replace(window=39)
        with patch.object(attention_error, "attention_reference", short_of(short)):
            found = measure(kind, DTYPES[device], device, 120)
    assert found.same_bits and found.error > 4 * bound, found


def short_of(rules: Rules) -> Any:
    """The oracle with other rules than it is given."""
    return lambda q, k, v, scale, _: attention_checks.attention_reference(q, k, v, scale, rules)


CHECKS = checks_in(globals())


interpreted, test_jit_bodies_in_interpreter, test_jit_bodies_on_gpu = jit_tests(
    CHECKS, __file__, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"
)


# ---- without any kernel ------------------------------------------------------------------------


@pytest.mark.parametrize(("wide", "fitting"), [(False, 2), (True, 1)])
def test_jit_bodies_compile_for_hopper(wide: bool, fitting: int) -> None:
    """What the interpreter accepts the compiler may not. With all rules at once."""
    head_size, blocks = 256, attention.blocks_for(256, wide)
    types = dict.fromkeys(("q", "out", "k_buffer", "v_buffer", "k_new", "v_new"), "*bf16")
    types |= {"scale": "fp32", "table_stride": "i32", "rows": "i32", "capacity": "i32"}
    types |= dict.fromkeys(("page_table", "prefix_lens", "indptr", "firsts", "records"), "*i32")
    types |= dict.fromkeys(("table_rows", "starts", "slots"), "*i64")
    types |= {"tops": "*fp32", "means": "*fp32"}
    parts = blocks.extend.parts
    types["k_tiles"] = f"tensordesc<bf16[{blocks.keys}, {head_size}]>"
    types["v_tiles"] = f"tensordesc<bf16[{blocks.keys}, {head_size // parts}]>"
    types |= {"squeeze": "fp32", "sinks": "*bf16"}
    known: dict[str, object] = {f"stride_{name}": 8 * head_size for name in ("q", "o", "k", "v")}
    known |= {"stride_k_new": 8 * head_size, "stride_v_new": 8 * head_size, "group": 4, "heads": 8}
    known |= {"head_size": head_size, "SEGMENT": blocks.segment, "BLOCK_N": blocks.keys}
    known |= {"BLOCK": 32, "overlap": True, "KIND": attention_triton.TILES.value}
    known |= {"WINDOW": 512, "PARTS": parts}

    def compiled(kernel: Any, rows: int, warps: int, stages: int = 3) -> Any:
        own = {**known, "BLOCK_M": rows}
        own = {n: v for n, v in own.items() if n in kernel.arg_names and n not in types}
        return for_hopper(kernel, types, own, warps, stages)

    extend = compiled(attention_prefill_triton.extend, *blocks.extend[:3])
    assert "wgmma.mma_async" in extend.asm["ptx"]
    assert fitting * (extend.metadata.shared + 1024) <= 228 * 1024  # programs of an SM
    decode = compiled(attention_decode_triton.decode, *blocks.decode[:3])
    for each in (extend, decode):
        assert "div.rn.f32" in each.asm["ptx"], "a cap divides with one rounding"
    assert compiled(attention_decode_triton.add_up, 0, 1).asm["ptx"]
    assert compiled(attention_decode_triton.plan, 0, 4).asm["ptx"]


@pytest.mark.parametrize("window", [0, *WINDOWS, 1000])
@pytest.mark.parametrize("head_size", attention_checks.HEAD_SIZES)
def test_the_bound_of_a_windows_segments_is_reached_and_holds(window: int, head_size: int) -> None:
    def segments(length: int) -> int:
        return (length - 1) // 256 - max(0, length - 1 - window) // 256 + 1

    for tokens in (1, 100, 257, 2000):
        most = max(segments(length) for length in range(1, tokens + 1))
        assert segments_of(tokens, head_size, window) >= most
    assert segments_of(2000, head_size, window) == most


@pytest.mark.parametrize("window", [None, 1, 16, 128, 512, 4096])
def test_a_start_looks_at_each_end_of_a_window(window: int | None) -> None:
    length = (window or 0) + attention_error.SLACK
    spans = spans_of(window, length)
    rows = {position for span in spans for position in range(*span)}
    assert rows <= set(range(length)) and {0, 1, length - 1} <= rows
    sizes = attention_checks.HEAD_SIZES
    cuts = [attention.blocks_for(size, wide) for size in sizes for wide in (False, True)]
    tiles = {cut.keys for cut in cuts} - {32}  # of which two have 64
    ends = [(window or 0) + left for left in (0, *tiles, 256)]  # a key, a tile and a segment
    assert length > max(ends) + max(tiles), "and a tile behind a segment"
    queries = [gluon_rings.READERS.value * attention_gluon.ROWS.value]
    queries += [cut.extend.rows for cut in cuts]
    assert spans[-1][1] - spans[-1][0] > max(queries), "a second block of them"
    assert all({end - 1, end, end + 1} & set(range(length)) <= rows for end in ends)
    for context in (1, 5):  # tokens
        assert all(0 <= a < b <= context for a, b in spans_of(window, context))
        assert spans_of(window, context)[-1][1] == context


# ---- errors ------------------------------------------------------------------------------------

Q = torch.zeros(2, 4, 64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (Rules(-1), ValueError, "window is -1; it must be 0 or more, or None"),
        (Rules(cap=-2.0), ValueError, "cap is -2.0; it must be above 0, or 0 for none"),
        (Rules(cap=float("nan")), ValueError, "cap is nan"),
        (Rules(sinks=torch.zeros(4, dtype=torch.int32)), TypeError, "sinks have dtype torch.int32"),
        (Rules(sinks=torch.zeros(3)), ValueError, r"shape \[3\]; 4 heads need one each"),
        (Rules(sinks=torch.zeros(8)[::2]), ValueError, "sinks has gaps"),
    ],
)
def test_rules_that_no_kernel_follows(rules: Rules, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_checks.check_rules(rules, 4)


@pytest.mark.parametrize(("rules", "window"), [(PLAIN, 16), (Rules(16), None), (Rules(16), 17)])
def test_a_plan_for_another_window_is_refused(rules: Rules, window: int | None) -> None:
    space = decode_workspace(2, 4, 4, 64, "cpu")
    if window is not None:
        space = with_window(space, window)
    paged = attention.Paged(Q, Q, torch.arange(2), torch.tensor([0, 1, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match=f"window is {rules.window}; the workspace is .* {window}"):
        attention.decode_attention(Q, paged, 0.1, Q.clone(), space, rules)


if __name__ == "__main__":
    triton.runtime.interpreter.InterpreterBuilder.create_dot = exact_dot
    print(json.dumps(run_checks(CHECKS, attention_decode_triton.decode)))
