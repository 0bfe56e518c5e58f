"""What `/server_info` says of several data-parallel replicas: by replica, and of all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from margingate.runtime.request.record import Counts

KEY = "margingate"  # of the gate's part in a scheduler's state
ALL = "all_replicas"  # in it, the same in each replica's
NUMBERS = (*(f.name for f in fields(Counts)), "canonical_steps", "merged_passes", "open", "held")
BY_NAME = ("reasons", "passes_by_reason", "hooks_fired", "hooks_failed")


async def internal_states(original: Any, manager: Any) -> list[dict[str, Any]]:
    """AROUND TokenizerManager.get_internal_state: by replica, and with what all have together.

    SGLang lists replicas as their answers come. One replica's state is left as it is.
    """
    states: list[dict[str, Any]] = await original(manager)
    return states if len(states) == 1 else with_totals(states)


def with_totals(states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The states in the order of replicas. The gate's part of each is mutated: it gets ALL."""
    ordered = sorted(states, key=lambda state: int(state[KEY]["replica"]))
    own = [state[KEY] for state in ordered]
    together = totals(own)
    for each in own:
        each[ALL] = together
    return ordered


def totals(gates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of counters, and what holds of all only if it holds of each."""
    summed: dict[str, Any] = {name: sum(gate[name] for gate in gates) for name in NUMBERS}
    for name in BY_NAME:
        keys = dict.fromkeys(key for gate in gates for key in gate[name])
        summed[name] = {key: sum(gate[name].get(key, 0) for gate in gates) for key in keys}
    steps = summed["steps"]
    broken = [f"replica {gate['replica']}: {gate['integrity']}" for gate in gates]
    broken = [said for said, gate in zip(broken, gates, strict=True) if gate["integrity"] != "ok"]
    return {
        "count": len(gates),
        **summed,
        "trigger_rate": summed["flagged"] / steps if steps else 0.0,
        "largest_batch": max(gate["largest_batch"] for gate in gates),
        "integrity": broken[0] if broken else "ok",
        **shared_fingerprint(gates),
    }


def shared_fingerprint(gates: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """The one fingerprint of all; null and why where one has none, or they differ."""
    for gate in gates:
        if gate["fingerprint"] is None:
            because = f"replica {gate['replica']}: {gate['fingerprint_because']}"
            return {"fingerprint": None, "fingerprint_because": because}
    found = [gate["fingerprint"] for gate in gates]
    if len(set(found)) == 1:
        return {"fingerprint": found[0]}
    listed = ", ".join(found)
    return {"fingerprint": None, "fingerprint_because": f"replicas have different ones: {listed}"}
