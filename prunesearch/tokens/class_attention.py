"""Scores from the class token's row of the attention matrix: EViT, AS-ViT, PPT / ATS.

Only this row is computed, from the q and k of the fused attention: N * A MACs instead of N^2 * A for the whole matrix.
A distilled model has two such rows (class and distillation token), which are averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunesearch.tokens.inputs import Attended, ScoreInput


def class_rows_BHRN(attended: Attended) -> Tensor:
    """Attention (after softmax) of the R class-like tokens to all N tokens, per head, in fp32."""
    query_XRD = attended.query_BHND[:, :, : attended.class_tokens].flatten(0, 1).float()  # X: images x heads
    key_XND = attended.key_BHND.flatten(0, 1).float()
    # one kernel for scale and product; with beta 0 the first argument gives no values
    logits_XRN = torch.baddbmm(query_XRD[..., :1], query_XRD, key_XND.transpose(1, 2), beta=0, alpha=attended.scale)
    logits_BHRN = logits_XRN.view(*attended.key_BHND.shape[:2], *logits_XRN.shape[1:])
    if attended.bias is not None:
        logits_BHRN = logits_BHRN + attended.bias[:, :, : attended.class_tokens].float()  # of these rows, or of all
    return logits_BHRN.softmax(dim=-1)


def _patch_attention_BHn(attended: Attended) -> Tensor:
    """Attention that patch tokens get from the class-like tokens, averaged over the latter, per head."""
    rows_BHRn = class_rows_BHRN(attended)[..., attended.prefix_tokens :]
    return rows_BHRn[:, :, 0] if attended.class_tokens == 1 else rows_BHRn.mean(dim=2)


def class_attention(scene: ScoreInput, *, momentum: float) -> Tensor:
    """Attention the class token pays to each patch token, averaged over heads.

    momentum: the model takes the mean over blocks; this is the attention of one.
    """
    assert scene.attended is not None
    return _patch_attention_BHn(scene.attended).mean(dim=1)


def head_weighted_class_attention(scene: ScoreInput) -> Tensor:
    """Class attention with each head weighted, per token, by the norm of the token's output in that head.

    w[h, j] = |o[h, j]| / sum_h |o[h, j]|, with o the attention output before the projection; the weights of a
    token sum to 1 over heads, and s[j] = sum_h A[h, cls, j] w[h, j].
    """
    assert scene.attended is not None
    return (_patch_attention_BHn(scene.attended) * head_weights_BHn(scene.attended)).sum(dim=1)


def head_weights_BHn(attended: Attended) -> Tensor:
    """How much of each patch token's attention output lies in each head; sums to 1 over heads."""
    norm_BHn = attended.output_BHND[:, :, attended.prefix_tokens :].float().norm(dim=-1)
    return norm_BHn / norm_BHn.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def norm_over_heads(vector_BHnD: Tensor) -> Tensor:
    """Norm of each token's vector, all heads concatenated, (B, n).

    In timm's layout the concatenation is a view, and a norm over the last dimension is fast in every layout.
    """
    return torch.linalg.vector_norm(vector_BHnD.transpose(1, 2).flatten(2), dim=-1)


def value_weighted(scene: ScoreInput) -> Tensor:
    """Class attention summed over heads, times the norm of the token's value vector; sums to 1 over patch tokens."""
    attended = scene.attended
    assert attended is not None
    value_BHnD = attended.value_BHND[:, :, attended.prefix_tokens :].float()
    norm_Bn = norm_over_heads(value_BHnD)
    score_Bn = _patch_attention_BHn(attended).sum(dim=1) * norm_Bn  # empty slots get no attention
    return score_Bn / score_Bn.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
