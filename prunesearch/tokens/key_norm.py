"""Score: length of a token's key vector. Free (no MACs), and works without a class token."""

from __future__ import annotations

import torch
from torch import Tensor

from prunesearch.tokens.class_attention import norm_over_heads
from prunesearch.tokens.inputs import ScoreInput


def key_norm(scene: ScoreInput) -> Tensor:
    """Norm of the token's key over all heads, as a share of the sum over patch tokens.

    In models with qk-norm the keys are normalised per head, so this score is a weak signal.
    """
    attended = scene.attended
    assert attended is not None
    key_BHnD = attended.key_BHND[:, :, attended.prefix_tokens :].float()
    norm_Bn = norm_over_heads(key_BHnD)
    if attended.present_Bn is not None:
        norm_Bn = norm_Bn * attended.present_Bn
    return norm_Bn / norm_Bn.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
