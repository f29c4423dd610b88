"""Score: random numbers. The baseline that every other score has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from prunesearch.tokens.inputs import ScoreInput


def random_score(scene: ScoreInput, *, seed: int) -> Tensor:
    """Random: anew for every image while training; in eval mode one fixed order of slots per block and seed.

    The order is fixed in eval mode so that an image's result does not depend on the rest of the batch. Like the other
    scores these are shares of a sum, so that `fuse` weights tokens alike.
    """
    patches_BnC = scene.patches_BnC
    images, tokens, _ = patches_BnC.shape
    present_Bn = scene.present_Bn
    if scene.training:
        score_Bn = torch.rand(images, tokens, device=patches_BnC.device)
    else:
        # one row for all images, which an ONNX export folds to a constant: OpenVINO computes in 32 bits
        place_Bn = torch.arange(tokens, device=patches_BnC.device)[None]
        if present_Bn is not None:  # the place among the present tokens
            place_Bn = (present_Bn > 0).cumsum(dim=1) - 1
        score_Bn = _hash_n(place_Bn + 1_000_003 * scene.block + 7_919 * seed)
    if present_Bn is not None:
        score_Bn = score_Bn * present_Bn
    return (score_Bn / score_Bn.sum(dim=1, keepdim=True)).expand(images, tokens)


def _hash_n(number_n: Tensor) -> Tensor:
    """Hash integers to floats in (0, 1) with the 32-bit finaliser of MurmurHash3.

    It computes in integers, so that every device gives the same values.
    """
    bits = 0xFFFFFFFF
    mixed = number_n.to(torch.int64) & bits
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & bits
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & bits
    mixed = mixed ^ (mixed >> 16)
    return ((mixed >> 8).float() + 0.5) / 2**24
