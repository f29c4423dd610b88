"""Problems with weights, device and data are found before work starts: exit 2, one message, no study folder."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image
from torch.utils.data import IterableDataset

from prunesearch.cli import main
from prunesearch.config import DataConfig, ModelConfig
from prunesearch.errors import DataError
from prunesearch.evaluate import data, inputs
from prunesearch.evaluate.build import _dense_model
from prunesearch.evaluate.data import Opened, open_data, warn_once
from prunesearch.evaluate.inputs import FILE, Inputs, check_inputs
from prunesearch.search import driver

OPTIONS = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 4, "img_size": 8}
MODEL = ModelConfig("vit_tiny_patch16_224", num_classes=2, options=tuple(sorted(OPTIONS.items())))


@pytest.fixture(autouse=True)
def no_cache() -> None:
    for cached in (data._open, data._open_split, warn_once, _dense_model):
        cached.cache_clear()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train, val and test with four 8 x 8 pictures in each of two class folders."""
    for split in ("train", "val", "test"):
        for name, shade in (("ant", 40), ("bee", 180)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (8, 8), shade + index).save(tmp_path / "images" / split / name / f"{index}.png")
    return tmp_path / "images"


def study(root: Path, **changes: Any) -> Path:
    """A study file on these images; `changes` replace values, by dotted name with __ for dots."""
    content: dict[str, Any] = {
        "version": 1,
        "name": "s",
        "model": {"name": MODEL.name, "num_classes": 2, "options": dict(OPTIONS)},
        "data": {"name": "folder", "root": str(root), "test_split": "test"},
        "space": {"blocks": [1], "keep": [0.5, 1.0]},
        "workers": {"kind": "serial"},
        "stop": {"trials": 2},
    }
    for name, value in changes.items():
        place, *path, last = (content, *name.split("__"))
        for part in path:
            place = place[part]
        place[last] = value
    (root.parent / "study.yaml").write_text(yaml.safe_dump(content))
    return root.parent / "study.yaml"


class Unsafe:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return print, ("this must never run",)


def weights(root: Path) -> dict[str, torch.Tensor]:
    return timm.create_model(MODEL.name, num_classes=2, **OPTIONS).state_dict()


def checkpoint(root: Path, make: Callable[[Path], Any], name: str = "w.pth") -> Path:
    make(root.parent / name)
    return study(root, model__checkpoint=str(root.parent / name))


def rename(root: Path, old: str, new: str) -> None:
    (root / old).rename(root / new)


def odd_shapes(root: Path) -> dict[str, torch.Tensor]:
    return {**weights(root), "pos_embed": torch.zeros(3), "patch_embed.proj.weight": torch.zeros(1)}


def other_head(root: Path) -> dict[str, torch.Tensor]:
    return {**weights(root), "head.bias": torch.zeros(5)}


