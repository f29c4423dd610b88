"""A short Python program that runs an exported file, with the right preprocessing and without PyTorch."""

from __future__ import annotations

import json
import math
from pathlib import Path

from prunesearch.errors import UserError
from prunesearch.evaluate.images import ImageInput
from prunesearch.export.file_facts import FileFacts, read_facts
from prunesearch.export.runtimes import runtime_of


def example_code(path: str | Path) -> str:
    """A program that prints the class (or the features) of the picture named on its command line.

    It needs NumPy, Pillow and the runtime, and reads 8-bit pictures as `prunesearch` does. Raises UserError and
    FileError as `read_facts`.
    """
    return program(read_facts(path), Path(path))


def program(facts: FileFacts, path: Path) -> str:
    """`example_code` of a file with these facts."""
    runtime, wanted = runtime_of(path), facts.preprocessing
    channels, height, width = wanted.size
    mode = "L" if channels == 1 else "RGB"
    in_float32 = "" if facts.half else runtime.in_float32
    names = runtime.metadata.format(key='"prunesearch.classes"')
    lines = [
        *(["import json"] if facts.classes else []),
        "import sys",
        "",
        "import numpy as np",
        runtime.imports,
        "from PIL import Image",
        "",
        f'image = Image.open(sys.argv[1]).convert("{mode}")',
        *_resized(wanted),
        f"pixels = np.asarray(image, np.float32).reshape({height}, {width}, {channels}) / 255",
        f"pixels = (pixels - np.float32({list(wanted.mean)})) / np.float32({list(wanted.std)})",
        "pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])",
        *(line.format(path=json.dumps(str(path)), in_float32=in_float32) for line in runtime.example),
        *_said(facts, names),
    ]
    return "\n".join(lines) + "\n"


def _said(facts: FileFacts, names: str) -> list[str]:
    """Lines that print what the file says of the picture."""
    if facts.features:
        return ["print(logits.shape, logits[:8])  # the features of the picture"]
    if facts.segments:
        lines = ["best = logits.argmax(axis=0)  # the class of each patch", "print(best)"]
        if facts.classes:
            lines += [f"names = json.loads({names})", "print([names[one] for one in sorted(set(best.flat))])"]
        return lines
    named = f"print(best, json.loads({names})[best])" if facts.classes else "print(best)"
    return ["best = int(logits.argmax())", named]


def _resized(wanted: ImageInput) -> list[str]:
    """Lines that resize and crop `image`, with the rounding of torchvision and timm."""
    _, height, width = wanted.size
    tall, wide = (math.floor(side / wanted.crop_pct) for side in (height, width))
    to_size = {
        "squash": f"({wide}, {tall})",
        "center": f"({wide} * w // min(w, h), {tall} * h // min(w, h))"
        if wide == tall
        else f"(round(w / min(w / {wide}, h / {tall})), round(h / min(w / {wide}, h / {tall})))",
    }
    if wanted.crop_mode not in to_size:
        raise UserError(
            f"example: crop mode {wanted.crop_mode!r} has none. Possible: {', '.join(to_size)}. Use timm's transform."
        )
    lines = [
        "w, h = image.size",
        f"image = image.resize({to_size[wanted.crop_mode]}, Image.Resampling.{wanted.interpolation.upper()})",
        f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
        f"image = image.crop((left, top, left + {width}, top + {height}))",
    ]
    if not wanted.take_sized:
        return lines
    return [f"if image.size != ({width}, {height}):", *(f"    {line}" for line in lines)]
