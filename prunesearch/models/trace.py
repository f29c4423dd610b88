"""What a forward pass with a schedule did, beside its logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Trace(NamedTuple):
    """logits (B, classes). patches_BnC: the final normalised patch tokens, `present_Bn`: 1 where there is one, None
    when all are (always with a feature map, whose patches are all its positions). counts: patch tokens of each image
    after each step from the first on whose counts differ between images or are learned, (B,) each; with gradients to
    the decisions while training."""

    logits: Tensor
    patches_BnC: Tensor
    present_Bn: Tensor | None
    counts: tuple[Tensor, ...]


class ModelCall:
    """What a model with a schedule is handed in one call beside the images; and what it leaves beside the logits.

    masked: as `prunesearch.models.trace`. No dataclass, as FSDP would copy it.
    """

    def __init__(self, masked: bool) -> None:
        self.masked = masked
        self.trace: Trace | None = None
