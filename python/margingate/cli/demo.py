"""`margingate demo`: one model, the stock server and the gated one, the same prompts, compared.

Each server answers the prompts one by one, then all at once in three ways. What changes against
its own one-by-one answers is what the gate is for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import margingate
from margingate.cli.errors import CliError
from margingate.config import FAST_PATHS, GateConfig

if TYPE_CHECKING:
    from rich.table import Table

    from margingate.client import Answer, Client, Prompt
    from margingate.plots import Margins
    from margingate.servers import Server

PROMPTS = Path(margingate.__file__).parent / "data" / "demo_prompts.jsonl"
MODEL = "smollm2"
TOKENS = 32
SIDES = ("stock", "gated")
TOGETHER = {
    "batched": "all at once",
    "shuffled": "all at once, shuffled",
    "cached": "all at once, prefixes cached",
}
RUNS = ("alone", *TOGETHER)
COUNTERS = ("steps", "canonical", "flagged", "replayed", "flips", "missed", "rolled_back", "passes")
SEED = 20260530


class Bar(NamedTuple):
    """What the measuring tells the progress bar."""

    say: Callable[[str], None]  # what is being done
    tick: Callable[[], None]  # one more request is answered


@dataclass(frozen=True)
class Run:
    """All prompts, once, against one server."""

    answers: list[Answer]
    wall_s: float
    gate: dict[str, int]  # the gate's counters, this run's alone; empty on the stock server

    @property
    def tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)


@dataclass(frozen=True)
class Side:
    """One server's runs by name."""

    runs: dict[str, Run]
    margins: Margins | None  # of the decode steps of all its runs; None on the stock server
    threshold: float | None  # logits; None on the stock server


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `margingate demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="compare the stock server with the gated one on this machine (minutes)",
        description="Serve a small model without and with the gate, send the same prompts alone "
        "and in batches, and write a report. Status 1 if a gated answer changed.",
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"per answer; default {TOKENS}"
    )
    parser.add_argument(
        "--prompts", type=Path, default=PROMPTS, metavar="FILE", help='JSONL with a "prompt" a line'
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
        default=GateConfig.fast_path,
        help="of the gated server (its --gate-fast-path): stock shows flips and their repair; "
        f"default {GateConfig.fast_path}",
    )
    parser.add_argument("--keep-log", action="store_true", help="keep the servers' logs there")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the report. 1 if an answer of the gated server changed."""
    from margingate.cli.model import ensure_model

    start = time.perf_counter()
    pairs = _read(args.prompts, args.tokens)
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
            _log(args.out, side).unlink(missing_ok=True)
    return int(any(report["sides"]["gated"]["identical"][r] < len(pairs) for r in TOGETHER))


def _read(path: Path, tokens: int) -> list[tuple[str, str]]:
    """The prompts, by distinct names; raises CliError for what the user gave wrongly."""
    from margingate.client import read_prompts

    if tokens < 1:
        raise CliError(f"--tokens is {tokens}: give 1 or more.")
    try:
        pairs = read_prompts(path)
    except OSError as err:
        raise CliError(f"--prompts {path} cannot be read ({err.strerror}): check it.") from err
    except ValueError as err:
        raise CliError(f"--prompts: {err}") from err
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CliError(f"--prompts {path} has two prompts with the id {twice!r}: rename one.")
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


def _log(out: Path, side: str) -> Path:
    return out / f"{side}.log"


# -- measuring


def measure(
    model: Path,
    pairs: Sequence[tuple[str, str]],
    tokens: int,
    out: Path,
    extra: Mapping[str, Sequence[str]],
) -> dict[str, Side]:
    """Start one server after the other and send everything; raises CliError if one fails.

    `extra`: more arguments for SGLang, by side.
    """
    from margingate.client import Client, chat_prompts
    from margingate.servers import ServerError, launch

    prompts = chat_prompts(pairs, model)
    sides = {}
    with _progress(len(SIDES) * len(RUNS) * len(prompts)) as bar:
        for side in SIDES:
            bar.say(f"{side}: starting the server")
            try:
                gate = side == "gated"
                with launch(model, _log(out, side), *extra[side], gate=gate) as server:
                    client = Client(server.base_url, tokens)
                    sides[side] = _one_side(client, server, prompts, side, bar)
            except ServerError as err:
                raise CliError(f"{side}: {err}") from err
    return sides


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Bar]:
    """A bar on stderr over `total` requests."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield Bar(
            lambda text: bar.update(task, description=text),
            lambda: bar.advance(task),
        )


def _one_side(
    client: Client, server: Server, prompts: Sequence[Prompt], side: str, bar: Bar
) -> Side:
    """All runs against one healthy server; raises ServerError if it stops answering."""
    import aiohttp
    import requests

    try:
        client.together(prompts[:4], sampling_params={"max_new_tokens": 4})  # not measured: warm-up
        before = _gate_state(client, side)
        runs = {}
        for name in RUNS:
            bar.say(f"{side}: {TOGETHER.get(name, 'one by one')}")
            runs[name] = _one_run(client, prompts, name, side, bar)
        return _side(runs, before, _gate_state(client, side))
    except (aiohttp.ClientError, requests.RequestException, TimeoutError, RuntimeError) as err:
        raise server.error(f"failed a request with {str(err) or type(err).__name__!r}") from err


def _one_run(client: Client, prompts: Sequence[Prompt], name: str, side: str, bar: Bar) -> Run:
    """One run of RUNS: `cached` keeps the prefixes of the run before, the others start empty."""
    if name != "cached":
        _flush(client)
    order = list(prompts)
    if name == "shuffled":
        random.Random(SEED).shuffle(order)
    send = client.alone if name == "alone" else client.together
    before = _counters(_gate_state(client, side))
    start = time.perf_counter()
    answers = send(order, bar.tick)
    wall_s = time.perf_counter() - start
    after = _counters(_gate_state(client, side))
    return Run(answers, wall_s, {key: after[key] - before[key] for key in after})


def _flush(client: Client, tries: int = 40) -> None:
    """Empty the prefix cache; the server may still be letting go of its last request."""
    import requests

    for left in range(tries - 1, -1, -1):
        try:
            client.flush()
            return
        except requests.HTTPError:
            if not left:
                raise
            time.sleep(0.25)


def _gate_state(client: Client, side: str) -> dict[str, Any]:
    return client.gate_state() if side == "gated" else {}


def _counters(state: dict[str, Any]) -> dict[str, int]:
    if not state:
        return {}
    counted = {**state, "canonical": state["reasons"].get("canonical", 0)}
    return {name: counted[name] for name in COUNTERS}


def _side(runs: dict[str, Run], before: dict[str, Any], after: dict[str, Any]) -> Side:
    from margingate.plots import Margins

    if not after:
        return Side(runs, None, None)
    margins = Margins.from_record(after["margins"]).since(Margins.from_record(before["margins"]))
    return Side(runs, margins, runs["alone"].answers[0].meta["gate"]["threshold"])


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
