"""Data sets: the same images from every source, the model's transforms, and helpful errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from prunesearch.config import DataConfig
from prunesearch.errors import DataError
from prunesearch.evaluate import data
from prunesearch.evaluate.data import DATASETS, Opened, open_data
from prunesearch.evaluate.digits import load_digits
from prunesearch.evaluate.images import image_input
from prunesearch.evaluate.loading import load

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's readers do not close files


@pytest.fixture(autouse=True)
def no_cache():
    data._open.cache_clear()
    data._open_split.cache_clear()


def tiny_vit(size: int = 16, classes: int = 3, channels: int = 3) -> torch.nn.Module:
    keywords = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "in_chans": channels}
    return timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=classes, **keywords)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ with 4 and val/ with 2 random 16 x 16 images in each of three class folders."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee", "cat"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    return tmp_path


def everything(images: data.ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    return next(images.batches([torch.arange(len(images))], CPU))


def test_digits_are_split_once_and_for_all():
    images, labels = load_digits("train")
    held_out, held_out_labels = load_digits("validation")
    assert images.shape == (1198, 8, 8)
    assert held_out.shape == (599, 8, 8)
    assert images.dtype == torch.uint8
    assert int(images.max()) == 255
    shares = torch.bincount(held_out_labels) / (torch.bincount(labels) + torch.bincount(held_out_labels))
    assert (shares - 1 / 3).abs().max() < 0.01
    seen = {bytes(image.flatten().tolist()) for image in images}
    assert not any(bytes(image.flatten().tolist()) in seen for image in held_out)


def test_digits_reach_another_model_at_its_size_and_channels():
    model = tiny_vit(size=16, classes=10)
    train, validation = open_data(DataConfig(train_images=20, val_images=10), model)
    images, labels = everything(train)
    assert images.shape == (20, 3, 16, 16)
    assert labels.dtype == torch.int64
    assert len(validation) == 10


def test_folder_tar_and_streamed_images_are_the_same(folder: Path):
    with tarfile.open(folder / "train.tar", "w") as tar:
        tar.add(folder / "train", arcname="")
    with tarfile.open(folder / "val.tar", "w") as tar:
        tar.add(folder / "val", arcname="")
    model = tiny_vit()
    ways = [
        DataConfig("folder", root=str(folder)),
        DataConfig("", root=str(folder / "train"), val_root=str(folder / "val")),
        DataConfig("folder", root=str(folder / "train.tar"), val_root=str(folder / "val.tar")),
        DataConfig("folder", root=str(folder), in_memory=False, loaders=0),
        DataConfig("torch/folder", root=str(folder), val_split="val"),
    ]
    opened = [open_data(way, model) for way in ways]
    for split in (0, 1):
        images, labels = everything(opened[0][split])
        assert labels.tolist() == [label for label in range(3) for _ in range((4, 2)[split])]
        for other in opened[1:]:
            their_images, their_labels = everything(other[split])
            assert torch.equal(their_images, images)
            assert torch.equal(their_labels, labels)


def test_pixels_are_those_of_timm(folder: Path):
    """At another input size images go through timm's evaluation transform; our normalisation equals timm's."""
    model = tiny_vit(size=24)
    config = DataConfig("folder", root=str(folder), crop_pct=0.8)
    images, _ = everything(open_data(config, model)[1])
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**{**settings, "input_size": (3, 24, 24), "crop_pct": 0.8})
    with Image.open(folder / "val" / "ant" / "0.png") as image:
        expected = transform(image)
    assert torch.allclose(images[0], expected, atol=1e-5)


def test_images_of_the_input_size_are_cropped_only_on_request(folder: Path):
    model = tiny_vit(size=16)  # timm's crop_pct 0.9 is meant for 224 x 224
    untouched, _ = everything(open_data(DataConfig("folder", root=str(folder)), model)[1])
    kept, _ = everything(open_data(DataConfig("folder", root=str(folder), crop_pct=1.0), model)[1])
    cropped, _ = everything(open_data(DataConfig("folder", root=str(folder), crop_pct=0.9), model)[1])
    assert image_input(model, DataConfig()).crop_pct == 0.9
    assert torch.equal(untouched, kept)
    assert not torch.allclose(untouched, cropped, atol=0.1)


def test_mean_and_std_of_the_file_win(folder: Path):
    model = tiny_vit()
    plain = DataConfig("folder", root=str(folder), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images, _ = everything(open_data(plain, model)[1])
    assert images.min() >= 0
    assert images.max() <= 1
    with pytest.raises(DataError, match=r"data\.mean: 1 values .* 3 input channels"):
        open_data(DataConfig("folder", root=str(folder), mean=(0.5,)), model)
    with pytest.raises(DataError, match=r"data\.mean: the model has 1 input channels"):
        open_data(DataConfig("folder", root=str(folder)), tiny_vit(channels=1))


def test_subsets_are_fixed(folder: Path):
    model = tiny_vit()
    first = open_data(DataConfig("folder", root=str(folder), train_images=5), model)[0]
    data._open.cache_clear()
    second = open_data(DataConfig("folder", root=str(folder), train_images=5), model)[0]
    other = open_data(DataConfig("folder", root=str(folder), train_images=6), model)[0]
    assert len(first) == 5
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert len(set(everything(first)[1].tolist())) > 1  # not just the first folder


def test_a_data_set_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    create = data.open_folder
    monkeypatch.setattr(data, "open_folder", lambda *args: calls.append(args) or create(*args))
    config = DataConfig("folder", root=str(folder))
    assert open_data(config, tiny_vit())[0] is open_data(config, tiny_vit())[0]
    assert len(calls) == 2  # one for each split


def test_loading_processes_give_the_same_images(folder: Path):
    model = tiny_vit()
    here = open_data(DataConfig("folder", root=str(folder), in_memory=False, loaders=0), model)[0]
    elsewhere = open_data(DataConfig("folder", root=str(folder), in_memory=False, loaders=1), model)[0]
    order = list(torch.randperm(12).split(5))
    for ours, theirs in zip(here.batches(order, CPU), elsewhere.batches(order, CPU), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


class Numbers(Dataset):
    """Says of each item whether the process that reads it is a copy of one that has set `copied`."""

    copied = False

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> bool:
        return Numbers.copied


def test_loading_processes_are_no_copies_of_this_one(monkeypatch: pytest.MonkeyPatch):
    """A fork of a process with threads has their locks as they were, perhaps held for ever."""
    monkeypatch.setattr(Numbers, "copied", True)
    assert list(load(Numbers(), [[0, 1]], list, loaders=1)) == [[False, False]]
    assert list(load(Numbers(), [[0, 1]], list, loaders=0)) == [[True, True]]


class Wrong(Numbers):
    """An item that is the user's mistake."""

    def __getitem__(self, index: int) -> bool:
        raise DataError(f"item {index} is wrong")


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_mistake_in_the_data_has_its_own_words_in_loading_processes(loaders: int):
    with pytest.raises(DataError, match=r"^item 2 is wrong$"):
        list(load(Wrong(), [[2, 3]], list, loaders))


