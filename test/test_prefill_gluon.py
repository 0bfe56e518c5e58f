"""The Gluon kernel of prefill: the bits of Triton's, in threads on a CPU; what Hopper's code is."""

from __future__ import annotations

import itertools
import json
import random
import re
from functools import partial
from unittest.mock import patch

import gluon_threads
import pytest
import torch
import triton
from attention_world import World, exact_dot
from jit_bodies import checks_in, jit_tests, run_checks
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from margingate_kernels import (
    Rules,
    attention,
    attention_prefill,
    attention_prefill_gluon,
    attention_prefill_triton,
)

PIECES = ((0, 0, 1), (1, 0, 64), (2, 100, 170), (3, 64, 65), (2, 256, 300))


def launched(stages, q, columns, chunks, multiply, out, rules):
    """In place of `_launch_extend`, on a CPU."""
    scale = multiply[0] / attention.LOG2_E
    gluon_threads.launch(stages, q, columns, chunks, scale, out, rules)


def extended(world, pieces, stages=attention_prefill.STAGES, **how):
    if world.device == "cpu":
        stand_in = partial(launched, stages)
        with patch.object(attention_prefill, "_launch_extend", stand_in):
            return world.extend(*pieces, **how)
    launch = partial(attention_prefill.gluon_launch, stages=stages)
    with patch.object(attention_prefill, "gluon_launch", launch):
        return world.extend(*pieces, **how)


def by_triton(world, pieces):
    """What Triton's kernel makes of tiles as wide."""
    wide = attention.blocks_for(world.size, wide=True)
    with (
        patch.object(attention, "has_wide_tiles", lambda *_: False),
        patch.object(attention, "blocks_for", lambda *_, **__: wide),
    ):
        return world.extend(*pieces)


def assert_same(world, pieces, stages=attention_prefill.STAGES):
    """Bit for bit; both sum products as `product_of` does."""
    found, wanted = extended(world, pieces, stages), by_triton(world, pieces)
    for piece, a, b in zip(pieces, found, wanted, strict=True):
        assert torch.equal(a, b), (piece, stages)


def check_packed(device):
    """Prompts, chunks behind cached keys that end within a tile, and one of a single token."""
    assert_same(World(device, [1, 64, 300, 65]), PIECES)


def check_heads(device):
    """Groups of an even and an odd number of heads, and of one."""
    for shape in ((4, 2, 64), (3, 1, 64), (1, 1, 128)):
        assert_same(World(device, [70, 130], shape), ((0, 0, 70), (1, 65, 130)))


def check_a_single_row_of_a_block(device):
    """Wherever it is in a tile: the part that has no rows takes each tile once, too."""
    for window in (None, 0, 70):
        world = World(device, [192], (1, 1, 64), Rules(window))
        for at in (0, 62, 63, 64, 127, 191):
            assert_same(world, ((0, at, at + 1),))
    assert_same(world, ((0, 63, 192),))


def check_stages(device):
    """Any number of tiles in flight, over more than a segment."""
    for stages in (2, 4):
        assert_same(World(device, [600]), ((0, 0, 300), (0, 300, 600)), stages)


def check_neighbours(device):
    """What no number is in another sequence's values stays there."""
    world = World(device, [100, 90])
    world.v[world.slots(1)] = torch.nan
    found, beside = extended(world, ((0, 0, 100), (1, 0, 90)))
    assert torch.equal(found, by_triton(world, ((0, 0, 100),))[0]) and beside.isnan().all()


def check_windows_and_sinks(device):
    """Cuts behind and within a window, chunks whose first tiles no row sees, packed or not."""
    draw = random.Random(5)
    for window, heads in itertools.product((1, 16, 127, 128, 300, None), ((2, 1, 64), (3, 1, 64))):
        for with_sinks in (False, True) if window else (True,):
            sinks = torch.linspace(-4.0, 6.0, heads[0]).to(device) if with_sinks else None
            lengths = [(window or 200) + draw.randint(100, 400), draw.randint(1, 60)]
            world = World(device, lengths, heads, Rules(window, 0.0, sinks))
            cut = draw.randrange(lengths[0] - 90, lengths[0])
            assert_same(world, ((0, cut, lengths[0]), (1, 0, lengths[1])), draw.choice((2, 3)))
    world = World(device, [700], (2, 1, 128), Rules(128, 0.0, torch.ones(2).to(device)))
    assert_same(world, ((0, 0, 300), (0, 300, 700)))


def check_slots_of_a_window_alone(device):
    """No slot in front of the list of a pool of windows is looked up."""
    wide = attention.blocks_for(64, wide=True)
    for window in (0, 1, 127, 128, 300):
        world = World(device, [window + 400], (1, 1, 64), Rules(window))
        for cut in (window + 127, window + 128, window + 270):
            pieces = ((0, cut, window + 399),)
            with patch.object(attention, "widest_blocks", lambda *_: wide):
                (listed,) = extended(world, pieces, listed=True)
            assert torch.equal(listed, extended(world, pieces)[0]), (window, cut)


def check_decode_of_windows(device):
    """A row's bits in decode, whose tiles are as wide."""
    wide = attention.blocks_for(64, wide=True)
    for window in (1, 100, 128, 256):
        world = World(
            device, [window + 300], (2, 1, 64), Rules(window, 0.0, torch.ones(2).to(device))
        )
        (found,) = extended(world, (world.whole(0),))
        at = [*range(window + 120, window + 140), window + 255, window + 256, window + 299]
        with patch.object(attention, "blocks_for", lambda *_, **__: wide):
            assert torch.equal(world.decode([(0, i) for i in at]), found[at]), window


CHECKS = checks_in(globals())
interpreted, test_in_interpreter, test_on_gpu = jit_tests(CHECKS, __file__)


@pytest.mark.parametrize(("size", "window"), [(64, None), (128, None), (64, 128), (128, 4096)])
def test_products_overlap_and_no_loop_spills(
    size: int, window: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Hopper's assembler says where it makes matrix products wait for each other (C75..)."""
    layout = gl.NVMMASharedLayout.get_default_for([128, size], gl.bfloat16)
    tiles = f"tensordesc<bf16[128,{size}],{layout!r}>"
    types = {
        **dict.fromkeys(("q", "out", "k_buffer", "v_buffer"), "*bf16"),
        **dict.fromkeys(("k_tiles", "v_tiles"), tiles),
        **{"page_table": "*i32", "table_stride": "i32", "table_rows": "*i64", "starts": "*i32"},
        **{"prefix_lens": "*i64", "scale": "fp32"},
        **({} if window is None else {"sinks": "*bf16"}),
    }
    kernel = attention_prefill_gluon.extend
    names = [name for name in kernel.arg_names if name not in types]
    strides = (32 * size, 32 * size, 8 * size, 8 * size)
    values = (*strides, 4, size, 256, 2, attention_prefill.STAGES, window)
    if window is None:
        values = (None, *values)
    constants = dict(zip(names, values, strict=True))
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if "*" in kind
    }
    with knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = True, True
        source = GluonASTSource(kernel, signature, constants, aligned)
        target = GPUTarget("cuda", 90, 32)
        made = triton.compile(source, target=target, options={"num_warps": 4})
    said = capfd.readouterr().out
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    assert int(spilled) <= 48, said  # outside of loops
    assert "C75" not in said, said
    assert made.metadata.shared <= 227 * 1024


if __name__ == "__main__":
    triton.runtime.interpreter.InterpreterBuilder.create_dot = exact_dot
    print(json.dumps(run_checks(CHECKS, attention_prefill_triton.extend)))
