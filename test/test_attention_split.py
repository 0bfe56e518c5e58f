"""Prefill attention whose programs share a row's keys: the bits of one loop over them.

As in test_kernels_attention.py, `python test/test_attention_split.py` runs the checks on the CPU.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from attention_world import DTYPES, SHAPE, World, assert_close, exact_dot
from jit_bodies import checks_in, for_hopper, jit_tests, run_checks

from margingate.runtime.probe.checks.attention_error import LayerKind, measure_shared
from margingate_kernels import (
    PLAIN,
    Chunks,
    Rules,
    attention,
    attention_split,
    attention_split_triton,
)
from margingate_kernels.attention import Segments, decode_workspace

BLOCKS_FOR = attention.blocks_for
PIECES = ((0, 1050, 1081), (1, 0, 9), (2, 255, 258), (3, 1, 3))
LENGTHS = (1081, 9, 258, 3)
TOKENS = sum(b - a for _, a, b in PIECES) + 1  # a row behind the last sequence


def room_for(world: World, segments: int) -> Segments:
    """Sums of so many segments of each row, filled with what is no number."""
    heads = world.q[0].shape[1]
    room = decode_workspace(1, segments * TOKENS, heads, world.size, world.device).segments
    room.tops.fill_(torch.nan)
    room.means.fill_(torch.nan)
    return room


class Launch:
    """Of programs that share keys."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks
        self.per: list[int] = []  # segments of a program, by turn


@contextmanager
def sharing(processors: int = 1 << 20) -> Iterator[list[Launch]]:
    """Few keys are enough to be shared; the launches so far."""
    launches: list[Launch] = []
    original, kernel = attention_split.launch, attention_split_triton.sum_segments

    def launch(*args: Any) -> None:
        launches.append(Launch(args[2]))
        original(*args)

    class Noted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def call(*args: Any, **options: Any) -> None:
                launches[-1].per.append(args[kernel.arg_names.index("per")])
                kernel[grid](*args, **options)

            return call

    with (
        patch.object(attention_split, "FEWEST_SEGMENTS", 2),
        patch.object(attention_split, "LEAST_ROOM", 2),
        patch.object(attention_split, "SHARE", 0),
        patch.object(attention_split, "_processors", lambda _: processors),
        patch.object(attention_split, "launch", launch),
        patch.object(attention_split_triton, "sum_segments", Noted()),
    ):
        yield launches


def hold_to_one_loop(world: World, *segments: int, processors: int = 1 << 20) -> list[int]:
    """The segments of a program, by room and turn."""
    loop = world.extend(*PIECES)
    per: list[int] = []
    for count in segments:
        with sharing(processors) as launches:
            shared = world.extend(*PIECES, room=room_for(world, count))
        assert len(launches) == 1, "one loop was compared with itself"
        per += launches[0].per
        for one, other in zip(loop, shared):
            assert torch.equal(one, other), count
    for i, a, b in PIECES:
        assert_close(loop[i], world.oracle(i)[a:b])
    return per


def check_bits(device: str) -> None:
    """Of heads in groups of 1, 3 and 4; sums of all five segments at once, or in turns."""
    for shape in ((2, 2, 64), (3, 1, 64), (8, 2, 64)):
        hold_to_one_loop(World(device, LENGTHS, shape), 5, 4, 2)


def check_several_segments_a_program(device: str) -> None:
    world = World(device, LENGTHS)
    assert hold_to_one_loop(world, 5, 3, processors=2) == [2, 1, 1, 1]  # five; two, two and one
    assert hold_to_one_loop(world, 5, 3, processors=1) == [5, 2, 2, 1]


def check_larger_heads(device: str) -> None:
    for shape in ((2, 1, 128), (2, 1, 256)):
        hold_to_one_loop(World(device, LENGTHS, shape), 2)


def check_wide_tiles(device: str) -> None:
    wide = {size: attention.blocks_for(size, wide=True) for size in (64, 256)}
    with (
        patch.object(attention, "has_wide_tiles", lambda *_: False),
        patch.object(attention, "blocks_for", lambda size, wide_=False: wide[size]),
    ):
        for shape in ((3, 1, 64), (2, 1, 256)):
            hold_to_one_loop(World(device, LENGTHS, shape), 4)


def check_caps_and_sinks(device: str) -> None:
    sinks = torch.tensor([0.5, -3.0], device=device)
    for rules in (Rules(cap=5.0), Rules(sinks=sinks), Rules(cap=2.0, sinks=sinks)):
        hold_to_one_loop(World(device, LENGTHS, SHAPE, rules), 4, 2)


def check_far_scores(device: str) -> None:
    """Later segments that dwarf those before, and the other way round."""
    for order in (1, -1):
        world = World(device, LENGTHS)
        slots = world.slots(0)
        for i in range(3):
            place = slice(i * 256, (i + 1) * 256)
            world.k[slots[place]] *= (1.0, 8.0, 24.0)[::order][i]
        hold_to_one_loop(world, 4, 2)


