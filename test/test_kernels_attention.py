"""Attention kernels: jit bodies against the oracle, and the sameness of bits that they promise.

Without a GPU the bodies run in Triton's interpreter, which has to be chosen before they are
imported: `python test/test_kernels_attention.py` runs every check in CHECKS on the CPU and prints
one JSON object. With a GPU the same checks run on it as well.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from attention_world import ERROR, SHAPE, World, assert_close, exact_dot
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jit_bodies import (
    captured,
    checks_in,
    for_hopper,
    hopper_ptx,
    jit_tests,
    needs_gpu,
    run_checks,
)

from margingate_kernels import (
    Chunks,
    Columns,
    Paged,
    Rules,
    attention,
    attention_checks,
    attention_decode_triton,
    attention_prefill,
    attention_prefill_triton,
    attention_triton,
    decode_attention,
    decode_workspace,
    extend_attention,
    plan_decode,
    segments_of,
)

HOPPER_SHARED, HOPPER_PER_PROGRAM = 228 * 1024, 1024  # bytes of an SM; kept for each program
WIDE = {size: attention.blocks_for(size, wide=True) for size in (64, 128, 256)}
LENGTHS = (1, 63, 64, 65, 255, 256, 257, 600)
SHAPES = ((2, 2, 64), (3, 1, 64), (4, 1, 128), (1, 1, 128))  # heads, K/V heads, head size


def last_of(length: int) -> int:
    """Where the last 70 positions start: two blocks of rows, for the interpreter is slow."""
    return max(0, length - 70)


def hold_to_the_oracle(world: World, shape: tuple[int, int, int]) -> None:
    """The last rows of each sequence, prefilled in one forward, and the last one decoded."""
    lengths = world.lengths
    extended = world.extend(*((i, last_of(n), n) for i, n in enumerate(lengths)))
    decoded = world.decode([(i, length - 1) for i, length in enumerate(lengths)])
    for i, length in enumerate(lengths):
        assert_close(extended[i], world.oracle(i)[last_of(length) :], (shape, length))
        assert torch.equal(decoded[i], extended[i][-1]), (shape, length)


# ---- checks of the jit bodies; each takes the device -------------------------------------------


def check_oracle(device: str) -> None:
    """Both kernels, in one forward each, at lengths around tiles and segments."""
    for shape in SHAPES:
        hold_to_the_oracle(World(device, LENGTHS, shape), shape)


def check_largest_head(device: str) -> None:
    """Size 256, whose tiles are smaller; and 16 heads a group, the most."""
    for shape in ((2, 1, 256), (16, 1, 64)):
        world = World(device, (290, 33), shape)
        extended = world.extend((0, 280, 290), (1, 30, 33))
        decoded = world.decode([(0, 289), (1, 32)])
        for i, rows in enumerate(extended):
            assert_close(rows, world.oracle(i)[-len(rows) :], (shape, i))
            assert torch.equal(decoded[i], rows[-1]), (shape, i)


def check_wide_tiles(device: str) -> None:
    """Both Triton kernels; Gluon's is held to them in test_prefill_gluon.py."""
    lengths = (1, 127, 128, 129, 256, 257, 400)
    with (
        patch.object(attention, "has_wide_tiles", lambda *_: False),
        patch.object(attention, "blocks_for", lambda size, wide=False: WIDE[size]),
    ):
        for shape in ((3, 1, 64), (2, 1, 128)):
            hold_to_the_oracle(World(device, lengths, shape), shape)
        hold_to_the_oracle(World(device, (65, 300), (2, 1, 256)), 256)


def check_one_key(device: str) -> None:
    """A row that sees one key has its value: what rounds the weight of it rounds the sum too."""
    for shape in ((2, 1, 64), (3, 1, 128), (1, 1, 256)):
        world = World(device, (70,), shape, Rules(0))
        values = world.v[world.slots(0)].expand(-1, shape[0], -1)
        (rows,) = world.extend(world.whole(0))
        assert torch.equal(rows, values), shape
        assert torch.equal(world.decode([(0, 0), (0, 69)]), values[[0, 69]]), shape


