"""`margingate calibrate`: the threshold below which this model, on this machine, needs checking."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import margingate
from margingate.cli.errors import CliError
from margingate.cli.inputs import in_a_line, read_pairs, refuse_out, refuse_twins

if TYPE_CHECKING:
    from margingate.cli.calibrate_measure import Journal, Walk
    from margingate.client import Client, Prompt

MODEL = "smollm2"
PROMPTS = Path(margingate.__file__).parent / "data" / "demo_prompts.jsonl"
SERVER = (
    *("--deterministic-gate", "--gate-policy", "observe", "--gate-study"),
    "--disable-radix-cache",  # else a prompt would find another's columns
)


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


def add_walk_options(parser: argparse.ArgumentParser) -> None:
    """What a walk needs to know, for every command that makes one."""
    parser.add_argument("--model-path", metavar="M", help=f"default: the embedded {MODEL}")
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=Path,
        default=[PROMPTS],
        metavar="FILE",
        help='JSONL with a "prompt" a line; default: the demo\'s 24',
    )
    parser.add_argument("--per-file", type=int, metavar="N", help="prompts of each; default all")
    parser.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="per answer; default 128"
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[2, 8, 16], metavar="B", help="default 2 8 16"
    )
    parser.add_argument(
        "server_args", nargs="*", metavar="-- ARGS", help="for the server, after --"
    )


def run(args: argparse.Namespace) -> int:
    """Measure what the journal lacks, choose, write the calibration file."""
    for name in ("target_miss_rate", "confidence"):
        check_share(name, getattr(args, name))
    if not 0 <= args.headroom < float("inf"):
        raise CliError(f"--headroom is {args.headroom}: give logits, 0 or more.")
    refuse_out(args.out)
    sets = read_sets(args)
    model = model_folder(args)
    prompts = tokenized(sets, model)
    with observing_server(args, model) as client:
        journal, machine = walk(args, client, model, prompts)
    record = make_record(args, journal, machine, identity(model))
    write(args.out, json.dumps(record, indent=1) + "\n")
    journal.path.unlink()
    args.out.with_suffix(".log").unlink(missing_ok=True)
    print(meaning(record, args.out))
    return 0


def check_share(name: str, value: float) -> None:
    """Raises CliError unless 0 < value < 1."""
    if not 0 < value < 1:
        option = name.replace("_", "-")
        raise CliError(f"--{option} is {value}: give a number between 0 and 1.")


def read_sets(args: argparse.Namespace) -> dict[str, list[tuple[str, str]]]:
    """The (id, text) pairs of each prompt file, by its stem; ids are distinct.

    Refuses what cannot work before anything starts.
    """
    for name, low in (("tokens", 1), ("per_file", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise CliError(f"--{name.replace('_', '-')} is {value}: give {low} or more.")
    if bad := [size for size in args.batch_sizes if not 2 <= size <= 1024]:
        raise CliError(f"--batch-sizes has {bad[0]}: a batch has 2 to 1024 requests.")
    files: dict[Path, list[tuple[str, str]]] = {}
    for path in args.prompts:
        if path.stem in {other.stem for other in files}:
            raise CliError(f"--prompts has two files named {path.stem}: rename one.")
        files[path] = read_pairs(path, args.per_file)
    refuse_twins(files)
    return {path.stem: pairs for path, pairs in files.items()}


def model_folder(args: argparse.Namespace) -> Path:
    """--model-path, which must hold a model, or the embedded one."""
    from margingate.cli.model import ensure_model

    model = Path(args.model_path or ensure_model(MODEL))
    identity(model)
    return model


def tokenized(sets: Mapping[str, Sequence[tuple[str, str]]], model: Path) -> list[Prompt]:
    """All prompts, with the model's chat template applied."""
    from margingate.client import chat_prompts

    try:
        return chat_prompts([pair for pairs in sets.values() for pair in pairs], model)
    except (OSError, ValueError) as err:
        said = in_a_line(str(err) or type(err).__name__)
        raise CliError(
            f"the tokenizer in {model} cannot be used ({said}): give --model-path a folder that "
            "has the tokenizer's files, and a chat template."
        ) from err


@contextmanager
def observing_server(args: argparse.Namespace, model: Path) -> Iterator[Client]:
    """A server that decodes as a stock one does, honours --gate-study and keeps no radix tree."""
    with gated_server(args, model, *SERVER) as client:
        yield client


@contextmanager
def gated_server(args: argparse.Namespace, model: Path, *options: str) -> Iterator[Client]:
    """A server with these options and the user's; raises CliError where it does not start."""
    import requests

    from margingate.client import Client
    from margingate.servers import ServerError, launch

    print(f"margingate: starting a server of {model}", file=sys.stderr, flush=True)
    server = launch(model, args.out.with_suffix(".log"), *options, *args.server_args)
    try:
        with server:
            yield Client(server.base_url, args.tokens)
    except ServerError as err:
        raise CliError(str(err)) from err
    except requests.RequestException as err:  # an OSError too
        raise CliError(
            f"the server stopped answering ({type(err).__name__}): see {server.log}, and start "
            "again to go on."
        ) from err
    except OSError as err:
        raise CliError(
            f"the work beside {args.out} cannot go on ({err.strerror or err}): check that the "
            "folder exists and the disk has room, then start again to go on."
        ) from err


