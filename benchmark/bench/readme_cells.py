"""README's table from the records of sameness.servers, speed.decode_step and speed.serving."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

COLUMNS = ("stock SGLang", "`--enable-deterministic-inference`", "margingate")
STOCK = COLUMNS[0]
# By part: what each column is called in the records, the present name first.
MODES: dict[str, dict[str, tuple[str, ...]]] = {
    part: dict(zip(COLUMNS, names, strict=True))
    for part, names in {
        "sameness": (("stock-default",), ("sglang-deterministic-default",), ("gate",)),
        "steps": (
            ("stock-default",),
            ("deterministic-default",),
            ("gate-default", "gate-triton"),
        ),
        "serving": (("stock-default",), ("deterministic-default",), ("gate",)),
    }.items()
}
FAILED, NOT_RUN, OUT_OF_TIME = "failed", "not run", "out of time"
NOT_ASKED = "not measured"  # a script ran without this kind of server
LOADED = {
    "output_throughput": "tokens a second",
    "median_ttft_ms": "time to the first token, median",
}
ALSO = {"p99_ttft_ms": "time to the first token, p99", "median_tpot_ms": "time a token, median"}
Figures = dict[str, dict[str, float]]  # by point, by column


@dataclass(frozen=True)
class Part:
    """What one script left."""

    name: str  # of MODES
    record: dict[str, Any] | None = None  # its --out; None: there is no file
    outcome: str = NOT_RUN  # empty when it ended by itself with status 0
    asked: dict[str, int] = field(default_factory=dict)  # points by row; where unknown: as measured
    absent: dict[str, str] = field(default_factory=dict)  # why a column was not asked for

    def lacking(self, column: str) -> str:
        """The words of a cell without a figure."""
        if column in self.absent:
            return self.absent[column]
        command = _command(self.record or {})
        if command and not {*MODES[self.name][column]} & {*command}:
            return NOT_ASKED
        return self.outcome or FAILED


@dataclass(frozen=True)
class Row:
    """A line of the table; a cell that lacks something is in `missing` too."""

    label: str
    cells: tuple[str, ...]
    missing: tuple[str, ...] = ()


def rows(parts: Mapping[str, Part]) -> list[Row]:
    """README's rows; a part that is not in `parts` has none."""
    makers = {"sameness": sameness_rows, "steps": step_rows, "serving": serving_rows}
    return [row for name, make in makers.items() if name in parts for row in make(parts[name])]


def sameness_rows(part: Part) -> list[Row]:
    record = part.record or {}
    model, tokens = _option(_command(record), "--model"), record.get("tokens")
    about = f" ({_model_name(model)}, {tokens:,} tokens)" if model and tokens else ""
    company = f"answers unchanged when batched and shuffled{about}"
    cached = "answers unchanged with the prompt in the prefix cache"
    return [
        _counted(part, company, "company", lambda name: name.startswith(("batched", "shuffled"))),
        _counted(part, cached, "cached", lambda name: name == "cached"),
    ]


def arrangements(part: Part, column: str) -> dict[str, dict[str, int]]:
    """By arrangement, what was counted of a column's answers."""
    case = _first((part.record or {}).get("cases", {}), MODES["sameness"][column])
    return {name: found for name, found in (case or {}).items() if _is_counted(found)}


def _is_counted(found: Any) -> bool:
    return isinstance(found, dict) and "of" in found


def _counted(part: Part, label: str, key: str, wanted: Callable[[str], bool]) -> Row:
    counts = {
        column: {name: each for name, each in arrangements(part, column).items() if wanted(name)}
        for column in COLUMNS
    }
    most = part.asked.get(key) or max(map(len, counts.values()))
    cells, missing = [], []
    for column, found in counts.items():
        if not found:
            cells.append(part.lacking(column))
        else:
            cells.append(_count_cell(list(found.values()), key == "cached"))
            if len(found) < most:
                cells[-1] += f" ({len(found)} of {most} arrangements)"
        if len(found) < max(most, 1) and column not in part.absent:
            missing.append(f"{label}, {column}: {cells[-1]}")
    return Row(label, tuple(cells), tuple(missing))


def _count_cell(found: list[dict[str, int]], from_cache: bool) -> str:
    same = _range([each["tokens"] for each in found], "d")
    nothing = from_cache and not any(each["cached"] for each in found)
    asked = _range([each["of"] for each in found], "d")
    return f"{same} of {asked}" + (", nothing was cached" if nothing else "")


def steps(part: Part) -> tuple[Figures, Figures]:
    """Milliseconds of decode steps and of prefills; of several groups of engines the median."""
    seen: dict[tuple[int, int], dict[str, list[float]]] = {}
    for found in (part.record or {}).get("results", []):
        point = seen.setdefault((found["batch"], found["context"]), {})
        for column, figure in _by_column("steps", found["step_ms"]).items():
            point.setdefault(column, []).append(figure)
    decode: Figures = {}
    prefill: Figures = {}
    for (batch, context), of in seen.items():
        where = decode if batch else prefill
        name = f"decode step, {batch} x {context:,}" if batch else f"prefill of {context:,} tokens"
        where[name] = {column: statistics.median(found) for column, found in of.items()}
    return decode, prefill


def step_rows(part: Part) -> list[Row]:
    decode, prefill = steps(part)
    record = part.record or {}
    shape = _option(_command(record), "--model")
    about = f" ({_model_name(shape)} shape)" if shape else ""
    lengths = sorted(r["context"] for r in record.get("results", []) if not r["batch"])
    span = f", {_range(lengths, ',')} tokens" if lengths else ""
    found = [_compared(part, f"time of a decode step{about}", "decode", decode)]
    if prefill or part.asked.get("prefill"):
        found.append(_compared(part, f"time of a prefill{span}", "prefill", prefill))
    return found


