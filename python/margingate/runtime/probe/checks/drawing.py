"""Row counts that a start draws anew for the checks of the whole model.

What the same counts show at each start they show at every start, and no other fault. So each start
draws some more, by a seed that is logged: next to the ends of classes, and anywhere between.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Iterable
from typing import Any

from margingate.runtime.compat.process.ranks import gathered

logger = logging.getLogger(__name__)

AT_BORDERS, ANYWHERE = 2, 3  # counts that are drawn of each kind


def shared(scheduler: Any) -> random.Random:
    """A generator with a new seed, the same on all ranks; a collective where there are several."""
    seed = gathered(scheduler, secrets.randbits(32))[0]
    logger.info("margingate: the checks of this start draw row counts with seed %d", seed)
    return random.Random(seed)


def row_counts(draw: random.Random, largest: int, borders: Iterable[int]) -> list[int]:
    """A few counts from 1 to `largest`, ascending.

    Args:
        borders: first and last row counts of classes; their neighbours are drawn too.
    """
    near = sorted({n + d for n in borders for d in (-1, 0, 1) if 1 <= n + d <= largest})
    drawn = draw.sample(near, min(AT_BORDERS, len(near)))
    return sorted({*drawn, *(draw.randint(1, largest) for _ in range(ANYWHERE))})