def walk(
    args: argparse.Namespace, client: Client, model: Path, prompts: Sequence[Prompt]
) -> tuple[Journal, dict[str, str]]:
    """Measure what the journal lacks; the journal, and what it was measured on."""
    from margingate.cli.bar import progress
    from margingate.cli.calibrate_measure import Journal, check_lengths, measure

    machine = client.gate_state()["machine"]
    about = {
        "model": identity(model),
        "machine": machine,
        "tokens": args.tokens,
        "prompts": digest(prompts),
        "server_args": args.server_args,
    }
    journal = Journal(args.out.with_suffix(".partial.jsonl"), about)
    check_lengths(client, prompts, args.tokens)
    sizes = sorted(set(args.batch_sizes))
    with progress(len(prompts) * (1 + len(sizes))) as bar:
        measure(client, prompts, sizes, journal, bar)
    return journal, machine


def identity(model: Path) -> dict[str, str]:
    """The same as `--gate-threshold auto` computes when it compares."""
    try:
        config = (model / "config.json").read_bytes()
    except OSError as err:
        if not model.exists():
            raise CliError(
                f"--model-path {model} is not there: give a local folder; a model of the hub has "
                "to be downloaded first (hf download NAME --local-dir FOLDER)."
            ) from err
        raise CliError(
            f"{model}/config.json cannot be read ({err.strerror}): give --model-path a model's "
            "folder."
        ) from err
    return {"config_sha256": hashlib.sha256(config).hexdigest()}


def digest(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts' token ids, in order."""
    return hashlib.sha256(json.dumps([p.input_ids for p in prompts]).encode()).hexdigest()


def write(path: Path, content: str | bytes) -> None:
    """Write a result; raises CliError where that fails, and leaves no half of a file."""
    draft = path.with_name(path.name + ".draft")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(path)
    except OSError as err:
        draft.unlink(missing_ok=True)
        raise CliError(
            f"{path} cannot be written ({err.strerror}): make room, or name another file; what was "
            "measured is kept."
        ) from err


def make_record(
    args: argparse.Namespace, journal: Journal, machine: dict[str, str], model: dict[str, str]
) -> dict[str, Any]:
    """The calibration file; raises CliError where the steps are too few."""
    from margingate.calibration import TooFewStepsError, Trials, choose_threshold, flagged_share
    from margingate.cli.calibrate_measure import ALONE, FIRST, flips, moved

    sizes = sorted(set(args.batch_sizes))
    walks: dict[tuple[int, str], Walk]
    walks = {k: one for k, one in journal.walks.items() if k[0] in (ALONE, *sizes)}
    alone = {name: one for (size, name), one in walks.items() if size == ALONE}
    batched = [one for (size, _), one in walks.items() if size != ALONE]
    margins = [margin for one in batched for margin in one.margins[FIRST - 1 :]]
    moving = moved(alone.values(), batched)
    once = dict.fromkeys(moving)
    trials = Trials(len(margins), len(moving), len(once))
    flipped = [one for one in once if one.token != alone[one.prompt].tokens[one.row - 1]]
    dtype = machine.get("lm_head", machine.get("dtype", ""))
    try:
        choice = choose_threshold(
            trials,
            [one.gap(dtype) for one in flipped],
            args.target_miss_rate,
            args.confidence,
            headroom=args.headroom,
        )
    except TooFewStepsError as err:
        raise CliError(
            f"{err.distinct} distinct steps with other numbers than alone cannot show a miss rate "
            f"of {args.target_miss_rate:g}, which takes {err.needed} where {len(moving)} of "
            f"{len(margins)} have such: give more --prompts, --tokens or --batch-sizes, or a "
            "higher --target-miss-rate; what was measured is kept."
        ) from err
    found = flips(walks)
    return {
        "schema": 1,
        "model": model,
        "machine": machine,
        "threshold": choice.threshold,
        "trigger_rate": flagged_share(margins, choice.threshold),
        "steps": len(margins),
        "moved_steps": trials.moved,
        "distinct_steps": trials.distinct,
        "flips": len(found),
        "distinct_flips": len(flipped),
        "missed": choice.missed,
        "miss_rate_bound": choice.miss_bound,
        "target_miss_rate": args.target_miss_rate,
        "confidence": args.confidence,
        "headroom": args.headroom,
        "batch_sizes": sizes,
        "prompts": len({name for _, name in walks}),
        "flipped_steps": found,
    }


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