def empty_folder(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val" / "ant").mkdir(parents=True)


def no_tar(root: Path) -> Path:
    (root.parent / "file").write_text("hello")
    roots = {"root": str(root.parent / "file"), "val_root": str(root / "val"), "test_root": str(root / "test")}
    return study(root, data={"name": "folder", **roots})


def four_channels(root: Path) -> Path:
    return study(root, model__options={**OPTIONS, "in_chans": 4}, data__mean=[0.5] * 4, data__std=[0.5] * 4)


def saved(what: Callable[[Path], Any]) -> Callable[[Path], Path]:
    """A study whose checkpoint was saved by torch."""
    return lambda root: checkpoint(root, lambda path: torch.save(what(root), path))


def tensor_file(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)


def with_(**changes: Any) -> Callable[[Path], Path]:
    return lambda root: study(root, **changes)


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no checkpoint": (with_(model__checkpoint="/nowhere.pth"), "there is no such file"),
    "a folder": (lambda root: study(root, model__checkpoint=str(root)), "there is no such file"),
    "no weights": (lambda root: checkpoint(root, lambda path: path.write_bytes(b"hello")), "cannot be read as weights"),
    "html": (
        lambda root: checkpoint(root, lambda p: p.write_text("<html>"), "w.safetensors"),
        "cannot be read as weig",
    ),
    "code in it": (saved(lambda root: Unsafe()), "cannot be read as weights"),
    "a list": (saved(lambda root: [1, 2]), "cannot be read as weights"),
    "numbers": (
        saved(lambda root: {"head.bias": 3}),
        "cannot be read as weights of the model: .* no tensors: head.bias",
    ),
    "odd shapes": (saved(odd_shapes), "cannot be read as weights|does not fit"),
    "other head": (saved(other_head), r"head.bias \(\(5,\), not \(2,\)\)"),
    "other keys": (lambda root: checkpoint(root, tensor_file, "w.safetensors"), "does not fit the model: it lacks"),
    "no device": (with_(workers__device="tpu"), "device: 'tpu' is not available"),
    "no such device": (with_(workers__device="cpu:x"), "device: 'cpu:x' is not available"),
    "interpolation": (with_(data__interpolation="cubic"), r"interpolation.*: is 'cubic'; possible: "),
    "channels": (four_channels, "the pictures have 1 or 3 channels, the model wants 4"),
    "outputs": (with_(model__num_classes=3), r"2 classes \(ant, bee\), but the model has 3 outputs"),
    "no root": (with_(data__root="/nowhere"), "data.root: '/nowhere' is not there"),
    "no tar": (no_tar, "is a file, but cannot be read as a tar file"),
    "no pictures": (empty_folder, "has no pictures"),
    "other classes": (
        lambda root: rename(root, "val/bee", "val/wasp"),
        "training and validation have different classes",
    ),
    "of the test": (lambda root: rename(root, "test/bee", "test/wasp"), "training and test have different classes"),
    "overlap": (lambda root: study(root, data__test_root=str(root / "val")), "validation .* and test images .*overlap"),
    "the search sees it": (with_(data__test_split="val"), "overlap"),
    "unreadable": (lambda root: (root / "test/bee/0.png").write_bytes(b""), r"\(test\): 1 of 8 .*the file is empty"),
    "data set": (with_(data__name="floder"), 'Did you mean "folder"'),
    "torchvision": (with_(data__name="torch/nothing"), "Unknown torchvision dataset"),
    "class order": (with_(data__class_order=["bee", "cow"]), "no folder 'cow'; it does not name 'ant'"),
}


