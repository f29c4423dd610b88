"""What a model wants to be fed, and a set of images that feeds it.

Everything goes one way: timm's evaluation transform makes a uint8 tensor of a PIL image, which stays in memory or is
made each time, and is normalised on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL.Image import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from prunesearch.config import DataConfig
from prunesearch.errors import DataError
from prunesearch.models import input_size


@dataclass(frozen=True)
class ImageInput:
    """What a model wants to be fed. `take_sized`: images that already have `size` are neither resized nor cropped."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str
    interpolation: str
    take_sized: bool = False

    def transform(self, image: Image) -> Tensor:
        """PIL image to uint8 (channels, height, width)."""
        channels, height, width = self.size
        image = image.convert("L" if channels == 1 else "RGB")
        return _pixels(self, cropped=not (self.take_sized and image.size == (width, height)))(image)

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """uint8 pixels to float32 of the model's mean and standard deviation, on the device they are on."""
        mean, std = (
            torch.tensor(values, device=images_BCHW.device).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std)
        )
        return (images_BCHW.float() - mean) / std


@dataclass(frozen=True)
class ImageSet:
    """Images and labels of one split, read by index.

    source: uint8 tensors (C, H, W) and labels, in memory when it is a TensorDataset. fingerprint: count and hash of
    pixels and labels, "" unless in memory.
    """

    input: ImageInput
    source: Any
    loaders: int = 0
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def in_memory(self) -> bool:
        """Whether the images are decoded already."""
        return isinstance(self.source, TensorDataset)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """For each vector of indices: normalised float32 images (B, C, H, W) and int64 labels (B), on `device`."""
        batches: Iterable[tuple[Tensor, Tensor]]
        if self.in_memory:
            batches = (self.source[batch] for batch in indices)
        else:
            order: Any = (batch.tolist() for batch in indices)
            batches = DataLoader(self.source, batch_sampler=order, num_workers=self.loaders)
        for images, labels in batches:
            yield self.input.normalise(images.to(device)), labels.to(device)


def image_input(model: nn.Module, config: DataConfig) -> ImageInput:
    """What the model's pretrained settings say, for the size it was built with; `config` wins. Raises DataError."""
    size = input_size(model)
    given = {name: getattr(config, name) for name in ("mean", "std", "interpolation", "crop_pct")}
    for name in ("mean", "std"):
        if given[name] is not None and len(given[name]) != size[0]:
            raise DataError(
                f"data.{name}: {len(given[name])} values were given, but the model has {size[0]} input channels. "
                f"Possible: one value per channel. Write {size[0]} of them."
            )
    own = resolve_model_data_config(model)
    for name in ("mean", "std"):
        if given[name] is None and len(own[name]) != size[0]:
            raise DataError(
                f"data.{name}: the model has {size[0]} input channels, but its pretrained settings are for "
                f"{len(own[name])}. Possible: one value per channel. Write {name} under data."
            )
    chosen = {**own, **{name: value for name, value in given.items() if value is not None}}
    return ImageInput(
        size=size,
        mean=tuple(chosen["mean"]),
        std=tuple(chosen["std"]),
        crop_pct=chosen["crop_pct"],
        crop_mode=chosen["crop_mode"],
        interpolation=chosen["interpolation"],
        # crop_pct belongs to the size the weights were trained at: 0.9 of 224 says nothing about a 32 x 32 image
        take_sized=config.crop_pct is None and tuple(own["input_size"]) != size,
    )


@lru_cache(maxsize=8)
def _pixels(wanted: ImageInput, cropped: bool) -> Callable[[Image], Tensor]:
    crop_pct = wanted.crop_pct if cropped else 1.0
    transform: Callable[[Image], Tensor] = create_transform(
        wanted.size,
        normalize=False,  # stays uint8; the device normalises
        crop_pct=crop_pct,
        crop_mode=wanted.crop_mode,
        interpolation=wanted.interpolation,
    )
    return transform
