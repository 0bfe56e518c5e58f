"""Plans that tensor-parallel ranks share: each measures by its own clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from margingate.config import GateError
from margingate.runtime.probe.classes import Finding
from margingate.runtime.probe.operators import Operator


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
            mine = replace(mine, plan=others[0].plan)  # noqa: PLW2901
        elif mine.name in whole:
            raise GateError(
                f"--deterministic-gate cannot use {mine.name} with {len(of_ranks)} ranks: it has "
                "other classes of row counts on another rank; use --tp-size 1."
            )
        found.append(mine)
    return found
