"""pytest-xdist: how many workers, what each has for its own, which modules go first.

Two modules at a time: a server's start is mostly one thread that imports.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from margingate.harness.servers import PORTS

MOST_WORKERS = 2  # a server and what asks it take 3 to 5 GB
# Modules that start servers, the longest first: no worker is left alone with one at the end.
SERVERS = (
    *("families", "gated", "constraints", "pressure", "clients", "study", "pools", "stock"),
    *("invariant", "images", "experts", "simulated", "ranks", "guard", "replicas"),
)
PLACES = {f"test_server_{name}.py": place for place, name in enumerate(SERVERS)}
PLACES["test_engine.py"] = len(SERVERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: one where there is one core."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores: servers and torch, which is not imported yet, read the variable.

    Threads of two servers on the same cores wait for each other within each operator. Examples of
    hypothesis have no deadline, since a core that others use tells nothing.
    """
    settings.register_profile("suite", deadline=None)
    settings.load_profile("suite")
    if count := workers(config)[1]:
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the modules by name, and those of PLACES among them by place; a module's tests stay."""

    def key(item: pytest.Item) -> tuple[str, int]:
        name = item.path.name
        return ("test_server_", PLACES[name]) if name in PLACES else (name, 0)

    items.sort(key=key)


def workers(config: pytest.Config) -> tuple[int, int]:
    """This worker's place and how many there are; 0 and 0 in a run without workers."""
    own = getattr(config, "workerinput", None)
    if own is None:
        return 0, 0
    count = own["workercount"]
    return int(own["workerid"].removeprefix("gw")) % count, count


@pytest.fixture(scope="session")
def ports(pytestconfig: pytest.Config) -> range:
    """Those of this worker alone: a port is free until its server binds it, seconds later."""
    place, count = workers(pytestconfig)
    return PORTS[place :: count or 1]


@pytest.fixture(scope="session")
def run_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all workers of a run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if workers(pytestconfig)[1] else base
