"""`margingate calibrate`: the threshold below which this model, on this machine, needs checking."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from margingate.cli.walk_options import add_walk_options, walk_options
from margingate.errors import CliError
from margingate.harness.inputs import refuse_out


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `margingate calibrate`."""
    parser = subparsers.add_parser(
        "calibrate",
        help="find --gate-threshold for a model on this machine",
        description="Answer prompts alone, walk the same answers again in batches on SGLang's own "
        "kernels, and choose the smallest threshold that misses few enough of the tokens that "
        "would have flipped. For --gate-fast-path stock. Can be ended and started again.",
    )
    add_walk_options(parser)
    parser.add_argument(
        "--target-miss-rate",
        type=float,
        default=1e-5,
        metavar="P",
        help="missed flips per step, at most; default 1e-5",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="C",
        help="of that bound, 0 to 1; default 0.95",
    )
    parser.add_argument(
        "--headroom",
        type=float,
        default=0.0,
        metavar="H",
        help="logits on top of the threshold that was found; default 0",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("calibration.json"),
        metavar="FILE",
        help="for --gate-calibration; default calibration.json; unfinished work and the server's "
        "log are beside it",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure what the journal lacks, choose, write the calibration file."""
    from margingate.study import calibration_file, session

    for name in ("target_miss_rate", "confidence"):
        check_share(name, getattr(args, name))
    if not 0 <= args.headroom < float("inf"):
        raise CliError(f"--headroom is {args.headroom}: give logits, 0 or more.")
    refuse_out(args.out)
    options = walk_options(args)
    sets = session.read_sets(options)
    model = session.model_folder(options)
    prompts = session.tokenized(sets, model)
    with session.observing_server(options, model) as client:
        journal, machine = session.walk(options, client, model, prompts)
    target = calibration_file.Target(args.target_miss_rate, args.confidence, args.headroom)
    record = calibration_file.make_record(
        target, options.batch_sizes, journal, machine, session.identity(model)
    )
    session.write(args.out, json.dumps(record, indent=1) + "\n")
    journal.path.unlink()
    args.out.with_suffix(".log").unlink(missing_ok=True)
    print(meaning(record, args.out))
    return 0


def check_share(name: str, value: float) -> None:
    """Raises CliError unless 0 < value < 1."""
    if not 0 < value < 1:
        option = name.replace("_", "-")
        raise CliError(f"--{option} is {value}: give a number between 0 and 1.")


def meaning(record: dict[str, Any], out: Path) -> str:
    """The result in plain sentences."""
    sizes = ", ".join(map(str, record["batch_sizes"]))
    seen = f"{record['flips']} of {record['steps']} decode steps flip in batches of {sizes}."
    trials = (
        f"{record['moved_steps']} of the steps have other numbers than alone, so that they could; "
        f"{record['distinct_steps']} of these are distinct, {record['distinct_flips']} of the "
        "flips: the same numbers in several batches are one trial."
    )
    flags = f"{record['threshold']:g} flags {record['trigger_rate']:.1%} of the steps"
    misses = f"misses {record['missed']} of the distinct flips"
    bound = f"{record['miss_rate_bound']:.1e} per step"
    return (
        f"{seen} {trials} A threshold of {flags} and {misses}: at most {bound}, with "
        f"{record['confidence']:.0%} confidence.\n"
        f"Use it: --gate-fast-path stock --gate-threshold auto --gate-calibration {out}"
    )
