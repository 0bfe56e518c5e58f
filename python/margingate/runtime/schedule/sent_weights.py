"""Weights that come or go: what SGLang cannot read, load or send ends no scheduler.

Of weights from another process SGLang says so itself, and answers "not done". All ranks meet behind
each update, so that one that failed must get there too; and since the first alone answers, each
hears of the others.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from margingate.errors import first_line
from margingate.runtime.compat.process import ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unreadable:
    """In the place of tensors."""

    why: str


def deserialize(original: Any, worker: Any, sent: Any) -> Any:
    """AROUND TpModelWorker.deserialize_own_rank: the tensors of one rank, or why there are none."""
    try:
        return original(worker, sent)
    except Exception as error:
        return Unreadable(_named(error))


def load(
    original: Any, updater: Any, named_tensors: Any, load_format: str | None = None
) -> tuple[bool, str]:
    """AROUND WeightUpdater.update_weights_from_tensor: whether they are in, and a sentence.

    A collective where there are several ranks.
    """
    own = _load(original, updater, named_tensors, load_format)
    of_ranks = ranks.of_all(own)
    failed = [rank for rank, (done, _) in enumerate(of_ranks) if not done]
    if not failed or len(failed) == len(of_ranks):
        return own
    rank = failed[0]
    return False, f"Not all ranks have the new weights. On rank {rank}: {of_ranks[rank][1]}"


def _load(
    original: Any, updater: Any, named_tensors: Any, load_format: str | None
) -> tuple[bool, str]:
    if isinstance(named_tensors, Unreadable):
        return False, (
            f"The weights were not updated, because the tensors cannot be read "
            f"({named_tensors.why}): send them as sglang.Engine does."
        )
    try:
        done: tuple[bool, str] = original(updater, named_tensors, load_format)
    except Exception as error:
        logger.exception("margingate: SGLang failed to load tensors.")
        return False, (
            f"The weights may be replaced in part, because SGLang raised {_named(error)}: "
            "send all of them again."
        )
    return done


def meet(original: Any, component: Any, *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """AROUND what makes groups with other processes, and sends weights to them."""
    try:
        done: tuple[bool, str] = original(component, *args, **kwargs)
    except Exception as error:
        return False, f"Nothing was done, because SGLang raised {_named(error)}."
    return done


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
