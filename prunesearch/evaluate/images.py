"""`ImageInput`: how a model's images are resized and normalised; `ImageSet`: the images of one split, in batches.

timm's evaluation transform turns a PIL image into a uint8 tensor. The tensor stays in memory, or is made each time it
is needed. It is normalised on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy
import torch
from PIL.Image import Image, Resampling
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms import InterpolationMode

from prunesearch.config import DataConfig
from prunesearch.errors import DataError
from prunesearch.evaluate.loading import load
from prunesearch.evaluate.pixels import grey_or_rgb
from prunesearch.evaluate.sections import channel_problems
from prunesearch.models import input_size
from prunesearch.models.dense_head import IGNORED, segments
from prunesearch.registry import did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageInput:
    """How a model's images are resized, cropped and normalised.

    size: channels, height, width. take_sized: images that already have this size are neither resized nor cropped.
    masks: labels are masks with a class for each pixel. Images and masks are then resized to `size` whole, so that each
    pixel has its class.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str
    interpolation: str
    take_sized: bool = False
    masks: bool = False

    def transform(self, image: Image) -> Tensor:
        """PIL image to uint8 (channels, height, width)."""
        channels, height, width = self.size
        image = grey_or_rgb(image, channels)
        return _pixels(self, cropped=not (self.take_sized and image.size == (width, height)))(image)

    def mask(self, mask: Image) -> Tensor:
        """A mask of class indices to uint8 (height, width), resized without mixing. Raises ValueError for others."""
        _, height, width = self.size
        check_mask_mode(mask)
        values = numpy.asarray(mask.resize((width, height), Resampling.NEAREST))
        if values.min() < 0 or values.max() > IGNORED:
            raise ValueError(f"the mask has the value {values.max()}; class indices go up to {IGNORED - 1}")
        return torch.from_numpy(values.astype(numpy.uint8))

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """uint8 pixels to float32, minus the mean and divided by the standard deviation, on the same device."""
        mean, std = (
            torch.tensor(values, device=images_BCHW.device).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std)
        )
        return (images_BCHW.float() - mean) / std


@dataclass(frozen=True)
class Unreadable:
    """A picture that cannot be read: its index, its name for messages, and the reason."""

    index: int
    name: str
    why: str


def check_mask_mode(mask: Image) -> None:
    """Raise ValueError for a mask that does not have one channel of whole numbers."""
    if mask.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"the mask has the mode {mask.mode}; save it with one channel of whole class indices")


def refuse_unreadable(split: str, bad: Sequence[Unreadable], count: int, most: int) -> None:
    """Raise DataError when more than `most` of the `count` pictures of a split cannot be read, or all of them."""
    if len(bad) <= most and len(bad) < count:
        return
    shown = "; ".join(f"{one.name}: {one.why}" for one in bad[:3]) + ("; ..." if len(bad) > 3 else "")
    what = f"{len(bad)} of {count} pictures cannot be read ({shown})"
    if split == "train":
        raise DataError(
            f"data (train): {what}. Possible: at most {most}, the share data.allow_unreadable of them, which are left "
            f"out. Repair or remove the files, or raise allow_unreadable."
        )
    raise DataError(
        f"data ({split}): {what}. Possible: pictures that Pillow decodes, as accuracy is measured on all of them. "
        f"Repair or remove the files."
    )


@dataclass(frozen=True)
class ImageSet:
    """Images and labels of one split, read by index.

    source: uint8 tensors (C, H, W) and labels, or masks (H, W). A TensorDataset when they are in memory; otherwise
    items may be an Unreadable. fingerprint: count and hash of pixels and labels; "" when not in memory. notes: messages
    about what was left out when the split was opened. most_unreadable: how many pictures may be left out later, when
    they are decoded each time. unreadable: those that this process has left out, by index.
    """

    input: ImageInput
    source: Any
    loaders: int = 0
    fingerprint: str = ""
    split: str = "train"
    most_unreadable: int = 0
    notes: tuple[str, ...] = ()
    unreadable: dict[int, Unreadable] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def in_memory(self) -> bool:
        """Whether the images are already decoded."""
        return isinstance(self.source, TensorDataset)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """For each vector of indices: normalised float32 images (B, C, H, W) and int64 labels (B), or masks (B, H, W),
        on `device`.

        Pictures that cannot be decoded are left out of their batch, which may then be empty. Raises DataError when
        there are more of them than `most_unreadable`.
        """
        batches: Iterable[tuple[Tensor, Tensor, list[Unreadable]]]
        if self.in_memory:
            batches = ((*self.source[batch], []) for batch in indices)
        else:
            batches = load(self.source, (batch.tolist() for batch in indices), collate, self.loaders)
        for images, labels, bad in batches:
            for one in bad:
                if one.index not in self.unreadable:
                    self.unreadable[one.index] = one
                    logger.warning("data (%s): %s cannot be read: %s", self.split, one.name, one.why)
            if bad:
                refuse_unreadable(self.split, list(self.unreadable.values()), len(self), self.most_unreadable)
            yield self.input.normalise(images.to(device)), labels.to(device).long()


def collate(items: list[Any]) -> tuple[Tensor, Tensor, list[Unreadable]]:
    """Images (B, C, H, W) and labels (B) or masks (B, H, W) of the items that could be read, and the unreadable
    ones."""
    good = [item for item in items if not isinstance(item, Unreadable)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, dtype=torch.uint8)
    if good and isinstance(good[0][1], Tensor):
        labels = torch.stack([label for _, label in good])
    else:
        labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return images, labels, [item for item in items if isinstance(item, Unreadable)]


def image_input(model: nn.Module, config: DataConfig) -> ImageInput:
    """The model's pretrained settings, for the size it was built with. Fields of `config` win. Raises DataError."""
    size = input_size(model)
    given = {name: getattr(config, name) for name in ("mean", "std", "interpolation", "crop_pct")}
    for problem in channel_problems(config, size[0]):
        raise DataError(problem)
    own = resolve_model_data_config(model)
    for name in ("mean", "std"):
        if given[name] is None and len(own[name]) != size[0]:
            raise DataError(
                f"data.{name}: the model has {size[0]} input channels, but its pretrained settings are for "
                f"{len(own[name])}. Possible: one value per channel. Write {name} under data."
            )
    possible = [mode.value for mode in InterpolationMode if _is_interpolation(mode.value)]
    if config.interpolation is not None and config.interpolation not in possible:
        raise DataError(
            f"data.interpolation: {config.interpolation!r} is unknown. Possible: {', '.join(possible)}."
            f"{did_you_mean(config.interpolation, possible)} Correct it."
        )
    masks = segments(model)
    if masks and config.crop_pct not in (None, 1.0):
        raise DataError(
            f"data.crop_pct: {config.crop_pct:g}, but a class for each pixel needs the whole picture. Possible: 1. "
            f"Leave it out."
        )
    chosen = {**own, **{name: value for name, value in given.items() if value is not None}}
    if masks:
        chosen |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return ImageInput(
        size=size,
        mean=tuple(chosen["mean"]),
        std=tuple(chosen["std"]),
        crop_pct=chosen["crop_pct"],
        crop_mode=chosen["crop_mode"],
        interpolation=chosen["interpolation"],
        # the model's crop_pct is for the size its weights were trained at: 0.9 of 224 does not apply to 32 x 32 images
        take_sized=config.crop_pct is None and tuple(own["input_size"]) != size,
        masks=masks,
    )


def _is_interpolation(name: str) -> bool:
    try:
        str_to_interp_mode(name)
    except KeyError:
        return False
    return True


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
