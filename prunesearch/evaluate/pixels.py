"""Convert a picture of any Pillow mode to 8-bit grey or RGB.

Pillow converts colour models, palettes and 1-bit pictures. 16-bit grey is scaled: 65535 becomes 255. Floats range from
0 (black) to 1 (white). Transparency and EXIF orientation are ignored, as in the training of timm and torchvision. When
a picture has several frames, the first one is used.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_16_BIT_FORMATS = ("PNG", "PPM")
"""Formats for which Pillow's mode I means 16 bits. In other formats mode I has no defined range."""


def grey_or_rgb(image: Image.Image, channels: int) -> Image.Image:
    """The picture in mode L (1 channel) or RGB (3 channels). Raises ValueError for pixels without a defined range."""
    check_mode(image)
    if image.mode.startswith("I"):
        image = _scaled(np.asarray(image), 65535)
    elif image.mode == "F":
        image = _scaled(np.asarray(image), 1)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; avoids a warning of Pillow
    return image.convert("L" if channels == 1 else "RGB")


def check_mode(image: Image.Image) -> None:
    """Raise ValueError when the header shows that the pixels have no defined range."""
    if image.mode == "I" and image.format not in _16_BIT_FORMATS:
        raise ValueError("32-bit whole numbers have no defined white; save it with 8 or 16 bits")


def _scaled(values: np.ndarray, white: int) -> Image.Image:
    """Convert grey values from 0 to `white` to 8-bit grey. Raises ValueError for other values."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):  # also for NaN
        raise ValueError(f"its values go from {low:g} to {high:g}, not from 0 to {white}; save it with 8 or 16 bits")
    return Image.fromarray(np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8))
