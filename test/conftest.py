"""Fixtures: the embedded model, real prompts, and servers that a module shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import margingate
from margingate.cli.model import ensure_model
from margingate.client import Prompt, chat_prompts, read_prompts
from margingate.servers import Server, launch

PROMPTS = Path(margingate.__file__).parent / "data/demo_prompts.jsonl"
Start = Callable[..., Server]
# On this path every decode step has to be verified or flagged: the gate is what is tested.
STOCK_PATH = ("--gate-fast-path", "stock")


@pytest.fixture(scope="session")
def model() -> Path:
    return ensure_model("smollm2")


@pytest.fixture(scope="session")
def all_prompts(model: Path) -> list[Prompt]:
    """24 prompts, six of each data set, with the chat template applied."""
    return chat_prompts(read_prompts(PROMPTS), model)


@pytest.fixture(scope="session")
def prompts(all_prompts: list[Prompt]) -> list[Prompt]:
    """12 of them, three of each data set."""
    return [prompt for i, prompt in enumerate(all_prompts) if i % 6 < 3]


@pytest.fixture(scope="module")
def start(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers; all of them end with the module. Two cores: one lives at a time."""
    servers: list[Server] = []

    def start_server(
        *args: str,
        gate: bool = True,
        stock_path: bool = True,
        env: dict[str, str] | None = None,
    ) -> Server:
        args += STOCK_PATH if gate and stock_path else ()
        for server in servers:
            server.stop()
        log = tmp_path_factory.mktemp("server") / "log"
        server = launch(model, log, *args, gate=gate, env=env)
        servers.append(server)
        server.start()
        return server

    yield start_server
    for server in servers:
        server.stop()
        if os.environ.get("MARGINGATE_SHOW_LOGS"):
            print(server.log.read_text(errors="replace")[-4000:])