def test_loading_processes_end_when_their_parent_is_killed():
    """The fork server and what it has forked would keep each other alive for ever."""
    code = """
from itertools import repeat
from prunesearch.evaluate.loading import load
items = load([0], repeat([0]), list, loaders=1)
print(next(items), flush=True)
input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", code], **pipes, text=True, start_new_session=True)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "[0]\n"
        parent.kill()
        assert parent.communicate(timeout=60) == ("", None)  # all that had the other end of the pipe have ended
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


def test_loading_processes_do_not_run_the_script_again(tmp_path: Path):
    """Even without `if __name__ == "__main__"`, which nobody needs for a call of evaluate()."""
    script = tmp_path / "script.py"
    script.write_text("""
print("here")
from prunesearch.evaluate.loading import load
print(list(load([5], [[0]], list, loaders=1)))
""")
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=120)
    assert ran.stdout == "here\n[[5]]\n", ran.stderr


def test_what_the_main_module_defines_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Numbers, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Numbers", Numbers, raising=False)
    with pytest.raises(DataError, match=r"data\.loaders: .*__main__.*Write loaders: 0"):
        load(Numbers(), [[0]], list, loaders=1)


def test_more_loading_processes_than_cores_are_no_warning(monkeypatch: pytest.MonkeyPatch):
    """The default is 2, and it would be said for every epoch."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert list(load([5], [[0], [0]], list, loaders=2)) == [[5], [5]]


def test_a_data_set_that_cannot_be_sent_is_refused():
    source = Numbers()
    source.transform = lambda item: item
    with pytest.raises(DataError, match=r"data\.loaders: .*lambda.*Write loaders: 0"):
        load(source, [[0]], list, loaders=1)


class Stream(IterableDataset):
    def __iter__(self):
        for index in range(10):
            yield Image.new("RGB", (16, 16), (index, 0, 0)), index % 3


def test_streams_are_read_up_to_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "create_dataset", lambda *args, **kwargs: Stream())
    train, validation = open_data(DataConfig("wds/some", root="here", train_images=4), tiny_vit())
    assert everything(train)[1].tolist() == [0, 1, 2, 0]
    assert len(validation) == 10
    with pytest.raises(DataError, match="only be read in order"):
        open_data(DataConfig("wds/some", root="here", in_memory=False), tiny_vit())


