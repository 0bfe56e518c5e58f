"""A study's record: measured into one JSON file, and read from it on any machine."""

from __future__ import annotations

import json
import lzma
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from margingate.errors import CliError
from margingate.study import measure as parts
from margingate.study import session
from margingate.study.journal import Journal
from margingate.study.session import WalkOptions

if TYPE_CHECKING:
    from margingate.harness.client import Prompt

KIND = "margingate study"
PARTS = (
    *("name", "model", "machine", "server_args", "tokens", "batch_sizes", "sets", "walks"),
    *("columns", "sequences", "probe"),
)


@dataclass(frozen=True)
class StudyOptions:
    """What a study measures."""

    walk: WalkOptions
    columns: int  # answers whose K/V columns are compared
    sequences: int  # prompts answered by gated servers too
    thresholds: Sequence[float] | None  # logits, of those servers; None: from the first file
    probe: bool  # whether the operators are probed


def measure(options: StudyOptions) -> dict[str, Any]:
    """Everything that was asked for and the journal lacks; the record."""
    sets = session.read_sets(options.walk)
    model = session.model_folder(options.walk)
    prompts = session.tokenized(sets, model)
    some = _interleaved(sets, prompts)[: options.sequences]
    sizes = options.walk.batch_sizes
    with session.observing_server(options.walk, model) as client:
        journal, machine = session.walk(options.walk, client, model, prompts)
        parts.columns(client, prompts, journal, options.columns)
        if some:
            parts.sequences(client, "stock", (), some, size=max(sizes), journal=journal)
    record = {
        "schema": 1,
        "kind": KIND,
        "name": model.name,
        "model": session.identity(model),
        "machine": machine,
        "server_args": list(options.walk.server_args),
        "tokens": options.walk.tokens,
        "batch_sizes": sorted(set(sizes)),
        "sets": {name: [prompt for prompt, _ in pairs] for name, pairs in sets.items()},
        "walks": _walks(journal, sizes),
        "columns": journal.notes.get(f"columns {options.columns}"),
    }
    record["sequences"] = _sequences(options, model, record, some, journal) if some else []
    if options.probe:
        _probe(options.walk, model, journal)
    return record | {"probe": journal.notes["probe"] if options.probe else None}


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
    options: StudyOptions,
    model: Path,
    record: dict[str, Any],
    prompts: Sequence[Prompt],
    journal: Journal,
) -> list[dict[str, Any]]:
    """The same prompts on a gated server per case; results of the stock one first."""
    from margingate.study.router_tables import router_threshold
    from margingate.study.tables import first_threshold

    size = max(options.walk.batch_sizes)
    cases = parts.cases(
        options.thresholds or [first_threshold(record)], partial(router_threshold, record)
    )
    for case, server_options in cases.items():
        if parts.sequence_key(case, prompts, size) not in journal.notes:
            with session.gated_server(options.walk, model, *server_options) as client:
                parts.sequences(client, case, server_options, prompts, size=size, journal=journal)
    keys = [parts.sequence_key(case, prompts, size) for case in ("stock", *cases)]
    return [journal.notes[key] for key in keys]


def _probe(options: WalkOptions, model: Path, journal: Journal) -> None:
    """What a gated server finds of the operators; a server that does not start ends no study."""
    if "probe" in journal.notes:
        return
    try:
        with session.gated_server(options, model, "--deterministic-gate") as client:
            found = client.gate_state()["probe"]
    except CliError as err:
        print(f"margingate: the probe is left out: {err}", file=sys.stderr)
        found = {"error": str(err)}
    journal.note("probe", found)


def write(record: dict[str, Any], out: Path) -> None:
    """The record to `out`, packed where its name ends in .xz; then the journal is not needed.

    Raises CliError where it cannot be written.
    """
    text = json.dumps(record) + "\n"
    session.write(out, lzma.compress(text.encode()) if _packed(out) else text)
    out.with_suffix(".partial.jsonl").unlink()
    out.with_suffix(".log").unlink(missing_ok=True)


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


def read(path: Path) -> dict[str, Any]:
    """A study that --from names; raises CliError for any other file."""
    record = _load("--from", path)
    if not isinstance(record, dict) or record.get("kind") != KIND or record.get("schema") != 1:
        raise CliError(f"--from {path} is not a study of this version: make one with --out.")
    if lacking := [part for part in PARTS if part not in record]:
        raise CliError(
            f"--from {path} is not whole, it lacks {', '.join(lacking)}: measure again, with --out."
        )
    return record


def read_calibration(path: Path) -> dict[str, Any]:
    """A calibration file that --calibration names; raises CliError for any other."""
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


def check_made_for(record: dict[str, Any], calibration: dict[str, Any], path: Path) -> None:
    """Raises CliError where the calibration is not for the study's model and machine."""
    for part in ("model", "machine"):
        for key, value in record[part].items():
            found = calibration.get(part, {}).get(key)
            if found != value:
                raise CliError(
                    f"--calibration {path} was made for {key} {found!r}, but the study is of "
                    f"{value!r}: calibrate that one, or drop the option."
                )
