"""Schedules in timm's VisionTransformer and VisionTransformerDistilled (ViT, DeiT, DINOv2, CLIP, SigLIP, ...).

The model's class is swapped for a subclass whose `forward` is one loop over the blocks. A block without a stage runs
timm's own code; a block with one runs the same layers with a step between attention and MLP, or before both.
Checked against timm 1.0.31. Letters in tensor names as in `tokens/registry.py`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.errors import ModelError
from prunesearch.schedule import ModelShape, Schedule, Stage, Step, options_of, resolve
from prunesearch.tokens import REDUCERS, SCORERS
from prunesearch.tokens.registry import Attended
from prunesearch.tokens.regroup import Evidence, TokenState, gather_evidence, take_step

SUPPORTS = "timm VisionTransformer and VisionTransformerDistilled with plain blocks"


@dataclass(frozen=True)
class BlockPlan:
    """What one block does besides its own work. `ahead`: the stages at the next block's `pre` that decide by what
    this block's attention sees."""

    pre: tuple[Step, ...] = ()
    mid: tuple[Step, ...] = ()
    ahead: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A schedule resolved for one number of patch tokens."""

    schedule: Schedule
    shape: ModelShape
    blocks: tuple[BlockPlan, ...]
    merges: bool
    log_size_bias: bool


class _Reduced:
    """The forward pass with a schedule, for any class that is laid out as timm's VisionTransformer."""

    _plan: Plan

    def forward_features(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Image to normalised tokens (B, N at the end, C)."""
        return self._features(x, attn_mask, is_causal).tokens_BNC

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Image to logits."""
        state = self._features(x, attn_mask, is_causal)
        if not (self._plan.merges and _pools_over_patches(self)):
            return super().forward_head(state.tokens_BNC)  # type: ignore[misc]
        return self.head(self.head_drop(self.fc_norm(_pool_by_size(self, state))))

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits. Tokens alone do not say how many patches each stands for, so this refuses to guess."""
        if self._plan.merges and _pools_over_patches(self):
            raise ModelError(
                f"forward_head: this model pools over merged tokens (global_pool={self.global_pool!r}), whose sizes "
                f"are not in its input. Possible: model(images). Call the whole model."
            )
        return super().forward_head(x, pre_logits=pre_logits)  # type: ignore[misc]

    def forward_intermediates(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused: feature maps need every token at its place."""
        raise ModelError(
            "forward_intermediates: the model carries a token schedule, and feature maps need every token in its "
            "place. Possible: a model without one. Call remove_schedule(model) first."
        )

    def _features(self: Any, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> TokenState:
        if attn_mask is not None or is_causal:
            raise ModelError(
                "forward: attn_mask and is_causal cannot be combined with a token schedule, whose blocks see fewer and "
                "fewer tokens. Call the model without them, or remove_schedule(model) first."
            )
        x = self.patch_embed(x)
        x = self._pos_embed(x)
        x = self.norm_pre(self.patch_drop(x))
        state = TokenState(x)
        plan = _plan_for(self, x.shape[1] - self._plan.shape.prefix_tokens)
        for block, block_plan in zip(self.blocks, plan.blocks, strict=True):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                state = checkpoint(_run_block, block, block_plan, plan, state, use_reentrant=False)
            else:
                state = _run_block(block, block_plan, plan, state)
        return state._replace(tokens_BNC=self.norm(state.tokens_BNC))


class ReducedVisionTransformer(_Reduced, VisionTransformer):
    """A VisionTransformer with a token schedule; made by `apply_schedule`, never constructed."""


class ReducedVisionTransformerDistilled(_Reduced, VisionTransformerDistilled):
    """A VisionTransformerDistilled with a token schedule; made by `apply_schedule`, never constructed."""


REDUCED: dict[type, type] = {
    VisionTransformer: ReducedVisionTransformer,
    VisionTransformerDistilled: ReducedVisionTransformerDistilled,
}


def is_family(model: nn.Module) -> bool:
    """Exactly one of the classes here, with or without a schedule."""
    return type(model) in REDUCED or type(model) in REDUCED.values()


def apply(model: Any, schedule: Schedule) -> None:
    """Swap the class of a model without a schedule. Raises ModelError or ScheduleError, and then changes nothing."""
    plan = _make_plan(schedule, shape_of(model))
    if plan.merges and model.global_pool == "prr":
        raise ModelError(
            "model: global_pool='prr' attends over the final tokens without room for the sizes of merged ones. "
            "Possible: drop, fuse or squeeze. Choose one of those."
        )
    model._plan = plan
    model.__class__ = REDUCED[type(model)]


def remove(model: nn.Module) -> None:
    """Swap the class back."""
    for plain, reduced in REDUCED.items():
        if type(model) is reduced:
            model.__class__ = plain
            del model._plan


def schedule_of(model: nn.Module) -> Schedule | None:
    """The applied schedule, or None."""
    return model._plan.schedule if type(model) in REDUCED.values() else None  # type: ignore[union-attr,return-value]


def shape_of(model: Any) -> ModelShape:
    """The shape for the model's own input size. Raises ModelError for blocks that are not timm's plain Block."""
    _check_blocks(model)
    block = model.blocks[0]
    attention = block.attn
    gate = _gate(attention)
    heads = [layer for layer in (model.head, getattr(model, "head_dist", None)) if isinstance(layer, nn.Linear)]
    pool_macs, pool_macs_per_token, pool_macs_per_pair = _pool_macs(model)
    return ModelShape(
        depth=len(model.blocks),
        dim=model.embed_dim,
        heads=attention.num_heads,
        attention_dim=attention.num_heads * attention.head_dim,
        patch_tokens=model.patch_embed.num_patches,
        prefix_tokens=model.num_prefix_tokens,
        class_tokens=model.has_class_token + isinstance(model, VisionTransformerDistilled),
        mlp_macs=_matrix_sizes(block.mlp),
        stem_macs=_stem_macs(model),
        head_macs=sum(layer.weight.numel() for layer in heads),
        gate_macs=0 if gate is None else gate.weight.numel(),
        pool_macs=pool_macs,
        pool_macs_per_token=pool_macs_per_token,
        pool_macs_per_pair=pool_macs_per_pair,
    )


def attend(attention: Attention, x_BNC: Tensor, bias_B11N: Tensor | None, shape: ModelShape) -> tuple[Tensor, Attended]:
    """timm's Attention.forward, which also returns what scorers read. Attention stays fused."""
    images, tokens, _ = x_BNC.shape
    gate = _gate(attention)
    opening = None if gate is None else gate(x_BNC).sigmoid()
    qkv = (
        attention.qkv(x_BNC).reshape(images, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    )
    query, key, value = qkv.unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    bias = None if bias_B11N is None else bias_B11N.to(query.dtype)
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    else:
        logits = (query * attention.scale) @ key.transpose(-2, -1)
        logits = logits if bias is None else logits + bias
        output = attention.attn_drop(logits.softmax(dim=-1)) @ value
    attended = Attended(query, key, value, output, bias, attention.scale, shape.prefix_tokens, shape.class_tokens)
    x_BNC = attention.norm(output.transpose(1, 2).flatten(2))
    x_BNC = x_BNC if opening is None else x_BNC * opening
    return attention.proj_drop(attention.proj(x_BNC)), attended


def _gate(attention: Attention) -> nn.Linear | None:
    return getattr(attention, "gate", None)  # timm 1.0.24 does not have it yet


def _run_block(block: Any, block_plan: BlockPlan, plan: Plan, state: TokenState) -> TokenState:
    prefix = plan.shape.prefix_tokens
    state, _ = _take_steps(block_plan.pre, state, state.evidence, prefix, block.training)
    bias = _log_size_bias(state, prefix) if plan.log_size_bias else None
    if not block_plan.mid and not block_plan.ahead:
        return state._replace(tokens_BNC=block(state.tokens_BNC, attn_mask=bias))
    x, listeners = state.tokens_BNC, _listeners(block_plan.mid) + block_plan.ahead
    if listeners:
        attention, attended = attend(block.attn, block.norm1(x), bias, plan.shape)
        x = x + block.drop_path1(block.ls1(attention))
        evidence = tuple(gather_evidence(stage, x[:, prefix:], attended, block.training) for stage in listeners)
    else:
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=bias)))
        evidence = ()
    state, ahead = _take_steps(block_plan.mid, state._replace(tokens_BNC=x), evidence, prefix, block.training)
    x = state.tokens_BNC
    return TokenState(x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), state.size_Bn, ahead)


