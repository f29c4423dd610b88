"""Which tokens stay: the k best of each image."""

from __future__ import annotations

from torch import Tensor


def top_k(scores_Bn: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Indices of the `kept` best tokens and of the others, each ascending (image order).

    The sort is stable, so equal scores go to the earlier token on every device.
    """
    order_Bn = scores_Bn.sort(dim=1, descending=True, stable=True).indices
    return order_Bn[:, :kept].sort(dim=1).values, order_Bn[:, kept:].sort(dim=1).values