def check_prefixes(device: str) -> None:
    """However much of a prompt was cached, a row has the same bits."""
    world = World(device, (300,))
    (whole,) = world.extend(world.whole(0))
    for prefix in (1, 63, 64, 100, 255, 256, 299):
        stop = min(300, prefix + 70)
        (rest,) = world.extend((0, prefix, stop))
        assert torch.equal(rest, whole[prefix:stop]), prefix


def check_chunks(device: str) -> None:
    world = World(device, (540,), (1, 1, 64))
    (whole,) = world.extend(world.whole(0))
    for cuts in ((0, 1, 77, 256, 300, 511, 540), (0, 255, 257, 258, 540), (0, 512, 539, 540)):
        pieces = [world.extend((0, a, b))[0] for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole), cuts


def check_where_keys_come_from(device: str) -> None:
    """From the pool, from the chunk by address, and by descriptor: old, mixed and new segments."""
    world = World(device, (70, 850), (2, 1, 64))
    pieces = ((0, 0, 70), (1, 300, 850))
    at = [300, 511, 512, 767, 768, 800, 849]
    decoded = world.decode([(1, position) for position in at])
    for copies_tiles in (False, True):
        with patch.object(attention_prefill, "_copies_tiles", lambda _, it=copies_tiles: it):
            _, rows = world.extend(*pieces)
        assert torch.equal(rows[[i - 300 for i in at]], decoded), copies_tiles
        assert_close(rows, world.oracle(1)[300:])


def check_parts(device: str) -> None:
    """However many programs share a head's lanes, and wherever its keys come from."""
    world = World(device, (150,), (2, 1, 64))
    blocks = attention.blocks_for(64)
    found = []
    for parts, copies_tiles in ((1, True), (2, True), (2, False), (4, True)):
        shared = blocks._replace(extend=blocks.extend._replace(parts=parts))
        with (
            patch.object(attention, "blocks_for", lambda *_, it=shared: it),
            patch.object(attention_prefill, "_copies_tiles", lambda _, it=copies_tiles: it),
        ):
            found.append(world.extend((0, 70, 150))[0])
    assert_close(found[0], world.oracle(0)[70:])
    for rows in found[1:]:
        assert torch.equal(rows, found[0])


def check_neighbours(device: str) -> None:
    """Longer and shorter sequences before and behind; `longest` only an upper bound."""
    world = World(device, (130, 300, 7))
    alone = [world.extend(world.whole(i))[0] for i in range(3)]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0), (2, 1)):
        together = world.extend(*map(world.whole, order), longest=400)
        for i, rows in zip(order, together):
            assert torch.equal(rows, alone[i]), (order, i)
    mine, _ = world.extend((1, 100, 300), (0, 0, 130))
    assert torch.equal(mine, alone[1][100:])


def check_decode_is_extend(device: str) -> None:
    world = World(device, (530,))
    (whole,) = world.extend(world.whole(0))
    at = [0, 1, 15, 16, 62, 63, 64, 65, 127, 128, 254, 255, 256, 257, 300, 511, 512, 513, 529]
    assert torch.equal(world.decode([(0, position) for position in at]), whole[at])


def check_row_order(device: str) -> None:
    """A row alone, in any order, twice, under any number of programs and with room to spare."""
    world = World(device, (300, 64, 257, 20))
    rows = [(0, 299), (1, 63), (2, 256), (3, 0), (2, 100)]
    batch = world.decode(rows)
    for i, row in enumerate(rows):
        assert torch.equal(world.decode([row])[0], batch[i]), row
    for order in ([4, 3, 2, 1, 0], [2, 2, 0], [1, 4, 0, 3]):
        assert torch.equal(world.decode([rows[i] for i in order]), batch[order]), order
    for segments, programs in ((8, 0), (8, 3), (200, 50)):
        assert torch.equal(world.decode(rows, segments, programs), batch), (segments, programs)


