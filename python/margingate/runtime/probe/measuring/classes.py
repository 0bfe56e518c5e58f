"""Measures, operator by operator, which row counts give a row the same bits.

Every row of one random input is computed at each row count, in windows of that many rows, and
once more in another order: equal bits put two row counts into one class; a row whose bits change
with its place or its neighbours at a fixed row count is an operator the gate cannot use.

Operators are in `operators`, `routed` and `scored`, and attention where `attention_operator` knows
the backend. Each is measured as a forward was seen to call it: with a bias or a residual, with as
many rows as it gets for each row of the forward, in the dtype and the layout of that input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch

from margingate.config import GateError
from margingate.core.rowclass import RowPlan, runs
from margingate.core.rowclass import members as counts_by_class
from margingate.runtime.probe.measuring.sample_sizes import SampleSize, size_for
from margingate.runtime.probe.operators.observed_calls import Observed
from margingate.runtime.probe.operators.operator import SEED, Inputs, Operator, dense_operators
from margingate.runtime.probe.operators.routed import routed_operators
from margingate.runtime.probe.operators.scored import scored_operators

DISTURBED = 4  # rows of a sample that are tried in the company that an operator chooses
SHOWN = 5  # classes of an operator in the log
PLANS = ("plan", "prefill_plan")  # of a Finding
Rows = Callable[[torch.Tensor], torch.Tensor]  # row indices [n] -> their results, of one call


@dataclass(frozen=True)
class Finding:
    """What the probe found of one operator."""

    kind: str  # of the operator: linear, norm, experts, router, attention, ...
    name: str  # of one module that runs it
    shape: tuple[int, ...]  # of its weight, [outputs, inputs]; attention: [heads, K/V heads, size]
    modules: int  # how many modules of the model share it
    classes: dict[int, int]  # row count -> class, numbered from 0 in order of appearance
    plan: RowPlan | None  # None: nothing keeps it to a class
    seconds: float
    prefill: bool = False  # prefills are kept to one class, by this plan or one of their own
    prefill_plan: RowPlan | None = None  # of their own

    def __str__(self) -> str:
        groups = [f"{run[0]} to {run[-1]}" for run, _ in runs(self.classes)]
        more = f" | {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
        kept = "" if self.plan is None else f", {self.plan}"
        kept += "" if self.prefill_plan is None else f", in prefills {self.prefill_plan}"
        same = " | ".join(groups[:SHOWN]) + more + kept
        return f"{self.name} {list(self.shape)} x{self.modules}: {same} ({self.seconds:.1f} s)"

    def record(self) -> dict[str, Any]:
        """For JSON; `from_record` reads it."""
        classes = [list(item) for item in self.classes.items()]
        plans = {
            name: None if (plan := getattr(self, name)) is None else plan.record() for name in PLANS
        }
        return {**vars(self), "shape": list(self.shape), "classes": classes, **plans}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for anything but a record."""
        plans = {name: None if (made := record[name]) is None else RowPlan(*made) for name in PLANS}
        classes = {int(count): int(key) for count, key in record["classes"]}
        shape = tuple(int(size) for size in record["shape"])
        return cls(**{**record, "shape": shape, "classes": classes, **plans})


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


def probe_operator(operator: Operator, counts: Sequence[int]) -> dict[int, int]:
    """Classes of `counts` for one operator.

    One that is capped is left out at the first row count at which its rows depend on each other,
    and at all above it: it runs in pieces of fewer rows.

    Raises:
        RowDependenceError: at a fixed row count a row's bits depend on its place or neighbours.
    """
    size = size_for(operator, counts[0])
    samples = operator.samples(size.whole(counts))
    of_samples = [_classes_of(operator, sample, (counts, size)) for sample in samples]
    found = _together(of_samples)
    disturbed = _disturbed(operator, samples[0], found)
    if disturbed and not operator.is_capped:
        raise RowDependenceError(disturbed)
    return {count: key for count, key in found.items() if not 0 < disturbed <= count}


def _classes_of(
    operator: Operator, sample: Inputs, asked: tuple[Sequence[int], SampleSize]
) -> dict[int, int]:
    """Classes by one sample, as `_classify`, up to where a capped operator depends."""
    found: dict[int, int] = {}
    try:
        _classify(lambda rows: operator.run(sample[rows]), asked, operator.device, found)
    except RowDependenceError:
        if not operator.is_capped or not found:
            raise
    return found


def _together(of_samples: Sequence[Mapping[int, int]]) -> dict[int, int]:
    """Classes of the row counts before the first that samples class apart, or that one lacks.

    There the rows' company decides, and not their number.
    """
    numbers: dict[tuple[int, ...], int] = {}
    found: dict[int, int] = {}
    for count in of_samples[0]:
        if not all(count in classes for classes in of_samples):
            break
        key = tuple(classes[count] for classes in of_samples)
        if _are_apart(key, numbers):
            break
        found[count] = numbers.setdefault(key, len(numbers))
    return found


def _are_apart(key: tuple[int, ...], known: Iterable[tuple[int, ...]]) -> bool:
    """Whether some samples have a class of another row count again, and others have not."""
    shared = ([one == other for one, other in zip(key, each, strict=True)] for each in known)
    return any(any(same) and not all(same) for same in shared)


