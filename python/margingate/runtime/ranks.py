"""What tensor-parallel ranks measure, each on its own part, and must decide alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def agreed(scheduler: Any, flags: Sequence[bool]) -> list[bool]:
    """Each flag if it holds on every rank; a collective where there are several."""
    if scheduler.server_args.tp_size == 1:
        return list(flags)
    group = scheduler.tp_cpu_group
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, list(flags), group=group)
    return [all(of_ranks) for of_ranks in zip(*gathered, strict=True)]