@pytest.mark.parametrize("verb", ["run serial", "run ray", "check"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_before_anything_starts(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mistake: str, verb: str
) -> None:
    file, (make, text) = study(root), MISTAKES[mistake]
    make(root)
    content = yaml.safe_load(file.read_text())
    content["workers"]["kind"] = "serial" if verb == "run serial" else "ray"
    file.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(driver, "_start_workers", None)
    how = ["--deep"] if verb == "check" else ["--output", str(root.parent / "out")]
    assert main([verb.split()[0], str(file), *how]) == 2
    error = capsys.readouterr().err
    assert re.search(text, error), error
    assert "Traceback" not in error and "this must never run" not in error
    assert re.search("[Pp]ossible|Known", error)
    assert not (root.parent / "out").exists()


def test_what_is_right_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "train" / "bee" / "notes.txt").touch()
    assert main(["check", str(study(root))]) == 0
    assert "Weights and data were not opened" in capsys.readouterr().out
    assert main(["check", str(study(root)), "--deep"]) == 0
    output = capsys.readouterr().out
    assert "Weights and data: fine, train 8 pictures, validation 8 pictures, test 8 pictures, 2 classes." in output
    assert "1 training file is no picture that Pillow reads and was left out (bee/notes.txt)" in output
    (root.parent / "best.yaml").write_text("version: 1\nstages: [{block: 1, keep: 0.5}]\n")
    assert main(["check", str(root.parent / "best.yaml"), "--deep"]) == 2


def test_ray_is_not_needed(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it is an error
    assert main(["check", str(study(root, workers={"kind": "ray", "count": 1})), "--deep"]) == 0
    assert "Weights and data: fine" in capsys.readouterr().out


def test_digits_are_not_loaded_before_workers_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """scikit-learn takes seconds to import, and the digits that come with it need no check."""
    monkeypatch.setattr(data, "load_digits", None)
    halves = DataConfig("digits", val_split="first half", test_split="second half")
    found = check_inputs(ModelConfig("vit_digits_patch1_8", pretrained=True), halves)
    assert found.counts == (("train", 1198), ("validation", 300), ("test", 299))


def test_looking_is_remembered(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second check of the same images opens none of them. New images are checked."""
    looked: list[str] = []
    for name in ("unreadable_headers", "unreadable_images"):
        real = getattr(inputs, name)
        monkeypatch.setattr(inputs, name, lambda *all, name=name, real=real: looked.append(name) or real(*all))
    settings = DataConfig("folder", root=str(root), test_split="test", allow_unreadable=0.2, in_memory=False, loaders=0)
    (root / "train" / "bee" / "0.png").write_bytes(b"")

    def look() -> tuple[tuple[str, ...], list[str]]:
        looked.clear()
        data._open_split.cache_clear()
        return check_inputs(MODEL, settings, memory=tmp_path / "study").notes, list(looked)

    notes = ("1 of 8 training pictures could not be read and were left out (bee/0.png)",)
    assert look() == (notes, ["unreadable_headers", "unreadable_images", "unreadable_images"])
    assert look() == (notes, [])
    Image.new("L", (9, 9)).save(root / "val" / "ant" / "0.png")
    assert look() == (notes, ["unreadable_images"])
    Image.new("L", (9, 9)).save(root / "train" / "ant" / "new.png")
    assert look()[1] == ["unreadable_headers"]
    for damage in ("", "[]", '{"train": 3}'):
        (tmp_path / "study" / FILE).write_text(damage)
        assert len(look()[1]) == 3
    settings = DataConfig(**{**vars(settings), "allow_unreadable": 0.0})
    with pytest.raises(DataError, match="1 of 9 pictures cannot be read"):
        look()


def test_a_large_set_is_looked_at_with_progress(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "REPORT_SECONDS", 0.0)
    said: list[tuple[str, int, int | None]] = []
    settings = DataConfig("folder", root=str(root), in_memory=False, loaders=0)
    check_inputs(MODEL, settings, report=lambda *all: said.append(all))
    assert said == [("train", 8, 8), ("validation", 8, 8)]


def test_a_serial_run_decodes_each_picture_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    real = data.FolderPictures.__getitem__
    monkeypatch.setattr(
        data.FolderPictures, "__getitem__", lambda self, index: decoded.append(self.name(index)) or real(self, index)
    )
    file = study(root, data={"name": "folder", "root": str(root)})
    assert main(["run", str(file), "--output", str(root.parent / "out"), "--no-progress"]) == 0
    assert len(decoded) == 16


def test_what_was_left_out_is_in_every_record(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    note = "1 of 8 training pictures could not be read and were left out (bee/0.png)"
    (root / "train" / "bee" / "0.png").write_bytes(b"")
    file, out = study(root, data__allow_unreadable=0.2), str(root.parent / "out")
    assert main(["run", str(file), "--output", out, "--no-progress"]) == 0
    assert caplog.text.count(note) == 1
    capsys.readouterr()
    for verb in ("front", "status"):
        assert main([verb, f"{out}/s"]) == 0
        assert note in " ".join(capsys.readouterr().out.split())
    assert main(["front", f"{out}/s", "--json"]) == 0
    assert all(row["data_notes"] == [note] for row in json.loads(capsys.readouterr().out))
    assert main(["export", f"{out}/s", "--trial", "0", "-o", str(root.parent / "best.yaml")]) == 0
    assert yaml.safe_load((root.parent / "best.yaml").read_text())["measured"]["data_notes"] == [note]


@pytest.mark.parametrize("rungs", [[{"images": 24}], [{"images": 5}, {"images": 24}]])
def test_training_leaves_out_what_it_meets(root: Path, rungs: list[dict[str, int]]) -> None:
    """In a stream, an image that fails to decode is left out of its batch, counted and recorded."""
    from prunesearch.study.reader import open_study_readonly

    picture = root / "train" / "bee" / "0.png"
    Image.effect_noise((64, 64), 50).save(picture)
    picture.write_bytes(picture.read_bytes()[:-500])
    settings = {"name": "folder", "root": str(root), "allow_unreadable": 0.2, "in_memory": False, "loaders": 0}
    file = study(root, data=settings, rungs=rungs, finetune={"batch_size": 1, "augment": "flip"})
    assert main(["run", str(file), "--output", str(root.parent / "out"), "--no-progress"]) == 0
    records = open_study_readonly(root.parent / "out" / "s").records()
    assert records[0].evaluation is not None and records[0].evaluation.images == 24
    for record in records:
        assert record.evaluation is not None
        assert record.evaluation.data_notes == (
            "1 of 8 training pictures could not be read and were left out (bee/0.png)",
        )


@pytest.mark.parametrize("order", [None, ["ascii"]])
def test_weights_of_another_class_order_are_suspected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, order: list[str] | None
) -> None:
    """Ten classes whose names put the digits in another order, with the shipped weights."""
    from prunesearch.evaluate.digits import load_digits

    for split, where in (("train", "train"), ("validation", "val")):
        images, labels = load_digits(split)
        for index in range(60):
            folder = tmp_path / "images" / where / sorted(f"c{number}" for number in range(1, 11))[int(labels[index])]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index].numpy()).save(folder / f"{index}.png")
    settings = {"name": "folder", "root": str(tmp_path / "images"), **({"class_order": order} if order else {})}
    model = {"name": "vit_digits_patch1_8", "pretrained": True}
    file = study(tmp_path / "images", data=settings, model=model, stop={"trials": 1})
    assert main(["run", str(file), "--output", str(tmp_path / "out"), "--no-progress"]) == 0
    assert ("in natural order, as in timm (index 1 is 'c2')" in caplog.text) == (order is None)
    assert ("The likely cause is the order of the classes" in caplog.text) == (order is None)


def test_on_a_cluster_what_cannot_be_seen_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = ModelConfig(MODEL.name, num_classes=2, options=MODEL.options, checkpoint="/there/w.pth")
    found = check_inputs(away, DataConfig("folder", root="/there"), "cuda", here=False)
    assert found.unseen == ("device 'cuda'", "the weights", "the data")
    found = check_inputs(MODEL, DataConfig("folder", root=str(root)), here=False)
    assert (found.unseen, found.counts) == (("device 'auto'",), (("train", 8), ("validation", 8)))
    (root / "val" / "bee" / "0.png").write_bytes(b"")
    data._open_split.cache_clear()
    with pytest.raises(DataError, match="1 of 8 pictures cannot be read"):
        check_inputs(MODEL, DataConfig("folder", root=str(root)), here=False)
    with pytest.raises(DataError, match="interpolation"):
        check_inputs(away, DataConfig("folder", root="/there", interpolation="?"), here=False)


class Broken(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield Image.new("RGB", (8, 8)), 0
        raise RuntimeError("shard 3 is not there")


def test_what_timms_readers_raise_is_a_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DataConfig("wds/some", root=str(root))
    monkeypatch.setattr(data, "create_dataset", lambda *all, **more: Broken())
    with pytest.raises(DataError, match=r"the stream cannot be read: RuntimeError: shard 3 is not there\. Possible"):
        check_inputs(MODEL, settings)


def test_pictures_of_a_reader_are_named_and_not_replaced(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For hfds/...: timm's ImageDataset around a reader would return the next image in place of a bad one."""
    real = timm.data.create_dataset
    monkeypatch.setattr(
        data, "create_dataset", lambda name, root, split, **more: real("", root=f"{root}/{split}", search_split=False)
    )
    settings = DataConfig("hfds/some", root=str(root), val_split="val")
    assert check_inputs(MODEL, settings).counts == (("train", 8), ("validation", 8))
    (root / "val" / "bee" / "0.png").write_bytes(b"<html>")
    data._open_split.cache_clear()
    with pytest.raises(DataError, match=r"data \(validation\): 1 of 8 pictures cannot be read \(bee/0.png: not a pict"):
        check_inputs(MODEL, settings)


def test_torchvisions_folders_have_the_first_folder_as_class(root: Path) -> None:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / split / name).rename(root / split / "images")
            (root / split / name).mkdir()
            (root / split / "images").rename(root / split / name / "images")
    settings = DataConfig("torch/folder", root=str(root), val_split="val")
    assert check_inputs(MODEL, settings).classes == ("ant", "bee")
    (root / "val" / "bee" / "images" / "0.png").write_bytes(b"<html>")
    data._open_split.cache_clear()
    with pytest.raises(DataError, match=r"1 of 8 pictures cannot be read .*bee/images/0.png: not a picture"):
        check_inputs(MODEL, settings)


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_beyond_the_outputs_are_found_at_the_start(monkeypatch: pytest.MonkeyPatch, label: int) -> None:
    monkeypatch.setattr(data.DATASETS, "_things", dict(data.DATASETS._things))

    @data.DATASETS.register("odd")
    def odd(config: DataConfig, split: data.Split) -> Opened:
        return Opened([(Image.new("L", (8, 8)), 0 if split == "train" else label)], None)

    with pytest.raises(DataError, match=rf"data \(validation\): picture 0 has label {label}.*Possible: 0 to 1"):
        check_inputs(MODEL, DataConfig("odd"))


def test_nothing_is_said_of_what_is_as_it_should_be(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = check_inputs(MODEL, DataConfig("folder", root=str(root)))
    assert found == Inputs((("train", 8), ("validation", 8)), ("ant", "bee"), 2)
    assert not caplog.records
    assert open_data(DataConfig("folder", root=str(root)), timm.create_model(MODEL.name, num_classes=2, **OPTIONS))
