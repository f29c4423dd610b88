"""Check all that a study reads before its workers start: weights, device, classes, labels, every picture."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL

from prunesearch.config import UNLABELLED, DataConfig, ModelConfig
from prunesearch.evaluate.build import build_model, skeleton
from prunesearch.evaluate.data import (
    DATASETS,
    Split,
    check_classes,
    check_labels,
    check_paths,
    chosen_images,
    classes_of,
    is_shipped,
    most_unreadable,
    notes_of,
    open_data,
    unreadable_headers,
    unreadable_images,
    unreadable_note,
    warn_once,
)
from prunesearch.evaluate.images import ImageInput, ImageSet, image_input, refuse_unreadable
from prunesearch.evaluate.machine import find_device
from prunesearch.evaluate.picture_files import PictureFiles
from prunesearch.evaluate.sections import check_checkpoint
from prunesearch.evaluate.task import Evaluation
from prunesearch.files import write_atomically

FILE = "inputs.json"
"""File in the study folder that records which pictures were checked, so that a large set is checked only once."""
REPORT_SECONDS = 5.0

Report = Callable[[Split, int, "int | None"], None]
"""Called with a split, how many of its pictures were checked, and of how many (None for a stream)."""


@dataclass(frozen=True)
class Inputs:
    """Result of `check_inputs`.

    counts: how many images of each split are used, None for a stream. classes: their names, None when unknown.
    outputs: number of outputs of the model. notes: messages about what was left out. unseen: what was not checked.
    order_is_open: the classes would have other indices in torchvision's order, and the study does not say which order
    it means.
    """

    counts: tuple[tuple[Split, int | None], ...] = ()
    classes: tuple[str, ...] | None = None
    outputs: int = 0
    notes: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    order_is_open: bool = False


def check_inputs(
    model: ModelConfig,
    data: DataConfig,
    device: str = "auto",
    *,
    here: bool = True,
    keep: bool = False,
    memory: Path | None = None,
    report: Report = lambda split, done, total: None,
) -> Inputs:
    """Open all that the evaluations of a study will read, and raise an error for mistakes.

    Pictures for validation and test are decoded. For training pictures it is enough to read the header.
    here: evaluations run on this machine. Otherwise, what this machine cannot see is not checked but named in the
    result. keep: evaluations run in this process, so decoded images stay in memory. memory: folder of the study, in
    which the checked pictures are recorded.
    Raises ModelError, DataError and ResourceError.
    """
    unseen = []
    if here:
        find_device(device)
    else:
        unseen.append(f"device {device!r}")
    if here or (not model.pretrained if model.checkpoint is None else Path(model.checkpoint).is_file()):
        dense = build_model(model)
    else:
        dense = build_model(replace(model, pretrained=False, checkpoint=None))
        unseen.append("the weights")
    wanted, outputs = image_input(dense, data), int(dense.num_classes)  # type: ignore[arg-type]
    if not (here or _is_visible(data)):
        return Inputs(unseen=(*unseen, "the data"), outputs=outputs)
    check_paths(data)
    splits: list[Split] = ["train", "validation"]
    splits += ["test"] if data.has_test else []
    check_classes(data, outputs, splits)
    for split in splits:
        check_labels(data, outputs, split)
    known = _recall(memory)
    keys = {split: _key(data, split) for split in splits}
    fresh = [split for split in splits if keys[split] is None or known.get(split, {}).get("key") != keys[split]]
    opened: dict[str, ImageSet] = {}
    if keep and data.in_memory and {"train", "validation"} & set(fresh):
        opened = dict(zip(("train", "validation"), open_data(data, dense), strict=True))
    found, notes = dict(known), list[str]()
    for split in splits:
        if split in opened:
            left_out = [note for note in opened[split].notes if note not in notes_of(data, split)]
        elif split in fresh:
            left_out = _look(data, wanted, outputs, split, report)
        else:
            left_out = known[split]["notes"]
        if keys[split] is not None:
            found[split] = {"key": keys[split], "notes": left_out}
        for note in left_out:
            warn_once(f"data: {note}")
        notes += [*notes_of(data, split), *left_out]
    if memory is not None and found != known:
        memory.mkdir(parents=True, exist_ok=True)
        write_atomically(memory / FILE, json.dumps(found, indent=1).encode())
    counts = [
        (split, None if chosen is None else len(chosen))
        for split in splits
        for _, chosen in [chosen_images(data, split)]
    ]
    classes, order_is_open = classes_of(data)
    return Inputs(tuple(counts), classes, outputs, tuple(notes), tuple(unseen), order_is_open)


def suspicion(inputs: Inputs, model: ModelConfig, dense: Evaluation) -> str | None:
    """A warning when a dense model with given weights is near chance and the order of classes is open; else None."""
    top1 = dict(dense.metrics).get("top1")
    has_weights = model.pretrained or model.checkpoint is not None
    if top1 is None or not has_weights or not inputs.order_is_open or inputs.outputs < 2:
        return None
    if top1 >= 100 * min(0.5, 3 / inputs.outputs):
        return None
    return (
        f"data.class_order: the dense model is right on {top1:.4g} % of the images of {inputs.outputs} classes, near "
        f"chance, though weights were given. The likely cause is the order of the classes: it is natural now, as "
        f"in timm. Possible: ascii, as in torchvision's ImageFolder, or a list. Write the order that the weights were "
        f"trained with, and give the new search another name."
    )


def _is_visible(data: DataConfig) -> bool:
    """Whether this machine has the files. Data that needs a network is left to the workers."""
    roots = [root for root in (data.root, data.val_root, data.test_root) if root is not None]
    needs_none = data.name in DATASETS and data.name not in (UNLABELLED, "masks")
    return needs_none or (bool(roots) and all(Path(root).exists() for root in roots))


def _look(data: DataConfig, wanted: ImageInput, outputs: int, split: Split, report: Report) -> list[str]:
    """Check the pictures of a split, and return messages about those left out. Raises DataError for too many."""
    if is_shipped(data, split):
        return []
    images, chosen = chosen_images(data, split)
    throttled = _throttled(lambda done, total: report(split, done, total))
    if split != "train":
        bad = unreadable_images(data, wanted, outputs, split, throttled)
    elif isinstance(images, PictureFiles) and chosen is not None:
        bad = unreadable_headers(images, chosen, data.loaders, throttled)
    else:
        return []  # no files, so nothing can be checked without decoding
    if not bad or chosen is None:
        return []
    refuse_unreadable(split, bad, len(chosen), most_unreadable(data, split, len(chosen)))
    return [unreadable_note(split, bad, len(chosen))]


def _throttled(report: Callable[[int, int | None], None]) -> Callable[[int, int | None], None]:
    """A function that calls `report`, but at most once in REPORT_SECONDS."""
    last = time.monotonic()

    def throttled(done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            report(done, total)

    return throttled


def _key(data: DataConfig, split: Split) -> str | None:
    """A hash of what a check of the pictures of a split depends on; None for data without files.

    It covers the names, and for decoded splits the sizes and times of the files. The sizes and times of a large
    training set would take minutes over a network.
    """
    images, chosen = chosen_images(data, split)
    if not isinstance(images, PictureFiles) or chosen is None:
        return None
    digest = hashlib.sha256(f"{PIL.__version__} {data.allow_unreadable} {data.root}".encode())
    for index in chosen:
        stamp = "" if split == "train" else images.stamp(index)
        if stamp is None:
            return None
        digest.update(f"{images.name(index)}\0{stamp}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _recall(memory: Path | None) -> dict[str, Any]:
    """What an earlier run recorded for each split: its key, and messages about what was left out.

    Empty when the file is missing or damaged. The file only saves time.
    """
    try:
        content = json.loads((memory / FILE).read_text()) if memory is not None else {}
        return {split: {"key": one["key"], "notes": list(one["notes"])} for split, one in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def image_input_of(model: ModelConfig, data: DataConfig) -> ImageInput:
    """How images are resized, cropped and normalised for a model, without its weights. Raises DataError, ModelError."""
    return image_input(skeleton(model), data)


def check_files(model: ModelConfig, data: DataConfig) -> None:
    """Raise ModelError or DataError when files of a study are missing. Checks the paths only, and opens nothing."""
    if model.checkpoint is not None:
        check_checkpoint(model.checkpoint)
    check_paths(data)
