"""scikit-learn's handwritten digits (UCI ML repository, Alpaydin & Kaynak 1998): 1797 grey 8 x 8 images, 10 classes."""

from __future__ import annotations

from functools import lru_cache

import torch

SPLIT_SEED = 0
"""Seed of the split, which is the same everywhere. A stratified third is held out for validation."""
TRAINING, HELD_OUT = 1198, 599
"""Number of images of each."""
PARTS = {
    "train": slice(None),
    "validation": slice(None),
    "first half": slice(None, 300),
    "second half": slice(300, None),
}
"""Splits by name. The two halves are those of the held-out images, for separate validation and test sets."""


@lru_cache(maxsize=4)
def load_digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of a split, uint8 (count, 8, 8) with 255 for full ink, and int64 labels (count,). split: of `PARTS`."""
    from sklearn.datasets import load_digits as read_digits
    from sklearn.model_selection import train_test_split

    images, labels = read_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=1 / 3, stratify=labels, random_state=SPLIT_SEED)
    pixels, targets = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    pixels, targets = pixels[PARTS[split]], targets[PARTS[split]]
    scaled = torch.from_numpy(pixels).reshape(-1, 8, 8) * (255 / 16)  # the source counts ink from 0 to 16
    return scaled.round().to(torch.uint8), torch.from_numpy(targets).to(torch.int64)
