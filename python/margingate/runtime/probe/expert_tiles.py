"""Tiles of SGLang's fused Triton kernels for experts in FP8: large ones at all row counts.

SGLang has tuned tiles for each number of rows. On Hopper a kernel with tiles of fewer rows than
LARGE exchanges its operands, and gives a row other bits than one with larger tiles; a forward of
many rows needs these. So a forward of few rows gets the tiles that SGLang tuned for more rows.
Whether that makes one class is then measured, as for any operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LARGE = 64  # rows of a tile
MOST = 1 << 14  # rows of a forward, up to which larger tiles are looked for
FP8 = "fp8_w8a8"  # as SGLang's files of tuned tiles call it
ROWS = "BLOCK_SIZE_M"  # of a tile, as they call these
Tuned = Callable[..., Any]


def tuned_tiles(  # noqa: PLR0917  SGLang's own parameters
    original: Tuned,
    w1_shape: Any,
    w2_shape: Any,
    top_k: int,
    dtype: str | None,
    M: int,  # noqa: N803
    *more: Any,
    **named: Any,
) -> Any:
    """AROUND try_get_optimal_moe_config, whose result has the tiles of one or of both products.

    Args:
        dtype: FP8, or another, whose tiles are left alone.
        M: rows of the forward.
    """
    found = original(w1_shape, w2_shape, top_k, dtype, M, *more, **named)
    larger, rows = found, M
    while dtype == FP8 and _tile_rows(larger) < LARGE:
        rows *= 2
        if rows > MOST:
            return found
        larger = original(w1_shape, w2_shape, top_k, dtype, rows, *more, **named)
    return larger


def _tile_rows(found: Any) -> int:
    """Of the first product, whose rows the second shares."""
    config = found[0] if isinstance(found, tuple) else found
    return int(config[ROWS])
