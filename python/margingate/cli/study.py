"""`margingate study`: how often batching flips tokens here, and which signal foretells it.

Measures into one JSON file, which `--from` turns into tables and a report on any machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from margingate.cli.walk_options import add_walk_options, walk_options
from margingate.errors import CliError
from margingate.harness.inputs import make_folder, refuse_out

MEASURING = (  # options that --from has no use for
    *("model_path", "prompts", "per_file", "tokens", "batch_sizes", "out", "columns"),
    *("sequences", "thresholds", "no_probe", "server_args"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `margingate study`."""
    parser = subparsers.add_parser(
        "study",
        help="measure flips, margins and signals for a model on this machine, and report them",
        description="Walk prompts alone and in batches on SGLang's own kernels, forced along the "
        "answers alone, and show how often batching flips a token, at which margins, and what a "
        "threshold would cost and miss. Can be ended and started again.",
    )
    add_walk_options(parser)
    _add_files(parser)
    _add_measurements(parser)
    usual = {name: parser.get_default(name) for name in MEASURING}
    parser.set_defaults(func=run, usual=usual)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("study.json"),
        metavar="FILE",
        help="what was measured; default study.json; packed where the name ends in .xz",
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write an HTML page and plots there"
    )
    parser.add_argument(
        "--from",
        dest="record",
        type=Path,
        metavar="FILE",
        help="measure nothing; read this, with --report and --calibration if you like",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="count what the threshold that margingate calibrate wrote here misses; may be .xz",
    )


def _add_measurements(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--columns",
        type=int,
        default=8,
        metavar="N",
        help="answers whose K/V columns are compared; default 8",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        default=0,
        metavar="N",
        help="prompts answered by gated servers too, a server per case; default 0",
    )
    parser.add_argument(
        "--thresholds",
        nargs="+",
        type=float,
        metavar="T",
        help="of those servers; default: what catches every flip of the first file",
    )
    parser.add_argument(
        "--no-probe", action="store_true", help="do not start a server to probe the operators"
    )


def run(args: argparse.Namespace) -> int:
    """Measure or read; print the tables; write the report."""
    _check(args)
    from margingate.study import record as records
    from margingate.study.column_tables import more_tables
    from margingate.study.router_tables import router_tables
    from margingate.study.tables import calibrated_table, make_tables, to_markdown

    calibration = records.read_calibration(args.calibration) if args.calibration else None
    record = _measured(args) if args.record is None else records.read(args.record)
    try:
        tables = make_tables(record) + router_tables(record) + more_tables(record)
    except (KeyError, IndexError, TypeError, ValueError) as err:
        if args.record is None:
            raise
        raise CliError(
            f"--from {args.record} is damaged ({type(err).__name__}: {err}): measure again, with "
            "--out."
        ) from err
    if calibration is not None:
        records.check_made_for(record, calibration, args.calibration)
        tables.insert(0, calibrated_table(record, calibration))
    print("\n\n".join(map(to_markdown, tables)))
    if args.record is None:
        print(f"\nMeasured: {args.out}")
    if args.report is not None:
        from margingate.study.report import write_report

        print(f"Report: {write_report(record, tables, args.report)}")
    return 0


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    """The record, once it is on the disk."""
    from margingate.study import record as records

    options = records.StudyOptions(
        walk=walk_options(args),
        columns=args.columns,
        sequences=args.sequences,
        thresholds=args.thresholds,
        probe=not args.no_probe,
    )
    began = time.monotonic()
    record = records.measure(options)
    records.write(record, args.out)
    print(f"margingate: measured in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return record


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything starts."""
    if args.record is not None:
        _refuse_measuring(args)
    else:
        refuse_out(args.out)
    for name in ("columns", "sequences"):
        if getattr(args, name) < 0:
            raise CliError(f"--{name} is {getattr(args, name)}: give 0 or more.")
    if bad := [t for t in args.thresholds or () if not 0 <= t < float("inf")]:
        raise CliError(f"--thresholds has {bad[0]}: give logits, 0 or more.")
    if args.report is not None:
        make_folder("--report", args.report)


def _refuse_measuring(args: argparse.Namespace) -> None:
    """Raises CliError for options that a study from a file would leave unused."""
    for name, usual in args.usual.items():
        if (value := getattr(args, name)) != usual and value != []:
            option = f"{value[0]!r}" if name == "server_args" else f"--{name.replace('_', '-')}"
            raise CliError(
                f"{option} is for measuring, and --from {args.record} measures nothing: drop one "
                "of them."
            )
