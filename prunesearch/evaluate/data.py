"""A `DataConfig` as two sets of images: opened by timm or by a registered function, and checked against the model."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL.Image import Image
from timm.data import create_dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from prunesearch.config import DataConfig
from prunesearch.errors import DataError
from prunesearch.evaluate.digits import PARTS, load_digits
from prunesearch.evaluate.images import ImageInput, ImageSet, image_input
from prunesearch.registry import Registry, did_you_mean

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
SUBSET_SEED = 0
FEW_IMAGES = 5000
"""Below this, starting processes takes longer than decoding in this one."""


class Opened(NamedTuple):
    """One split: a sequence of (PIL image, class index), or an iterable one, and the class names if they are known."""

    images: Any
    classes: tuple[str, ...] | None


DATASETS: Registry[Callable[[DataConfig, Split], Opened]] = Registry("data set")
"""Data sets that timm does not know; anything else goes to timm.data.create_dataset."""


@DATASETS.register("digits")
def open_digits(config: DataConfig, split: Split) -> Opened:
    """scikit-learn's handwritten digits; they need no root."""
    from PIL.Image import fromarray

    images, labels = load_digits(_digits_split(config, split))
    pairs = [(fromarray(image.numpy()), int(label)) for image, label in zip(images, labels, strict=True)]
    return Opened(pairs, tuple("0123456789"))


def _digits_split(config: DataConfig, split: Split) -> str:
    name = _named_split(config, split)
    if name not in PARTS or (split == "test" and {name, config.val_split} != {"first half", "second half"}):
        field = {"train": "train_split", "validation": "val_split", "test": "test_split"}[split]
        raise DataError(
            f"data.{field}: {name!r}, with val_split {config.val_split!r}. Possible: train and validation; with a "
            f"test, of which the search must not see anything, val_split: first half and test_split: second half. "
            f"Change them."
        )
    return name


def open_data(config: DataConfig, model: nn.Module, measured: Split = "validation") -> tuple[ImageSet, ImageSet]:
    """The training images for a model and those to measure it on. The last four sets opened stay in memory.

    Raises DataError for what is not there, not readable, empty, or does not fit the model's classes.
    """
    wanted, outputs = image_input(model, config), int(model.num_classes)  # type: ignore[arg-type]
    _check_classes(config, _open_split(config, "train").classes, _open_split(config, measured).classes, outputs)
    return _open(config, wanted, outputs, "train"), _open(config, wanted, outputs, measured)


def open_training(config: DataConfig, model: nn.Module) -> ImageSet:
    """The training images alone. Raises DataError as `open_data`."""
    wanted, outputs = image_input(model, config), int(model.num_classes)  # type: ignore[arg-type]
    classes = _open_split(config, "train").classes
    _check_classes(config, classes, classes, outputs)
    return _open(config, wanted, outputs, "train")


@lru_cache(maxsize=4)
def _open(config: DataConfig, wanted: ImageInput, outputs: int, split: Split) -> ImageSet:
    limit = {"train": config.train_images, "validation": config.val_images}.get(split)
    return _image_set(config, wanted, outputs, _open_split(config, split).images, split, limit)


def check_paths(config: DataConfig) -> None:
    """Raises DataError for an unknown data set, a folder or tar that is not there, or a test that the search would see;
    opens nothing."""
    if config.name in ("", "folder"):
        _folders(config)
    elif config.name not in DATASETS:
        _check_timm_name(config.name)
    if config.name == "digits" and config.has_test:
        _digits_split(config, "test")
    validation = (config.val_root or config.root, config.val_split)
    if config.has_test and (config.test_root or config.root, _named_split(config, "test")) == validation:
        raise DataError(
            f"data.test_split: {_named_split(config, 'test')!r} are the images for validation, which the search sees. "
            f"Possible: another split, or another test_root. Change one of them, or leave the test out."
        )