def _take_steps(
    steps: tuple[Step, ...], state: TokenState, evidence: tuple[Evidence, ...], prefix: int, training: bool
) -> tuple[TokenState, tuple[Evidence, ...]]:
    """Run steps in order. `evidence` begins with that of the steps that read attention; what is left is returned."""
    for step in steps:
        if _reads_attention(step.stage):
            own, evidence = evidence[0], evidence[1:]
        else:
            own = gather_evidence(step.stage, state.tokens_BNC[:, prefix:], None, training)
        state, evidence = take_step(step, state, prefix, own, evidence)
    return state, evidence


def _reads_attention(stage: Stage) -> bool:
    return REDUCERS[stage.reduce].needs_keys or (stage.score != "none" and SCORERS[stage.score].needs_attention)


def _listeners(steps: tuple[Step, ...]) -> tuple[Stage, ...]:
    return tuple(step.stage for step in steps if _reads_attention(step.stage))


def _log_size_bias(state: TokenState, prefix: int) -> Tensor | None:
    """ToMe's proportional attention: a token that stands for s patches is attended to as s tokens would be."""
    if state.size_Bn is None:
        return None
    bias_BN = F.pad(state.size_Bn.log(), (prefix, 0))  # prefix tokens stand for themselves: log 1
    return bias_BN[:, None, None, :].to(state.tokens_BNC.dtype)


