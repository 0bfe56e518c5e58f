"""Measures, operator by operator, which row counts give a row the same bits.

Every row of one random input is computed at each row count, in windows of that many rows, and
once more in another order: equal bits put two row counts into one class; a row whose bits change
with its place or its neighbours at a fixed row count is an operator the gate cannot use.

Operators are the model's linear layers, its lm_head and its norms, one of each kind and shape, and
attention where `probe_attention` knows the backend. Each is measured as a forward was seen to call
it: with a bias or a residual, with as many rows as it gets for each row of the forward, in the
dtype and the layout of that input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch

from margingate.config import GateError
from margingate.core.rowclass import RowPlan, runs
from margingate.core.rowclass import members as counts_by_class
from margingate.runtime.probe.observed_calls import AS_WEIGHT, ObservedCall

SAMPLE_ROWS = 64  # rows computed at every count; twice that from counts above it
SEED = 20260530  # of the inputs of all measurements at start; arbitrary, and always the same
HEAD = "lm_head"
SHOWN = 5  # classes of an operator in the log
Operator = Callable[[torch.Tensor], torch.Tensor]
Rows = Callable[[torch.Tensor], torch.Tensor]  # row indices [n] -> their results, of one call


@dataclass(frozen=True)
class Finding:
    """What the probe found of one operator."""

    kind: str  # linear, norm or attention
    name: str  # of one module that runs it
    shape: tuple[int, ...]  # of its weight, [outputs, inputs]; attention: [heads, K/V heads, size]
    modules: int  # how many modules of the model share it
    classes: dict[int, int]  # row count -> class, numbered from 0 in order of appearance
    plan: RowPlan | None  # of linear layers and all-reduce; None: nothing keeps it to a class
    seconds: float
    prefill: bool = False  # the plan holds for the row counts of prefill too

    def __str__(self) -> str:
        groups = [f"{run[0]} to {run[-1]}" for run, _ in runs(self.classes)]
        more = f" | {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
        kept = "" if self.plan is None else f", {self.plan}"
        same = " | ".join(groups[:SHOWN]) + more + kept
        return f"{self.name} {list(self.shape)} x{self.modules}: {same} ({self.seconds:.1f} s)"

    def record(self) -> dict[str, Any]:
        """For JSON; `from_record` reads it."""
        plan = None if self.plan is None else self.plan.record()
        classes = [list(item) for item in self.classes.items()]
        return {**vars(self), "shape": list(self.shape), "classes": classes, "plan": plan}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for anything but a record."""
        plan = None if record["plan"] is None else RowPlan(*record["plan"])
        classes = {int(count): int(key) for count, key in record["classes"]}
        shape = tuple(int(size) for size in record["shape"])
        return cls(**{**record, "shape": shape, "classes": classes, "plan": plan})


@dataclass(frozen=True)
class Member:
    """One module that runs an operator."""

    kind: str
    name: str
    module: Any
    operator: Operator  # of inputs [rows, width], as `call` says
    widened: bool = False  # computed in float32 from a weight of another dtype
    call: ObservedCall = AS_WEIGHT

    @property
    def width(self) -> int:
        """Of the operator's inputs: elements for each row of a forward."""
        return int(self.call.width or self.module.weight.shape[-1])

    @property
    def like(self) -> torch.Tensor:
        """Of the dtype and on the device of its inputs."""
        weight: torch.Tensor = self.module.weight
        dtype = self.call.dtype or weight.dtype
        return torch.empty(0, dtype=dtype, device=weight.device)

    @property
    def group(self) -> str:
        """The same for modules whose operators are one: layers of a model repeat."""
        weight, name = self.module.weight, self.name.rsplit(".", 1)[-1]
        wide = " in float32" if self.widened else ""
        return f"{self.kind} {name} {list(weight.shape)} {weight.dtype}{wide}{self.call}"


def row_counts(largest: int) -> list[int]:
    """The row counts of decode that are measured: every one up to `largest`."""
    return list(range(1, largest + 1))


