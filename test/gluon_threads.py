"""The Gluon prefill kernel on a CPU: its own lines, on numpy, each part of a program in a thread.

Gluon has no interpreter. What a GPU does later is done late here too: a product reads shared memory
when it is waited for, and a tile arrives some time after it was asked for; so a stage that is given
back too early, or read too early, changes the outcome. A barrier that is never reached is an error
after `PATIENCE_S`, and so is a phase that a part has not waited for once when a program ends.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from attention_world import product_of
from triton.experimental.gluon import GluonJITFunction

from margingate_kernels import (
    Rules,
    attention,
    attention_gluon,
    attention_prefill,
    attention_prefill_gluon,
    gluon_rings,
)
from margingate_kernels.attention_prefill import Chunks, Columns

PATIENCE_S = 60
TYPES = {"fp32": np.float32, "int32": np.int32, "int64": np.int64, "fp16": np.float16}
TYPES["uint32"] = np.uint32
changed = threading.Condition()  # of all barriers
thread = threading.local()  # its products in flight
barriers: list[Barrier] = []  # of the program that runs


class Array(np.ndarray):
    """A tensor of Gluon's, of any layout; scalars too."""

    def __array_wrap__(self, found: Any, context: Any = None, scalar: bool = False) -> Array:
        return array(found)

    def __getitem__(self, at: Any) -> Array:
        return array(super().__getitem__(at))

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)

    def permute(self, order: Any) -> Array:
        return self.transpose(order)

    def split(self) -> tuple[Array, Array]:
        return self[..., 0], self[..., 1]

    def to(self, dtype: Any, bitcast: bool = False) -> Array:
        kind = TYPES.get(str(dtype), dtype)
        return array(np.asarray(self).view(kind) if bitcast else np.asarray(self).astype(kind))


def array(numbers: Any, dtype: Any = None) -> Array:
    return np.asarray(numbers, dtype).view(Array)


class Pointer:
    def __init__(self, data: np.ndarray, at: Any = 0) -> None:
        self.data, self.at = data, np.asarray(at)
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.data, self.at + np.asarray(more))


class Shared:
    def __init__(self, data: np.ndarray) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, at: Any) -> Shared:
        return Shared(self.data[int(at)])

    def slice(self, first: int, count: int, axis: int) -> Shared:
        assert axis == 0
        return Shared(self.data[first : first + count])

    def permute(self, order: Any) -> Shared:
        return Shared(self.data.transpose(order))

    def store(self, numbers: Any) -> None:
        self.data[...] = numbers

    def load(self, _: Any) -> Array:
        return array(self.data.copy())


class Barrier:
    """Of a stage: a phase ends when all have arrived and all bytes are there."""

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = self.ended = 0
        self.waits: dict[int, int] = {}  # of each thread

    def change(self, arrivals: int, more: int) -> None:
        with changed:
            self.pending -= arrivals
            self.bytes += more
            assert self.pending >= 0 and self.bytes >= 0, "more than the phase waits for"
            if self.pending == self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.ended += 1
            changed.notify_all()

    def wait(self, parity: Any) -> None:
        with changed:
            if not changed.wait_for(lambda: self.phase != int(parity), PATIENCE_S):
                raise TimeoutError("a barrier is never reached")
            own = threading.get_ident()
            self.waits[own] = self.waits.get(own, 0) + 1

    def settle(self) -> None:
        """At a program's end: no phase is begun, and who waits has waited for each once."""
        assert (self.pending, self.bytes) == (self.count, 0), "a phase is begun and never ends"
        assert set(self.waits.values()) <= {self.ended}, "a phase is not waited for once"


class Barriers:
    def __init__(self, stages: int) -> None:
        self.all = [Barrier() for _ in range(stages)]
        barriers.extend(self.all)

    def index(self, at: Any) -> Barrier:
        return self.all[int(at)]


class Descriptor:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.data = tensor.flatten(1).numpy()
        self.block = (gluon_rings.TILE.value, tensor.shape[-1])
        self.nbytes_per_cta = math.prod(self.block) * self.data.itemsize


def copy_tile(descriptor: Descriptor, corner: Any, barrier: Barrier, result: Shared) -> None:
    """By a thread, late; rows outside of the tensor are 0."""
    row, column = (int(at) for at in corner)
    rows, lanes = descriptor.block

    def copy() -> None:
        time.sleep(random.random() / 1000)
        found = descriptor.data[row : row + rows, column : column + lanes]
        result.data[...] = 0
        result.data[: len(found)] = found
        barrier.change(0, -descriptor.nbytes_per_cta)

    threading.Thread(target=copy).start()


class Product:
    """Of the matrix unit, in flight."""

    def __init__(self, left: Any, right: Shared, so_far: Any, use_acc: Any) -> None:
        self.left, self.right, self.so_far, self.use_acc = left, right, so_far, bool(use_acc)
        thread.products.append(self)

    def finish(self) -> None:
        left = np.asarray(self.left.data if isinstance(self.left, Shared) else self.left)
        so_far = self.so_far.found if isinstance(self.so_far, Product) else self.so_far
        so_far = np.asarray(so_far) if self.use_acc else np.zeros((), np.float32)
        self.found = array(product_of(left, self.right.data, so_far))


def wait_products(flying: int, deps: list[Any]) -> Any:
    time.sleep(random.random() / 1000)
    while len(thread.products) > flying:
        thread.products.pop(0).finish()
    found = tuple(each.found if isinstance(each, Product) else each for each in deps)
    return found if len(found) > 1 else found[0]


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Array:
    seen = np.broadcast_to(True if mask is None else mask, pointer.at.shape)
    inside = (pointer.at >= 0) & (pointer.at < len(pointer.data))
    assert (inside | ~seen).all(), "an address outside of a tensor"
    found = pointer.data[np.where(seen, pointer.at, 0)]
    return array(np.where(seen, found, np.asarray(other, found.dtype)))


