"""`margingate probe`: which operators of a model depend on the batch, on this machine.

A gated server measures that when it starts. The command starts one, or asks one that runs, and
shows what it found: a table, probe.json and probe.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from margingate.cli.errors import CliError
from margingate.cli.inputs import api_key, in_a_line, refuse_key, server_root

if TYPE_CHECKING:
    from rich.table import Table

MODEL = "smollm2"
EXTEND = "attention extend"  # row counts are lengths of chunks here
MOST_SPANS = 6  # more of them do not fit into a cell


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
        report = _ask(args.base_url, args.api_key) if args.base_url else _measure(args)
    console = Console(file=sys.stdout)
    try:  # whichever of the two fails, the other tells the result
        console.print(make_table(report))
        console.print(meaning(report), highlight=False)
    finally:
        _write(report, args.out)
    console.print(f"Report: {args.out / 'probe.json'}, {args.out / 'probe.png'}", highlight=False)
    return 0


def _write(report: dict[str, Any], out: Path) -> None:
    from margingate.plots import plot_classes

    grid = {row["name"].rsplit(".", 1)[-1]: dict(row["classes"]) for row in rows(report)}
    title = f"Row counts that give a row the same bits: {Path(report['model']).name}"
    try:
        (out / "probe.json").write_text(json.dumps(report, indent=1) + "\n")
        plot_classes(grid, out / "probe.png", title)
    except OSError as err:
        raise CliError(
            f"--out {out} cannot be written ({err.strerror}): make room, or name another folder."
        ) from err


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Make the report's folder, and remove it if the body fails with nothing in it."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CliError(
            f"--out {out} cannot be made ({err.strerror}): name another folder."
        ) from err
    if not os.access(out, os.W_OK):
        raise CliError(f"--out {out} cannot be written: name another folder.")
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # a server's log is in it
                out.rmdir()
        raise


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start a gated server that probes anew, and ask it."""
    from margingate.cli.model import ensure_model
    from margingate.servers import ServerError, launch

    model = args.model_path or str(ensure_model(MODEL))
    log = args.out / "server.log"
    server = launch(model, log, "--gate-probe", "fresh", *args.server_args, gate=True)
    print("margingate: starting a server of", model, file=sys.stderr, flush=True)
    try:
        with server:
            return _ask(server.base_url)
    except ServerError as err:
        raise CliError(str(err)) from err
    except CliError as err:
        raise CliError(f"{str(err).removesuffix('.')}; its log is {log}.") from err


def _ask(url: str, key: str = "none") -> dict[str, Any]:
    """What the gated server at `url` found; raises CliError for any other server."""
    import requests

    url = server_root(url)
    try:
        headers = {"Authorization": f"Bearer {api_key(key)}"}
        reply = requests.get(f"{url}/server_info", headers=headers, timeout=60)
        refuse_key(url, reply.status_code)
        info = reply.json()
        state = info["internal_states"][0]["margingate"]
    except requests.ConnectionError as err:
        raise CliError(f"no server answers at {url}: start it, or correct --base-url.") from err
    except (requests.RequestException, ValueError) as err:
        raise CliError(
            f"{url} does not answer as an SGLang server ({in_a_line(str(err))}): correct "
            "--base-url."
        ) from err
    except (KeyError, IndexError, TypeError):
        raise CliError(
            f"the server at {url} has no gate: start it with --deterministic-gate."
        ) from None
    try:
        found = {"schema": 1, "model": info["model_path"], "version": info["version"]}
        probe = {"steps": None, **state["probe"]}
        probed = bool(probe["operators"])
    except (KeyError, TypeError):
        raise CliError(
            f"the gate at {url} tells of no probe: use a server of this version of margingate."
        ) from None
    if not probed:
        raise CliError(
            f"the server at {url} did not probe: start it with --gate-fast-path invariant."
        )
    return {**found, **probe}


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The operators, and where it was measured the whole step, with class 0 of a verify pass."""
    if report["steps"] is None:
        return list(report["operators"])
    whole = {
        "kind": "model",
        "name": "decode step, as served",
        "shape": [],
        "modules": 1,
        "classes": [[count, 0 if same else 1] for count, same in report["steps"]["measured"]],
        "plan": None,
    }
    return [*report["operators"], whole]


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
        name, modules = row["name"].rsplit(".", 1)[-1], str(row["modules"])
        table.add_row(name, shape, modules, _spans(row["classes"]), _runs_with(row))
    return table


def _runs_with(row: dict[str, Any]) -> str:
    from margingate.core.rowclass import RowPlan

    if row["plan"] is not None:
        return str(RowPlan(*row["plan"]))
    return "any" if len({key for _, key in row["classes"]}) == 1 else "as it comes"


def _spans(classes: list[list[int]]) -> str:
    from margingate.core.rowclass import runs

    found = [(counts[0], counts[-1]) for counts, _ in runs(dict(map(tuple, classes)))]  # type: ignore[arg-type]
    if len(found) > MOST_SPANS:
        return f"{len({key for _, key in classes})} classes"
    return " | ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in found)


def meaning(report: dict[str, Any]) -> str:
    """The result in plain sentences."""
    several = [
        row["name"] for row in report["operators"] if len({c for _, c in row["classes"]}) > 1
    ]
    guilty = [name.rsplit(".", 1)[-1] for name in several if name != EXTEND]
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
