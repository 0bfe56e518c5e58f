"""Fixtures: the embedded model, real prompts, and servers that a module shares."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from margingate.harness.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.harness.defaults import PROMPTS
from margingate.harness.embedded_model import ensure_model
from margingate.harness.servers import Server, free_port, launch, slow_bfloat16

pytest_plugins = ("workers",)
# A run of the suite asks the same of every machine. `pytest --hypothesis-profile explore` draws new
# examples each time, ten times as many where a test does not set their number.
hypothesis.settings.register_profile("repeat", derandomize=True)
hypothesis.settings.register_profile("explore", max_examples=1000)
hypothesis.settings.load_profile("repeat")
Start = Callable[..., Server]
Canonical = Callable[[Client, Sequence[Prompt]], list[Answer]]
# On this path a decode step is what SGLang makes of it, and the gate has flips to find and repair.
TOKENS = 24  # of an answer, where a test does not need another number
STOCK_PATH = ("--gate-fast-path", "stock")
# Threads that share the rows of a float32 layer with a bias give them bits by their place on some
# CPUs (an EPYC with AVX-512: 5 to 7 and 9 to 11 rows), and the gate refuses such a model.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path` against the other workers; the kernel drops it if this process dies."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def model(run_folder: Path) -> Path:
    """SmolLM2; a sixth of its layers where a CPU without AVX-512 makes bfloat16 slow.

    There torch multiplies it in loops of its own, up to five times slower: all tests would take
    hours. They ask for no sense in what the model says.
    """
    whole = ensure_model("smollm2")
    if not slow_bfloat16():
        return whole
    folder = run_folder / "smollm2-sixth"
    with locked(folder):
        if not folder.exists():
            make_sixth(whole, folder)
    return folder


def make_sixth(whole: Path, folder: Path) -> None:
    """`folder`: links to the files of `whole`, and a config with a sixth of its layers."""
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").unlink()
    layers = {"num_hidden_layers": config["num_hidden_layers"] // 6}
    (folder / "config.json").write_text(json.dumps(config | layers))


@pytest.fixture(scope="session")
def all_prompts(model: Path) -> list[Prompt]:
    """24 prompts, six of each data set, with the chat template applied."""
    return chat_prompts(read_prompts(PROMPTS), model)


@pytest.fixture(scope="session")
def prompts(all_prompts: list[Prompt]) -> list[Prompt]:
    """8 of them, two of each data set."""
    return [prompt for i, prompt in enumerate(all_prompts) if i % 6 < 2]


@pytest.fixture(scope="session")
def canonical(run_folder: Path) -> Canonical:
    """Each prompt's answer alone, from the first gated server of the run that was asked for it.

    Every other gated server is held to it, in whatever worker: fast path, guarantee, delay,
    retraction and entry point may change what the gate has to do, but not the answer.
    """
    file = run_folder / "canonical.pickle"

    def alone(client: Client, prompts: Sequence[Prompt]) -> list[Answer]:
        tokens = client.params["max_new_tokens"]
        with locked(file):
            known = pickle.loads(file.read_bytes()) if file.exists() else {}
            new = [prompt for prompt in prompts if (tokens, prompt.name) not in known]
            known.update({(tokens, answer.name): answer for answer in client.alone(new)})
            file.write_bytes(pickle.dumps(known))
        return [known[tokens, prompt.name] for prompt in prompts]

    return alone


@pytest.fixture(scope="module")
def start(model: Path, ports: range, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers; all of them end with the module. One of a worker's lives at a time."""
    servers: list[Server] = []

    def start_server(
        *args: str,
        gate: bool = True,
        stock_path: bool = True,
        **options: Any,
    ) -> Server:
        args += STOCK_PATH if gate and stock_path else ()
        for server in servers:
            server.stop()
        log = tmp_path_factory.mktemp("server") / "log"
        options.setdefault("stop_s", 0.5)  # SGLang sleeps for five seconds before it ends
        options.setdefault("start_s", 900)  # a start took 80 where others had the cores
        if "float32" in args:
            options["env"] = ONE_THREAD | (options.get("env") or {})
        port = free_port(ports)
        server = launch(model, log, *args, gate=gate, port=port, **options)
        servers.append(server)
        server.start()
        return server

    yield start_server
    for server in servers:
        server.stop()
        if os.environ.get("MARGINGATE_SHOW_LOGS"):
            print(server.log.read_text(errors="replace")[-4000:])
