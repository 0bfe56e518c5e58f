"""`margingate demo`: one model, the stock server and the gated one, the same prompts, compared.

Each server answers the prompts one by one, then all at once in three ways. What changes against
its own one-by-one answers is what the gate is for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import margingate
from margingate.cli.demo_measure import (
    COUNTERS,
    RUNS,
    SEED,
    SIDES,
    TOGETHER,
    Run,
    Side,
    log_path,
    measure,
)
from margingate.cli.errors import CHANGED, CliError
from margingate.cli.inputs import read_pairs, refuse_twins
from margingate.config import FAST_PATHS
from margingate.servers import slow_bfloat16

if TYPE_CHECKING:
    from rich.table import Table

    from margingate.client import Answer

PROMPTS = Path(margingate.__file__).parent / "data" / "demo_prompts.jsonl"
MODEL = "smollm2"
TOKENS = 32
FAST_PATH = "stock"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `margingate demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="compare the stock server with the gated one on this machine (minutes)",
        description="Serve a small model without and with the gate, send the same prompts alone "
        "and in batches, and write a report.",
        epilog="Exit status: 0 every gated answer was the same; 1 one changed; 2 it could not be "
        "tested; 130 Ctrl-C.",
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"per answer; default {TOKENS}"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=PROMPTS,
        metavar="FILE",
        help='JSONL with a "prompt" a line; default: 24 that come with margingate, or 8 of them '
        "where a CPU without AVX-512 makes it slow",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-report"),
        metavar="DIR",
        help="the report's folder; default ./demo-report",
    )
    parser.add_argument(
        "--fast-path",
        choices=FAST_PATHS,
        default=FAST_PATH,
        help="of the gated server (its --gate-fast-path): stock shows flips and their repair, "
        f"invariant a server that has none; default {FAST_PATH}",
    )
    parser.add_argument("--keep-log", action="store_true", help="keep the servers' logs there")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, write the report, print the table; 1 if an answer of the gated server changed."""
    from margingate.cli.model import ensure_model

    start = time.perf_counter()
    pairs = _read(args.prompts, args.tokens)
    if args.prompts == PROMPTS and slow_bfloat16():
        pairs = pairs[::3]  # of each data set as many
    _make_folder(args.out)
    model = ensure_model(MODEL)
    extra = {"stock": (), "gated": ("--gate-fast-path", args.fast_path)}
    sides = measure(model, pairs, args.tokens, args.out, extra)
    options = {"model": model.name, "fast_path": args.fast_path, "tokens": args.tokens}
    report = make_report(sides, {**options, "seed": SEED, "demo_s": time.perf_counter() - start})
    _write(report, sides["gated"], args.out)
    _show(report, args.out)
    if not args.keep_log:
        for side in SIDES:
            log_path(args.out, side).unlink(missing_ok=True)
    same = report["sides"]["gated"]["identical"]
    return CHANGED if any(same[run] < len(pairs) for run in TOGETHER) else 0


def _read(path: Path, tokens: int) -> list[tuple[str, str]]:
    """The prompts, by distinct names; raises CliError for what the user gave wrongly."""
    if tokens < 1:
        raise CliError(f"--tokens is {tokens}: give 1 or more.")
    pairs = read_pairs(path)
    refuse_twins({path: pairs})
    return pairs


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as err:
        raise CliError(
            f"--out {out} cannot be written ({err.strerror}): name another folder."
        ) from err


# -- the report