@lru_cache(maxsize=4)
def _open_split(config: DataConfig, split: Split) -> Opened:
    if config.name in DATASETS:
        return DATASETS[config.name](config, split)
    return open_with_timm(config, split)


def open_with_timm(config: DataConfig, split: Split) -> Opened:
    """Folder, tar, torch/..., hfds/..., wds/... through timm.data.create_dataset."""
    name = config.name
    root = {"validation": config.val_root, "test": config.test_root}.get(split) or config.root
    if name in ("", "folder"):
        name, root = "", _folders(config)[split]
    else:
        _check_timm_name(name)
    wanted = _named_split(config, split)
    try:
        images = create_dataset(name, root=root, split=wanted, search_split=name != "")
    except Exception as error:  # readers raise anything: AssertionError, RuntimeError, ImportError, ...
        raise DataError(
            f"data ({split}): timm cannot open {config.name or 'folder'!r} with root {root!r}, split {wanted!r}: "
            f"{type(error).__name__}: {error}. Possible: a folder or .tar of class/image files, or a name that "
            f"timm.data.create_dataset opens. Check name, root and the split's name."
        ) from error
    return Opened(images, _class_names(images))


def _check_timm_name(name: str) -> None:
    prefix, has_prefix, _ = name.partition("/")
    if not (has_prefix and prefix.lower() in TIMM_PREFIXES):
        known = [*DATASETS, "folder", *(f"{prefix}/..." for prefix in TIMM_PREFIXES)]
        raise DataError(
            f"data.name: unknown data set {name!r}. Known: {', '.join(known)}."
            f"{did_you_mean(name, known)} Correct the name."
        )


def _folders(config: DataConfig) -> dict[Split, str]:
    """Folder or tar of each split. Raises DataError when one is not there or when one contains the other."""
    found: dict[Split, Path] = {"train": _folder("root", config.root, (config.train_split, "train", "training"))}
    names: dict[Split, tuple[str, ...]] = {"validation": ("validation", "val", "valid", "eval", "evaluation")}
    if config.has_test:
        names["test"] = ("test", "testing")
    roots = {"validation": ("val_root", config.val_root), "test": ("test_root", config.test_root)}
    for split, usual in names.items():
        field, root = roots[split] if roots[split][1] is not None else ("root", config.root)
        found[split] = _folder(field, root, (_named_split(config, split), *usual))
    for split, other in itertools.combinations(found, 2):
        first, second = found[split].resolve(), found[other].resolve()
        if first.is_relative_to(second) or second.is_relative_to(first):
            what, field = ("training" if split == "train" else split), roots[other][0]
            raise DataError(
                f"data.root: {what} images ({str(found[split])!r}) and {other} images ({str(found[other])!r}) overlap. "
                f"Possible: sub-folders {split} and {other} in root, or two separate paths. Write root and {field}."
            )
    return {split: str(path) for split, path in found.items()}


def _named_split(config: DataConfig, split: Split) -> str:
    """What the study file calls a split."""
    return {"train": config.train_split, "validation": config.val_split, "test": config.test_split or "test"}[split]


def _folder(field: str, root: str | None, splits: tuple[str, ...]) -> Path:
    """The first sub-folder of `root` with one of these names, else `root` itself."""
    if root is None or not Path(root).exists():
        came = "nothing was given" if root is None else f"{root!r} is not there"
        raise DataError(
            f"data.{field}: {came}. Possible: a folder or .tar file of class/image files, or a folder with train and "
            f"validation sub-folders. Give the path of one."
        )
    return next((Path(root) / name for name in splits if (Path(root) / name).is_dir()), Path(root))


def _class_names(images: Any) -> tuple[str, ...] | None:
    """Names in the order of their indices, from whichever attribute this reader or torchvision class has."""
    for holder in (getattr(images, "reader", None), images):
        for attribute in ("class_to_idx", "class_name_to_idx"):
            mapping = getattr(holder, attribute, None)
            if isinstance(mapping, dict) and mapping:
                return tuple(sorted(mapping, key=mapping.__getitem__))
    return None


