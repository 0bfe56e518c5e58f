"""`margingate calibrate`: the threshold below which this model, on this machine, needs checking."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import margingate
from margingate.cli.errors import CliError

if TYPE_CHECKING:
    from margingate.cli.calibrate_measure import Journal
    from margingate.client import Client, Prompt

MODEL = "smollm2"
PROMPTS = Path(margingate.__file__).parent / "data" / "demo_prompts.jsonl"
SERVER = ("--deterministic-gate", "--gate-policy", "observe", "--gate-study")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `margingate calibrate`."""
    parser = subparsers.add_parser(
        "calibrate",
        help="find --gate-threshold for a model on this machine",
        description="Answer prompts alone, walk the same answers again in batches on SGLang's own "
        "kernels, and choose the smallest threshold that misses few enough of the tokens that "
        "would have flipped. Can be ended and started again.",
    )
    parser.add_argument("--model-path", metavar="M", help=f"default: the embedded {MODEL}")
    parser.add_argument(
        "--prompts", nargs="+", type=Path, default=[PROMPTS], metavar="FILE", help="JSONL"
    )
    parser.add_argument("--per-file", type=int, metavar="N", help="prompts of each; default all")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="per answer; 128")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[2, 8, 16], metavar="B", help="2 8 16"
    )
    parser.add_argument(
        "--target-miss-rate",
        type=float,
        default=1e-5,
        metavar="P",
        help="missed flips per step, at most; default 1e-5",
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="of that; default 0.95"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("calibration.json"), metavar="FILE", help="what is written"
    )
    parser.add_argument(
        "server_args", nargs="*", metavar="-- ARGS", help="for the server, after --"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure what the journal lacks, choose, write the calibration file."""
    from margingate.cli.model import ensure_model
    from margingate.servers import ServerError, launch

    prompts_of = _check(args)
    model = Path(args.model_path or ensure_model(MODEL))
    prompts = _prompts(prompts_of, model)
    server = launch(model, args.out.with_suffix(".log"), *SERVER, *args.server_args)
    print(f"margingate: starting a server of {model}", file=sys.stderr, flush=True)
    try:
        with server:
            journal, machine = _walk(args, server.base_url, model, prompts)
    except ServerError as err:
        raise CliError(str(err)) from err
    record = make_record(args, journal, machine, _identity(model))
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    journal.path.unlink()
    args.out.with_suffix(".log").unlink(missing_ok=True)
    print(meaning(record, args.out))
    return 0


def _check(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Refuse what cannot work before anything starts; the prompts, by distinct names."""
    from margingate.client import read_prompts

    for name, low in (("tokens", 1), ("per_file", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise CliError(f"--{name.replace('_', '-')} is {value}: give {low} or more.")
    if bad := [size for size in args.batch_sizes if size < 2]:
        raise CliError(f"--batch-sizes has {bad[0]}: a batch has 2 requests or more.")
    for name in ("target_miss_rate", "confidence"):
        if not 0 < getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise CliError(f"--{option} is {getattr(args, name)}: give a number between 0 and 1.")
    try:
        pairs = [pair for path in args.prompts for pair in read_prompts(path, args.per_file)]
    except OSError as err:
        raise CliError(f"--prompts {err.filename} cannot be read ({err.strerror}).") from err
    except ValueError as err:
        raise CliError(f"--prompts: {err}") from err
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CliError(f"--prompts has two prompts with the id {twice!r}: rename one.")
    return pairs


def _prompts(pairs: Sequence[tuple[str, str]], model: Path) -> list[Prompt]:
    from margingate.client import chat_prompts

    return chat_prompts(pairs, model)


def _walk(
    args: argparse.Namespace, url: str, model: Path, prompts: Sequence[Prompt]
) -> tuple[Journal, dict[str, str]]:
    """Measure against the server at `url`; the journal, and what it was measured on."""
    from margingate.cli.bar import progress
    from margingate.cli.calibrate_measure import Journal, measure
    from margingate.client import Client

    client: Client = Client(url, args.tokens)
    machine = client.gate_state()["machine"]
    identity = {
        "model": _identity(model),
        "machine": machine,
        "tokens": args.tokens,
        "prompts": _digest(prompts),
    }
    journal = Journal(args.out.with_suffix(".partial.jsonl"), identity)
    sizes = sorted(set(args.batch_sizes))
    with progress(len(prompts) * (1 + len(sizes))) as bar:
        measure(client, prompts, sizes, journal, bar)
    return journal, machine


def _identity(model: Path) -> dict[str, str]:
    """The same as `--gate-threshold auto` computes when it compares."""
    try:
        config = (model / "config.json").read_bytes()
    except OSError as err:
        raise CliError(f"{model}/config.json cannot be read: give --model-path a folder.") from err
    return {"config_sha256": hashlib.sha256(config).hexdigest()}


def _digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps([p.input_ids for p in prompts]).encode()).hexdigest()


def make_record(
    args: argparse.Namespace, journal: Journal, machine: dict[str, str], model: dict[str, str]
) -> dict[str, Any]:
    """The calibration file; raises CliError where the steps are too few."""
    from margingate.calibration import TooFewStepsError, choose_threshold
    from margingate.cli.calibrate_measure import ALONE, flips

    sizes = sorted(set(args.batch_sizes))
    walks = {k: walk for k, walk in journal.walks.items() if k[0] in (ALONE, *sizes)}
    margins = [m for (size, _), walk in walks.items() if size != ALONE for m in walk.margins]
    found = flips(walks)
    try:
        choice = choose_threshold(
            margins, [flip["margin"] for flip in found], args.target_miss_rate, args.confidence
        )
    except TooFewStepsError as err:
        raise CliError(
            f"{err.steps} steps cannot show a miss rate of {args.target_miss_rate:g}, which takes "
            f"{err.needed}: give more --prompts, --tokens or --batch-sizes, or a higher "
            "--target-miss-rate; what was measured is kept."
        ) from err
    return {
        "schema": 1,
        "model": model,
        "machine": machine,
        "threshold": choice.threshold,
        "trigger_rate": choice.trigger_rate,
        "steps": len(margins),
        "flips": len(found),
        "missed": choice.missed,
        "miss_rate_bound": choice.miss_bound,
        "target_miss_rate": args.target_miss_rate,
        "confidence": args.confidence,
        "batch_sizes": sizes,
        "prompts": len({name for _, name in walks}),
        "flipped_steps": found,
    }


def meaning(record: dict[str, Any], out: Path) -> str:
    """The result in plain sentences."""
    sizes = ", ".join(map(str, record["batch_sizes"]))
    return (
        f"{record['flips']} of {record['steps']} steps flip in batches of {sizes}. A threshold of "
        f"{record['threshold']:g} flags {record['trigger_rate']:.1%} of the steps and misses "
        f"{record['missed']} of the flips seen: at most {record['miss_rate_bound']:.1e} per step, "
        f"with {record['confidence']:.0%} confidence.\n"
        f"Use it: --gate-threshold auto --gate-calibration {out}"
    )
