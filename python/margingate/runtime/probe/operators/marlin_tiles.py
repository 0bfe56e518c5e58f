"""Layers by Marlin: one tile for steps of up to 64 rows, where it is compiled, right and fast.

SGLang's Marlin has a tile for up to 16 rows and another above. Steps of few requests would be
padded to the second, or those of many run in pieces of the first. `compat/compute/marlin_rows` has
the first for more rows. A start compares it with SGLang's own results of 16 rows, bit for bit, and
leaves the layers as they are where any differs. No clock decides: the next start is to do the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from margingate.errors import first_line
from margingate.runtime.compat.compute import marlin_rows
from margingate.runtime.compat.process import ranks
from margingate.runtime.probe.operators.operator import Operator, Packed

logger = logging.getLogger(__name__)

FEW = 16  # rows of SGLang's products in that tile
COMPARED = (17, 31, 32, 33, 48, 49, 63, 64)  # rows of the kernel's


def settle(groups: Mapping[str, Sequence[Operator]]) -> bool:
    """Use the kernel for all of these layers that it is for, or for none. Mutates SGLang's module.

    Args:
        groups: operators by signature.

    Returns:
        Whether it is used: operators are others now.
    """
    kinds = [same for same in groups.values() if _is_for(same[0])]
    if not kinds:
        return False
    reasons = [each for each in ranks.of_all(_why_not(kinds)) if each]
    if reasons:
        marlin_rows.give_up()
        logger.warning(
            "margingate: layers by Marlin have other bits above %d rows than below, and one tile "
            "for both is not used: %s.",
            FEW,
            reasons[0],
        )
    return not reasons


def _is_for(operator: Operator) -> bool:
    packed = isinstance(operator, Packed) and operator.device.type == "cuda"
    return packed and marlin_rows.form_of(operator.module) is not None


def _why_not(kinds: Sequence[Sequence[Operator]]) -> str:
    """What keeps layers from the kernel, "" if nothing; it is in use then."""
    forms = {marlin_rows.form_of(same[0].module) for same in kinds}
    try:
        with torch.inference_mode():
            expected = [_in_pieces(same[0], max(COMPARED)) for same in kinds]
            marlin_rows.use(form for form in forms if form is not None)
            for same, rows in zip(kinds, expected, strict=True):
                if not _agrees(same[0], rows):
                    return f"{same[0].name} has other bits in it"
    except Exception as error:  # a compiler's, a launch's or a module's that is not there
        return first_line(error)
    return ""


def _in_pieces(operator: Operator, count: int) -> torch.Tensor:
    sample = operator.sample(count)
    return torch.cat([operator.run(sample[i : i + FEW]) for i in range(0, count, FEW)])


def _agrees(operator: Operator, expected: torch.Tensor) -> bool:
    sample = operator.sample(len(expected))
    return all(torch.equal(operator.run(sample[:n]), expected[:n]) for n in COMPARED)
