"""Open the image sets of a `DataConfig`, with timm or a registered function, and check them against the model."""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image, fromarray
from timm.data import ImageDataset, create_dataset
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset, IterableDataset, TensorDataset
from torchvision.datasets import DatasetFolder

from prunesearch.config import MASKED, UNLABELLED, DataConfig
from prunesearch.errors import DataError
from prunesearch.evaluate.class_order import class_of_folders, in_order, listed_classes, natural_key
from prunesearch.evaluate.digits import HELD_OUT, PARTS, TRAINING, load_digits
from prunesearch.evaluate.images import ImageInput, ImageSet, Unreadable, collate, image_input, refuse_unreadable
from prunesearch.evaluate.loading import load
from prunesearch.evaluate.masks import folders_of, masked_pictures
from prunesearch.evaluate.picture_files import (
    FolderPictures,
    Listing,
    PictureFiles,
    ReaderPictures,
    TarPictures,
    list_pictures,
)
from prunesearch.evaluate.scenes import CLASSES, COUNTS, Scenes
from prunesearch.evaluate.sections import source_problems
from prunesearch.evaluate.task import Split
from prunesearch.extras import need
from prunesearch.models.dense_head import IGNORED
from prunesearch.registry import Registry, did_you_mean

logger = logging.getLogger(__name__)

TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
SUBSET_SEED = 0
FEW_IMAGES = 5000
"""With fewer images, starting processes takes longer than decoding in this one."""


TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("validation", "val", "valid", "eval", "evaluation")
TEST_FOLDERS = ("test", "testing")
HELD_OUT_PART, MOST_HELD_OUT = 5, 5000
"""Of pictures without classes in one folder, one in so many is for validation, and so many at most."""


class Opened(NamedTuple):
    """One split as it was opened.

    images: a sequence or an iterable of (PIL image, class index), or of (PIL image, PIL mask of class indices).
    classes: names in the order of their indices, None when unknown. notes: messages about what was left out. ambiguous:
    torchvision would give the classes other indices, and the study does not say which order it means. is_shipped: it
    comes with a package, so all images are readable.
    """

    images: Any
    classes: tuple[str, ...] | None
    notes: tuple[str, ...] = ()
    ambiguous: bool = False
    is_shipped: bool = False


DATASETS: Registry[Callable[[DataConfig, Split], Opened]] = Registry("data set")
"""Data sets by name that are opened by a function. All other names go to `open_with_timm`."""


@DATASETS.register("digits")
def open_digits(config: DataConfig, split: Split) -> Opened:
    """scikit-learn's handwritten digits; they need no root. Raises MissingLibraryError without it."""
    need("data digits", "search", "sklearn")
    return Opened(_Digits(_digits_split(config, split)), tuple("0123456789"), is_shipped=True)