def check_far_scores(device: str) -> None:
    """Scores hundreds of powers of two apart: segments that weigh nothing, or all."""
    world = World(device, (700,))
    world.q[0] *= 40
    (rows,) = world.extend((0, 630, 700))
    assert_close(rows, world.oracle(0)[630:])
    at = [630, 639, 640, 641, 699]
    assert torch.equal(world.decode([(0, i) for i in at]), rows[[i - 630 for i in at]])


def check_rows_that_do_not_fit(device: str) -> None:
    """They come out as NaN, and those before them as ever."""
    world = World(device, (600, 300, 65))
    rows = [(2, 64), (0, 599), (1, 299), (2, 64)]  # 1, 3, 2 and 1 segments
    want = world.decode(rows)
    assert not want.isnan().any()
    for capacity, fitting in ((7, 4), (6, 3), (5, 2), (4, 2), (3, 1), (1, 1)):
        got = world.decode(rows, capacity)
        assert torch.equal(got[:fitting], want[:fitting]), capacity
        assert got[fitting:].isnan().all(), capacity


def check_views(device: str) -> None:
    """q and out as parts of wider rows, K and V of one buffer, slots in int32."""
    world = World(device, (70,))
    heads = world.q[0].shape[1]
    (want,) = world.extend(world.whole(0))
    wide = torch.cat([world.q[0], world.random(70, 3, world.size)], 1)
    kv = torch.cat([world.k, world.v], 1)
    k, v = kv.split(world.k.shape[1], 1)
    row, starts, prefix = (torch.tensor(t, device=device) for t in ([0], [0, 70], [0]))
    chunks = Chunks(world.table[1:], row, starts, prefix, 70)
    out = torch.full_like(wide, 7.0)
    columns = Columns(k, v, k[world.slots(0)], v[world.slots(0)])
    extend_attention(wide[:, :heads], columns, chunks, world.scale, out[:, :heads])
    assert torch.equal(out[:, :heads], want)
    assert (out[:, heads:] == 7.0).all()
    space = decode_workspace(1, 1, heads, world.size, device)
    paged = Paged(k, v, world.slots(0).int(), torch.tensor([0, 70], dtype=torch.int32).to(device))
    plan_decode(paged.indptr, space)
    out.fill_(7.0)
    decode_attention(wide[69:, :heads], paged, world.scale, out[69:, :heads], space)
    assert torch.equal(out[69, :heads], want[69])
    assert (out[:69] == 7.0).all()


def check_random_cuts(device: str) -> None:
    """Two sequences cut anywhere, their chunks side by side: always the bits of one forward."""

    @settings(max_examples=5, phases=[Phase.generate], deadline=None, derandomize=True)
    @given(st.lists(st.integers(1, 280), min_size=2, max_size=2), st.data())
    def any_cuts(lengths: list[int], data: st.DataObject) -> None:
        world = World(device, lengths, (1, 1, 64))
        whole = world.extend(*map(world.whole, (0, 1)))
        cuts = [data.draw(st.integers(0, length - 1)) for length in lengths]
        later = world.extend(*((i, cuts[i], lengths[i]) for i in (1, 0)))
        rows = world.decode([(i, cuts[i]) for i in (0, 1)])
        for i, rest in zip((1, 0), later):
            assert torch.equal(rest, whole[i][cuts[i] :])
            assert torch.equal(rows[i], whole[i][cuts[i]])

    any_cuts()


@triton.jit
def powers_of_two(x: tl.tensor, out: tl.tensor, count: tl.constexpr) -> None:
    at = tl.arange(0, count)
    tl.store(out + at, attention_triton.power_of_two(tl.load(x + at)))


