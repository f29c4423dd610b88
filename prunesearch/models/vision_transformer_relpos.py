"""Schedules in timm's VisionTransformerRelPos (ViTs with relative positions, as in Swin).

Checked against timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models import vision_transformer_relpos as theirs
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from prunesearch.errors import ModelError
from prunesearch.models.layers import macs_per_token
from prunesearch.models.pair_bias import BiasedAttention, PairBias
from prunesearch.models.plan import Plan, make_plan
from prunesearch.models.swap import Place, timm_class
from prunesearch.models.transformer import (
    Heads,
    PostNormBlock,
    Reduced,
    SteppingBlock,
    block_places,
    check_plan,
    split_heads,
)
from prunesearch.models.transformer import block_inputs as block_inputs
from prunesearch.models.transformer import input_size as input_size
from prunesearch.models.transformer import patch_tokens_of as patch_tokens_of
from prunesearch.models.transformer import patches_of as patches_of
from prunesearch.models.transformer import run_from as run_from
from prunesearch.models.transformer import size_keywords as size_keywords
from prunesearch.models.vit_shape import block_shape, check_blocks, shape_from
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape

SUPPORTS = "timm VisionTransformerRelPos"
MODULES = ("timm.models.vision_transformer_relpos",)
"""Python modules with functions that build models of this class."""


class ReducedRelPosAttention(BiasedAttention, RelPosAttention):
    """timm's RelPosAttention that can be listened to."""

    stands_for = RelPosAttention

    def heads_of(self: Any, x_BNC: Tensor, **given: Any) -> Heads:
        """Query, key and value, after the norms of query and key."""
        query, key, value = split_heads(self, self.qkv(x_BNC))
        return self.q_norm(query), self.k_norm(key), value

    def pair_bias(self: Any, given: Mapping[str, Any]) -> Tensor | None:
        """That of this block, or that of all blocks. Where attention is not fused, timm calls the module."""
        if self.rel_pos is None:
            bias: Tensor | None = given["shared_rel_pos"]
        else:
            bias = self.rel_pos.get_bias() if self.fused_attn else self.rel_pos(0.0)
        return bias


class ReducedRelPosBlock(SteppingBlock, RelPosBlock):
    """timm's RelPosBlock that can run steps."""

    stands_for = RelPosBlock


class ReducedResPostRelPosBlock(PostNormBlock, ResPostRelPosBlock):
    """timm's ResPostRelPosBlock that can run steps."""

    stands_for = ResPostRelPosBlock


class ReducedVisionTransformerRelPos(Reduced, VisionTransformerRelPos):
    """A VisionTransformerRelPos with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = VisionTransformerRelPos

    def stem(self: Any, x: Tensor) -> tuple[Tensor, PairBias]:
        """Image to the tokens that the first block gets, and their places."""
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x, ReducedVisionTransformerRelPos.positions(self)

    def positions(self: Any) -> PairBias:
        """The places of the tokens of an image."""
        height, width = self.patch_embed.grid_size
        shared = None if self.shared_rel_pos is None else self.shared_rel_pos.get_bias()
        rel_pos = self.blocks[0].attn.rel_pos if shared is None else self.shared_rel_pos
        device = rel_pos.relative_position_index.device  # not every model has a class token
        return PairBias(height, width, self.num_prefix_tokens, device, {"shared_rel_pos": shared})


def is_family(model: nn.Module) -> bool:
    """True for exactly VisionTransformerRelPos, with or without a schedule."""
    return timm_class(model) is VisionTransformerRelPos


def shape_of(model: Any) -> ModelShape:
    """The shape for the model's own input size. Raises ModelError for blocks and positions that are not timm's own, and
    for layers whose cost is not known."""
    check_blocks(model, nn.ModuleList, (RelPosBlock, ResPostRelPosBlock), (RelPosAttention,))
    shape = shape_from(model, block_shape(model), class_tokens=int(model.cls_token is not None), has_positions=True)
    return replace(shape, stem_macs=shape.stem_macs + _position_macs(model))


def _position_macs(model: Any) -> int:
    """MACs of the small MLPs that make biases of places. They run once in a pass, whatever tokens are left.

    Raises ModelError for positions that are not timm's own.
    """
    shared = model.shared_rel_pos
    found = {} if shared is None else {"model.shared_rel_pos": shared}
    for index, block in enumerate(model.blocks):
        if shared is None or block.attn.rel_pos is not None:
            found[f"model.blocks[{index}].attn.rel_pos"] = block.attn.rel_pos
    macs = 0
    for path, rel_pos in found.items():
        if type(rel_pos) not in (RelPosBias, RelPosMlp):
            raise ModelError(
                f"{path}: {type(rel_pos).__module__}.{type(rel_pos).__qualname__} is not supported. Possible: timm's "
                f"RelPosBias or RelPosMlp, exactly; another class may compute something else. Put that back."
            )
        if type(rel_pos) is RelPosMlp:
            height, width = rel_pos.window_size
            macs += (2 * height - 1) * (2 * width - 1) * macs_per_token(rel_pos.mlp, f"{path}.mlp")
    return macs


def plan_of(model: Any, schedule: Schedule) -> Plan:
    """The schedule resolved for a model, which is not changed. Raises ModelError or ScheduleError."""
    return check_plan(make_plan(schedule, shape_of(model)), model)


def places_of(model: Any, plan: Plan) -> Sequence[Place]:
    """The modules whose class is swapped."""
    return [
        Place("model", model, ReducedVisionTransformerRelPos, calls=True),
        *block_places(model, plan, in_attention=True),
    ]


def adapted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """See `prunesearch.models.adapted`. Resizes tables of biases too, as timm does for its own weights."""
    resize = getattr(theirs, "checkpoint_filter_fn", None)  # timm 1.0.24 does not have it yet
    return state if resize is None else resize(state, model)
