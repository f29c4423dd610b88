"""The `ModelShape` of timm's ViTs, and checks that their layers are known."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from timm.layers import AttentionPoolLatent, PatchEmbed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.errors import ModelError
from prunesearch.models.dense_head import segments
from prunesearch.models.layers import check_countable, macs_per_token, on_meta, own_grid
from prunesearch.models.swap import timm_class
from prunesearch.shape import ModelShape


class BlockShape(NamedTuple):
    """What the blocks of a model have in common: heads, width of the attention, and MACs per token of gate and MLP."""

    heads: int
    attention_dim: int
    gate_macs: int
    mlp_macs: int


def shape_from(
    model: Any,
    blocks: BlockShape,
    class_tokens: int,
    has_positions: bool = False,
    patches: int | None = None,
    stem_macs: int | None = None,
) -> ModelShape:
    """The shape for the model's own input size. Raises ModelError for layers whose cost is not known.

    patches, stem_macs: of models without a `patch_embed`.
    """
    for name in ("norm_pre", "norm", "fc_norm", "head_drop"):
        macs_per_token(getattr(model, name, None), f"model.{name}")
    pool_macs, pool_macs_per_token, pool_macs_per_pair = _pool_macs(model)
    patches = patch_tokens_of(model) if patches is None else patches
    return ModelShape(
        depth=len(model.blocks),
        dim=model.embed_dim,
        heads=blocks.heads,
        attention_dim=blocks.attention_dim,
        patch_tokens=patches,
        prefix_tokens=model.num_prefix_tokens,
        class_tokens=class_tokens,
        mlp_macs=blocks.mlp_macs,
        stem_macs=_stem_macs(model) if stem_macs is None else stem_macs,
        head_macs=_head_macs(model, patches),
        gate_macs=blocks.gate_macs,
        pool_macs=pool_macs,
        pool_macs_per_token=pool_macs_per_token,
        pool_macs_per_pair=pool_macs_per_pair,
        has_positions=has_positions,
        segments=segments(model),
    )


def patch_tokens_of(model: Any) -> int:
    """Patch tokens of an image of the model's current size."""
    rows, columns = own_grid(model.patch_embed)
    return rows * columns


def _head_macs(model: Any, patches: int) -> int:
    """MACs of the classifiers, or of a head that gives classes to each patch."""
    if segments(model):
        return model.head.macs_per_patch * patches
    return sum(macs_per_token(getattr(model, name, None), f"model.{name}") for name in ("head", "head_dist"))


def check_blocks(model: Any, container: type, blocks: Collection[type], attentions: Collection[type]) -> None:
    """Raise ModelError unless `model.blocks` is exactly a container of blocks and attentions of these classes."""
    if timm_class(model.blocks) is not container:
        raise ModelError(
            f"model.blocks: {type(model.blocks).__qualname__} is not supported. Possible: the nn.{container.__name__} "
            f"that timm makes. Put that back."
        )
    for index, block in enumerate(model.blocks):
        for part, wanted in ((block, blocks), (getattr(block, "attn", block), attentions)):
            if timm_class(part) not in wanted:
                found = f"{type(part).__module__}.{type(part).__qualname__}"
                names = " or ".join(kind.__name__ for kind in wanted)
                raise ModelError(
                    f"model block {index}: {found} is not supported. Possible: timm's {names}, exactly; "
                    f"another class may compute something else. Choose a model with plain blocks."
                )


