"""A tensor stored in pieces, as one expression."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from llmconvert.checkpoint.megatron import Tile
from llmconvert.errors import BadInput
from llmconvert.tensors.expressions import Expression, beside, concat, stored


def assemble(name: str, tiles: Sequence[Tile]) -> Expression:
    """The tensor that tiles make up: bands of rows, each of tiles side by side.

    Args:
        name: for messages.
        tiles: of a vector or a matrix.

    Raises:
        BadInput: they leave a gap, overlap, or differ in dtype.
    """
    bands: list[Expression] = []
    try:
        for row, band in groupby(sorted(tiles, key=lambda tile: (tile.row, tile.column)), key=lambda tile: tile.row):
            parts, column = [], 0
            for tile in band:
                if tile.column != column:
                    raise ValueError(f"columns from {column} on")
                parts.append(stored(tile.stored))
                column += tile.stored.shape[1] if len(tile.stored.shape) > 1 else 1
            if row != sum(expression.rows for expression in bands):
                raise ValueError(f"rows from {row} on")
            bands.append(parts[0] if len(parts) == 1 else beside(parts))
        return concat(bands)
    except ValueError as error:
        raise BadInput(f"the chunks of `{name}` do not fit together: {error}") from None