def store(pointer: Pointer, numbers: Any, mask: Any) -> None:
    seen = np.broadcast_to(mask, pointer.at.shape)
    pointer.data[pointer.at[seen]] = np.asarray(numbers)[seen]


def allocate(dtype: Any, shape: Any, _: Any) -> Any:
    return Barriers(shape[0]) if dtype == "int64" else Shared(np.full(shape, np.nan, dtype))


def specialize(parts: Any, *_: Any) -> None:
    errors: list[Exception] = []

    def run(part: Any, arguments: Any) -> None:
        thread.products = []
        try:
            part(*arguments)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if errors:
        raise errors[0]
    while barriers:
        barriers.pop().settle()


def nothing(*_: Any, **__: Any) -> None:
    pass


program: dict[str, list[int]] = {}  # of the grid: its place, and how many there are
language = SimpleNamespace(
    **{"float32": "fp32", "int32": "int32", "int64": "int64", "uint32": "uint32"},
    static_range=range,
    **dict.fromkeys(("SliceLayout", "DotOperandLayout", "NVMMADistributedLayout"), nothing),
    **{"barrier": nothing, "num_warps": lambda: 4, "load": load, "store": store},
    NVMMASharedLayout=SimpleNamespace(get_default_for=nothing),
    allocate_shared_memory=allocate,
    warp_specialize=specialize,
    program_id=lambda axis: array(program["at"][axis], np.int32),
    num_programs=lambda axis: program["of"][axis],
    arange=lambda first, end, _: array(np.arange(first, end, dtype=np.int32)),
    full=lambda shape, number, *_: array(np.full(shape, np.asarray(number), np.float32)),
    zeros=lambda shape, *_: array(np.zeros(shape, np.float32)),
    convert_layout=lambda numbers, *_, **__: numbers,
    broadcast=lambda *some: tuple(array(each) for each in np.broadcast_arrays(*some)),
    where=lambda seen, a, b: array(np.where(seen, a, b).astype(np.float32)),
    fma=lambda a, b, c: array(np.asarray(a) * np.asarray(b) + np.asarray(c)),
    max=lambda numbers, axis: array(np.asarray(numbers).max(axis)),
    sum=lambda numbers, axis: array(np.asarray(numbers).sum(axis, dtype=np.int32)),
    cdiv=lambda a, b: array(-(-np.asarray(a) // b)),
    **{"maximum": np.maximum, "minimum": np.minimum, "ceil": np.ceil, "exp2": np.exp2},
)


def power_of_two(numbers: Any) -> Array:
    whole = np.maximum(numbers, -127).astype(np.int32) + 127
    return array((np.asarray(whole) << 23).view(np.float32))


def rewired() -> dict[str, Any]:
    """The kernel's modules as one, on the above."""
    modules = (gluon_rings, attention_gluon, attention_prefill_gluon)
    names = {name: value for module in modules for name, value in vars(module).items()}
    lines = {}
    for name, value in names.items():
        if type(value).__name__ == "constexpr":
            lines[name] = value.value
        elif isinstance(value, GluonJITFunction):
            lines[name] = FunctionType(value.fn.__code__, names)
    ring = type("Ring", (), {"__init__": hold})
    for name in ("wait_full", "wait_free", "release"):
        body = getattr(gluon_rings.Ring, name).fn
        setattr(ring, name, FunctionType(body.__code__, names))
    barrier = SimpleNamespace(
        init=lambda each, count: each.init(count),
        wait=lambda each, parity: each.wait(parity),
        arrive=lambda each, count: each.change(count, 0),
        expect=lambda each, more: each.change(1, more),
        MBarrierLayout=nothing,
    )
    rows = SimpleNamespace(
        async_load=lambda result, pointers, mask: result.store(load(pointers, mask)),
        mbarrier_arrive=nothing,
    )
    names |= lines | {
        **{"gl": language, "mbarrier": barrier, "async_copy": rows, "Ring": ring},
        "hopper": SimpleNamespace(fence_async_shared=nothing),
        "tma": SimpleNamespace(async_load=copy_tile),
        "warpgroup_mma": lambda a, b, c, use_acc=True, is_async=True: Product(a, b, c, use_acc),
        **{"warpgroup_mma_wait": wait_products, "rows_layout": nothing},
        "power_of_two": power_of_two,
    }
    return names


def hold(self: Any, tiles: Any, full: Any, free: Any) -> None:
    self.tiles, self.full, self.free = tiles, full, free


def launch(
    stages: int,
    q: torch.Tensor,
    columns: Columns,
    chunks: Chunks,
    scale: float,
    out: Any,
    rules: Rules,
) -> None:
    """As `attention_prefill._launch_gluon`: one program after the other."""
    grid, constants = attention_prefill.gluon_launch(q, columns, chunks, out, stages)
    program["of"] = list(grid)
    tensors = [Pointer(each.view(-1).numpy()) for each in (q, out, *columns[:2])]
    table, *lengths = (Pointer(each.view(-1).numpy()) for each in chunks[:4])
    sinks = None if rules.sinks is None else Pointer(rules.sinks.numpy())
    lines = rewired()
    for at in itertools.product(*map(range, grid)):
        program["at"] = list(at)
        barriers.clear()  # of a program that failed
        lines["extend"](
            *(*tensors, Descriptor(columns.k), Descriptor(columns.v), table),
            *(chunks.page_table.stride(0), *lengths, sinks, scale * attention.LOG2_E),
            *(*constants, rules.window),
        )
