"""Data-parallel replicas of one server: processes apart, which meet in a file while they start.

SGLang's controller hands its launcher two numbers of one replica and nothing of the others, and
gives replicas no collective. So the launcher names a file, and each scheduler writes what the
others, or the launcher, must know.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from margingate.config import GateError
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.arguments.server_args import RENDEZVOUS
from margingate.runtime.compat.process import ranks

WAIT = timedelta(hours=1)  # for a replica that measures; one that dies ends the server before
Place = tuple[int, int]  # replica, tensor-parallel rank in it
_UP = "up"


def size(server_args: Any) -> int:
    """Replicas of the server; 1 without --dp-size."""
    replicas: int = settings.view(server_args).dp_size
    return replicas


@contextmanager
def rendezvous(server_args: Any) -> Iterator[None]:
    """Meanwhile schedulers that are given these arguments can meet. In the launcher.

    Nothing for one replica.
    """
    if size(server_args) == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="margingate-") as folder:
        setattr(server_args, RENDEZVOUS, str(Path(folder) / "store"))
        yield


def first(server_args: Any, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives in the first replica, where alone it is called; for JSON.

    Of ranks with the same number in tensor parallelism. Raises GateError where it does not come.
    """
    if size(server_args) == 1:
        return make()
    if ranks.dp_rank() == 0:
        _tell(server_args, name, made := make())
        return made
    return _heard(server_args, name, 0)


def of_all(server_args: Any, name: str, value: Any) -> list[Any]:
    """Each replica's value, by replica, as `first` gives one."""
    replicas = size(server_args)
    if replicas == 1:
        return [value]
    _tell(server_args, name, value)
    return [_heard(server_args, name, replica) for replica in range(replicas)]


def announce(server_args: Any, state: dict[str, Any]) -> None:
    """Say to the launcher, last of all, that the gate of this scheduler is up; nothing for one."""
    if size(server_args) > 1:
        _tell(server_args, _UP, state)


def announced(server_args: Any) -> dict[Place, dict[str, Any] | None]:
    """What each scheduler of each replica announced, or None where it did not. Does not wait."""
    store = _store(server_args)
    places = range(size(server_args)), range(settings.view(server_args).tp_size)
    found: dict[Place, dict[str, Any] | None] = {}
    for place in ((replica, rank) for replica in places[0] for rank in places[1]):
        key = _key(_UP, *place)
        found[place] = json.loads(store.get(key)) if store.check([key]) else None
    return found


def end_all(count: int) -> None:
    """In a scheduler that is about to end: its controller would route requests to it for ever.

    Nothing for one replica, whose end the launcher sees.
    """
    if count > 1:
        os.kill(os.getppid(), signal.SIGQUIT)  # as SGLang does where a scheduler raises


def _tell(server_args: Any, name: str, value: Any) -> None:
    text = json.dumps(value, default=str)
    _store(server_args).set(_key(name, ranks.dp_rank(), ranks.tp_rank()), text)


def _heard(server_args: Any, name: str, replica: int) -> Any:
    try:
        return json.loads(_store(server_args).get(_key(name, replica, ranks.tp_rank())))
    except RuntimeError as error:  # torch says so of a file, and a subclass of other stores
        raise GateError(
            f"--deterministic-gate waited in vain for {name} of replica {replica}: see its log "
            "above, or use --dp-size 1."
        ) from error


def _key(name: str, replica: int, tp_rank: int) -> str:
    return f"{name}/{replica}/{tp_rank}"


def _store(server_args: Any) -> Any:
    """Raises GateError where the launcher named no file."""
    from torch.distributed import FileStore

    path = getattr(server_args, RENDEZVOUS, None)
    if path is None:
        raise GateError(
            f"--dp-size is {size(server_args)}, but the launcher gave replicas no place to meet: "
            "launch with sglang serve or sglang.Engine."
        )
    store = FileStore(path)
    store.set_timeout(WAIT)
    return store