def block_shape(model: Any) -> BlockShape:
    """The shape of the blocks, which must be the same in all of them.

    Raises ModelError when blocks differ, or when attention's layers have other sizes than `cost.py` assumes.
    """
    first = model.blocks[0].attn
    width = first.num_heads * head_dim_of(first)
    for index, block in enumerate(model.blocks):
        layers = {
            name: macs_per_token(layer, f"model.blocks[{index}].{name}")
            for name, layer in (*_flat_children(block, "attn"), *_flat_children(block.attn, "rel_pos", "attn."))
        }
        gate, mlp = layers.pop("attn.gate", 0), layers.pop("mlp")
        sizes = {name: size for name, size in layers.items() if size}
        if index == 0:
            gate_of_first, mlp_of_first = gate, mlp
        wanted = {name: model.embed_dim * width * parts for name, parts in _projections(block.attn).items()}
        if sizes != wanted or (gate, mlp) != (gate_of_first, mlp_of_first):
            found = ", ".join(f"{name} {size}" for name, size in {**sizes, "attn.gate": gate, "mlp": mlp}.items())
            raise ModelError(
                f"model.blocks[{index}]: its layers have other sizes than the arithmetic takes all blocks to have, in "
                f"MACs a token: {found}. Possible: {', '.join(f'{name} {size}' for name, size in wanted.items())}, "
                f"attn.gate {gate_of_first}, mlp {mlp_of_first}. Use a model whose blocks are alike."
            )
    return BlockShape(first.num_heads, width, gate_of_first, mlp_of_first)


def head_dim_of(attention: Any) -> int:
    """Channels of a head, which not every attention of timm keeps."""
    if hasattr(attention, "head_dim"):
        return int(attention.head_dim)
    if attention.qkv is None:  # Eva's in early versions of timm
        return int(attention.q_proj.out_features // attention.num_heads)
    return int(attention.qkv.out_features // (3 * attention.num_heads))  # BEiT's does not keep it


def _projections(attention: Any) -> dict[str, int]:
    """The matrices of an attention, and how many of the width of the attention each of them makes or takes."""
    if attention.qkv is not None:
        return {"attn.qkv": 3, "attn.proj": 1}
    return {"attn.q_proj": 1, "attn.k_proj": 1, "attn.v_proj": 1, "attn.proj": 1}


def _flat_children(module: nn.Module, but: str = "", prefix: str = "") -> list[tuple[str, nn.Module]]:
    return [(prefix + name, child) for name, child in module.named_children() if name != but]


def _stem_macs(model: Any) -> int:
    embed = model.patch_embed
    check_countable(embed, "model.patch_embed")
    if type(embed) is PatchEmbed:
        return embed.proj.weight.numel() * patch_tokens_of(model)
    # a hybrid stem (a small CNN) has no closed form: count one pass on the meta device
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        on_meta(embed)(torch.empty(1, channels_of(embed), *embed.img_size, dtype=next(embed.parameters()).dtype))
    return counter.get_total_flops() // 2


def pools_prefix(model: Any) -> bool:
    """Whether pooling also reads the prefix tokens. Eva's attention pooling does, and has no option for it."""
    return getattr(model, "pool_include_prefix", model.global_pool == "map")


def channels_of(embed: nn.Module) -> int:
    """Channels of the images that a stem takes: those of its first convolution."""
    return next(weight.shape[1] for weight in embed.parameters() if weight.ndim == 4)


def _pool_macs(model: Any) -> tuple[int, int, int]:
    """MACs of an attention pooling head: a constant, per token, and per pair of tokens."""
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return 0, 0, 0
    layers = {name: macs_per_token(layer, f"model.attn_pool.{name}") for name, layer in pool.named_children()}
    if type(pool) is AttentionPoolLatent:
        per_token = layers.pop("kv") + 2 * pool.latent_len * pool.kv.in_features
        left_out = 0 if pools_prefix(model) else model.num_prefix_tokens
        return pool.latent_len * sum(layers.values()) - left_out * per_token, per_token, 0
    if type(pool).__qualname__ == "AttentionPoolPrr" and not any(layers.values()):  # timm 1.0.24 does not have it yet
        return 0, 0, 2 * model.embed_dim  # self-attention without projections
    raise ModelError(
        f"model.attn_pool: the cost of a {type(pool).__module__}.{type(pool).__qualname__} is not known. Possible: "
        f"timm's AttentionPoolLatent and AttentionPoolPrr, exactly. Choose a model with one of those, or without."
    )