def _check_classes(
    config: DataConfig, train: tuple[str, ...] | None, validation: tuple[str, ...] | None, outputs: int
) -> None:
    if train is None or validation is None:
        return
    if train != validation:
        differing = sorted(set(train) ^ set(validation))[:5]
        raise DataError(
            f"data {config.name!r}: training and validation have different classes ({len(train)} and "
            f"{len(validation)}; for example {', '.join(map(repr, differing))}), so equal labels would mean different "
            f"things. Possible: the same class folders in both. Check root and val_root."
        )
    if train in (("",), (".",)):
        raise DataError(
            f"data {config.name!r}: the images are not in class folders. Possible: files named class/image. "
            f"Put each image in a folder named after its class."
        )
    if len(train) != outputs:
        shown = ", ".join(train[:5]) + (", ..." if len(train) > 5 else "")
        raise DataError(
            f"data {config.name!r}: {len(train)} classes ({shown}), but the model has {outputs} outputs. Possible: "
            f"as many outputs as classes. Write num_classes: {len(train)} under model, with a checkpoint for them."
        )


def _image_set(
    config: DataConfig, wanted: ImageInput, outputs: int, images: Any, split: Split, limit: int | None
) -> ImageSet:
    prepare = partial(_prepare, wanted, outputs, split)
    source: Any
    if isinstance(images, IterableDataset):
        if not config.in_memory:
            raise DataError(
                f"data ({split}): {config.name!r} can only be read in order, but training reads in random order. "
                f"Possible: in_memory: true with train_images and val_images, or a data set of files. Change data."
            )
        # the first ones of the stream: to draw among all of them, all would have to be read
        source = [prepare(image, label) for image, label in itertools.islice(images, limit)]
    else:
        if limit is not None and limit < len(images):
            generator = torch.Generator().manual_seed(SUBSET_SEED)
            images = Subset(images, torch.randperm(len(images), generator=generator)[:limit].sort().values.tolist())
        source = _Prepared(images, prepare)
    if not len(source):
        raise DataError(f"data ({split}): {config.name!r} has no images. Possible: one or more. Check root and splits.")
    if not config.in_memory:
        return ImageSet(wanted, source, loaders=config.loaders)
    decoded = _decode(wanted, source, config.loaders if len(source) >= FEW_IMAGES else 0)
    size = "x".join(map(str, wanted.size))
    logger.info("%s: %d %s images of %s in memory", config.name or "folder", len(decoded), split, size)
    return decoded


def _decode(wanted: ImageInput, source: Any, loaders: int) -> ImageSet:
    images = torch.empty((len(source), *wanted.size), dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64)
    filled = 0
    for some, their_labels in DataLoader(source, batch_size=64, num_workers=loaders):
        images[filled : filled + len(some)] = some
        labels[filled : filled + len(some)] = their_labels
        filled += len(some)
    digest = hashlib.sha256(images.numpy().data)
    digest.update(labels.numpy().data)
    return ImageSet(wanted, TensorDataset(images, labels), fingerprint=f"{len(images)}:{digest.hexdigest()[:12]}")


def _prepare(wanted: ImageInput, outputs: int, split: Split, image: Image, label: Any) -> tuple[Tensor, int]:
    if not 0 <= int(label) < outputs:  # on a GPU a wrong label would take the whole process down
        raise DataError(
            f"data ({split}): an image has label {int(label)}, but the model has {outputs} outputs. "
            f"Possible: 0 to {outputs - 1}. Write num_classes under model, or choose the matching data."
        )
    return wanted.transform(image), int(label)


class _Prepared(Dataset[tuple[Tensor, int]]):
    """PIL images and labels as a model wants them."""

    def __init__(self, images: Any, prepare: Callable[[Image, Any], tuple[Tensor, int]]) -> None:
        self._images, self._prepare = images, prepare

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._prepare(*self._images[index])