def check_powers_of_two(device: str) -> None:
    x = torch.tensor([*range(-126, 1), -127, -128, -1000, -math.inf] + [-5] * 125).to(device)
    want = [2.0**i if i >= -126 else 0.0 for i in x.tolist()]
    got = torch.empty_like(x)
    powers_of_two[(1,)](x, got, len(x))
    assert got.tolist() == want


CHECKS = checks_in(globals())


# ---- the jit bodies ----------------------------------------------------------------------------


interpreted, test_jit_bodies_in_interpreter, test_jit_bodies_on_gpu = jit_tests(
    CHECKS, __file__, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"
)


@needs_gpu
@pytest.mark.parametrize("shape", ["8b", "smollm2"])
def test_the_benchmarks_own_check(shape: str) -> None:
    """Every one of 1,100 positions, in bfloat16 and in the shape of a real model."""
    from benchmark.kernels import attention as benchmark

    result = benchmark.check(benchmark.Pool(*benchmark.SHAPES[shape]))
    for promise in ("chunks", "beside others", "decode alone", "decode = extend"):
        assert result[promise], result
    assert max(result["extend error"], result["decode error"]) < ERROR["cuda"]


@needs_gpu
def test_decode_replays_in_a_cuda_graph() -> None:
    """Captured once, the kernels follow the lengths and queries that are there at replay."""
    world = World("cuda", (600, 300))
    space = decode_workspace(2, 8, SHAPE[0], world.size, "cuda")
    slots = torch.cat([world.slots(0), world.slots(1)])
    paged = Paged(world.k, world.v, slots, torch.tensor([0, 1, 2], dtype=torch.int32).cuda())
    q = torch.stack([world.q[0][599], world.q[1][299]])
    out = torch.empty_like(q)

    def step() -> None:
        plan_decode(paged.indptr, space)
        decode_attention(q, paged, world.scale, out, space)

    graph = captured(step)
    paged.indptr.copy_(torch.tensor([0, 600, 900]))
    graph.replay()
    assert torch.equal(out, world.decode([(0, 599), (1, 299)]))


# ---- without any kernel ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_size", "wide"),
    [(64, False), (128, False), (256, False), (64, True), (128, True), (256, True)],
)
def test_blocks_keep_what_the_bodies_assume(head_size: int, wide: bool) -> None:
    blocks = attention.blocks_for(head_size, wide)
    assert blocks.segment % blocks.keys == 0
    assert blocks.decode.rows == attention_checks.MOST_GROUPED
    tokens = (1, blocks.segment, blocks.segment + 1, 5 * blocks.segment)
    assert [segments_of(n, head_size) for n in tokens] == [1, 1, 2, 5]


