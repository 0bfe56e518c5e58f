"""`margingate study`: how often batching flips tokens here, and which signal foretells it.

Measures into one JSON file, which `--from` turns into tables and a report on any machine.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from margingate.cli import calibrate
from margingate.cli.errors import CliError
from margingate.cli.inputs import refuse_out

if TYPE_CHECKING:
    from margingate.cli.calibrate_measure import Journal
    from margingate.client import Prompt

KIND = "margingate study"
PARTS = (
    *("name", "model", "machine", "server_args", "tokens", "batch_sizes", "sets", "walks"),
    *("columns", "sequences", "probe"),
)
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
    calibrate.add_walk_options(parser)
    _add_options(parser)
    usual = {name: parser.get_default(name) for name in MEASURING}
    parser.set_defaults(func=run, usual=usual)


def _add_options(parser: argparse.ArgumentParser) -> None:
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
    calibration = _read_calibration(args.calibration)
    record = _measured(args) if args.record is None else _read(args.record)
    from margingate.cli.study_more_tables import more_tables
    from margingate.cli.study_tables import calibrated_table, make_tables, to_markdown

    try:
        tables = make_tables(record) + more_tables(record)
    except (KeyError, IndexError, TypeError, ValueError) as err:
        if args.record is None:
            raise
        raise CliError(
            f"--from {args.record} is damaged ({type(err).__name__}: {err}): measure again, with "
            "--out."
        ) from err
    if calibration is not None:
        _check_made_for(record, calibration, args.calibration)
        tables.insert(0, calibrated_table(record, calibration))
    print("\n\n".join(map(to_markdown, tables)))
    if args.record is None:
        print(f"\nMeasured: {args.out}")
    if args.report is not None:
        from margingate.cli.study_report import write_report

        print(f"Report: {write_report(record, tables, args.report)}")
    return 0


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    """The record, once it is on the disk; then the journal is not needed any more."""
    began = time.monotonic()
    record = _measure(args)
    text = json.dumps(record) + "\n"
    calibrate.write(args.out, lzma.compress(text.encode()) if _packed(args.out) else text)
    args.out.with_suffix(".partial.jsonl").unlink()
    args.out.with_suffix(".log").unlink(missing_ok=True)
    print(f"margingate: measured in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return record


def _packed(path: Path) -> bool:
    return path.suffix == ".xz"


def _load(option: str, path: Path) -> Any:
    """A JSON file's content, unpacked where the name ends in .xz; None where it is none.

    Raises CliError, which names the option, where the file cannot be read.
    """
    try:
        data = path.read_bytes()
        return json.loads(lzma.decompress(data) if _packed(path) else data)
    except OSError as err:
        raise CliError(f"{option} {path} cannot be read ({err.strerror}): check the path.") from err
    except (ValueError, lzma.LZMAError, EOFError):
        return None


def _read_calibration(path: Path | None) -> dict[str, Any] | None:
    """A calibration file; None for no file."""
    if path is None:
        return None
    record = _load("--calibration", path)
    numbers = ("threshold", "trigger_rate", "steps", "target_miss_rate")
    if (
        not isinstance(record, dict)
        or record.get("schema") != 1
        or not all(isinstance(record.get(name), int | float) for name in numbers)
        or not all(isinstance(record.get(part), dict) for part in ("model", "machine"))
    ):
        raise CliError(
            f"--calibration {path} is not a calibration file of this version: make one with "
            "margingate calibrate."
        )
    return record


def _check_made_for(record: dict[str, Any], calibration: dict[str, Any], path: Path) -> None:
    """Raises CliError where the calibration is not for the study's model and machine."""
    for part in ("model", "machine"):
        for key, value in record[part].items():
            found = calibration.get(part, {}).get(key)
            if found != value:
                raise CliError(
                    f"--calibration {path} was made for {key} {found!r}, but the study is of "
                    f"{value!r}: calibrate that one, or drop the option."
                )


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
        _make_folder(args.report)


