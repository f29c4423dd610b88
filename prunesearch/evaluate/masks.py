"""Pictures with masks: two folders, one with pictures and one with masks of the same names.

A mask has one channel. The value of a pixel is the index of its class; 255 means that it belongs to none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from prunesearch.errors import DataError
from prunesearch.evaluate.class_order import natural_key
from prunesearch.evaluate.images import check_mask_mode
from prunesearch.evaluate.picture_files import FolderPictures, PictureFiles, list_pictures

PICTURES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "annotations", "labels")
"""Names of the two folders."""


class MaskedPictures(PictureFiles):
    """Pictures and their masks, as (PIL image, PIL mask)."""

    def __init__(self, pictures: FolderPictures, masks: FolderPictures) -> None:
        self._pictures, self._masks = pictures, masks

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        picture, _ = self._pictures[index]
        try:
            file, _ = self._masks.open(index)
            with file, Image.open(file) as opened:
                mask = opened.copy()
        except Exception as error:  # decoders raise anything
            raise ValueError(f"its mask {self._masks.name(index)}: {error}") from error
        if mask.size != picture.size:
            raise ValueError(f"its mask {self._masks.name(index)} has {mask.size} pixels, the picture {picture.size}")
        return picture, mask

    def open(self, index: int) -> tuple[BinaryIO, Any]:
        return self._pictures.open(index)

    def name(self, index: int) -> str:
        return self._pictures.name(index)

    def stamp(self, index: int) -> str | None:
        both = self._pictures.stamp(index), self._masks.stamp(index)
        return None if None in both else " ".join(map(str, both))

    def read_header(self, index: int) -> None:
        self._pictures.read_header(index)
        file, _ = self._masks.open(index)
        with file, Image.open(file) as mask:
            check_mask_mode(mask)


def folders_of(root: str, splits: Sequence[str]) -> tuple[Path, Path] | None:
    """The folders of pictures and of masks of a split, or None.

    Either the split's folder holds both (root/train/images, root/train/masks), or both hold the split's
    (root/images/train, root/masks/train), or the root itself is the split's folder. splits: its possible names.
    """
    above = Path(root)
    for split in (*splits, ""):
        for inside in ((above / split, ""), (above, split)):
            found = [_first(inside[0], names, inside[1]) for names in (PICTURES, MASKS)]
            if found[0] is not None and found[1] is not None:
                return found[0], found[1]
    return None


def _first(folder: Path, names: Sequence[str], below: str) -> Path | None:
    return next((folder / name / below for name in names if (folder / name / below).is_dir()), None)


def masked_pictures(pictures: Path, masks: Path, field: str) -> tuple[MaskedPictures, list[str]]:
    """The pictures of a folder with their masks, and the files that are no pictures. Raises DataError.

    A mask has the path of its picture, up to the suffix. field: name of the root in errors.
    """
    listed, theirs = (list_pictures(str(folder), field) for folder in (pictures, masks))
    names = sorted(listed.pictures, key=natural_key)
    mask_of = {os.path.splitext(name)[0]: name for name in theirs.pictures}
    twice = _twice(names) or _twice(theirs.pictures)
    if twice is not None:
        raise DataError(
            f"data.{field}: {twice[0]} and {twice[1]} have the same name up to the suffix, so one of them would be "
            f"taken for the other. Possible: one picture and one mask of each name. Remove one, or rename them."
        )
    lossy = [name for name in theirs.pictures if name.lower().endswith((".jpg", ".jpeg"))]
    if lossy:
        raise DataError(
            f"data.{field}: {len(lossy)} masks are JPEG ({', '.join(lossy[:3])}), which changes class indices. "
            f"Possible: PNG, or another format without loss. Make the masks again."
        )
    missing = [name for name in names if os.path.splitext(name)[0] not in mask_of]
    if missing or not names:
        what = f"{len(missing)} of {len(names)} pictures have no mask ({', '.join(missing[:3])})" if names else "empty"
        raise DataError(
            f"data.{field}: {str(pictures)!r}: {what}; masks are in {str(masks)!r}. Possible: for each picture a mask "
            f"of the same name, such as images/a.jpg and masks/a.png. Add them, or move the pictures away."
        )
    paired = [mask_of[os.path.splitext(name)[0]] for name in names]
    nothing = [0] * len(names)
    found = MaskedPictures(FolderPictures(str(pictures), names, nothing), FolderPictures(str(masks), paired, nothing))
    return found, [*listed.others, *theirs.others]


def _twice(names: Sequence[str]) -> tuple[str, str] | None:
    """Two files with the same path up to the suffix, if there are any."""
    seen: dict[str, str] = {}
    for name in names:
        stem = os.path.splitext(name)[0]
        if stem in seen:
            return seen[stem], name
        seen[stem] = name
    return None
