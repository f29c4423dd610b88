"""Places of tokens in the image: row and column, in patches."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_places(height: int, width: int, device: torch.device) -> Tensor:
    """Row and column of each patch token of an image, in its order, fp32, (n, 2)."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(rows, columns).float()


def nearest_index(place_Bn2: Tensor, width: int) -> Tensor:
    """Indices of the patch tokens of the image whose places are nearest, (B, n)."""
    near_Bn2 = place_Bn2.round()
    return (near_Bn2[..., 0] * width + near_Bn2[..., 1]).long()