@pytest.mark.parametrize(
    ("head_size", "wide", "fitting"),
    [(64, False, 2), (128, False, 2), (256, False, 2), (256, True, 1)],
)
def test_jit_bodies_compile_for_hopper(head_size: int, wide: bool, fitting: int) -> None:
    """Without a GPU: what the interpreter accepts the compiler may not."""
    blocks = attention.blocks_for(head_size, wide)
    halves = dict.fromkeys(("q", "out", "k_buffer", "v_buffer", "k_new", "v_new"), "*bf16")
    parts = blocks.extend.parts
    halves["k_tiles"] = f"tensordesc<bf16[{blocks.keys}, {head_size}]>"
    halves["v_tiles"] = f"tensordesc<bf16[{blocks.keys}, {head_size // parts}]>"
    numbers = {"scale": "fp32", "table_stride": "i32", "rows": "i32", "capacity": "i32"}
    ints = dict.fromkeys(("page_table", "prefix_lens", "indptr", "firsts", "records"), "*i32")
    longs = dict.fromkeys(("table_rows", "starts", "slots"), "*i64")
    types = {**halves, **numbers, **ints, **longs, "tops": "*fp32", "means": "*fp32"}
    strides = {f"stride_{name}": 8 * head_size for name in (*"qokv", "k_new", "v_new")}
    sizes = {"head_size": head_size, "heads": 8, "group": 4, "SEGMENT": blocks.segment}
    known: dict[str, object] = {**strides, **sizes, "BLOCK_N": blocks.keys, "BLOCK": 32}
    known |= {"overlap": True, "PARTS": parts}
    extend, decode = ({**known, "BLOCK_M": each.rows} for each in (blocks.extend, blocks.decode))

    def ptx(kernel: Any, constants: dict[str, object], warps: int) -> str:
        own = {name: value for name, value in constants.items() if name in kernel.arg_names}
        return hopper_ptx(kernel, types, own, warps)

    kernel = attention_prefill_triton.extend
    tiles = {**extend, "KIND": attention_triton.TILES.value}
    own = {name: value for name, value in tiles.items() if name in kernel.arg_names}
    compiled = for_hopper(kernel, types, own, blocks.extend.warps, blocks.extend.stages)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    # So many programs fit an SM's shared memory.
    assert fitting * (compiled.metadata.shared + HOPPER_PER_PROGRAM) <= HOPPER_SHARED
    types |= dict.fromkeys(("k_tiles", "v_tiles"), "*bf16")
    assert ptx(kernel, {**extend, "KIND": attention_triton.FLAT.value}, blocks.extend.warps)
    assert "mma.sync" in ptx(attention_decode_triton.decode, decode, blocks.decode.warps)
    if head_size in WIDE:
        known = {**decode, "BLOCK_N": WIDE[head_size].keys}
        own = {k: v for k, v in known.items() if k in attention_decode_triton.decode.arg_names}
        cut = WIDE[head_size].decode
        made = for_hopper(attention_decode_triton.decode, types, own, cut.warps, cut.stages)
        assert made.metadata.shared + HOPPER_PER_PROGRAM <= HOPPER_SHARED
    assert ptx(attention_decode_triton.add_up, known, 1)
    assert ptx(attention_decode_triton.plan, known, 4)


# ---- errors ------------------------------------------------------------------------------------

Q = torch.zeros(2, 4, 64, dtype=torch.float16)
KV = torch.zeros(9, 2, 64, dtype=torch.float16)
HEADS_ERRORS = [
    ({"q": Q.float()}, TypeError, "q has dtype torch.float32; cast to bfloat16 or float16"),
    ({"out": Q.bfloat16()}, TypeError, "out has dtype torch.bfloat16, q torch.float16; they must"),
    ({"k": KV.bfloat16()}, TypeError, "k_buffer has dtype torch.bfloat16"),
    ({"v": KV.float()}, TypeError, "v_buffer has dtype torch.float32"),
    ({"q": Q.flatten(1)}, ValueError, r"q has shape \[2, 256\] .* \[tokens, heads, head_size\]"),
    ({"q": Q.transpose(0, 1)}, ValueError, r"q has .* strides \[64, 256, 1\]; .* contiguous heads"),
    ({"k": KV[:, :, ::2]}, ValueError, "k_buffer has shape"),
    ({"v": KV[0]}, ValueError, "v_buffer has shape"),
    ({"out": Q[:1]}, ValueError, r"out has shape \[1, 4, 64\], q \[2, 4, 64\]; they must agree"),
    ({"q": Q[..., :32].clone(), "out": Q[..., :32].clone()}, ValueError, "head_size is 32; the"),
    ({"k": torch.cat([KV, KV[:, :1]], 1)}, ValueError, "4 heads cannot share 3 K/V heads"),
    ({"v": KV[:, :1].clone()}, ValueError, r"v_buffer \[9, 1, 64\]; both must have the K/V heads"),
    ({"k": KV[..., :32].clone()}, ValueError, r"k_buffer is \[9, 2, 32\] .* head_size of 64"),
]


@pytest.mark.parametrize(
    "kernel", [attention_prefill_triton.extend, attention_decode_triton.decode]
)
def test_what_may_be_none_has_no_type(kernel: Any) -> None:
    """A launch on a GPU refuses None where a parameter is annotated as a number.

    Neither Triton's interpreter nor a compilation ahead of time says so.
    """
    notes = kernel.fn.__annotations__
    assert "squeeze" in notes
    typed = {name for name, note in notes.items() if isinstance(note, tl.dtype)}
    assert typed == {"scale"}, "a number at each launch"


