"""Schedules in timm's VisionTransformer and VisionTransformerDistilled (ViT, DeiT, DINOv2, CLIP, SigLIP, ...).

Checked against timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from prunesearch.errors import ModelError
from prunesearch.models.plan import Plan, make_plan
from prunesearch.models.step import TokenState
from prunesearch.models.swap import Place, Swapped, check_takes_call, check_was_called, ours, timm_class
from prunesearch.models.transformer import (
    AttendingAttention,
    Heads,
    Reduced,
    Run,
    SteppingBlock,
    block_places,
    check_plan,
    run_blocks,
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

SUPPORTS = "timm VisionTransformer and VisionTransformerDistilled with plain blocks"


class BlocksCall:
    """Passed to `blocks` in one pass, besides the tokens. The blocks set `left`, the state after them.

    This is no dataclass, because FSDP would copy it and look for tensors in it.
    """

    def __init__(self, run: Run, checkpointed: bool) -> None:
        self.run, self.checkpointed = run, checkpointed
        self.left: TokenState | None = None


class ReducedAttention(AttendingAttention, Attention):
    """timm's Attention that can be listened to."""

    stands_for = Attention

    def heads_of(self: Any, x_BNC: Tensor, **given: Any) -> Heads:
        """Query, key and value, after the norms of query and key."""
        images, tokens, _ = x_BNC.shape
        qkv = self.qkv(x_BNC).reshape(images, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return self.q_norm(query), self.k_norm(key), value


class ReducedBlock(SteppingBlock, Block):
    """timm's Block that can run steps."""

    stands_for = Block


class ReducedBlocks(Swapped, nn.Sequential):
    """A model's `blocks`. With a call, they run the schedule."""

    stands_for = nn.Sequential

    def forward(self, input: Tensor, call: BlocksCall | None = None) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N at the end, C)."""
        if call is None:
            return nn.Sequential.forward(self, input)
        call.left = run_blocks(self, call.run, TokenState(input), call.checkpointed)
        return call.left.tokens_BNC


class _Reduced(Reduced):
    """What both classes share: timm calls `blocks` as one module, and no block reads where its tokens are."""

    def stem(self: Any, x: Tensor) -> tuple[Tensor, None]:
        """Image to the tokens that the first block gets."""
        x = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(self.patch_drop(x)), None

    def run_blocks(self: Any, run: Run, tokens_BNC: Tensor) -> TokenState:
        """The tokens of the stem to the state after the last block."""
        call = BlocksCall(run, self.grad_checkpointing)
        check_takes_call(self.blocks, "model.blocks")
        tokens_BNC = self.blocks(tokens_BNC, call=call)
        check_was_called(call.left, "model.blocks")
        return call.left._replace(tokens_BNC=tokens_BNC)  # type: ignore[union-attr]

    def _head(self: Any, state: TokenState, plan: Plan) -> Tensor:
        _check_pooling(plan, self)  # again, because images of another size may have another plan
        return super()._head(state, plan)


class ReducedVisionTransformer(_Reduced, VisionTransformer):
    """A VisionTransformer with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = VisionTransformer


class ReducedVisionTransformerDistilled(_Reduced, VisionTransformerDistilled):
    """A VisionTransformerDistilled with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = VisionTransformerDistilled


MODULES = (
    "timm.models.vision_transformer",
    "timm.models.deit",
    "timm.models.vision_transformer_hybrid",
    "timm.models.vitamin",
    "prunesearch.models.digits_vit",
)
"""Python modules with functions that build models of these classes (among others)."""


def is_family(model: nn.Module) -> bool:
    """True for exactly VisionTransformer and VisionTransformerDistilled, with or without a schedule."""
    return timm_class(model) in (VisionTransformer, VisionTransformerDistilled)


def shape_of(model: Any) -> ModelShape:
    """The shape for the model's own input size. Raises ModelError for blocks that are not timm's plain Block, and for
    layers whose cost is not known."""
    check_blocks(model, nn.Sequential, (Block,), (Attention,))
    classes = model.has_class_token + isinstance(model, VisionTransformerDistilled)
    return shape_from(model, block_shape(model), class_tokens=classes)


def plan_of(model: Any, schedule: Schedule) -> Plan:
    """The schedule resolved for a model, which is not changed. Raises ModelError or ScheduleError."""
    plan = make_plan(schedule, shape_of(model))
    _check_pooling(plan, model)
    return check_plan(plan, model)


def _check_pooling(plan: Plan, model: Any) -> None:
    """Raise ModelError for a pooling that could not leave tokens out or weight them."""
    if (plan.merges or plan.decisions_learn) and model.global_pool == "prr":
        raise ModelError(
            "model: global_pool='prr' attends over the final tokens without room for the sizes of merged ones or for "
            "masked ones. Possible: drop, fuse or squeeze, by scores that do not learn. Choose one of those."
        )


def places_of(model: Any, plan: Plan) -> Sequence[Place]:
    """The modules whose class is swapped."""
    return [
        Place("model", model, ours(model), calls=True),
        Place("model.blocks", model.blocks, ReducedBlocks, calls=True),
        *block_places(model, plan),
    ]


def adapted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """See `prunesearch.models.adapted`. Resizes position embeddings too, as timm does for its own weights."""
    return checkpoint_filter_fn(state, model)
