"""`margingate probe`: which operators of a model depend on the batch, on this machine.

A gated server measures that when it starts. The command starts one, or asks one that runs, and
shows what it found: a table, probe.json and probe.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from margingate.errors import CliError
from margingate.harness.defaults import MODEL
from margingate.harness.inputs import make_writable_folder
from margingate.study.probe import ask, measure, rows
from margingate.study.row_counts import grid, short_name, spans

if TYPE_CHECKING:
    from rich.table import Table

EXTEND = "attention extend"  # row counts are lengths of chunks here
UNPACKED = "unpacked linear"  # kind of what prefills of the gate alone run
CAPPED = ("packed linear", "experts")  # kinds whose rows may depend on each other in larger calls
WHOLE = ("linear", "norm")  # kinds that are measured at all row counts of decode


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `margingate probe`."""
    parser = subparsers.add_parser(
        "probe",
        help="show which operators of a model depend on the batch, on this machine",
        description="Start a gated server, whose first act is to measure which row counts give "
        "a row the same bits, and show what it found.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model-path", metavar="M", help=f"default: the embedded {MODEL}")
    source.add_argument(
        "--base-url", metavar="URL", help="ask this gated server instead of starting one"
    )
    parser.add_argument("--api-key", default="none", metavar="KEY", help="if that server wants one")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("probe-report"),
        metavar="DIR",
        help="folder for probe.json and probe.png; default ./probe-report",
    )
    parser.add_argument(
        "server_args", nargs="*", metavar="-- ARGS", help="for the server, after --"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure or ask, print the table, write the report."""
    from rich.console import Console

    if args.base_url and args.server_args:
        raise CliError(
            f"{args.server_args[0]} is for a server that probe starts, and --base-url names one "
            "that runs: drop one of them."
        )
    with _folder(args.out):
        if args.base_url:
            report = ask(args.base_url, args.api_key)
        else:
            report = measure(args.model_path, args.server_args, args.out)
    console = Console(file=sys.stdout)
    try:  # whichever of the two fails, the other tells the result
        console.print(make_table(report))
        console.print(meaning(report), highlight=False)
    finally:
        _write(report, args.out)
    console.print(f"Report: {args.out / 'probe.json'}, {args.out / 'probe.png'}", highlight=False)
    return 0


def _write(report: dict[str, Any], out: Path) -> None:
    from margingate.study.plots import plot_classes

    title = f"Row counts that give a row the same bits: {Path(report['model']).name}"
    try:
        (out / "probe.json").write_text(json.dumps(report, indent=1) + "\n")
        plot_classes(grid(rows(report)), out / "probe.png", title)
    except OSError as err:
        raise CliError(
            f"--out {out} cannot be written ({err.strerror}): make room, or name another folder."
        ) from err


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Make the report's folder, and remove it if the body fails with nothing in it."""
    new = not out.exists()
    make_writable_folder("--out", out)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # a server's log is in it
                out.rmdir()
        raise


def make_table(report: dict[str, Any]) -> Table:
    """A row per operator; `|` separates row counts that give a row different bits."""
    from rich.table import Table

    table = Table(title=f"{Path(report['model']).name}", title_justify="left")
    table.add_column("operator", no_wrap=True)
    table.add_column("shape")
    table.add_column("modules", justify="right")
    table.add_column("row counts with the same bits")
    table.add_column("plan")
    for row in rows(report):
        shape = " x ".join(map(str, row["shape"]))
        modules = str(row["modules"])
        name, counts = short_name(row["name"]), spans(row["classes"])
        table.add_row(name, shape, modules, counts, _runs_with(row))
    return table


def _runs_with(row: dict[str, Any]) -> str:
    from margingate.core.rowclass import RowPlan

    if row["plan"] is not None:
        said = str(RowPlan(*row["plan"]))
        own = row.get("prefill_plan")
        return said if own is None else f"{said}, in prefills {RowPlan(*own)}"
    return "as it comes" if _differs(row) else "any"


def _depends(row: dict[str, Any], operators: list[dict[str, Any]]) -> bool:
    """Whether SGLang's operator gives a row other bits at other row counts."""
    if row["kind"] in CAPPED:
        most = min((_most(each) for each in operators if each["kind"] in WHOLE), default=0)
        if _most(row) < most:
            return True
    return row["kind"] != UNPACKED and _differs(row)


def _differs(row: dict[str, Any]) -> bool:
    """Whether the row counts that were measured have several classes."""
    return len({key for _, key in row["classes"]}) > 1


def _most(row: dict[str, Any]) -> int:
    return max(int(count) for count, _ in row["classes"])


def meaning(report: dict[str, Any]) -> str:
    """The result in plain sentences."""
    several = [row["name"] for row in report["operators"] if _depends(row, report["operators"])]
    guilty = [short_name(name) for name in several if name != EXTEND]
    said = ["No operator of a decode step depends on the number of rows here."]
    if guilty:
        said = [
            f"With another number of rows, {' and '.join(guilty)} gives a row other bits: this is "
            "why greedy answers depend on the batch here."
        ]
    if EXTEND in several:
        said.append("Prefill depends on where a prompt is cut; gated prompts are cut on a grid.")
    if report["steps"] is None:
        return " ".join([*said, "Whole decode steps were not measured on this server."])
    measured = report["steps"]["measured"]
    good = sum(same for _, same in measured)
    said.append(
        f"With the gate, decode steps are canonical at {good} of {len(measured)} measured row "
        f"counts{'' if good == len(measured) else '; rows of the others are verified by margin'}."
    )
    return " ".join(said)
