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

_looked_up: dict[tuple[Any, ...], int] = {}  # rows whose tiles are taken, by what asks for them


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

    Larger tiles are looked for once for each row count: eager forwards ask in every layer.

    Args:
        dtype: FP8, or another, whose tiles are left alone.
        M: rows of the forward.
    """

    def find(rows: int) -> Any:
        return original(w1_shape, w2_shape, top_k, dtype, rows, *more, **named)

    if dtype != FP8:
        return find(M)
    asked = (tuple(w1_shape), tuple(w2_shape), top_k, M, str((more, named)))
    if asked not in _looked_up:
        _looked_up[asked] = _rows_of_large_tiles(find, M)
    return find(_looked_up[asked])


def _rows_of_large_tiles(find: Tuned, rows: int) -> int:
    """The first of `rows`, twice, four times as many, which has large tiles; `rows` if none has."""
    more = rows
    while _tile_rows(find(more)) < LARGE:
        more *= 2
        if more > MOST:
            return rows
    return more


def _tile_rows(found: Any) -> int:
    """Of the first product, whose rows the second shares."""
    config = found[0] if isinstance(found, tuple) else found
    return int(config[ROWS])