def _refuse_measuring(args: argparse.Namespace) -> None:
    """Raises CliError for options that a study from a file would leave unused."""
    for name, usual in args.usual.items():
        if (value := getattr(args, name)) != usual and value != []:
            option = f"{value[0]!r}" if name == "server_args" else f"--{name.replace('_', '-')}"
            raise CliError(
                f"{option} is for measuring, and --from {args.record} measures nothing: drop one "
                "of them."
            )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CliError(
            f"--report {folder} cannot be made ({err.strerror}): name another folder."
        ) from err


def _read(path: Path) -> dict[str, Any]:
    record = _load("--from", path)
    if not isinstance(record, dict) or record.get("kind") != KIND or record.get("schema") != 1:
        raise CliError(f"--from {path} is not a study of this version: make one with --out.")
    if lacking := [part for part in PARTS if part not in record]:
        raise CliError(
            f"--from {path} is not whole, it lacks {', '.join(lacking)}: measure again, with --out."
        )
    return record


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for and the journal lacks; the record."""
    from margingate.cli import study_measure as parts

    sets = calibrate.read_sets(args)
    model = calibrate.model_folder(args)
    prompts = calibrate.tokenized(sets, model)
    some = _interleaved(sets, prompts)[: args.sequences]
    with calibrate.observing_server(args, model) as client:
        journal, machine = calibrate.walk(args, client, model, prompts)
        parts.columns(client, prompts, journal, args.columns)
        if some:
            parts.sequences(client, "stock", (), some, size=max(args.batch_sizes), journal=journal)
    record = {
        "schema": 1,
        "kind": KIND,
        "name": model.name,
        "model": calibrate.identity(model),
        "machine": machine,
        "server_args": list(args.server_args),
        "tokens": args.tokens,
        "batch_sizes": sorted(set(args.batch_sizes)),
        "sets": {name: [prompt for prompt, _ in pairs] for name, pairs in sets.items()},
        "walks": _walks(journal, args.batch_sizes),
        "columns": journal.notes.get(f"columns {args.columns}"),
    }
    record["sequences"] = _sequences(args, model, record, some, journal) if some else []
    if not args.no_probe:
        _probe(args, model, journal)
    return record | {"probe": None if args.no_probe else journal.notes["probe"]}


def _walks(journal: Journal, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Alone and at these batch sizes, in an order that no interruption changes.

    A prompt's walks stand together: they are much the same, so they pack well.
    """
    wanted = (one for (size, _), one in journal.walks.items() if size in (1, *sizes))
    return [asdict(one) for one in sorted(wanted, key=lambda one: (one.name, one.batch_size))]


def _interleaved(sets: dict[str, Any], prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, one of each file in turn, as far as each goes."""
    known = {prompt.name: prompt for prompt in prompts}
    longest = max(map(len, sets.values()))
    return [known[pairs[i][0]] for i in range(longest) for pairs in sets.values() if i < len(pairs)]


def _sequences(
    args: argparse.Namespace,
    model: Path,
    record: dict[str, Any],
    prompts: Sequence[Prompt],
    journal: Journal,
) -> list[dict[str, Any]]:
    """The same prompts on a gated server per case; results of the stock one first."""
    from margingate.cli import study_measure as parts
    from margingate.cli.study_tables import first_threshold

    size = max(args.batch_sizes)
    cases = parts.cases(args.thresholds or [first_threshold(record)])
    for case, options in cases.items():
        if parts.sequence_key(case, prompts, size) not in journal.notes:
            with calibrate.gated_server(args, model, *options) as client:
                parts.sequences(client, case, options, prompts, size=size, journal=journal)
    keys = [parts.sequence_key(case, prompts, size) for case in ("stock", *cases)]
    return [journal.notes[key] for key in keys]


def _probe(args: argparse.Namespace, model: Path, journal: Journal) -> None:
    """What a gated server finds of the operators; a server that does not start ends no study."""
    if "probe" in journal.notes:
        return
    try:
        with calibrate.gated_server(args, model, "--deterministic-gate") as client:
            found = client.gate_state()["probe"]
    except CliError as err:
        print(f"margingate: the probe is left out: {err}", file=sys.stderr)
        found = {"error": str(err)}
    journal.note("probe", found)
