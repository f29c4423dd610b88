"""The `ModelShape` of a timm Swin, Swin-V2 or ConvNeXt, which describes its third stage, where schedules act."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.errors import ModelError
from prunesearch.models.layers import check_countable, macs_per_token, on_meta
from prunesearch.models.plan import PARTS
from prunesearch.models.swap import timm_class
from prunesearch.shape import ModelShape

STAGE = 2
"""Index of the third stage, which has most of the blocks. The published method leaves the other stages unchanged."""


ATTENTIONS = {SwinTransformerBlock: WindowAttention, SwinTransformerV2Block: WindowAttentionV2}
"""Blocks with window attention, and its class."""


def is_swin(model: Any) -> bool:
    """Whether a model has window attention. Its maps are (B, H, W, C), those of a ConvNeXt (B, C, H, W)."""
    return isinstance(model, (SwinTransformer, SwinTransformerV2))


def stages_of(model: Any) -> nn.Sequential:
    """The sequence of stages, which Swin and ConvNeXt name differently."""
    return model.layers if is_swin(model) else model.stages


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images the model was built for. Raises ModelError."""
    if is_swin(model):
        embed: Any = model.patch_embed
        return (embed.proj.weight.shape[1], *embed.img_size)
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise ModelError(
            "model: a ConvNeXt takes images of any size, and this one does not say which it is for. Possible: a model "
            'of timm.create_model. Use that, or set model.pretrained_cfg = {"input_size": (3, 224, 224)}.'
        )
    return (model.stem[0].in_channels, size[1], size[2])


def shape_of(model: Any) -> ModelShape:
    """The shape for the model's own input size. Raises ModelError for blocks that are not timm's plain ones, and for
    layers whose cost is not known.

    The dense cost is counted in one pass. `stem_macs` is what remains after the third stage's blocks and the head. It
    includes the padding of windows that do not tile the map, which no schedule changes.
    """
    stages = stages_of(model)
    if len(stages) <= STAGE:
        raise ModelError(
            f"model: {len(stages)} stages. Possible: {STAGE + 1} or more; tokens are held in the third. Choose another."
        )
    blocks: Any = stages[STAGE].blocks
    for index, block in enumerate(blocks):
        _check(index, block)
    block = blocks[0]
    if timm_class(block) in ATTENTIONS:
        attention = block.attn
        dim, heads, norm = attention.qkv.in_features, attention.num_heads, block.norm2
    else:
        dim, heads, norm = block.conv_dw.out_channels, 0, block.norm
    sizes = [_block_macs(block, f"{place_of(model)}.blocks[{index}]") for index, block in enumerate(blocks)]
    for index, other in enumerate(sizes):
        if other != sizes[0]:
            raise ModelError(
                f"{place_of(model)}.blocks[{index}]: token mixing and MLP have {other} MACs a position, those of block "
                f"0 {sizes[0]}. Possible: blocks of one size. Use a model whose blocks are alike."
            )
    mixing, mlp = sizes[0]
    head = sum(layer.weight.numel() for layer in model.head.modules() if isinstance(layer, nn.Linear))
    macs, positions = _one_pass(model, dim)
    return ModelShape(
        depth=len(blocks),
        dim=dim,
        heads=heads,
        attention_dim=0,
        patch_tokens=positions,
        prefix_tokens=0,
        class_tokens=0,
        mlp_macs=mlp,
        stem_macs=macs - head - len(blocks) * positions * (mixing + mlp),
        head_macs=head,
        gate_macs=mixing,
        holds=True,
        layer_scale=getattr(block, "gamma", None) is not None,
        norm_eps=getattr(norm, "eps", ModelShape.norm_eps),
    )


def place_of(model: Any) -> str:
    """The third stage's path in the model."""
    return f"model.layers[{STAGE}]" if is_swin(model) else f"model.stages[{STAGE}]"


def _block_macs(block: Any, place: str) -> tuple[int, int]:
    """MACs per position of token mixing and of the MLP. Raises ModelError for an unknown layer."""
    mlp = macs_per_token(block.mlp, f"{place}.mlp")
    if timm_class(block) not in ATTENTIONS:
        return block.conv_dw.weight.numel(), mlp
    attention = block.attn
    matrices = [macs_per_token(getattr(attention, name), f"{place}.attn.{name}") for name in ("qkv", "proj")]
    height, width = attention.window_size
    return sum(matrices) + 2 * attention.proj.in_features * height * width, mlp


def _check(index: int, block: Any) -> None:
    """Raise ModelError when a block may compute something else than our pass through it."""
    kinds: list[tuple[Any, tuple[type, ...]]] = [
        (block, (*ATTENTIONS, ConvNeXtBlock)),
        (getattr(block, "mlp", None), (Mlp,)),
    ]
    if timm_class(block) in ATTENTIONS:
        kinds.append((block.attn, (ATTENTIONS[timm_class(block)],)))
    for part, wanted in kinds:
        if timm_class(part) not in wanted:
            found = f"{type(part).__module__}.{type(part).__qualname__}"
            reason = (
                "it normalises over all positions, so that an MLP on some of them computes something else"
                if type(part).__name__ == "GlobalResponseNormMlp"
                else "another class may compute something else"
            )
            raise ModelError(
                f"model stage {STAGE}, block {index}: {found} is not supported: {reason}. Possible: timm's "
                f"{' or '.join(kind.__name__ for kind in wanted)}, exactly. Choose a model with plain blocks."
            )
    if getattr(block, "use_conv_mlp", False):
        raise ModelError(
            f"model stage {STAGE}, block {index}: its MLP is made of 1x1 convolutions (conv_mlp=True), which need the "
            f"whole map. Possible: conv_mlp=False, as in convnext_tiny and larger. Choose one of those."
        )


def _one_pass(model: Any, dim: int) -> tuple[int, int]:
    """MACs of the dense model and positions of the third stage's map, counted on the meta device."""
    dense = on_meta(model)
    dense.__class__ = timm_class(model)  # modules inside need no change: without a call they run timm's code
    dense._modules.pop(PARTS, None)
    check_countable(dense, "model")
    positions: list[int] = []

    def look(stage: nn.Module, inputs: Any, output: Tensor) -> None:
        positions.append(output.numel() // dim)

    stages_of(dense)[STAGE].register_forward_hook(look)
    image = torch.empty(1, *input_size(model), device="meta", dtype=next(model.parameters()).dtype)
    # FlopCounterMode needs gradients to be enabled
    with torch.inference_mode(False), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        dense(image)
    return counter.get_total_flops() // 2, positions[0]
