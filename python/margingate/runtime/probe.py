"""Measures, operator by operator, which row counts give a row the same bits.

Every row of one random input is computed at each row count, in windows of that many rows, and
once more in another order: equal bits put two row counts into one class; a row whose bits change
with its place or its neighbours at a fixed row count is an operator the gate cannot use.

Operators are the model's linear layers, its lm_head and its norms, one of each kind and shape, and
attention where `probe_attention` knows the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, Self

import torch

from margingate.config import GateError
from margingate.core.rowclass import RowPlan, runs

SAMPLE_ROWS = 64  # rows computed at every count; twice that from counts above it
SEED = 20260530
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
    plan: RowPlan | None  # linear layers; None: every measured row count is in one class
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
        plan = None if self.plan is None else list(astuple(self.plan))
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
    operator: Operator
    widened: bool = False  # computed in float32 from a weight of another dtype

    @property
    def group(self) -> str:
        """The same for modules whose operators are one: layers of a model repeat."""
        weight, name = self.module.weight, self.name.rsplit(".", 1)[-1]
        wide = " in float32" if self.widened else ""
        return f"{self.kind} {name} {list(weight.shape)} {weight.dtype}{wide}"


def row_counts(largest: int) -> list[int]:
    """The row counts that are measured: all small ones, then multiples of 8, up to `largest`."""
    small = range(1, min(largest, 16) + 1)
    return sorted({*small, *range(24, largest + 1, 8), largest})


def prefill_counts(above: int, largest: int) -> list[int]:
    """Row counts of prefill forwards that are measured: those above `above`, up to `largest`.

    Dense where libraries change their kernels most, with odd ones among them.
    """
    steps = ((1024, 64), (4096, 256), (largest, 512))
    found = {largest}
    low = above
    for high, step in steps:
        found |= set(range(low + step, min(high, largest) + 1, step))
        low = max(low, high)
    odd = {count - 1 - count // 64 % 7 for count in found}
    return sorted(count for count in found | odd if count > above)


def probe_operator(
    operator: Operator, width: int, counts: Sequence[int], like: torch.Tensor
) -> dict[int, int]:
    """Classes of `counts` for one operator over inputs [rows, width].

    Args:
        like: dtype and device of the input.

    Raises:
        RowDependenceError: at a fixed row count a row's bits depend on its place or neighbours.
    """
    generator = torch.Generator().manual_seed(SEED)
    sample = torch.randn(sample_rows(counts), width, generator=generator).to(like)
    return classify(lambda rows: operator(sample[rows]), counts, like.device)


def sample_rows(counts: Sequence[int]) -> int:
    """How many rows `classify` asks for."""
    return max(SAMPLE_ROWS, *counts)


def classify(
    rows: Rows, counts: Sequence[int], device: torch.device, *, in_any_order: bool = True
) -> dict[int, int]:
    """Classes of `counts` for results of the rows 0 to sample_rows(counts) - 1.

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
    classes: dict[int, int],
    counts: Sequence[int],
    like: torch.Tensor,
) -> dict[int, int]:
    """`classes` with the larger `counts`, each in the class of the largest so far, or in its own.

    Rows repeat in blocks, so that a large output is held once and compared with a small one.
    """
    base = max(classes)
    generator = torch.Generator().manual_seed(SEED)
    sample = torch.randn(base, width, generator=generator).to(like)
    expected = operator(sample)
    found, unused = dict(classes), max(classes.values()) + 1
    repeated = sample.repeat(-(-max(counts, default=0) // base), 1)
    for count in counts:
        outputs = operator(repeated[:count])
        agree = [(block == expected[: len(block)]).all() for block in outputs.split(base)]
        if bool(torch.stack(agree).all()):
            found[count] = classes[base]
        else:
            found[count], unused = unused, unused + 1
    return found


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


def members(model: Any) -> Iterator[Member]:
    """Every linear layer and norm of an SGLang model, lm_head included."""
    from sglang.srt.layers import layernorm
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    norms = (layernorm.RMSNorm, layernorm.GemmaRMSNorm, torch.nn.RMSNorm, torch.nn.LayerNorm)
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod):
            yield Member("linear", name, module, partial(_apply, method, module))
        elif isinstance(module, norms) and isinstance(module.weight, torch.Tensor):
            yield Member("norm", name, module, partial(_normalize, module))
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "weight"):
        wide = bool(getattr(getattr(model, "logits_processor", None), "use_fp32_lm_head", False))
        yield Member("linear", HEAD, head, partial(_project, head, wide), wide)


def _apply(method: Any, module: Any, x: torch.Tensor) -> torch.Tensor:
    return method.apply(module, x, None)


def _project(head: Any, wide: bool, x: torch.Tensor) -> torch.Tensor:
    return x.float() @ head.weight.float().T if wide else x @ head.weight.T


def _normalize(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module(x.clone())


def groups(model: Any) -> dict[str, list[Member]]:
    """The members of a model by what they run."""
    found: dict[str, list[Member]] = {}
    for member in members(model):
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
