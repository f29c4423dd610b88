"""`Trace`: what a forward pass with a schedule reports: logits, final tokens and counts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Trace(NamedTuple):
    """Results of one forward pass.

    logits: (B, classes). patches_BnC: the final normalised patch tokens; with a feature map, all positions.
    present_Bn: 1 where there is a token; None when all are present, as always with a feature map.
    counts: patch tokens of each image after each step, (B,) each, starting with the first step whose counts differ
    between images or are learned. In training they carry gradients to the decisions.
    """

    logits: Tensor
    patches_BnC: Tensor
    present_Bn: Tensor | None
    counts: tuple[Tensor, ...]


class ModelCall:
    """Passed to a model with a schedule besides the images. The model sets `trace`.

    masked: as in `prunesearch.models.trace`. Not a dataclass, because FSDP would copy it.
    """

    def __init__(self, masked: bool) -> None:
        self.masked = masked
        self.trace: Trace | None = None