def check_what_a_start_measures(device: str) -> None:
    """It finds the bits the same, one that is not, and layers whose keys are never shared."""
    dtype = DTYPES[device]
    kind = LayerKind(2, 1, 64, 0.125, PLAIN)
    assert measure_shared(kind, dtype, device, 700) is None, "so few keys are not shared"
    with sharing() as launches:
        assert measure_shared(kind, dtype, device, 10_000) is True
        assert len(launches) == 2
        for launch in launches:
            cached, segment = int(launch.chunks.prefix_lens), BLOCKS_FOR(64).segment
            assert cached % segment, "a server's cached tokens end within a segment"
            assert cached // segment < (launch.chunks.most_keys - 1) // segment
        windowed = LayerKind(2, 1, 64, 0.125, Rules(window=100))
        assert measure_shared(windowed, dtype, device, 10_000) is None
        with patch.object(attention_split.attention, "blocks_for", narrower):
            assert measure_shared(kind, dtype, device, 10_000) is False


def narrower(head_size: int, wide: bool = False) -> attention.Blocks:
    """Segments of 128 keys where keys are shared, which are other bits."""
    caller = inspect.stack()[1].function
    blocks = BLOCKS_FOR(head_size, wide)
    return blocks._replace(segment=128) if caller == "launch" else blocks


CHECKS = checks_in(globals())

interpreted, test_jit_bodies_in_interpreter, test_jit_bodies_on_gpu = jit_tests(
    CHECKS, __file__, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"
)


@pytest.mark.parametrize(
    ("head_size", "wide"), [(64, True), (128, True), (256, True), (128, False), (256, False)]
)
def test_the_jit_bodies_compile_for_hopper(head_size: int, wide: bool) -> None:
    blocks = attention.blocks_for(head_size, wide)
    types = {
        **dict.fromkeys(("q", "k_buffer", "v_buffer", "out", "sinks"), "*bf16"),
        **dict.fromkeys(("page_table", "starts", "prefix_lens"), "*i32"),
        "table_rows": "*i64",
        **dict.fromkeys(("tops", "means"), "*fp32"),
        **dict.fromkeys(("table_stride", "first", "count", "per", "before", "tokens"), "i32"),
        **dict.fromkeys(("stride_q", "stride_o"), "i32"),
        "scale": "fp32",
    }
    constants: dict[str, object] = {f"stride_{name}": 8 * head_size for name in "kv"}
    constants |= {"head_size": head_size, "heads": 8, "group": 4, "BLOCK_M": blocks.split.rows}
    constants |= {"BLOCK_N": blocks.keys, "SEGMENT": blocks.segment}
    constants |= {"BEGINS": False, "ENDS": False}

    def compiled(kernel: Any, warps: int, stages: int) -> Any:
        names = kernel.arg_names
        own = {name: value for name, value in constants.items() if name in names}
        its = {name: kind for name, kind in types.items() if name in names}
        return for_hopper(kernel, its, own, warps, stages)

    made = compiled(attention_split_triton.sum_segments, blocks.split.warps, blocks.split.stages)
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert made.metadata.shared <= 227 * 1024
    assert compiled(attention_split_triton.add_segments, 1, 3).asm["ptx"]


# ---- when ----------------------------------------------------------------------------------------


def fits(
    tokens: int, keys: int, *, sequences: int = 1, room: int = 1 << 16, rules: Rules = PLAIN
) -> bool:
    heads = 32
    q = torch.empty(tokens * sequences, heads, 128, device="meta")
    means = torch.empty(room, heads, 128, device="meta")
    chunks = Chunks(*(torch.empty(sequences, device="meta"),) * 4, longest=tokens, most_keys=keys)
    sums = Segments(means, means, means, means)
    with patch.object(attention_split, "_processors", lambda _: 132):
        return attention_split.shares_keys(q, chunks, sums, rules)


@pytest.mark.parametrize(
    ("shared", "case"),
    [
        (True, {"tokens": 64, "keys": 32_000}),
        (True, {"tokens": 1, "keys": 16_384}),
        (True, {"tokens": 128, "keys": 128_000}),
        (False, {"tokens": 64, "keys": 16_000}),
        (False, {"tokens": 64, "keys": 0}),  # not known
        (False, {"tokens": 512, "keys": 32_000}),
        (False, {"tokens": 64, "keys": 32_000, "sequences": 8}),
        (False, {"tokens": 64, "keys": 32_000, "room": 1_000}),
        (False, {"tokens": 64, "keys": 32_000, "rules": Rules(window=4_096)}),
    ],
)
def test_keys_are_shared_where_rows_are_few_and_keys_are_many(shared, case):
    assert fits(**case) is shared


def test_room_for_other_heads_is_refused():
    world = World("cpu", (3,))
    room = decode_workspace(1, 99, 4, world.size, "cpu").segments
    with pytest.raises(ValueError, match=r"room is for \[heads, head_size\] \[4, 64\], not"):
        world.extend(world.whole(0), room=room)


if __name__ == "__main__":
    triton.runtime.interpreter.InterpreterBuilder.create_dot = exact_dot
    print(json.dumps(run_checks(CHECKS, attention_split_triton.sum_segments)))