def make_report(sides: dict[str, Side], options: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, ready for JSON."""
    report: dict[str, Any] = {
        "schema": 1,
        "versions": {"margingate": margingate.__version__}
        | {name: metadata.version(name) for name in ("sglang", "torch")},
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "python": platform.python_version(),
        },
        **options,
        "prompts": len(sides["stock"].runs["alone"].answers),
        "sides": {name: _side_record(side) for name, side in sides.items()},
        "overhead": {
            name: sides["gated"].runs[name].wall_s / sides["stock"].runs[name].wall_s
            for name in RUNS
        },
    }
    return {**report, "meaning": meaning(report)}


def _side_record(side: Side) -> dict[str, Any]:
    from margingate.client import identical

    alone = side.runs["alone"].answers
    gate = {name: sum(run.gate.get(name, 0) for run in side.runs.values()) for name in COUNTERS}
    record: dict[str, Any] = {
        "identical": {name: identical(alone, side.runs[name].answers) for name in TOGETHER},
        "changed": {name: _changed(alone, side.runs[name].answers) for name in TOGETHER},
        "runs": {name: _run_record(run) for name, run in side.runs.items()},
    }
    if side.margins is not None:
        rate = gate["flagged"] / gate["steps"] if gate["steps"] else 0.0
        record["gate"] = {**gate, "trigger_rate": rate, "threshold": side.threshold}
        record["margins"] = asdict(side.margins)
    return record


def _run_record(run: Run) -> dict[str, Any]:
    return {
        "wall_s": run.wall_s,
        "tokens": run.tokens,
        "tokens_per_s": run.tokens / run.wall_s,
        **({"gate": run.gate} if run.gate else {}),
    }


def _changed(alone: Sequence[Answer], answers: Sequence[Answer]) -> dict[str, int]:
    """The first token index that differs from the answer given alone, by prompt."""
    found = {}
    expected = {answer.name: answer.tokens for answer in alone}
    for answer in answers:
        pairs = zip_longest(answer.tokens, expected[answer.name])
        at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if at is not None:
            found[answer.name] = at
    return found


def _processor() -> str:
    """The GPU's name, else the CPU's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def meaning(report: dict[str, Any]) -> str:
    """The result in plain sentences."""
    count = report["prompts"]
    stock, gated = (len(set().union(*report["sides"][side]["changed"].values())) for side in SIDES)
    cost = report["overhead"]
    first = (
        f"Without the gate, {stock} of {count} answers changed when the requests shared a batch"
        if stock
        else f"Without the gate, none of {count} answers happened to change in a batch"
    )
    second = (
        f"with it, {gated} still changed: that is a bug, or a threshold too low for this model."
        if gated
        else "with it, every answer was the same token for token, alone, batched, shuffled and "
        "cached."
    )
    return (
        f"{first}; {second} Batched, the gate took {cost['batched']:.2f} times the stock time; "
        f"alone, {cost['alone']:.2f} times."
    )


# -- showing it


def _write(report: dict[str, Any], gated: Side, out: Path) -> None:
    """report.json and margins.png in `out`."""
    from margingate.plots import plot_margins

    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    title = f"Margins on the gated server: {report['model']}, {report['prompts']} prompts"
    assert gated.margins is not None and gated.threshold is not None
    plot_margins(gated.margins, gated.threshold, out / "margins.png", title)


def _show(report: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout)
    console.print(make_table(report))
    console.print(report["meaning"], highlight=False)
    console.print(f"Report: {out / 'report.json'}, {out / 'margins.png'}", highlight=False)


def make_table(report: dict[str, Any]) -> Table:
    """The table that the demo ends with."""
    from rich.table import Table

    count, options = report["prompts"], f"{report['tokens']} tokens each, greedy"
    table = Table(title=f"{report['model']}: {count} prompts, {options}", title_justify="left")
    table.add_column("")
    for side in SIDES:
        table.add_column(side, justify="right")
    stock, gated = (report["sides"][side] for side in SIDES)
    for name, words in TOGETHER.items():
        cells = (f"{side['identical'][name]} of {count}" for side in (stock, gated))
        table.add_row(f"same as alone: {words}", *cells)
    table.add_section()
    for label, value in _gate_rows(gated["gate"]):
        table.add_row(label, "-", value)
    table.add_section()
    for name, words in (("alone", "one by one"), ("batched", "all at once")):
        cells = (f"{side['runs'][name]['tokens_per_s']:.1f}" for side in (stock, gated))
        table.add_row(f"tokens/s, {words}", *cells)
    for name, words in (("alone", "one by one"), ("batched", "all at once")):
        table.add_row(f"time against stock, {words}", "1", f"{report['overhead'][name]:.2f}")
    return table


def _gate_rows(gate: dict[str, Any]) -> list[tuple[str, str]]:
    share = f"{gate['trigger_rate']:.1%} ({gate['flagged']} of {gate['steps']})"
    return [
        ("rows canonical as decoded, no check", f"{gate['canonical']} of {gate['steps']}"),
        ("flips found and repaired", str(gate["flips"])),
        ("rows flagged (trigger rate)", share),
        ("rows replayed", str(gate["replayed"])),
    ]
