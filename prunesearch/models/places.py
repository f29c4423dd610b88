"""Places of tokens in the image: row and column, in patches."""

from __future__ import annotations

import torch
from torch import Tensor

HALFWAY = 1e-3
"""Places this close to the middle between two count as in the middle."""


def grid_places(height: int, width: int, device: torch.device) -> Tensor:
    """Row and column of each patch token of an image, in its order, fp32, (n, 2)."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(rows, columns).float()


def nearest_place(place_Bn2: Tensor) -> Tensor:
    """The places of the image that are nearest. Halfway between two it is the later one, also when the last bits of a
    mean, which depend on the order of its sum, put it a little before."""
    return (place_Bn2 + HALFWAY).round()


def nearest_index(place_Bn2: Tensor, height: int, width: int) -> Tensor:
    """Indices of the patch tokens of the image whose places are nearest, (B, n).

    A mean weighted by scores that are NaN is no place. It gets some index, so that the logits are NaN and no kernel
    reads outside of a table.
    """
    near_Bn2 = nearest_place(place_Bn2)
    return (near_Bn2[..., 0] * width + near_Bn2[..., 1]).long().clamp(0, height * width - 1)