def _disturbed(operator: Operator, sample: Inputs, counts: Iterable[int]) -> int:
    """The first row count at which company that the operator chooses changes a row; or 0."""
    if not operator.company(sample, 0, 2):
        return 0
    for count in (count for count in counts if count > 1):
        for row in range(DISTURBED):
            first = row - row % count  # of the window that the row is in
            expected = operator.run(sample[first : first + count])[[row - first]]
            if not _is_undisturbed(operator, sample, count, expected, row):
                return count
    return 0


def classify(
    rows: Rows, counts: Sequence[int], device: torch.device, *, in_any_order: bool = True
) -> dict[int, int]:
    """Classes of `counts` for results of the rows 0 to SampleSize().whole(counts) - 1.

    A row count at which a row depends on its place ends it; such counts cannot be left out instead.
    oneDNN with AVX-512 and no bfloat16 products has them at 5, 7, 9, 11, 13, 17 and 33 rows (others
    were not tried), but so few rows show it there that this sample misses some of these counts.

    Args:
        in_any_order: also compute the rows in another order; False where order has a meaning.

    Raises:
        RowDependenceError: at a fixed row count a row's bits depend on its place or neighbours.
    """
    found: dict[int, int] = {}
    _classify(rows, (counts, SampleSize()), device, found, in_any_order=in_any_order)
    return found


def _classify(
    rows: Rows,
    asked: tuple[Sequence[int], SampleSize],
    device: torch.device,
    found: dict[int, int],
    *,
    in_any_order: bool = True,
) -> None:
    """As `classify`, into `found`, which has the row counts before the one that raised.

    Args:
        asked: the row counts, and how many rows to compute at each.
    """
    (counts, size), generator = asked, torch.Generator().manual_seed(SEED)
    order = torch.randperm(size.whole(counts), generator=generator).to(device)
    ascending = torch.arange(len(order), device=device)
    seen: list[torch.Tensor] = []
    for count in counts:
        used = size.rows(count)
        outputs = _in_windows(rows, ascending[:used], count)
        shuffled = order[order < used]
        if in_any_order and not torch.equal(_in_windows(rows, shuffled, count), outputs[shuffled]):
            raise RowDependenceError(count)
        found[count] = _class_of(outputs, seen)


def extended(
    operator: Operator, classes: Mapping[int, int], counts: Sequence[int]
) -> dict[int, int]:
    """`classes` with the larger `counts`: each in a class that has its bits, or in a new one.

    Rows repeat in blocks of the largest count so far, or of more where rows have few results, so
    that a large output is held once and each of its blocks compared with a small one.
    """
    if not counts:
        return dict(classes)
    base = size_for(operator, max(classes)).whole(classes)
    of_samples = [_extended(operator, sample, classes, counts) for sample in operator.samples(base)]
    found, numbers = dict(classes), {(key,) * len(of_samples): key for key in classes.values()}
    for count in counts:
        keys, unused = tuple(each[count] for each in of_samples), max(found.values()) + 1
        apart = _are_apart(keys, numbers)
        found[count] = unused if apart else numbers.setdefault(keys, unused)
    return found


def _extended(
    operator: Operator, sample: Inputs, classes: Mapping[int, int], counts: Sequence[int]
) -> dict[int, int]:
    """As `extended`, by one sample of as many rows as a block has."""
    found, base = dict(classes), len(sample)

    def run(rows: torch.Tensor) -> torch.Tensor:
        return operator.run(sample[rows % base])

    known = counts_by_class(classes).items()
    seen = {key: _in_windows(run, _cover(base, of[-1]), of[-1]) for key, of in known}
    unused = max(classes.values()) + 1
    for count in counts:
        rows = _cover(base, count)
        single = len(rows) == count  # its output may be large, and is not copied
        blocks = (run(rows) if single else _in_windows(run, rows, count)).split(base)
        steady = _is_undisturbed(operator, sample, count, blocks[0][:1])
        keys = (key for key, expected in seen.items() if steady and _repeats(expected, blocks))
        found[count] = key = next(keys, unused)
        if key == unused:
            unused += 1
            if steady and _repeats(blocks[0], blocks):  # the same bits at every place
                seen[key] = blocks[0].clone()
    return found


def _is_undisturbed(
    operator: Operator, sample: Inputs, count: int, expected: torch.Tensor, row: int = 0
) -> bool:
    """Whether a row has these results [1, outputs] in the company that the operator chooses."""
    beside = operator.company(sample, row, count)
    return all(torch.equal(operator.run(each)[[place]], expected) for each, place in beside)


def _cover(rows: int, count: int) -> torch.Tensor:
    """Row indices for whole windows of `count`, at least `rows` of them."""
    return torch.arange(-(-rows // count) * count)


def _repeats(expected: torch.Tensor, blocks: Sequence[torch.Tensor]) -> bool:
    agree = [(block == expected[: len(block)]).all() for block in blocks]
    return bool(torch.stack(agree).all())


def apart_in_graphs(operator: Operator, counts: Sequence[int]) -> list[int]:
    """The counts at which an operator gives other bits in a CUDA graph than outside of one."""
    sample = operator.sample(max(counts, default=1))
    apart = []
    for count in counts:
        expected = operator.run(sample[:count])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = operator.run(sample[:count])
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


def groups(model: Any, seen: Mapping[int, Observed] | None = None) -> dict[str, list[Operator]]:
    """The operators of a model by what they run.

    Args:
        seen: how a forward called each module, by its id.
    """
    found: dict[str, list[Operator]] = {}
    for list_of in (dense_operators, routed_operators, scored_operators):
        for operator in list_of(model, seen or {}):
            found.setdefault(operator.signature, []).append(operator)
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
