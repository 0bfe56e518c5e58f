"""What tensor-parallel ranks find, each on its own part, and must decide alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from margingate.runtime.compat.arguments import settings

T = TypeVar("T")


def tp_size(owner: Any) -> int:
    """Of tensor parallelism, by the server arguments of a scheduler or of a model runner."""
    size: int = settings.view(owner.server_args).tp_size
    return size


def tp_rank() -> int:
    """Of this process in tensor parallelism, once SGLang has published its ranks."""
    from sglang.srt.runtime_context import get_parallel

    rank: int = get_parallel().tp_rank
    return rank


def dp_rank() -> int:
    """Of this process's scheduler among the replicas of a server; 0 where there is one."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().dp_rank or 0


def group() -> Any | None:
    """SGLang's group of this process's tensor-parallel ranks; None where it has one rank."""
    from sglang.srt.distributed import parallel_state

    found = parallel_state.get_tp_group()
    return None if found.world_size == 1 else found


def of_all(value: T) -> list[T]:
    """As `gathered`, before there is a scheduler."""
    ranks = group()
    if ranks is None:
        return [value]
    return _gather(value, ranks.cpu_group, ranks.world_size)


def gathered(scheduler: Any, value: T) -> list[T]:
    """Each rank's value, by rank; a collective where there are several."""
    if tp_size(scheduler) == 1:
        return [value]
    group = scheduler.tp_cpu_group
    return _gather(value, group, torch.distributed.get_world_size(group))


def _gather(value: T, group: Any, size: int) -> list[T]:
    values: list[Any] = [None] * size
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def slowest(scheduler: Any, milliseconds: Sequence[float]) -> list[float]:
    """Each time as long as on the slowest rank; a collective where there are several."""
    of_ranks = gathered(scheduler, list(milliseconds))
    return [max(times) for times in zip(*of_ranks, strict=True)]


def agreed(scheduler: Any, flags: Sequence[bool]) -> list[bool]:
    """Each flag if it holds on every rank; a collective where there are several."""
    of_ranks = gathered(scheduler, list(flags))
    return [all(flag) for flag in zip(*of_ranks, strict=True)]
