"""What arithmetic needs to know of a timm VisionTransformer, and which ones are understood."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.errors import ModelError
from prunesearch.schedule import ModelShape


def shape_of(model: Any) -> ModelShape:
    """The shape for the model's own input size. Raises ModelError for blocks that are not timm's plain Block."""
    _check_blocks(model)
    block = model.blocks[0]
    attention = block.attn
    gate = gate_of(attention)
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


def gate_of(attention: Attention) -> nn.Linear | None:
    """The layer that gates attention's output, or None."""
    return getattr(attention, "gate", None)  # timm 1.0.24 does not have it yet


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
