"""The replicas of a server: each scheduler has its gate, and all give the same bits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from margingate.config import GateConfig, GateError
from margingate.runtime.compat.process import replicas
from margingate.runtime.probe.checks import check_decode
from margingate.runtime.schedule import server_info
from margingate.runtime.verify.verifier import Verifier

logger = logging.getLogger(__name__)

_UNLIKE = "have all the same devices and memory, give --max-total-tokens, or use --dp-size 1"


def announce(scheduler: Any, config: GateConfig, verifier: Verifier, parts: dict[str, Any]) -> None:
    """In each scheduler, when its gate is up: say so, and what answers depend on here.

    Args:
        parts: of the fingerprint.
    """
    if replicas.size(scheduler.server_args) == 1:
        return
    state = {
        "gate": server_info.init_info(config),
        "fingerprint_of": parts,
        "bits": check_decode.digest(verifier, scheduler),
    }
    replicas.announce(scheduler.server_args, state)


def confirm(server_args: Any) -> dict[str, Any]:
    """In the launcher, when all schedulers are ready. Returns what the first says of its gate.

    Raises:
        GateError: a scheduler came up without its gate, or replicas would answer apart.
    """
    found = replicas.announced(server_args)
    refuse_absent(found)
    refuse_unlike(found)
    logger.info("margingate: the gate is up in all %d replicas", replicas.size(server_args))
    first = found[0, 0]
    return first["gate"] if first else {}


def refuse_absent(found: Mapping[replicas.Place, dict[str, Any] | None]) -> None:
    """Raises GateError with the first scheduler that did not announce its gate."""
    for (replica, rank), state in found.items():
        if state is None:
            raise GateError(
                f"scheduler {rank} of replica {replica} came up without the gate although "
                "--deterministic-gate is set: check that SGLANG_PLUGINS and SGLANG_PLATFORM let "
                "the plugin 'margingate' load."
            )


def refuse_unlike(found: Mapping[replicas.Place, dict[str, Any] | None]) -> None:
    """Raises GateError with the first replica that is unlike the first one, and by what."""
    for (replica, rank), state in found.items():
        first, own = found[0, rank] or {}, state or {}
        parts = list(_differing(first.get("fingerprint_of"), own.get("fingerprint_of")))
        if parts:
            raise GateError(
                f"replica {replica} has another fingerprint than replica 0, by "
                f"{', '.join(parts)}, so that answers would depend on which one serves: {_UNLIKE}."
            )
        if first.get("bits") != own.get("bits"):
            raise GateError(
                f"replica {replica} gives the same rows other bits than replica 0, so that "
                f"answers would depend on which one serves: {_UNLIKE}."
            )


def _differing(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Names of the parts that differ, as `machine.longest`; two levels of them."""
    if one == other:
        return
    if name.count(".") > 1 or not (isinstance(one, dict) and isinstance(other, dict)):
        yield name.removeprefix(".") or "all of it"
        return
    for key in sorted({*one, *other}):
        yield from _differing(one.get(key), other.get(key), f"{name}.{key}")
