"""Heads that give classes to each patch, for segmentation, in place of a model's pooling and classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from prunesearch.errors import ModelError
from prunesearch.models.layers import own_grid
from prunesearch.models.swap import Swapped, timm_class

Model = TypeVar("Model", bound=nn.Module)
Kind = Literal["linear", "conv"]
IGNORED = 255
"""The value of pixels in a mask that belong to no class, and so count nowhere."""


class DenseHead(nn.Module):
    """Final tokens (B, N, C) to logits of each patch (B, classes, rows, columns).

    linear: one matrix for each patch. conv: before it a 3 x 3 convolution over the grid of patches, and GELU.
    rows, columns: of the model's own image size. For another number of patches the grid is taken to be square.
    """

    def __init__(self, kind: Kind, channels: int, classes: int, rows: int, columns: int, prefix_tokens: int) -> None:
        super().__init__()
        self.rows, self.columns, self.prefix_tokens = rows, columns, prefix_tokens
        self.mix = nn.Conv2d(channels, channels, 3, padding=1) if kind == "conv" else None
        self.classify = nn.Conv2d(channels, classes, 1)

    @property
    def kind(self) -> Kind:
        """The kind that it was built as."""
        return "linear" if self.mix is None else "conv"

    @property
    def macs_per_patch(self) -> int:
        """Multiply-accumulates for each patch."""
        return sum(layer.weight.numel() for layer in (self.mix, self.classify) if layer is not None)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Final tokens, prefix included, to logits of each patch."""
        images, tokens, channels = x_BNC.shape
        rows, columns = self._grid(tokens - self.prefix_tokens)
        x_BCHW = x_BNC[:, self.prefix_tokens :].transpose(1, 2).reshape(images, channels, rows, columns)
        if self.mix is not None:
            x_BCHW = F.gelu(self.mix(x_BCHW))
        return self.classify(x_BCHW)

    def _grid(self, patches: int) -> tuple[int, int]:
        if patches == self.rows * self.columns:
            return self.rows, self.columns
        side = math.isqrt(patches)
        if side * side != patches:
            raise ModelError(
                f"model.head: {patches} patches arrive, which are neither {self.rows} x {self.columns} as the model "
                f"was built for nor a square. Possible: images of the model's own size, or square ones. Resize them."
            )
        return side, side


def with_dense_head(model: Model, kind: Kind, classes: int) -> Model:
    """Give a timm model without a classifier a head for each patch, in place, and return it. Its weights are random.

    Pooling is taken out; a norm that timm applies after it is applied to each token. Raises ModelError for a model
    whose final tokens are not one for each patch, and for a kind or a number of classes that cannot be.
    """
    inner: Any = model
    if kind not in get_args(Kind):
        raise ModelError(f"model.head is {kind!r}. Possible: {', '.join(get_args(Kind))}. Write one of them.")
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ModelError(f"model.num_classes is {classes!r}. Possible: a whole number from 1. Write one of those.")
    if isinstance(inner, Swapped):
        raise ModelError(
            "model.head: the model has a schedule. Possible: the head first, then the schedule. Call "
            "remove_schedule(model), give it the head, then call apply_schedule."
        )
    is_plain = hasattr(getattr(inner, "patch_embed", None), "grid_size") and hasattr(inner, "num_prefix_tokens")
    if not is_plain or isinstance(inner, VisionTransformerDistilled):
        raise ModelError(
            f"model.head: a {timm_class(inner).__name__} cannot have one. Possible: ViTs with one final token for each "
            f"patch and one classifier (VisionTransformer, Eva, Beit, VisionTransformerRelPos). Choose one of those."
        )
    rows, columns = own_grid(inner.patch_embed)
    inner.head = DenseHead(kind, inner.num_features, classes, rows, columns, inner.num_prefix_tokens)
    inner.head.to(next(inner.patch_embed.parameters()).device)
    inner.global_pool, inner.attn_pool, inner.num_classes = "", None, classes
    return model


def segments(model: nn.Module) -> bool:
    """Whether the model's output are logits of each patch."""
    return isinstance(getattr(model, "head", None), DenseHead)


def kind_in(state: Mapping[str, Tensor]) -> Kind | None:
    """The kind of the head in a checkpoint; None without one."""
    if "head.classify.weight" not in state:
        return None
    return "conv" if "head.mix.weight" in state else "linear"


def resized(logits_BKHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits of patches to logits of pixels, (B, classes, height, width), by bilinear interpolation."""
    return F.interpolate(logits_BKHW, size=size, mode="bilinear", align_corners=False)
