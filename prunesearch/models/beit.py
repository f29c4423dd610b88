"""Schedules in timm's Beit (BEiT, BEiT v2).

Checked against timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.beit import Attention, Beit, Block, checkpoint_filter_fn
from torch import Tensor, nn

from prunesearch.models.pair_bias import BiasedAttention, PairBias
from prunesearch.models.plan import Plan, make_plan
from prunesearch.models.swap import Place, timm_class
from prunesearch.models.transformer import GammaBlock, Heads, Reduced, block_places, check_plan, heads_of_fused
from prunesearch.models.transformer import block_inputs as block_inputs
from prunesearch.models.transformer import input_size as input_size
from prunesearch.models.transformer import patch_tokens_of as patch_tokens_of
from prunesearch.models.transformer import patches_of as patches_of
from prunesearch.models.transformer import run_from as run_from
from prunesearch.models.transformer import size_keywords as size_keywords
from prunesearch.models.vit_shape import block_shape, check_blocks, shape_from
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape

SUPPORTS = "timm Beit"
MODULES = ("timm.models.beit",)
"""Python modules with functions that build models of this class."""


class ReducedBeitAttention(BiasedAttention, Attention):
    """BEiT's Attention that can be listened to."""

    stands_for = Attention

    def heads_of(self: Any, x_BNC: Tensor, **given: Any) -> Heads:
        """Query, key and value."""
        return heads_of_fused(self, x_BNC)

    def pair_bias(self: Any, given: Mapping[str, Any]) -> Tensor | None:
        """That of this block and that of all blocks."""
        shared: Tensor | None = given.get("shared_rel_pos_bias")
        shared = None if shared is None else shared[None]
        if self.relative_position_bias_table is None:
            return shared
        own: Tensor = self._get_rel_pos_bias()
        return own if shared is None else own + shared


class ReducedBeitBlock(GammaBlock, Block):
    """BEiT's Block that can run steps."""

    stands_for = Block


class ReducedBeit(Reduced, Beit):
    """A Beit with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = Beit

    def stem(self: Any, x: Tensor) -> tuple[Tensor, PairBias]:
        """Image to the tokens that the first block gets, and their places."""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x if self.pos_embed is None else x + self.pos_embed
        return self.pos_drop(x), ReducedBeit.positions(self)

    def positions(self: Any) -> PairBias:
        """The places of the tokens of an image."""
        height, width = self.patch_embed.grid_size
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        prefix, device = self.num_prefix_tokens, self.cls_token.device
        return PairBias(height, width, prefix, device, {"shared_rel_pos_bias": shared})


def is_family(model: nn.Module) -> bool:
    """True for exactly Beit, with or without a schedule."""
    return timm_class(model) is Beit


def shape_of(model: Any) -> ModelShape:
    """The shape for the model's own input size. Raises ModelError for blocks that are not timm's own, and for layers
    whose cost is not known."""
    check_blocks(model, nn.ModuleList, (Block,), (Attention,))
    return shape_from(model, block_shape(model), class_tokens=1, has_positions=True)


def plan_of(model: Any, schedule: Schedule) -> Plan:
    """The schedule resolved for a model, which is not changed. Raises ModelError or ScheduleError."""
    return check_plan(make_plan(schedule, shape_of(model)), model)


def places_of(model: Any, plan: Plan) -> Sequence[Place]:
    """The modules whose class is swapped."""
    return [Place("model", model, ReducedBeit, calls=True), *block_places(model, plan, in_attention=True)]


def adapted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """See `prunesearch.models.adapted`. Resizes positions too, as timm does for its own weights."""
    return checkpoint_filter_fn(state, model)
