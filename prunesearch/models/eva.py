"""Schedules in timm's Eva (DINOv3, EVA, EVA-02, Perception Encoder, ViTs with rotary positions).

Checked against timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm, checkpoint_filter_fn
from torch import Tensor, nn

from prunesearch.models.plan import Plan, make_plan
from prunesearch.models.rotary import Rotary, rotary_of
from prunesearch.models.swap import Place, timm_class
from prunesearch.models.transformer import (
    AttendingAttention,
    GammaBlock,
    Heads,
    PostNormBlock,
    Reduced,
    block_places,
    check_plan,
    heads_of_fused,
    refuse_patch_dropout,
    split_heads,
)
from prunesearch.models.transformer import block_inputs as block_inputs
from prunesearch.models.transformer import input_size as input_size
from prunesearch.models.transformer import patch_tokens_of as patch_tokens_of
from prunesearch.models.transformer import patches_of as patches_of
from prunesearch.models.transformer import run_from as run_from
from prunesearch.models.transformer import size_keywords as size_keywords
from prunesearch.models.vit_shape import block_shape, check_blocks, head_dim_of, shape_from
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape

SUPPORTS = "timm Eva"
MODULES = ("timm.models.eva", "prunesearch.models.scenes_vit")
"""Python modules with functions that build models of this class (among others)."""


class ReducedEvaAttention(AttendingAttention, EvaAttention):
    """timm's EvaAttention that can be listened to."""

    stands_for = EvaAttention

    def heads_of(self: Any, x_BNC: Tensor, **given: Any) -> Heads:
        """Query and key, after their norms and turned by their positions, and value."""
        if self.qkv is None:
            return _turned(self, _separate(self, x_BNC), given.get("rope"))
        return _turned(self, heads_of_fused(self, x_BNC), given.get("rope"))


class ReducedAttentionRope(AttendingAttention, AttentionRope):
    """timm's AttentionRope that can be listened to."""

    stands_for = AttentionRope

    def heads_of(self: Any, x_BNC: Tensor, **given: Any) -> Heads:
        """Query and key, after their norms and turned by their positions, and value."""
        heads = _separate(self, x_BNC) if self.qkv is None else split_heads(self, self.qkv(x_BNC))
        return _turned(self, heads, given.get("rope"))


def _separate(attention: Any, x_BNC: Tensor) -> Heads:
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    head_dim = head_dim_of(attention)
    query, key, value = (layer(x_BNC).unflatten(-1, (-1, head_dim)).transpose(1, 2) for layer in layers)
    return query, key, value


def _turned(attention: Any, heads: Heads, rope: Tensor | None) -> Heads:
    """As timm turns them: patch tokens only. Keys and values that several heads share are repeated."""
    query, key, value = attention.q_norm(heads[0]), attention.k_norm(heads[1]), heads[2]
    if rope is not None:
        prefix, half = attention.num_prefix_tokens, attention.rotate_half
        query, key = (
            torch.cat([one[:, :, :prefix], apply_rot_embed_cat(one[:, :, prefix:], rope, half=half)], dim=2)
            for one in (query, key)
        )
        query, key = query.type_as(value), key.type_as(value)
    groups = getattr(attention, "num_kv_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return query, key, value


class ReducedEvaBlock(GammaBlock, EvaBlock):
    """timm's EvaBlock that can run steps."""

    stands_for = EvaBlock


class ReducedEvaBlockPostNorm(PostNormBlock, EvaBlockPostNorm):
    """timm's EvaBlockPostNorm that can run steps."""

    stands_for = EvaBlockPostNorm


class ReducedEva(Reduced, Eva):  # type: ignore[misc]  # Eva.forward_intermediates has no output_dict
    """An Eva with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = Eva

    def stem(self: Any, x: Tensor) -> tuple[Tensor, Rotary | None]:
        """Image to the tokens that the first block gets, and their rotary positions."""
        refuse_patch_dropout(self)
        height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        tokens_BNC, table = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(tokens_BNC), rotary_of(self, table, height, width)

    def positions(self: Any) -> Rotary | None:
        """The rotary positions of images of the model's own size."""
        height, width = self.patch_embed.grid_size
        if self.rope is None:
            return None
        keeps_table = not self.dynamic_img_size and hasattr(self.rope, "feat_shape")
        table = self.rope.get_embed() if keeps_table else self.rope.get_embed(shape=(height, width))
        return rotary_of(self, table, height, width)


def is_family(model: nn.Module) -> bool:
    """True for exactly Eva, with or without a schedule."""
    return timm_class(model) is Eva


def shape_of(model: Any) -> ModelShape:
    """The shape for the model's own input size. Raises ModelError for blocks that are not timm's own, and for layers
    whose cost is not known."""
    check_blocks(model, nn.ModuleList, (EvaBlock, EvaBlockPostNorm), (EvaAttention, AttentionRope))
    classes = int(model.cls_token is not None)
    return shape_from(model, block_shape(model), class_tokens=classes, has_positions=model.rope is not None)


def plan_of(model: Any, schedule: Schedule) -> Plan:
    """The schedule resolved for a model, which is not changed. Raises ModelError or ScheduleError."""
    return check_plan(make_plan(schedule, shape_of(model)), model)


def places_of(model: Any, plan: Plan) -> Sequence[Place]:
    """The modules whose class is swapped."""
    return [Place("model", model, ReducedEva, calls=True), *block_places(model, plan)]


def adapted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """See `prunesearch.models.adapted`. Resizes position embeddings too, as timm does for its own weights."""
    return checkpoint_filter_fn(state, model)
