"""Rotary positions that travel with their tokens. A token between the places of the image gets the angles there."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from torch import Tensor

from prunesearch.errors import ModelError
from prunesearch.models.places import grid_places, nearest_index, nearest_place

MOST = 3.0
"""An angle that grows by this much or less, in radians, from one patch to the next is known from a table: by less than
half a turn."""


class Rotary:
    """The rotary tables of one pass.

    table: sine and cosine of the angles of each patch token of the image, in its order, (n, 2 D) for all blocks, or
    (depth, H, n, 2 D). The angles are linear in row and column, as in all tables that timm makes. height, width: of the
    image, in patches. between: whether tokens may lie between the places of the image. growth: how much the angles grow
    over one row and over one column, (D,) each, where the table does not tell.
    """

    in_attention = False

    def __init__(
        self, table: Tensor, height: int, width: int, between: bool, growth: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.table, self.height, self.width, self.between, self.growth = table, height, width, between, growth
        self.by_block = table.ndim == 4
        self.grid_n2 = grid_places(height, width, table.device)

    def found(self, place_Bn2: Tensor | None) -> Tensor | None:
        """The rows of the table for all blocks, (B, 1, n, 2 D); or the places, when each block has its own table."""
        if place_Bn2 is None or self.by_block:
            return place_Bn2
        return self._rows(self.table[None], place_Bn2)

    def keywords(self, index: int, found: Tensor | None) -> dict[str, Any]:
        """The keyword `rope` of a block, as timm gives it: with a batch where images keep different tokens."""
        table = self.table[index] if self.by_block else self.table
        if found is None:
            return {"rope": table}
        return {"rope": self._rows(table, found) if self.by_block else found}

    def _rows(self, table_HnD: Tensor, place_Bn2: Tensor) -> Tensor:
        """Sine and cosine of the angles at these places, (B, H, n, 2 D)."""
        images, tokens, _ = place_Bn2.shape
        index_Bn = nearest_index(place_Bn2, self.height, self.width)
        rows = table_HnD.index_select(1, index_Bn.flatten()).unflatten(1, (images, tokens)).transpose(0, 1)
        if not self.between:
            return rows
        # the angles of the nearest place, turned on by the way from there: exact at the places of the image
        way_Bn2 = place_Bn2 - nearest_place(place_Bn2)
        row_HD, column_HD = self._growth(table_HnD)
        angle = way_Bn2[:, None, :, :1] * row_HD[:, None] + way_Bn2[:, None, :, 1:] * column_HD[:, None]
        sin, cos = rows.chunk(2, dim=-1)
        more_sin, more_cos = angle.sin(), angle.cos()
        turned = torch.cat([sin * more_cos + cos * more_sin, cos * more_cos - sin * more_sin], dim=-1)
        return turned.to(rows.dtype)

    def _growth(self, table_HnD: Tensor) -> tuple[Tensor, Tensor]:
        """How much the angles grow over one row and over one column, (H, D) each, fp32."""
        if self.growth is not None:
            row_D, column_D = self.growth
            return row_D[None], column_D[None]
        one_row, one_column = (self.width if self.height > 1 else 0), (1 if self.width > 1 else 0)
        return _turn(table_HnD, one_row), _turn(table_HnD, one_column)


def _turn(table_HnD: Tensor, step: int) -> Tensor:
    """The angles from the first place to the one `step` later, within half a turn, (H, D), fp32."""
    first, second = table_HnD[:, 0].float(), table_HnD[:, step].float()
    sin, cos = first.chunk(2, dim=-1)
    next_sin, next_cos = second.chunk(2, dim=-1)
    return torch.atan2(next_sin * cos - next_cos * sin, next_cos * cos + next_sin * sin)


def rotary_of(model: Any, table: Tensor | None, height: int, width: int) -> Rotary | None:
    """The positions of a model, dense or with its schedule; None without a table. Raises ModelError as `_growth_of`."""
    if table is None:
        return None
    plan, growth = getattr(model, "_plan", None), None
    between = plan is not None and plan.leaves_places
    changes = model.training and getattr(model.rope, "aug_active", False)  # each table is stretched at random
    if between and not changes:
        growth = _growth_of(model.rope, height, width)
    return Rotary(table, height, width, between, growth)


def _growth_of(rope: Any, height: int, width: int) -> tuple[Tensor, Tensor] | None:
    """How much the angles grow over one row and over one column, (D,) each, for images so small that the growth may be
    half a turn or more. None where it is less, so that the table of the image tells.

    Taken from images with more rows or columns, over which the angles span the same. Raises ModelError for a table that
    was made once, for one size.
    """
    reference = getattr(rope, "ref_feat_shape", None)
    if reference is not None:
        spans, fixed = reference, rope.feat_shape is not None
    elif isinstance(rope, RotaryEmbeddingDinoV3):  # from -1 to 1, in turns
        spans, fixed = (2 * math.tau / min(1.0, rope.temperature or rope.min_period or 1.0),) * 2, False
    else:  # the same angle from patch to patch in all images, one radian at most
        return None
    sizes = (height, width)
    growths = [span / size if size > 1 else 0.0 for span, size in zip(spans, sizes, strict=True)]
    if fixed and max(growths) >= math.pi:
        raise ModelError(
            f"model: this schedule puts tokens between patches (fuse, pool, or position: mean), and with {height} x "
            f"{width} patches the rotary angles from one to the next are too far apart to know those between. "
            f"Possible: larger images, dynamic_img_size=True, or drop and verbs with position: host. Use one of those."
        )
    if fixed or max(growths) <= MOST:
        return None
    row_times, column_times = (max(math.ceil(growth / MOST), 2) for growth in growths)
    rows_nD = rope.get_embed(shape=(row_times * height, 1))
    columns_nD = rope.get_embed(shape=(1, column_times * width))
    return row_times * _turn(rows_nD[None], 1)[0], column_times * _turn(columns_nD[None], 1)[0]