def test_a_plugin_adds_a_data_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DATASETS, "_things", dict(DATASETS._things))

    @DATASETS.register("two-greys")
    def two_greys(config: DataConfig, split: data.Split) -> Opened:
        return Opened([(Image.new("L", (16, 16), shade), shade // 200) for shade in (0, 200)], ("dark", "light"))

    train, _ = open_data(DataConfig("two-greys"), tiny_vit(classes=2))
    assert everything(train)[1].tolist() == [0, 1]


def test_test_images_are_others_than_those_for_validation(folder: Path, tmp_path: Path):
    (folder / "val").rename(folder / "unseen")
    for name, shade in (("val", 10), ("test", 90)):
        for kind in ("ant", "bee", "cat"):
            (folder / name / kind).mkdir(parents=True)
            Image.new("RGB", (16, 16), (shade,) * 3).save(folder / name / kind / "0.png")
    model, config = tiny_vit(), DataConfig("folder", root=str(folder), test_split="test")
    assert config.has_test and not DataConfig("folder", root=str(folder)).has_test
    means = [float(everything(open_data(config, model, split)[1])[0].mean()) for split in ("validation", "test")]
    assert means[0] < means[1]
    assert open_data(config, model)[0] is open_data(config, model, "test")[0]  # in memory once
    elsewhere = replace(config, test_split=None, test_root=str(folder / "test"))
    assert open_data(elsewhere, model, "test")[1].fingerprint == open_data(config, model, "test")[1].fingerprint
    for wrong in (replace(config, test_root=str(folder / "val")), replace(config, test_split="val")):
        with pytest.raises(DataError, match=r"validation images .* and test images .* overlap"):
            data.check_paths(wrong)
    with pytest.raises(DataError, match=r"data.test_split: 'val'.*which the search sees.*Possible"):
        data.check_paths(DataConfig("hfds/some", val_split="val", test_split="val"))


def test_digits_have_a_test_of_their_own():
    model = timm.create_model("vit_digits_patch1_8")
    halves = DataConfig("digits", val_split="first half", test_split="second half")
    data.check_paths(halves)
    validation, test = (open_data(halves, model, split)[1] for split in ("validation", "test"))
    whole = open_data(DataConfig("digits"), model)[1]
    assert (len(validation), len(test), len(whole)) == (300, 299, 599)
    together = torch.cat([everything(validation)[1], everything(test)[1]])
    assert torch.equal(together, everything(whole)[1])
    for wrong in (replace(halves, val_split="validation"), replace(halves, test_split="test")):
        with pytest.raises(DataError, match=r"data.test_split: .*Possible: train and validation; with a test"):
            data.check_paths(wrong)


def test_errors_say_what_to_do(folder: Path, tmp_path: Path):
    train, val = str(folder / "train"), str(folder / "val")
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    (tmp_path / "half" / "val").mkdir(parents=True)
    flat = [str(tmp_path / name) for name in ("flat.tar", "flat_too.tar")]
    for path in flat:
        with tarfile.open(path, "w") as tar:
            tar.add(folder / "val" / "ant" / "0.png", arcname="0.png")
    mistakes = {
        "data.root: nothing was given": DataConfig("folder"),
        "data.root: '/nowhere' is not there": DataConfig("folder", root="/nowhere"),
        "data.val_root: '/nowhere' is not there": DataConfig("folder", root=str(folder), val_root="/nowhere"),
        r"\('.*/train'\) and validation images \('.*/train'\) overlap": DataConfig("folder", root=train),
        r"\('.*/half'\) and validation images \('.*/half/val'\) overlap": DataConfig("", root=str(tmp_path / "half")),
        'Did you mean "digits"': DataConfig("digit", root=str(folder)),
        "has no pictures": DataConfig("folder", root=str(tmp_path / "empty"), val_root=val),
        "not in class folders": DataConfig("folder", root=flat[0], val_root=flat[1]),
        "data.val_root: there are images that are not in class folders": DataConfig(
            "folder", root=train, val_root=str(folder / "val" / "ant")
        ),
        "Unknown torchvision dataset": DataConfig("torch/nothing", root=str(folder)),
    }
    model = tiny_vit()
    for text, config in mistakes.items():
        with pytest.raises(DataError, match=text):
            open_data(config, model)
    with pytest.raises(DataError, match=r"3 classes \(ant, bee, cat\), but the model has 10 outputs"):
        open_data(DataConfig("folder", root=str(folder)), tiny_vit(classes=10))


def test_labels_beyond_the_outputs_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "create_dataset", lambda *args, **kwargs: [(Image.new("RGB", (16, 16)), 7)])
    with pytest.raises(DataError, match="label 7, but the model has 3 outputs"):
        open_data(DataConfig("hfds/some"), tiny_vit())
