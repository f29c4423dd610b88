"""Rotary positions that travel with their tokens. A token between the places of the image gets the angles there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prunesearch.errors import ModelError
from prunesearch.models.places import grid_places, nearest_index, nearest_place

FEW = 8
"""Rows or columns of a grid below which an angle may grow by half a turn or more from one to the next, so that a table
alone does not tell by how much. With 16 of them, timm's angles grow by one radian at most."""
FINER = 4


class Rotary:
    """The rotary tables of one pass.

    table: sine and cosine of the angles of each patch token of the image, in its order, (n, 2 D) for all blocks, or
    (depth, H, n, 2 D). The angles are linear in row and column, as in all tables that timm makes. height, width: of the
    image, in patches. between: whether tokens may lie between the places of the image. finer: the table of an image
    with `FINER` times as many rows and columns; for small images whose tables always span the same angles.
    """

    in_attention = False

    def __init__(self, table: Tensor, height: int, width: int, between: bool, finer: Tensor | None = None) -> None:
        self.table, self.height, self.width, self.between, self.finer = table, height, width, between, finer
        self.by_block = table.ndim == 4
        self.steps = (1 if width > 1 else 0, width if height > 1 else 0)
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
        column_HD, row_HD = (self._growth(table_HnD, step) for step in self.steps)
        angle = way_Bn2[:, None, :, :1] * row_HD[:, None] + way_Bn2[:, None, :, 1:] * column_HD[:, None]
        sin, cos = rows.chunk(2, dim=-1)
        more_sin, more_cos = angle.sin(), angle.cos()
        turned = torch.cat([sin * more_cos + cos * more_sin, cos * more_cos - sin * more_sin], dim=-1)
        return turned.to(rows.dtype)

    def _growth(self, table_HnD: Tensor, step: int) -> Tensor:
        """How much the angles grow over one row or column, (H, D), fp32. step: how far that is in the table."""
        turn_HD = self._turn(table_HnD, step)
        if self.finer is None:
            return turn_HD
        growth_HD = FINER * self._turn(self.finer[None], step if step <= 1 else FINER * step)
        # where whole turns are all that differs; else the finer table has the same angle from place to place
        turns_HD = (growth_HD - turn_HD) / math.tau
        return torch.where((turns_HD - turns_HD.round()).abs() < 1e-3, growth_HD, turn_HD)

    @staticmethod
    def _turn(table_HnD: Tensor, step: int) -> Tensor:
        """The angles from the first place to the one `step` later, within half a turn, (H, D), fp32."""
        first, second = table_HnD[:, 0].float(), table_HnD[:, step].float()
        sin, cos = first.chunk(2, dim=-1)
        next_sin, next_cos = second.chunk(2, dim=-1)
        return torch.atan2(next_sin * cos - next_cos * sin, next_cos * cos + next_sin * sin)


def rotary_of(model: Any, table: Tensor | None, height: int, width: int) -> Rotary | None:
    """The positions of a model, dense or with its schedule; None without a table. Raises ModelError, see below."""
    if table is None:
        return None
    plan, finer = getattr(model, "_plan", None), None
    between = plan is not None and plan.leaves_places
    changes = model.training and getattr(model.rope, "aug_active", False)  # each table is stretched at random
    if between and min(height, width) < FEW and table.ndim == 2 and not changes:
        finer = model.rope.get_embed(shape=(FINER * height, FINER * width))
        if len(finer) == len(table):  # a table that was made once, for one size
            finer = None
            _check_ways(model.rope, height, width)
    return Rotary(table, height, width, between, finer)


def _check_ways(rope: Any, height: int, width: int) -> None:
    """Raise ModelError where angles grow by half a turn or more from patch to patch, so that none is known between."""
    reference = getattr(rope, "ref_feat_shape", None)  # rows and columns over which the angles span the same
    if reference is not None and any(
        most / patches >= math.pi for most, patches in zip(reference, (height, width), strict=True) if patches > 1
    ):
        raise ModelError(
            f"model: this schedule puts tokens between patches (fuse, pool, or position: mean), and with {height} x "
            f"{width} patches the rotary angles from one to the next are too far apart to know those between. "
            f"Possible: larger images, dynamic_img_size=True, or drop and verbs with position: host. Use one of those."
        )
