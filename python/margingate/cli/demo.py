"""`margingate demo`: one model, the stock server and the gated one, the same prompts, compared.

Each server answers the prompts one by one, then all at once in three ways. What changes against
its own one-by-one answers is what the gate is for.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from margingate.cli.exit_status import CHANGED
from margingate.config import FAST_PATHS
from margingate.errors import CliError
from margingate.harness.defaults import MODEL, PROMPTS, SEED
from margingate.harness.inputs import make_writable_folder, read_pairs, refuse_one, refuse_twins
from margingate.harness.servers import slow_bfloat16
from margingate.study.comparison import SIDES, TOGETHER, Side, log_path, measure
from margingate.study.comparison_report import make_report

if TYPE_CHECKING:
    from rich.table import Table

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
    from margingate.harness.embedded_model import ensure_model

    start = time.perf_counter()
    pairs = _read(args.prompts, args.tokens)
    if args.prompts == PROMPTS and slow_bfloat16():
        pairs = pairs[::3]  # of each data set as many
    make_writable_folder("--out", args.out)
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
    refuse_one(path, pairs)
    return pairs


def _write(report: dict[str, Any], gated: Side, out: Path) -> None:
    """report.json and margins.png in `out`."""
    from margingate.study.plots import plot_margins

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