@pytest.mark.parametrize("kernel", ["extend", "decode"])
@pytest.mark.parametrize(("changed", "error", "message"), HEADS_ERRORS)
def test_errors_of_heads(
    kernel: str, changed: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    given = {"q": Q, "out": torch.empty_like(Q), "k": KV, "v": KV, **changed}
    with pytest.raises(error, match=message):
        call(kernel, **given)


def call(kernel: str, **given: Any) -> None:
    """A kernel with arguments that are right but for those given."""
    given = {"q": Q, "out": torch.empty_like(Q), "k": KV, "v": KV, "heads": 4, **given}
    q, out, k, v = (given[name] for name in ("q", "out", "k", "v"))
    if kernel == "extend":
        empty = torch.zeros(0, dtype=torch.int64)
        rows, starts = given.get("table_rows", empty), given.get("starts", torch.zeros(1))
        table = given.get("table", torch.zeros(1, 9, dtype=torch.int32))
        new = given.get("new", k[: len(q)])
        columns = Columns(k, v, new, v[: len(q)])
        scale = given.get("scale", 0.1)
        extend_attention(q, columns, Chunks(table, rows, starts, empty, 0), scale, out)
    else:
        space = decode_workspace(4, 4, given["heads"], 64, "cpu")
        indptr = given.get("indptr", torch.tensor([0, 4, 9], dtype=torch.int32))
        decode_attention(q, Paged(k, v, torch.arange(9), indptr), 0.1, out, space)


@pytest.mark.parametrize(
    ("kernel", "given", "message"),
    [
        ("extend", {"starts": torch.zeros(2)}, "0 sequences need .* of starts, not 2"),
        ("extend", {"table_rows": torch.zeros(3)}, "as many table_rows, not 3"),
        ("extend", {"table": torch.zeros(9, 2).t()}, "page_table has gaps along its positions"),
        ("decode", {"indptr": torch.zeros(6, dtype=torch.int32)[::2]}, "indptr has gaps; pass ind"),
        ("decode", {"indptr": torch.zeros(5)}, "indptr has 5 entries; 2 rows need one more"),
        ("extend", {"scale": 0.0}, "scale is 0.0; it must be above 0"),
        ("extend", {"new": KV[:2, :, ::2]}, r"k is torch.float16 \[2, 2, 32\]; these tokens need"),
        ("extend", {"new": KV[:4:2]}, "k has gaps; pass k.contiguous"),
        ("decode", {"heads": 8}, r"workspace is for .* \[8, 64\], not \[4, 64\]"),
        ("decode", {"k": KV[:, :1].repeat(1, 3, 1)}, "4 heads cannot share 3"),
    ],
)
def test_errors_of_a_batch(kernel: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(kernel, **given)


def test_errors_of_a_workspace() -> None:
    with pytest.raises(ValueError, match=r"head_size is 96; the kernels are for \(64, 128, 256\)"):
        decode_workspace(1, 1, 4, 96, "cpu")
    space = decode_workspace(3, 8, 4, 64, "cpu")
    for rows in (0, 4):
        with pytest.raises(ValueError, match=f"has {rows} rows; the workspace is for 1 to 3"):
            plan_decode(torch.zeros(rows + 1, dtype=torch.int32), space)


def test_more_heads_than_a_group_may_have() -> None:
    q = torch.zeros(1, 17, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="17 heads cannot share 1 K/V heads"):
        call("extend", q=q, out=q.clone(), k=KV[:, :1].clone(), v=KV[:, :1].clone())


if __name__ == "__main__":
    triton.runtime.interpreter.InterpreterBuilder.create_dot = exact_dot
    print(json.dumps(run_checks(CHECKS, attention_decode_triton.decode)))
