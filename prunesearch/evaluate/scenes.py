"""Scenes: several of scikit-learn's handwritten digits on a canvas of 64 x 64, with the class of each pixel.

Classes are 0 for the background and digit + 1 for ink. Scenes are made by a function of a split and an index, so the
same split is the same everywhere. Scenes for training, validation and test show different digits.
"""

from __future__ import annotations

import torch
from PIL.Image import Image, fromarray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from prunesearch.evaluate.digits import load_digits

SIDE = 64
CLASSES = ("background", *"0123456789")
COUNTS = {"train": 20_000, "validation": 600, "test": 600}
"""Scenes of each split."""
DIGITS_OF = {"train": "train", "validation": "first half", "test": "second half"}
MOST_DIGITS = 4
SMALLEST, LARGEST = 20, 36
"""Sides of a digit in pixels."""
PLACES = 6
"""Random places of which a digit takes the emptiest."""
INK = 80
"""Brightness, of 255, from which on a pixel belongs to a digit."""
_FIRST_SEED = {"train": 0, "validation": 1_000_000, "test": 2_000_000}


class Scenes(Dataset[tuple[Image, Image]]):
    """The scenes of a split: pictures, each with its mask. split: of COUNTS."""

    def __init__(self, split: str) -> None:
        self._split = split

    def __len__(self) -> int:
        return COUNTS[self._split]

    def __getitem__(self, index: int) -> tuple[Image, Image]:
        picture, mask = scene(self._split, index)
        return fromarray(picture.numpy()), fromarray(mask.numpy())


def scene(split: str, index: int) -> tuple[Tensor, Tensor]:
    """A scene and its mask, uint8 (SIDE, SIDE) each."""
    if not 0 <= index < COUNTS[split]:
        raise IndexError(index)
    digits, labels = load_digits(DIGITS_OF[split])
    generator = torch.Generator().manual_seed(_FIRST_SEED[split] + index)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    clouds = torch.rand(1, 1, 5, 5, generator=generator) * 60
    canvas = F.interpolate(clouds, size=(SIDE, SIDE), mode="bilinear", align_corners=True)[0, 0]
    canvas = canvas + 20 * torch.rand(SIDE, SIDE, generator=generator)
    mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    for _ in range(between(1, MOST_DIGITS)):
        one, side = between(0, len(labels) - 1), between(SMALLEST, LARGEST)
        drawn = F.interpolate(digits[one].float()[None, None], size=(side, side), mode="bilinear")[0, 0]
        corners = [(between(0, SIDE - side), between(0, SIDE - side)) for _ in range(PLACES)]
        places = [(slice(top, top + side), slice(left, left + side)) for top, left in corners]
        place = min(places, key=lambda place: int((mask[place] > 0).sum()))  # digits seldom hide each other
        canvas[place] = torch.where(drawn >= INK, drawn, canvas[place])
        mask[place] = torch.where(drawn >= INK, labels[one].to(torch.uint8) + 1, mask[place])
    return canvas.clamp(0, 255).round().to(torch.uint8), mask