def prefill_counts(above: int, largest: int, more: Iterable[int] = ()) -> list[int]:
    """Row counts of prefill forwards that are measured: those above `above`, up to `largest`.

    Other forwards are padded up to one of these: by 5 % of their rows on average at 257 rows, by
    1 % at 4,096.

    Args:
        more: row counts that forwards are known to have, as those of prefill graphs.
    """
    steps = ((1024, 32), (4096, 64), (largest, 128))
    found = {largest, *(count for count in more if count <= largest)}
    low = 0
    for high, step in steps:
        found |= set(range(low + step, min(high, largest) + 1, step))
        low = max(low, high)
    return sorted(count for count in found if count > above)


def probe_operator(
    operator: Operator, width: int, counts: Sequence[int], like: torch.Tensor
) -> dict[int, int]:
    """Classes of `counts` for one operator over inputs [rows, width].

    Args:
        like: dtype and device of the input.

    Raises:
        RowDependenceError: at a fixed row count a row's bits depend on its place or neighbours.
    """
    sample = _sample(sample_rows(counts), width, like)
    return classify(lambda rows: operator(sample[rows]), counts, like.device)


def _sample(rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(rows, width, generator=generator).to(like)


def sample_rows(counts: Sequence[int]) -> int:
    """How many rows `classify` asks for."""
    return max(SAMPLE_ROWS, *counts)


def classify(
    rows: Rows, counts: Sequence[int], device: torch.device, *, in_any_order: bool = True
) -> dict[int, int]:
    """Classes of `counts` for results of the rows 0 to sample_rows(counts) - 1.

    A row count at which a row depends on its place ends it; such counts cannot be left out instead.
    oneDNN with AVX-512 and no bfloat16 products has them at 5, 7, 9, 11, 13, 17 and 33 rows (others
    were not tried), but so few rows show it there that this sample misses some of these counts.

    Args:
        in_any_order: also compute the rows in another order; False where order has a meaning.

    Raises:
        RowDependenceError: at a fixed row count a row's bits depend on its place or neighbours.
    """
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(sample_rows(counts), generator=generator).to(device)
    ascending = torch.arange(len(order), device=device)
    seen: list[torch.Tensor] = []
    classes: dict[int, int] = {}
    for count in counts:
        used = max(count, SAMPLE_ROWS // count * count)
        outputs = _in_windows(rows, ascending[:used], count)
        shuffled = order[order < used]
        if in_any_order and not torch.equal(_in_windows(rows, shuffled, count), outputs[shuffled]):
            raise RowDependenceError(count)
        classes[count] = _class_of(outputs, seen)
    return classes


def extended(
    operator: Operator,
    width: int,
    classes: Mapping[int, int],
    counts: Sequence[int],
    like: torch.Tensor,
) -> dict[int, int]:
    """`classes` with the larger `counts`: each in a class that has its bits, or in a new one.

    Rows repeat in blocks of the largest count so far, so that a large output is held once and each
    of its blocks compared with a small one.
    """
    found = dict(classes)
    if not counts:
        return found
    base = max(classes)
    sample = _sample(base, width, like)
    seen = {
        key: _in_windows(lambda rows: operator(sample[rows % base]), _cover(base, of[-1]), of[-1])
        for key, of in counts_by_class(classes).items()
    }
    repeated = sample.repeat(-(-max(counts) // base), 1)
    unused = max(classes.values()) + 1
    for count in counts:
        blocks = operator(repeated[:count]).split(base)
        keys = (key for key, expected in seen.items() if _repeats(expected, blocks))
        found[count] = key = next(keys, unused)
        if key == unused:
            unused += 1
            if _repeats(blocks[0], blocks):  # its rows have the same bits at every place
                seen[key] = blocks[0].clone()
    return found


def _cover(rows: int, count: int) -> torch.Tensor:
    """Row indices for whole windows of `count`, at least `rows` of them."""
    return torch.arange(-(-rows // count) * count)


def _repeats(expected: torch.Tensor, blocks: Sequence[torch.Tensor]) -> bool:
    agree = [(block == expected[: len(block)]).all() for block in blocks]
    return bool(torch.stack(agree).all())


def apart_in_graphs(
    operator: Operator, width: int, counts: Sequence[int], like: torch.Tensor
) -> list[int]:
    """The counts at which an operator gives other bits in a CUDA graph than outside of one."""
    sample = _sample(max(counts, default=1), width, like)
    apart = []
    for count in counts:
        expected = operator(sample[:count])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = operator(sample[:count])
        graph.replay()
        if not torch.equal(result, expected):
            apart.append(count)
    return apart


class RowDependenceError(Exception):
    """At this fixed row count a row's bits depend on the other rows."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.rows = rows


def _in_windows(rows: Rows, indices: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([rows(indices[i : i + count]) for i in range(0, len(indices), count)])


def _class_of(outputs: torch.Tensor, seen: list[torch.Tensor]) -> int:
    """The first class whose rows agree with `outputs` on all rows both have; or a new one."""
    for number, other in enumerate(seen):
        shared = min(len(outputs), len(other))
        if torch.equal(outputs[:shared], other[:shared]):
            if len(outputs) > len(other):
                seen[number] = outputs
            return number
    seen.append(outputs)
    return len(seen) - 1


def members(model: Any, seen: Mapping[int, ObservedCall] | None = None) -> Iterator[Member]:
    """Every linear layer and norm of an SGLang model, lm_head included.

    Args:
        seen: how a forward called each of them, by id of the module.
    """
    from sglang.srt.layers import layernorm
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    norms = (layernorm.RMSNorm, layernorm.GemmaRMSNorm, torch.nn.RMSNorm, torch.nn.LayerNorm)
    seen = seen or {}
    for name, module in model.named_modules():
        method, call = getattr(module, "quant_method", None), seen.get(id(module), AS_WEIGHT)
        if isinstance(method, UnquantizedLinearMethod):
            yield Member("linear", name, module, partial(_apply, method, module, call), call=call)
        elif isinstance(module, norms) and isinstance(module.weight, torch.Tensor):
            yield Member("norm", name, module, partial(_normalize, module, call), call=call)
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "weight"):
        processor = getattr(model, "logits_processor", None)
        names = ("use_fp32_lm_head", "use_fp32_lm_head_output")
        wide = any(getattr(processor, name, False) for name in names)
        yield Member("linear", HEAD, head, partial(_project, processor, head), wide)


def _apply(method: Any, module: Any, call: ObservedCall, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = method.apply(module, call.laid_out(x), call.bias_of(module))
    return result.reshape(len(x), -1)


def _project(processor: Any, head: Any, x: torch.Tensor) -> torch.Tensor:
    if processor is None:
        return x @ head.weight.T
    logits: torch.Tensor = processor._compute_lm_head(x, head)
    return logits


def _normalize(module: Any, call: ObservedCall, x: torch.Tensor) -> torch.Tensor:
    given = call.laid_out(x.clone())
    if not call.residual:
        return module(given).reshape(len(x), -1)
    results = module(given, call.laid_out(x.flip(-1)))
    return torch.cat([part.reshape(len(x), -1) for part in results], dim=-1)


def groups(model: Any, seen: Mapping[int, ObservedCall] | None = None) -> dict[str, list[Member]]:
    """The members of a model by what they run."""
    found: dict[str, list[Member]] = {}
    for member in members(model, seen):
        found.setdefault(member.group, []).append(member)
    return found


@contextmanager
def refusing(name: str) -> Iterator[None]:
    try:
        yield
    except RowDependenceError as error:
        raise GateError(
            f"--deterministic-gate cannot use {name}: with {error.rows} rows, a row's result "
            "depends on the other rows; serve this model without the flag, or use "
            "--gate-fast-path stock with --gate-policy observe to study it."
        ) from None
