"""Score: a small network per stage predicts the probability that a token stays (DynamicViT, dTPS)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunesearch.shape import ModelShape
from prunesearch.tokens.inputs import ScoreInput


class Predictor(nn.Module):
    """Two-way classifier of each token, from its own features and the mean over the tokens that are present.

    LayerNorm, C -> C, GELU. The second half of the channels is averaged over the present tokens and joined to the first
    half of each token. Then C -> C/2 -> C/4 -> 2 with GELU between (DynamicViT's PredictorLG; widths rounded down).
    """

    def __init__(self, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.embed = nn.Linear(dim, dim)
        self.decide = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    def forward(self, patches_BnC: Tensor, present_Bn: Tensor | None) -> Tensor:
        """Log-probability of staying, (B, n)."""
        features_BnC = nn.functional.gelu(self.embed(self.norm(patches_BnC.to(self.norm.weight.dtype))))
        half = features_BnC.shape[-1] // 2
        local_BnC, global_BnC = features_BnC[..., :half], features_BnC[..., half:]
        if present_Bn is None:
            mean_B1C = global_BnC.mean(dim=1, keepdim=True)
        else:
            share_Bn = present_Bn / present_Bn.sum(dim=1, keepdim=True)
            mean_B1C = share_Bn[:, None].to(global_BnC.dtype) @ global_BnC
        joined_BnC = torch.cat([local_BnC, mean_B1C.expand(-1, local_BnC.shape[1], -1)], dim=-1)
        return self.decide(joined_BnC).log_softmax(dim=-1)[..., 0]


def part(shape: ModelShape) -> Predictor:
    """The learned module of one stage."""
    return Predictor(shape.dim, shape.norm_eps)


def predictor(scene: ScoreInput) -> Tensor:
    """Probability that a token stays, from a learned two-way classifier (local and global features)."""
    assert scene.part is not None
    return scene.part(scene.patches_BnC, scene.present_Bn).float().exp()
