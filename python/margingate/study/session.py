"""A session of measuring: prompts, the model's identity, servers, and the walk that they share."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from margingate.errors import CliError
from margingate.harness.defaults import MODEL
from margingate.harness.inputs import in_a_line, read_pairs, refuse_twins

if TYPE_CHECKING:
    from margingate.harness.client import Client, Prompt
    from margingate.study.journal import Journal

SERVER = (
    *("--deterministic-gate", "--gate-policy", "observe", "--gate-study"),
    "--disable-radix-cache",  # else a prompt would find another's columns
)


@dataclass(frozen=True)
class WalkOptions:
    """What a walk needs to know."""

    model_path: str | None  # None: the embedded model
    prompts: Sequence[Path]  # JSONL files
    per_file: int | None  # prompts of each; None: all
    tokens: int  # per answer, at most
    batch_sizes: Sequence[int]
    out: Path  # the result's; unfinished work and the server's log are beside it
    server_args: Sequence[str]  # for the server, after its own


def read_sets(options: WalkOptions) -> dict[str, list[tuple[str, str]]]:
    """The (id, text) pairs of each prompt file, by its stem; ids are distinct. Raises CliError."""
    files: dict[Path, list[tuple[str, str]]] = {}
    for path in options.prompts:
        if path.stem in {other.stem for other in files}:
            raise CliError(f"--prompts has two files named {path.stem}: rename one.")
        files[path] = read_pairs(path, options.per_file)
    refuse_twins(files)
    return {path.stem: pairs for path, pairs in files.items()}


def model_folder(options: WalkOptions) -> Path:
    """--model-path, which must hold a model, or the embedded one."""
    from margingate.harness.embedded_model import ensure_model

    model = Path(options.model_path or ensure_model(MODEL))
    identity(model)
    return model


def tokenized(sets: Mapping[str, Sequence[tuple[str, str]]], model: Path) -> list[Prompt]:
    """All prompts, with the model's chat template applied."""
    from margingate.harness.client import chat_prompts

    try:
        return chat_prompts([pair for pairs in sets.values() for pair in pairs], model)
    except (OSError, ValueError) as err:
        said = in_a_line(str(err) or type(err).__name__)
        raise CliError(
            f"the tokenizer in {model} cannot be used ({said}): give --model-path a folder that "
            "has the tokenizer's files, and a chat template."
        ) from err


@contextmanager
def observing_server(options: WalkOptions, model: Path) -> Iterator[Client]:
    """A server that decodes as a stock one does, honours --gate-study and keeps no radix tree."""
    with gated_server(options, model, *SERVER) as client:
        yield client


@contextmanager
def gated_server(options: WalkOptions, model: Path, *arguments: str) -> Iterator[Client]:
    """A server with these arguments and the user's; raises CliError where it does not start."""
    import requests

    from margingate.harness.client import Client
    from margingate.harness.servers import ServerError, launch

    print(f"margingate: starting a server of {model}", file=sys.stderr, flush=True)
    server = launch(model, options.out.with_suffix(".log"), *arguments, *options.server_args)
    try:
        with server:
            yield Client(server.base_url, options.tokens)
    except ServerError as err:
        raise CliError(str(err)) from err
    except requests.RequestException as err:  # an OSError too
        raise CliError(
            f"the server stopped answering ({type(err).__name__}): see {server.log}, and start "
            "again to go on."
        ) from err
    except OSError as err:
        raise CliError(
            f"the work beside {options.out} cannot go on ({err.strerror or err}): check that the "
            "folder exists and the disk has room, then start again to go on."
        ) from err


def walk(
    options: WalkOptions, client: Client, model: Path, prompts: Sequence[Prompt]
) -> tuple[Journal, dict[str, str]]:
    """Measure what the journal lacks; the journal, and what it was measured on."""
    from margingate.harness.progress import progress
    from margingate.study.journal import Journal
    from margingate.study.walk import check_lengths, measure

    machine = client.gate_state()["machine"]
    about = {
        "model": identity(model),
        "machine": machine,
        "tokens": options.tokens,
        "prompts": digest(prompts),
        "server_args": options.server_args,
    }
    journal = Journal(options.out.with_suffix(".partial.jsonl"), about)
    check_lengths(client, prompts, options.tokens)
    sizes = sorted(set(options.batch_sizes))
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