def loads(part: Part, figure: str) -> dict[str, Figures]:
    """A figure by rate, by load; of repeats the median."""
    seen: dict[tuple[str, str, str], list[float]] = {}
    for found in (part.record or {}).get("results", []):
        key = (str(found["rate"]), found["mix"], found["mode"])
        seen.setdefault(key, []).append(found[figure])
    by_rate: dict[str, dict[str, dict[str, float]]] = {}
    for (rate, mix, mode), values in seen.items():
        by_rate.setdefault(rate, {}).setdefault(mix, {})[mode] = statistics.median(values)
    return {
        rate: {f"{mix} {rate_words(rate)}": _by_column("serving", of) for mix, of in mixes.items()}
        for rate, mixes in by_rate.items()
    }


def serving_rows(part: Part) -> list[Row]:
    rates = [name.removeprefix("rate ") for name in part.asked if name.startswith("rate ")]
    rates = rates or list(loads(part, "output_throughput")) or ["inf"]
    return [
        _compared(
            part,
            f"{words}, {rate_words(rate)}",
            f"rate {rate}",
            loads(part, figure).get(rate, {}),
        )
        for figure, words in LOADED.items()
        for rate in rates
    ]


def rate_words(rate: str) -> str:
    """How a load arrives."""
    return "all at once" if rate == "inf" else f"{float(rate):g} requests a second"


def _compared(part: Part, label: str, key: str, figures: Figures) -> Row:
    """Ranges of ratios over stock; `key` is the row's in `part.asked`."""
    most = part.asked.get(key) or len(figures)
    cells, missing = [], []
    for column in COLUMNS:
        ratios = over_stock(figures, column)
        cells.append(_ratio_cell(ratios, column) if ratios else part.lacking(column))
        if 0 < len(ratios) < most:
            cells[-1] += f" ({len(ratios)} of {most} points)"
        if len(ratios) < max(most, 1) and column not in part.absent:
            missing.append(f"{label}, {column}: {cells[-1]}")
    return Row(label, tuple(cells), tuple(missing))


def over_stock(figures: Figures, column: str) -> dict[str, float]:
    """By point, a column's figure over stock's, where both were measured."""
    return {
        point: found[column] / found[STOCK]
        for point, found in figures.items()
        if column in found and found.get(STOCK)
    }


def _ratio_cell(ratios: dict[str, float], column: str) -> str:
    return "1" if column == STOCK else _range(list(ratios.values()), ".2f")


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _by_column(part: str, figures: Mapping[str, float]) -> dict[str, float]:
    found = {column: _first(figures, names) for column, names in MODES[part].items()}
    return {column: figure for column, figure in found.items() if figure is not None}


def _first(found: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((found[name] for name in names if name in found), None)


def _command(record: Mapping[str, Any]) -> list[str]:
    command = record.get("command") or record.get("environment", {}).get("command", [])
    return [str(word) for word in command]


def _option(command: Sequence[str], name: str) -> str | None:
    return next((b for a, b in pairwise(command) if a == name), None)


def _model_name(folder: str) -> str:
    """The last part of a path; the embedded SmolLM2's without its hash."""
    return re.sub(r"^smollm2-.*", "SmolLM2", folder.rstrip("/").rpartition("/")[2])


def machines(parts: Mapping[str, Part]) -> list[tuple[str, str]]:
    """Device and SGLang version of the records; more than one: they are not of one run."""
    found = []
    for record in (part.record for part in parts.values() if part.record):
        about = record.get("environment") or {"device": record["device"], **record["versions"]}
        found.append((about["device"], about["sglang"]))
    return list(dict.fromkeys(found))


def details(parts: Mapping[str, Part]) -> list[Row]:
    """Each point: stock's figure, and what the others have over it."""
    found = []
    if "sameness" in parts:
        found += _answer_details(parts["sameness"])
    if "steps" in parts:
        decode, prefill = steps(parts["steps"])
        found += _figure_details(parts["steps"], {**prefill, **decode}, "", " ms")
    if "serving" in parts:
        for figure, words in {**LOADED, **ALSO}.items():
            unit = " ms" if figure.endswith("_ms") else ""
            for figures in loads(parts["serving"], figure).values():
                found += _figure_details(parts["serving"], figures, f"{words}, ", unit)
    return found


def _answer_details(part: Part) -> list[Row]:
    by_column = {column: arrangements(part, column) for column in COLUMNS}
    names = dict.fromkeys(name for found in by_column.values() for name in found)
    return [
        Row(
            f"same answers, {name} (of these the same log-probs)",
            tuple(
                f"{found[name]['tokens']} of {found[name]['of']} ({found[name]['logprobs']})"
                if name in found
                else part.lacking(column)
                for column, found in by_column.items()
            ),
        )
        for name in names
    ]


def _figure_details(part: Part, figures: Figures, before: str, unit: str) -> list[Row]:
    found = []
    for point, of in figures.items():
        cells = [f"{of[STOCK]:,.2f}{unit}" if STOCK in of else part.lacking(STOCK)]
        for column in COLUMNS[1:]:
            ratio = over_stock({point: of}, column).get(point)
            cells.append(part.lacking(column) if ratio is None else f"{ratio:.3f}")
        found.append(Row(before + point, tuple(cells)))
    return found


def markdown(head: str, lines: Sequence[Row]) -> str:
    """A table whose first column is called `head`."""
    printed = [f"| {head} | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    printed += [f"| {row.label} | {' | '.join(row.cells)} |" for row in lines]
    return "\n".join(printed)
