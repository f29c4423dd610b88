"""`ModelShape`: the sizes of a model from which token counts and MACs are computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model from which token counts and MACs are computed. All are per image unless noted.

    attention_dim: heads x head_dim, which may differ from `dim`. mlp_macs, gate_macs: per token.
    stem_macs: the patch embedding, and what else runs once in a pass. head_macs: the classifier(s).
    pool_macs...: a pooling head that attends costs pool_macs + pool_macs_per_token N + pool_macs_per_pair N^2 for N
    tokens. prefix_tokens: class, distillation and register tokens. class_tokens: those of them whose attention ranks
    patches (0, 1, or 2 with a distillation token).

    holds: the model has a feature map (Swin, ConvNeXt). Then depth, dim and patch_tokens are the blocks, width and
    positions of its third stage. gate_macs is the token mixing per position, and stem_macs the rest of the model.
    has_positions: its attention reads where each patch token is (rotary positions, a bias for each pair of places).
    segments: its head gives classes to each patch token, so that all of them must be in their places at the end.
    head_macs is then for all of them. layer_scale: its blocks scale what they add. norm_eps: epsilon of its LayerNorms;
    learned parts use the same. In other models learned parts have PyTorch's default, as in the released code.
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
    has_positions: bool = False
    segments: bool = False
    layer_scale: bool = False
    norm_eps: float = 1e-5

    @property
    def gives_features(self) -> bool:
        """Whether the model has no classifier, so that its output are features."""
        return self.head_macs == 0

    @property
    def has_class_token(self) -> bool:
        """Whether class attention exists."""
        return self.class_tokens > 0
