"""`ModelShape`: what arithmetic needs to know of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """What arithmetic needs to know of a model. Counts are per image.

    `attention_dim` is heads x head_dim (it may differ from `dim`); `mlp_macs` and `gate_macs` are per token;
    `stem_macs` is the patch embedding, `head_macs` the classifier(s), and a pooling head that attends costs
    `pool_macs + pool_macs_per_token * N + pool_macs_per_pair * N^2` for N tokens. `prefix_tokens` counts class,
    distillation and register tokens; `class_tokens` those whose attention ranks patches: 1, or 2 with a
    distillation token, or 0.

    Of a model with a feature map (`holds`), depth, dim and patch tokens are those of its third stage: blocks, width,
    positions. `gate_macs` is then the token mixing per position, `stem_macs` the rest of the model, `layer_scale`
    whether its blocks scale what they add, and `norm_eps` the epsilon of their LayerNorms, which learned parts take
    over. Learned parts of other models have PyTorch's default, as in the released code.
    """

    depth: int
    dim: int
    heads: int
    attention_dim: int
    patch_tokens: int
    prefix_tokens: int
    class_tokens: int
    mlp_macs: int
    stem_macs: int
    head_macs: int
    gate_macs: int = 0
    pool_macs: int = 0
    pool_macs_per_token: int = 0
    pool_macs_per_pair: int = 0
    holds: bool = False
    layer_scale: bool = False
    norm_eps: float = 1e-5

    @property
    def has_class_token(self) -> bool:
        """Whether class attention exists."""
        return self.class_tokens > 0