@DATASETS.register(UNLABELLED)
def open_images(config: DataConfig, split: Split) -> Opened:
    """Pictures in any folders, on disk or in a tar file, without classes: every label is 0."""
    (root, share), field = _unlabelled(config, split), _root_field(config, split)
    listing = list_pictures(root, field)
    order = sorted(range(len(listing.pictures)), key=lambda index: natural_key(listing.pictures[index]))
    if share is not None:  # the same pictures for a split, however many there are of the other
        generator = torch.Generator().manual_seed(SUBSET_SEED)
        drawn = torch.randperm(len(order), generator=generator).tolist()
        held_out = set(drawn[: min(len(order) // HELD_OUT_PART, MOST_HELD_OUT)])
        order = [place for rank, place in enumerate(order) if (rank in held_out) == (share == "validation")]
    if not order:
        raise DataError(
            f"data.{field}: {root!r} has {len(listing.pictures)} pictures, too few for {_WORDS[split]}. Possible: "
            f"pictures in a format that Pillow reads, {HELD_OUT_PART} or more where no val_root is given. Check the "
            f"path."
        )
    notes = _left_out(listing, split)
    for note in notes:
        warn_once(f"data: {note}")
    return Opened(_pictures(root, listing, order, [0] * len(order)), None, tuple(notes))


@DATASETS.register("scenes")
def open_scenes(config: DataConfig, split: Split) -> Opened:
    """Several digits on a canvas, with the class of each pixel; they need no root. Raises MissingLibraryError."""
    need("data scenes", "search", "sklearn")
    name = _named_split(config, split)
    if name not in COUNTS:
        field = {"train": "train_split", "validation": "val_split", "test": "test_split"}[split]
        raise DataError(f"data.{field}: {name!r}. Possible: {', '.join(COUNTS)}. Correct it.")
    return Opened(Scenes(name), CLASSES, is_shipped=True)


@DATASETS.register("masks")
def open_masks(config: DataConfig, split: Split) -> Opened:
    """Pictures and masks in two folders. Raises DataError."""
    (pictures, masks), field = _mask_folders(config)[split], _root_field(config, split)
    found, others = masked_pictures(pictures, masks, field)
    notes = _left_out(Listing([], others, []), split)
    for note in notes:
        warn_once(f"data: {note}")
    return Opened(found, None, tuple(notes))


def _mask_folders(config: DataConfig) -> dict[Split, tuple[Path, Path]]:
    """The folders of pictures and masks of each split. Raises DataError when one is missing or two are the same."""
    names: dict[Split, tuple[str, ...]] = {
        "train": (config.train_split, *TRAIN_FOLDERS),
        "validation": (config.val_split, *VALIDATION_FOLDERS),
    }
    if config.has_test:
        names["test"] = (_named_split(config, "test"), *TEST_FOLDERS)
    roots = {
        "train": config.root,
        "validation": config.val_root or config.root,
        "test": config.test_root or config.root,
    }
    found: dict[Split, tuple[Path, Path]] = {}
    for split, possible in names.items():
        root, field = roots[split], _root_field(config, split)
        folders = None if root is None or not Path(root).is_dir() else folders_of(root, possible)
        if folders is None:
            came = "nothing was given" if root is None else f"{root!r} has no folders of pictures and masks"
            raise DataError(
                f"data.{field}: {came} for {_WORDS[split]}. Possible: ROOT/{possible[0]}/images with "
                f"ROOT/{possible[0]}/masks, or ROOT/images/{possible[0]} with ROOT/masks/{possible[0]} (masks may be "
                f"called annotations or labels). Check the path."
            )
        same = next((other for other, theirs in found.items() if theirs[0] == folders[0]), None)
        if same is not None:
            raise DataError(
                f"data.{field}: {str(folders[0])!r} holds the pictures for {_WORDS[same]} and for {_WORDS[split]}. "
                f"Possible: folders for each. Make {possible[0]} folders, or write {field}."
            )
        found[split] = folders
    return found


def _unlabelled(config: DataConfig, split: Split) -> tuple[str, Split | None]:
    """Where the pictures of a split are, and the part of them that belongs to it, if not all.

    Without val_root and folders of their own, a fixed random part of the pictures is for validation.
    """
    root = _folder("root", config.root, ())
    names = ((config.train_split, *TRAIN_FOLDERS), (config.val_split, *VALIDATION_FOLDERS))
    if config.val_root is not None or all(_folder("root", config.root, one) != root for one in names):
        return _folders(config)[split], None
    if split != "test":
        return str(root), split
    if config.test_root is None:
        raise DataError(
            f"data.test_split: {config.test_split!r}, but {str(root)!r} is one folder for training and validation. "
            f"Possible: pictures elsewhere for the test. Write test_root, or leave test_split out."
        )
    return str(_folder("test_root", config.test_root, ())), None


class _Digits(Dataset[tuple[Image, int]]):
    """One part of the digits. It is loaded at the first access, because importing scikit-learn takes seconds."""

    def __init__(self, part: str) -> None:
        self._part = part

    def __len__(self) -> int:
        return TRAINING if self._part == "train" else len(range(HELD_OUT)[PARTS[self._part]])

    def __getitem__(self, index: int) -> tuple[Image, int]:
        images, labels = load_digits(self._part)
        return fromarray(images[index].numpy()), int(labels[index])


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
    """The training images for a model, and those of the split `measured`. The last four sets opened stay in memory.

    Raises DataError for data that is missing, unreadable, empty, or does not fit the model's classes.
    """
    wanted, outputs = image_input(model, config), int(model.num_classes)  # type: ignore[arg-type]
    check_classes(config, outputs, ("train", measured))
    return _open(config, wanted, outputs, "train"), _open(config, wanted, outputs, measured)


def open_training(config: DataConfig, model: nn.Module) -> ImageSet:
    """The training images alone. Raises DataError as `open_data`."""
    return open_split(config, model, "train")


def open_split(config: DataConfig, model: nn.Module, split: Split) -> ImageSet:
    """The images of one split alone. Raises DataError as `open_data`."""
    wanted, outputs = image_input(model, config), int(model.num_classes)  # type: ignore[arg-type]
    check_classes(config, outputs, (split,))
    return _open(config, wanted, outputs, split)


def open_validation(config: DataConfig, model: nn.Module) -> ImageSet:
    """The validation images alone. Raises DataError as `open_data`."""
    wanted, outputs = image_input(model, config), int(model.num_classes)  # type: ignore[arg-type]
    check_classes(config, outputs, ("validation",))
    return _open(config, wanted, outputs, "validation")


@lru_cache(maxsize=4)
def _open(config: DataConfig, wanted: ImageInput, outputs: int, split: Split) -> ImageSet:
    opened = _open_split(config, split)
    return _image_set(config, wanted, outputs, opened.images, split, opened.notes)


def chosen_images(config: DataConfig, split: Split) -> tuple[Any, Sequence[int] | None]:
    """All images of a split, and the indices of those that are used, in ascending order. None for a stream."""
    images = _open_split(config, split).images
    if isinstance(images, IterableDataset):
        return images, None
    limit, count = _limit(config, split), len(images)
    if limit is None or limit >= count:
        return images, range(count)
    generator = torch.Generator().manual_seed(SUBSET_SEED)
    return images, torch.randperm(count, generator=generator)[:limit].sort().values.tolist()


def _limit(config: DataConfig, split: Split) -> int | None:
    return {"train": config.train_images, "validation": config.val_images}.get(split)


def most_unreadable(config: DataConfig, split: Split, count: int) -> int:
    """How many of `count` images of a split may be left out because they cannot be read."""
    return math.floor(config.allow_unreadable * count) if split == "train" else 0


def unreadable_images(
    config: DataConfig, wanted: ImageInput, outputs: int, split: Split, report: Callable[[int, int], None]
) -> list[Unreadable]:
    """Decode all used images of a split without keeping them, and return those that cannot be read.

    report: called with how many are done, and of how many. Raises DataError for a label beyond the model's outputs.
    """
    images, chosen = chosen_images(config, split)
    prepare = partial(_prepare, wanted, outputs, split)
    found: list[Unreadable] = []
    if chosen is None:
        for done, _ in enumerate(_stream(images, prepare, split, _limit(config, split))):
            report(done, done)
        return found
    source = _Prepared(images, chosen, prepare)
    done = 0
    for labels, bad in _in_batches(source, config.loaders, _labels_alone):
        found += bad
        done += len(labels) + len(bad)
        report(done, len(chosen))
    return found


def unreadable_headers(
    pictures: PictureFiles, chosen: Sequence[int], loaders: int, report: Callable[[int, int], None]
) -> list[Unreadable]:
    """Read the headers of the files with these indices, and return the files that do not begin like a picture."""
    found, done = [], 0
    for batch in _in_batches(_Headers(pictures, chosen), loaders, list):
        found += [one for one in batch if one is not None]
        done += len(batch)
        report(done, len(chosen))
    return found


def _in_batches(source: Dataset[Any], loaders: int, collate: Callable[[list[Any]], Any]) -> Iterator[Any]:
    count = len(source)  # type: ignore[arg-type]
    batches = BatchSampler(range(count), batch_size=64, drop_last=False)
    return load(source, batches, collate, loaders if count >= FEW_IMAGES else 0)


def _labels_alone(items: list[Any]) -> tuple[list[int], list[Unreadable]]:
    bad = [item for item in items if isinstance(item, Unreadable)]
    return [item[1] for item in items if not isinstance(item, Unreadable)], bad


def check_paths(config: DataConfig) -> None:
    """Raise DataError for an unknown data set, a missing folder or tar, or a test split that the search would see.

    Opens no data set.
    """
    if config.name in ("", "folder"):
        _folders(config)
        listed_classes(config)
    elif config.class_order is not None:
        raise DataError(
            f"data.class_order: {', '.join(config.class_order[:5])}, but {config.name!r} brings an order of its own. "
            f"Possible: with a folder or .tar of class/image files. Leave class_order out."
        )
    elif config.name == UNLABELLED:
        for split in ("train", "validation", *(["test"] if config.has_test else [])):
            _unlabelled(config, split)  # type: ignore[arg-type]
    elif config.name == "masks":
        _mask_folders(config)
    elif config.name not in DATASETS:
        _check_timm_name(config.name)
    for problem in source_problems(config):
        raise DataError(problem)
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
    """Open torch/..., hfds/..., wds/... with timm.data.create_dataset, and a folder or tar file with our own reader.

    timm's reader of folders leaves out most formats, and returns another picture for one that it cannot read.
    """
    name = config.name
    if name in ("", "folder"):
        return open_folder(config, split)
    check_paths(config)
    root = {"validation": config.val_root, "test": config.test_root}.get(split) or config.root
    wanted = _named_split(config, split)
    try:
        images = create_dataset(name, root=root, split=wanted, search_split=True)
    except Exception as error:  # readers raise anything: AssertionError, RuntimeError, ImportError, ...
        raise DataError(
            f"data ({split}): timm cannot open {name!r} with root {root!r}, split {wanted!r}: "
            f"{type(error).__name__}: {error}. Possible: a folder or .tar of class/image files, or a name that "
            f"timm.data.create_dataset opens. Check name, root and the split's name."
        ) from error
    return Opened(_as_files(images), _class_names(images))


def _as_files(images: Any) -> Any:
    """Wrap what timm or torchvision opened, so that we read its files ourselves where it has files.

    Their readers convert to 8-bit RGB by dropping bits, and timm's returns another picture for one that it cannot read.
    """
    if isinstance(images, ImageDataset):
        return ReaderPictures(images)
    if isinstance(images, DatasetFolder):
        paths, labels = zip(*images.samples, strict=True)
        return FolderPictures("", paths, labels)
    return images


def open_folder(config: DataConfig, split: Split) -> Opened:
    """Open pictures in class folders, on disk or in a tar file. Raises DataError when there are none."""
    check_paths(config)
    field = _root_field(config, split)
    root = _folders(config)[split]
    listing = list_pictures(root, field)
    folders = [name.rpartition("/")[0] for name in listing.pictures]
    order = sorted(range(len(folders)), key=lambda index: natural_key(listing.pictures[index]))
    if not order:
        others = f" but {_some(listing.others)}" if listing.others else ""
        raise DataError(
            f"data.{field}: {root!r} has no pictures{others}. Possible: class/image files in a format that Pillow "
            f"reads. Check the path."
        )
    class_of, classes = class_of_folders(config, folders, field)
    index_of = {name: index for index, name in enumerate(classes)}
    labels = [index_of[class_of[folders[index]]] for index in order]
    notes = _left_out(listing, split)
    if listing.empty:
        what = "has an empty folder" if len(listing.empty) == 1 else f"has {len(listing.empty)} empty folders"
        notes.append(f"the {_WORDS[split]} set {what}, which is no class ({_some(listing.empty)})")
    for note in notes:
        warn_once(f"data: {note}")
    ambiguous = config.class_order is None and in_order(classes, "ascii") != classes
    if ambiguous:
        other = in_order(classes, "ascii")
        place = next(index for index, name in enumerate(classes) if name != other[index])
        warn_once(
            f"data: the classes are in natural order, as in timm (index {place} is {classes[place]!r}); torchvision's "
            f"ImageFolder has them in ASCII order (index {place} is {other[place]!r}). With weights of the other order "
            f"nearly every answer is wrong. Possible: data.class_order: natural, ascii, or a list. Write the one that "
            f"the weights were trained with."
        )
    return Opened(_pictures(root, listing, order, labels), classes, tuple(notes), ambiguous)


def _pictures(root: str, listing: Listing, order: Sequence[int], labels: Sequence[int]) -> PictureFiles:
    """The listed pictures with these indices."""
    if listing.members is not None:
        return TarPictures(root, [listing.members[index] for index in order], labels)
    return FolderPictures(root, [listing.pictures[index] for index in order], labels)


def _left_out(listing: Listing, split: Split) -> list[str]:
    """A message about files that are no pictures, if there are any."""
    if not listing.others:
        return []
    verb = (
        "are no pictures that Pillow reads and were"
        if len(listing.others) > 1
        else "is no picture that Pillow reads and was"
    )
    return [f"{_count(len(listing.others), split, 'file')} {verb} left out ({_some(listing.others)})"]


_WORDS: dict[Split, str] = {"train": "training", "validation": "validation", "test": "test"}


def _count(count: int, split: Split, what: str) -> str:
    return f"{count} {_WORDS[split]} {what}{'s' if count != 1 else ''}"


def _some(names: Collection[str]) -> str:
    """The first few names of many."""
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


@lru_cache(maxsize=256)
def warn_once(text: str) -> None:
    """Log a warning, but each text only once in this process."""
    logger.warning("%s", text)


def _root_field(config: DataConfig, split: Split) -> str:
    given = {"validation": ("val_root", config.val_root), "test": ("test_root", config.test_root)}.get(split)
    return given[0] if given is not None and given[1] is not None else "root"


def _check_timm_name(name: str) -> None:
    prefix, has_prefix, _ = name.partition("/")
    if not (has_prefix and prefix.lower() in TIMM_PREFIXES):
        known = [*DATASETS, "folder", *(f"{prefix}/..." for prefix in TIMM_PREFIXES)]
        raise DataError(
            f"data.name: unknown data set {name!r}. Known: {', '.join(known)}."
            f"{did_you_mean(name, known)} Correct the name."
        )


def _folders(config: DataConfig) -> dict[Split, str]:
    """Folder or tar file of each split. Raises DataError when one is missing or contains another."""
    found: dict[Split, Path] = {"train": _folder("root", config.root, (config.train_split, *TRAIN_FOLDERS))}
    names: dict[Split, tuple[str, ...]] = {"validation": VALIDATION_FOLDERS}
    if config.has_test:
        names["test"] = TEST_FOLDERS
    roots = {"validation": ("val_root", config.val_root), "test": ("test_root", config.test_root)}
    for split, usual in names.items():
        field, root = roots[split] if roots[split][1] is not None else ("root", config.root)
        found[split] = _folder(field, root, (_named_split(config, split), *usual))
    for split, other in itertools.combinations(found, 2):
        first, second = found[split].resolve(), found[other].resolve()
        if first == second and first.is_dir() and not any(first.iterdir()):
            raise DataError(
                f"data.{roots[other][0]}: {str(found[other])!r} is empty. Possible: a folder with train and val "
                f"sub-folders of class/image files. Check the path."
            )
        if first.is_relative_to(second) or second.is_relative_to(first):
            what, field = ("training" if split == "train" else split), roots[other][0]
            raise DataError(
                f"data.root: {what} images ({str(found[split])!r}) and {other} images ({str(found[other])!r}) overlap. "
                f"Possible: sub-folders train, val (and test) in root, or two separate paths. Write root and {field}."
            )
    return {split: str(path) for split, path in found.items()}


def _named_split(config: DataConfig, split: Split) -> str:
    """The name of a split in the study file."""
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
    """Class names in the order of their indices, from the attribute that timm's readers or torchvision's classes have.

    None when there is no such attribute.
    """
    for holder in (getattr(images, "reader", None), images):
        for attribute in ("class_to_idx", "class_name_to_idx"):
            mapping = getattr(holder, attribute, None)
            if isinstance(mapping, dict) and mapping:
                return tuple(sorted(mapping, key=mapping.__getitem__))
    return None


def check_classes(config: DataConfig, outputs: int, splits: Sequence[Split]) -> None:
    """Raise DataError when a split has other classes than the training images, or the model another number of outputs.

    Classes without names cannot be compared. A model without a classifier (0 outputs) takes any classes.
    """
    train = _open_split(config, "train").classes
    if train is None:
        return
    for split in splits:
        other = _open_split(config, split).classes
        if other is not None and train != other:
            differing = sorted(set(train) ^ set(other))[:5] or list(train[:5])
            raise DataError(
                f"data {config.name!r}: training and {split} have different classes ({len(train)} and "
                f"{len(other)}; for example {', '.join(map(repr, differing))}), so equal labels would mean different "
                f"things. Possible: the same class folders in both. Check root and {_root_field(config, split)}."
            )
    if outputs and len(train) != outputs:
        shown = ", ".join(train[:5]) + (", ..." if len(train) > 5 else "")
        raise DataError(
            f"data {config.name!r}: {len(train)} classes ({shown}), but the model has {outputs} outputs. Possible: "
            f"as many outputs as classes. Write num_classes: {len(train)} under model, with a checkpoint for them."
        )


def classes_of(config: DataConfig) -> tuple[tuple[str, ...] | None, bool]:
    """The class names, None when they are unknown; and whether their order is ambiguous (see `Opened`)."""
    opened = _open_split(config, "train")
    return opened.classes, opened.ambiguous


def is_shipped(config: DataConfig, split: Split) -> bool:
    """Whether a split comes with a package, so that all images are readable."""
    return _open_split(config, split).is_shipped


def notes_of(config: DataConfig, split: Split) -> tuple[str, ...]:
    """Messages about files and folders of a split that were left out because they hold no picture."""
    return _open_split(config, split).notes


def check_labels(config: DataConfig, outputs: int, split: Split) -> None:
    """Raise DataError for a class index beyond the model's outputs, if the indices are known without opening files."""
    images = _open_split(config, split).images
    labels = getattr(images, "labels", None)
    if labels is None:
        labels = getattr(images, "targets", None)  # torchvision
    if labels is not None and len(labels):
        values = torch.as_tensor(labels)
        for label in (int(values.min()), int(values.max())):
            _check_label(outputs, split, label)


def _stream(
    images: Any, prepare: Callable[[Image, Any], tuple[Tensor, Any]], split: Split, limit: int | None
) -> Iterator[tuple[Tensor, Any]]:
    """The first `limit` images of a stream. A random subset would need all of them to be read."""
    try:
        for image, label in itertools.islice(images, limit):
            yield prepare(image, label)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # readers raise anything
        raise DataError(
            f"data ({split}): the stream cannot be read: {type(error).__name__}: {error}. Possible: images with labels "
            f"that timm's reader decodes. Check name, root and the split's name."
        ) from error


def _image_set(
    config: DataConfig, wanted: ImageInput, outputs: int, images: Any, split: Split, notes: tuple[str, ...]
) -> ImageSet:
    prepare = partial(_prepare, wanted, outputs, split)
    _, chosen = chosen_images(config, split)
    source: Any
    if chosen is None:
        if not config.in_memory:
            raise DataError(
                f"data ({split}): {config.name!r} can only be read in order, but training reads in random order. "
                f"Possible: in_memory: true with train_images and val_images, or a data set of files. Change data."
            )
        source = list(_stream(images, prepare, split, _limit(config, split)))
    else:
        source = _Prepared(images, chosen, prepare)
    if not len(source):
        raise DataError(f"data ({split}): {config.name!r} has no images. Possible: one or more. Check root and splits.")
    most = most_unreadable(config, split, len(source))
    if not config.in_memory:
        return ImageSet(wanted, source, config.loaders, split=split, most_unreadable=most, notes=notes)
    decoded = _decode(wanted, source, config.loaders, split, most, notes)
    size = "x".join(map(str, wanted.size))
    logger.info("%s: %d %s images of %s in memory", config.name or "folder", len(decoded), split, size)
    return decoded


def _decode(
    wanted: ImageInput, source: Any, loaders: int, split: Split, most_unreadable: int, notes: tuple[str, ...]
) -> ImageSet:
    images = torch.empty((len(source), *wanted.size), dtype=torch.uint8)
    labels = torch.empty(len(source), dtype=torch.int64)
    if wanted.masks:
        labels = torch.empty((len(source), *wanted.size[1:]), dtype=torch.uint8)
    filled, bad = 0, list[Unreadable]()
    for some, their_labels, unreadable in _in_batches(source, loaders, collate):
        if len(some):
            images[filled : filled + len(some)] = some
            labels[filled : filled + len(some)] = their_labels
        filled += len(some)
        bad += unreadable
    if bad:
        refuse_unreadable(split, bad, len(source), most_unreadable)
        notes += (unreadable_note(split, bad, len(source)),)
        warn_once(f"data: {notes[-1]}")
        images, labels = images[:filled].clone(), labels[:filled].clone()
    digest = hashlib.sha256(images.numpy().data)
    digest.update(labels.numpy().data)
    fingerprint = f"{len(images)}:{digest.hexdigest()[:12]}"
    return ImageSet(wanted, TensorDataset(images, labels), fingerprint=fingerprint, split=split, notes=notes)


def unreadable_note(split: Split, bad: Sequence[Unreadable], count: int) -> str:
    """A message: how many images of a split were left out because they cannot be read."""
    names = _some([one.name for one in bad])
    return f"{len(bad)} of {_count(count, split, 'picture')} could not be read and were left out ({names})"


def _prepare(
    wanted: ImageInput, outputs: int, split: Split, image: Image, label: Any, name: str = "an image"
) -> tuple[Tensor, Any]:
    if isinstance(label, Image) != wanted.masks:
        has = "one class each, but the model gives classes to each patch"
        if isinstance(label, Image):
            has = "a class for each pixel, but the model gives one to a picture"
        raise DataError(
            f"data ({split}): the pictures have {has}. Possible: data with masks ({', '.join(MASKED)}) for a model "
            f"with model.head, other data for one without. Change one of them."
        )
    if wanted.masks:
        mask = wanted.mask(label)
        known = mask[mask != IGNORED]
        if len(known):
            _check_label(outputs, split, int(known.max()), f"the mask of {name}")
        return wanted.transform(image), mask
    _check_label(outputs, split, int(label), name)
    return wanted.transform(image), int(label)


def _check_label(outputs: int, split: Split, label: int, name: str = "an image") -> None:
    if outputs and not 0 <= label < outputs:  # on a GPU a wrong label would kill the whole process
        raise DataError(
            f"data ({split}): {name} has label {label}, but the model has {outputs} outputs. "
            f"Possible: 0 to {outputs - 1}. Write num_classes under model, or choose the matching data."
        )


class _Prepared(Dataset[Any]):
    """The `chosen` images and labels, prepared for a model; an Unreadable in the place of one that cannot be read."""

    def __init__(self, images: Any, chosen: Sequence[int], prepare: Callable[..., tuple[Tensor, Any]]) -> None:
        self._images, self._chosen, self._prepare = images, chosen, prepare

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, position: int) -> tuple[Tensor, Any] | Unreadable:
        index = self._chosen[position]
        try:
            image, label = self._images[index]
            return self._prepare(image, label, _name(self._images, index))
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
            return _unreadable(self._images, index, error)


class _Headers(Dataset[Any]):
    """For each of the files `chosen`: None, or an Unreadable when it does not begin like a picture."""

    def __init__(self, pictures: PictureFiles, chosen: Sequence[int]) -> None:
        self._pictures, self._chosen = pictures, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, position: int) -> Unreadable | None:
        index = self._chosen[position]
        try:
            self._pictures.read_header(index)
        except Exception as error:
            return _unreadable(self._pictures, index, error)
        return None


def _name(images: Any, index: int) -> str:
    return images.name(index) if isinstance(images, PictureFiles) else f"picture {index}"


def _unreadable(images: Any, index: int, error: Exception) -> Unreadable:
    """The picture as an Unreadable. Raises errors that are not its fault: a wrong label, no memory, too many files."""
    if isinstance(error, (DataError, MemoryError)) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        raise error
    name = _name(images, index)
    if isinstance(error, FileNotFoundError):
        return Unreadable(index, name, "a link to a file that is not there, or it was removed")
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Unreadable(index, name, why or type(error).__name__)