def _make_plan(schedule: Schedule, shape: ModelShape) -> Plan:
    steps = [step for step in resolve(schedule, shape) if not step.is_idle]

    def at(block: int, place: str) -> tuple[Step, ...]:
        return tuple(step for step in steps if (step.stage.block, step.stage.at) == (block, place))

    blocks = tuple(
        BlockPlan(at(block, "pre"), at(block, "mid"), ahead=_listeners(at(block + 1, "pre")))
        for block in range(shape.depth)
    )
    merging = [step.stage for step in steps if REDUCERS[step.stage.reduce].merges]
    log_size_bias = any(options_of(stage).get("proportional_attention", False) for stage in merging)
    return Plan(schedule, shape, blocks, merges=bool(merging), log_size_bias=log_size_bias)


def _plan_for(model: Any, patch_tokens: int) -> Plan:
    """The model's plan, made anew when an image of another size came in (dynamic_img_size)."""
    plan: Plan = model._plan
    if patch_tokens == plan.shape.patch_tokens:
        return plan
    return _make_plan(plan.schedule, replace(plan.shape, patch_tokens=patch_tokens))


def _pools_over_patches(model: Any) -> bool:
    return model.global_pool in ("avg", "avgmax", "map")


def _pool_by_size(model: Any, state: TokenState) -> Tensor:
    """timm's pooling with each merged token counted as the patches it stands for: (B, N, C) to (B, C)."""
    prefix = model.num_prefix_tokens
    x_BNC, size_BN = state.tokens_BNC, state.size_Bn
    assert size_BN is not None
    if model.pool_include_prefix:
        size_BN = F.pad(size_BN, (prefix, 0), value=1.0)
    else:
        x_BNC = x_BNC[:, prefix:]
    if model.global_pool == "map":
        bias = size_BN.log()[:, None, None, :].to(x_BNC.dtype) if model._plan.log_size_bias else None
        return model.attn_pool(x_BNC, attn_mask=bias)
    share_BN1 = (size_BN / size_BN.sum(dim=1, keepdim=True))[..., None]
    mean_BC = (x_BNC * share_BN1.to(x_BNC.dtype)).sum(dim=1)
    return 0.5 * (x_BNC.amax(dim=1) + mean_BC) if model.global_pool == "avgmax" else mean_BC


def _check_blocks(model: Any) -> None:
    for index, block in enumerate(model.blocks):
        for part, wanted in ((block, Block), (getattr(block, "attn", None), Attention)):
            if type(part) is not wanted:
                found = f"{type(part).__module__}.{type(part).__qualname__}"
                raise ModelError(
                    f"model block {index}: {found} is not supported. Possible: timm's {wanted.__name__}, exactly; "
                    f"another class may compute something else. Choose a model with plain blocks."
                )


def _matrix_sizes(module: nn.Module) -> int:
    """MACs per token of the linear layers in a module."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _stem_macs(model: Any) -> int:
    embed = model.patch_embed
    if type(embed) is PatchEmbed:
        return embed.proj.weight.numel() * embed.num_patches
    # a hybrid stem (a small CNN) has no closed form: count one pass without data
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        copy.deepcopy(embed).to("meta").eval()(torch.empty(1, model.in_chans, *embed.img_size))
    return counter.get_total_flops() // 2


def _pool_macs(model: Any) -> tuple[int, int, int]:
    """MACs of an attention pooling head: constant, per token, per pair of tokens."""
    pool = model.attn_pool
    if pool is None:
        return 0, 0, 0
    if isinstance(pool, AttentionPoolLatent):
        per_token = pool.kv.weight.numel() + 2 * pool.latent_len * pool.kv.in_features
        return pool.latent_len * (_matrix_sizes(pool) - pool.kv.weight.numel()), per_token, 0
    return 0, 0, 2 * model.embed_dim  # timm's AttentionPoolPrr: self-attention without projections
