"""Plans that ranks and replicas share: each would measure by its own clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from margingate.config import GateError
from margingate.runtime.compat.process import ranks, replicas
from margingate.runtime.probe.measuring.classes import Finding
from margingate.runtime.probe.operators.operator import Operator


def of_all_ranks(
    own: Sequence[Finding],
    of_ranks: Sequence[Sequence[Finding]],
    operators: Mapping[str, Sequence[Operator]],
) -> list[Finding]:
    """The findings of this rank, with the first rank's plans wherever all have the same classes.

    Ranks measure times apart. A layer that each rank runs whole, as a router's, must be called by
    all alike: a near-tie would send a row to one expert here and to another one there.

    Args:
        own: the findings of this rank, in the order of those of each rank.

    Raises:
        GateError: such a layer has other classes on another rank.
    """
    whole = {same[0].name for same in operators.values() if same[0].is_replicated}
    found = []
    for mine, *others in zip(own, *of_ranks, strict=True):
        if all(other.classes == mine.classes for other in others):
            first = others[0]
            mine = replace(mine, plan=first.plan, prefill_plan=first.prefill_plan)  # noqa: PLW2901
        elif mine.name in whole:
            raise GateError(
                f"--deterministic-gate cannot use {mine.name} with {len(of_ranks)} ranks: it has "
                "other classes of row counts on another rank; use --tp-size 1."
            )
        found.append(mine)
    return found


def of_first_replica(
    server_args: Any, identity: dict[str, Any], find: Callable[[], list[Finding]]
) -> list[Finding]:
    """What `find` gives in the first data-parallel replica, where alone it is called.

    Args:
        identity: everything that findings depend on, of this replica; for JSON.

    Raises:
        GateError: the first replica's identity is another.
    """
    if replicas.size(server_args) == 1:
        return find()
    told = replicas.first(
        server_args,
        "plan",
        lambda: {"identity": identity, "findings": [each.record() for each in find()]},
    )
    refuse_unlike(identity, told["identity"])
    return [Finding.from_record(each) for each in told["findings"]]


def refuse_unlike(own: dict[str, Any], first: dict[str, Any]) -> None:
    """A plan measured elsewhere holds here only where all is alike. Raises GateError."""
    plain = [json.loads(json.dumps(each, default=str)) for each in (own, first)]
    other = [name for name in plain[0] if plain[1].get(name) != plain[0][name]]
    if other:
        raise GateError(
            f"--deterministic-gate needs replicas that compute alike, but in replica "
            f"{ranks.dp_rank()} {', '.join(other)} differ from those of replica 0: give all the "
            "same devices, or use --dp-size 1."
        )
