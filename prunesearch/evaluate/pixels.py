"""A picture of any Pillow mode as 8-bit grey or RGB.

Colour models, palettes and 1 bit are converted by Pillow. 16-bit grey is scaled: 65535 becomes 255. Floats are taken
from 0 (black) to 1 (white). Transparency is ignored, and so is the EXIF orientation: timm and torchvision train without
both, so weights expect pictures that way. Of several frames the first one counts.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_16_BIT_FORMATS = ("PNG", "PPM")
"""Formats whose whole numbers Pillow gives as mode I, scaled to 16 bits. In others mode I has no defined range."""


def grey_or_rgb(image: Image.Image, channels: int) -> Image.Image:
    """The picture in mode L (1 channel) or RGB (3 channels). Raises ValueError for pixels without a defined range."""
    check_mode(image)
    if image.mode.startswith("I"):
        image = _scaled(np.asarray(image), 65535)
    elif image.mode == "F":
        image = _scaled(np.asarray(image), 1)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns when it goes to RGB at once
    return image.convert("L" if channels == 1 else "RGB")


def check_mode(image: Image.Image) -> None:
    """Raises ValueError when the header alone says that the pixels have no defined range."""
    if image.mode == "I" and image.format not in _16_BIT_FORMATS:
        raise ValueError("32-bit whole numbers have no defined white; save it with 8 or 16 bits")


def _scaled(values: np.ndarray, white: int) -> Image.Image:
    """Grey values from 0 to `white` as 8-bit grey. Raises ValueError when there are others."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):  # also for NaN
        raise ValueError(f"its values go from {low:g} to {high:g}, not from 0 to {white}; save it with 8 or 16 bits")
    return Image.fromarray(np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8))
