"""Image formats and modes in folders and tar files: each is read correctly, or named and counted."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from prunesearch.config import DataConfig
from prunesearch.errors import DataError
from prunesearch.evaluate import data
from prunesearch.evaluate.class_order import natural_key
from prunesearch.evaluate.data import open_data, warn_once
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.inputs import check_inputs
from prunesearch.evaluate.pixels import grey_or_rgb

CPU = torch.device("cpu")
SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def no_cache() -> None:
    for cached in (data._open, data._open_split, warn_once):
        cached.cache_clear()


def model(classes: int = 2, channels: int = 3) -> torch.nn.Module:
    keywords = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "in_chans": channels}
    return timm.create_model("vit_tiny_patch16_224", img_size=8, num_classes=classes, **keywords)


def make(root: Path, classes: tuple[str, ...] = ("ant", "bee"), each: int = 4) -> Path:
    """Write train, val and test with a few different 8 x 8 images of each class."""
    shade = 0
    for split in SPLITS:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(each):
                shade += 3
                Image.new("RGB", (8, 8), (shade % 256, shade // 256, index)).save(root / split / name / f"{index}.png")
    return root


def pack(root: Path) -> None:
    for split in SPLITS:
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, arcname=".")


def config(root: Path, container: str = "folder", **changes: object) -> DataConfig:
    if container == "folder":
        return DataConfig("folder", root=str(root), test_split="test", **changes)  # type: ignore[arg-type]
    pack(root)
    roots = {"root": "train", "val_root": "val", "test_root": "test"}
    return DataConfig("folder", **{field: str(root / f"{name}.tar") for field, name in roots.items()}, **changes)  # type: ignore[arg-type]


def look(settings: DataConfig, classes: int = 2) -> tuple[str, ...]:
    """The notes of `check_inputs` for a study with these images."""
    from prunesearch.config import ModelConfig

    options = (("depth", 1), ("embed_dim", 24), ("num_heads", 2), ("patch_size", 8), ("img_size", 8))
    return check_inputs(ModelConfig("vit_tiny_patch16_224", num_classes=classes, options=options), settings).notes


def everything(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(images.batches(torch.arange(len(images)).split(4), CPU))
    return torch.cat([one for one, _ in batches]), torch.cat([labels for _, labels in batches])


def truncated(path: Path) -> None:
    Image.effect_noise((32, 32), 50).save(path)
    path.write_bytes(path.read_bytes()[:-200])


FAULTS = {
    "html": (lambda path: path.write_bytes(b"<html>404</html>"), "not a picture that Pillow knows"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "truncated": (truncated, "truncated"),
    "no range": (lambda path: Image.new("I", (8, 8), 70000).save(path, format="TIFF"), "no defined white"),
    "float range": (lambda path: Image.new("F", (8, 8), 7.0).save(path, format="TIFF"), "from 7 to 7, not from 0 to 1"),
    "broken link": (lambda path: (path.unlink(), path.symlink_to("nowhere.png")), "a link to a file that is not"),
}
SEEN_ONLY_WHEN_DECODED = ("truncated", "float range")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("container", ["folder", "tar"])
@pytest.mark.parametrize("split", SPLITS)
def test_an_unreadable_picture_is_named_and_never_another_one(
    tmp_path: Path, split: str, container: str, fault: str
) -> None:
    root, (spoil, why) = make(tmp_path), FAULTS[fault]
    spoil(root / split / "bee" / "1.png")
    settings = config(root, container, allow_unreadable=0.2)
    if split != "train":
        which = {"val": "validation", "test": "test"}[split]
        with pytest.raises(DataError, match=rf"data \({which}\): 1 of 8 pictures cannot be read \(bee/1.png: .*{why}"):
            look(settings)
        for in_memory in (True, False):
            there = config(root, container, allow_unreadable=0.2, in_memory=in_memory, loaders=0)
            with pytest.raises(DataError, match=rf"1 of 8 pictures .*bee/1.png: .*{why}.*Possible"):
                everything(open_data(there, model(), which)[1])  # type: ignore[arg-type]
        return
    note = "1 of 8 training pictures could not be read and were left out (bee/1.png)"
    assert look(settings) == (() if fault in SEEN_ONLY_WHEN_DECODED else (note,))
    images = open_data(settings, model())[0]
    assert images.notes == (note,)
    assert everything(images)[1].tolist() == [0] * 4 + [1] * 3
    streamed = open_data(config(root, container, allow_unreadable=0.2, in_memory=False, loaders=1), model())[0]
    for ours, theirs in zip(everything(streamed), everything(images), strict=True):
        assert torch.equal(ours, theirs)
    assert [one.name for one in streamed.unreadable.values()] == ["bee/1.png"]
    few = config(root, container)
    with pytest.raises(DataError, match=rf"data \(train\): 1 of 8 .*bee/1.png: .*{why}.*at most 0.*allow_unreadable"):
        open_data(few, model())
    if fault not in SEEN_ONLY_WHEN_DECODED:
        with pytest.raises(DataError, match=r"data \(train\): 1 of 8 pictures cannot be read"):
            look(few)
    strict = config(root, container, in_memory=False, loaders=0)
    with pytest.raises(DataError, match=r"data \(train\): 1 of 8 pictures cannot be read"):
        everything(open_data(strict, model())[0])


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
MODES = {
    "L png": lambda path: Image.fromarray(GREY).save(path, "PNG"),
    "I;16 png": lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path, "PNG"),
    "I;16 tiff": lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path, "TIFF"),
    "I;16B tiff": lambda path: Image.fromarray((GREY.astype(np.uint16) * 257).astype(">u2")).save(path, "TIFF"),
    "16-bit pgm": lambda path: path.write_bytes(b"P5 8 8 65535\n" + (GREY.astype(">u2") * 257).astype(">u2").tobytes()),
    "F tiff": lambda path: Image.fromarray(GREY.astype(np.float32) / 255).save(path, "TIFF"),
    "RGB webp": lambda path: Image.fromarray(GREY).convert("RGB").save(path, "WEBP", lossless=True),
    "RGB bmp": lambda path: Image.fromarray(GREY).convert("RGB").save(path, "BMP"),
    "LA png": lambda path: Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(255 - GREY))).save(path, "PNG"),
    "RGBA png": lambda path: Image.merge("RGBA", [Image.fromarray(x) for x in (GREY,) * 3 + (255 - GREY,)]).save(
        path, "PNG"
    ),
    "P gif": lambda path: Image.fromarray(GREY).save(path, "GIF"),
    "P png, transparent": lambda path: (
        Image.fromarray(GREY).convert("P").save(path, "PNG", transparency=bytes(range(256)))
    ),
    "CMYK tiff": lambda path: Image.fromarray(GREY).convert("RGB").convert("CMYK").save(path, "TIFF"),
    "EXIF, turned": lambda path: Image.fromarray(GREY).save(path, "PNG", exif=_turned()),
}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_pixels(tmp_path: Path, mode: str, channels: int) -> None:
    MODES[mode](tmp_path / "picture")
    with Image.open(tmp_path / "picture") as image:
        pixels = np.asarray(grey_or_rgb(image, channels))
    assert np.array_equal(pixels if channels == 1 else pixels[..., 1], GREY)
    assert pixels.shape == ((8, 8) if channels == 1 else (8, 8, 3))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(GREY > 100).save(tmp_path / "picture", "PNG")
    with Image.open(tmp_path / "picture") as image:
        assert image.mode == "1"
        assert np.array_equal(np.asarray(grey_or_rgb(image, 1)), (GREY > 100) * np.uint8(255))


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_all_formats_are_read_and_the_rest_is_named(tmp_path: Path, container: str) -> None:
    root = make(tmp_path)
    image, place = Image.new("RGB", (8, 8)), root / "train" / "bee"
    for name in ("a.webp", "b.TIF", "c.bmp", "d.gif", "e.JPEG", "f.jp2", "g.ppm"):
        image.save(place / name)
    (place / "notes.txt").write_text("my notes")
    (root / "train" / "labels.csv").write_text("0,ant")
    (root / "train" / "cow.png").mkdir()
    for hidden in ("._0.png", ".DS_Store", "Thumbs.db"):
        (place / hidden).write_bytes(bytes(82))
    for hidden in ("@eaDir", ".ipynb_checkpoints", "__MACOSX"):
        (root / "train" / hidden).mkdir()
        image.save(root / "train" / hidden / "0.png")
    notes = look(config(root, container))
    assert notes == (
        "2 training files are no pictures that Pillow reads and were left out (bee/notes.txt, labels.csv)",
        "the training set has an empty folder, which is no class (cow.png)",
    )
    images = open_data(config(root, container), model())[0]
    assert (len(images), images.notes) == (15, notes)


@pytest.mark.parametrize("container", ["folder", "tar"])
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (None, ("c1", "c2", "c10")),
        (("natural",), ("c1", "c2", "c10")),
        (("ascii",), ("c1", "c10", "c2")),
        (("c2", "c10", "c1"), ("c2", "c10", "c1")),
        ("file", ("c10", "c1", "c2")),
    ],
)
def test_classes_have_the_order_that_is_asked_for(
    tmp_path: Path,
    container: str,
    order: tuple[str, ...] | str | None,
    expected: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = make(tmp_path / "images", ("c1", "c10", "c2"), each=1)
    if order == "file":
        (tmp_path / "classes.txt").write_text("c10\nc1\n\nc2\n")
        order = (str(tmp_path / "classes.txt"),)
    settings = config(root, container, class_order=order)
    images, labels = everything(open_data(settings, model(3))[0])
    alphabetical = dict(zip(("c1", "c10", "c2"), (3, 6, 9), strict=True))  # the red of each
    mean, std = open_data(settings, model(3))[0].input.mean[0], open_data(settings, model(3))[0].input.std[0]
    reds = torch.round((images[:, 0, 0, 0] * std + mean) * 255).int().tolist()
    found = dict(zip(labels.tolist(), reds, strict=True))
    assert found == {index: alphabetical[name] for index, name in enumerate(expected)}
    assert ("in natural order, as in timm (index 1 is 'c2')" in caplog.text) == (order is None)


def test_natural_order_is_that_of_timm() -> None:
    names = ["c10", "C2", "c1", "a", "10", "9", "b2a10", "b2a9"]
    assert sorted(names, key=natural_key) == sorted(names, key=timm.utils.misc.natural_key)
    assert natural_key("x²") == ["x²"]


CLASS_MISTAKES = {
    "unknown word": ({"class_order": ("asci",)}, r"class_order: 'asci' is neither.*Did you mean \"ascii\""),
    "missing": ({"class_order": ("ant", "bee", "cow")}, "lists 3 classes, root has 2: there is no folder 'cow'"),
    "unnamed": ({"class_order": ("ant", "cow")}, "there is no folder 'cow'; it does not name 'bee'"),
    "twice": ({"class_order": ("ant", "ant", "bee")}, "names 'ant' more than once"),
    "other data": ({"name": "digits", "class_order": ("ascii",)}, "'digits' brings an order of its own"),
    "interpolation": ({"interpolation": "bicubik"}, r"interpolation: 'bicubik' is unknown.*Did you mean \"bicubic\""),
}


@pytest.mark.parametrize("mistake", CLASS_MISTAKES)
def test_what_does_not_fit_the_data_is_refused(tmp_path: Path, mistake: str) -> None:
    changes, text = CLASS_MISTAKES[mistake]
    fields = {"name": "folder", "root": str(make(tmp_path)), **changes}
    with pytest.raises(DataError, match=text) as caught:
        look(DataConfig(**fields), classes=10 if mistake == "other data" else 2)
    assert "Possible" in str(caught.value)


@pytest.mark.parametrize("container", ["folder", "tar"])
def test_folders_that_end_alike_are_not_merged(tmp_path: Path, container: str) -> None:
    paths = ("east/0", "east/1", "west/0", "west/1")
    root = make(tmp_path, paths, each=1)
    with pytest.raises(DataError, match=r"'east/0' and 'west/0' end in the same name.*class_order.*torch/folder"):
        open_data(config(root, container), model())
    images = open_data(config(root, container, class_order=paths), model(4))[0]
    assert everything(images)[1].tolist() == [0, 1, 2, 3]


def test_a_class_is_the_last_folder_as_in_timm(tmp_path: Path) -> None:
    root = make(tmp_path, ("wild/fox", "tame/dog", "tame/cat"), each=1)
    opened = data._open_split(config(root), "train")
    assert opened.classes == ("cat", "dog", "fox")
    assert list(timm.data.create_dataset("", root=str(root / "train")).reader.class_to_idx) == ["cat", "dog", "fox"]


def test_tar_files_in_a_tar_file_are_classes(tmp_path: Path) -> None:
    root = make(tmp_path)
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as outer:
            for name in ("ant", "bee"):
                with tarfile.open(root / f"{name}.tar", "w") as inner:
                    for path in sorted((root / split / name).iterdir()):
                        inner.add(path, arcname=path.name)
                outer.add(root / f"{name}.tar", arcname=f"{name}.tar")
    nested = DataConfig("folder", root=str(root / "train.tar"), val_root=str(root / "val.tar"))
    for ours, theirs in zip(open_data(nested, model()), open_data(config(root), model()), strict=True):
        assert ours.fingerprint == theirs.fingerprint


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def leads_out(path: Path, name: str) -> None:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        tar.addfile(info)


TARS = {
    "no tar": (lambda path: path.write_text("hello"), "is a file, but cannot be read as a tar file"),
    "cut in a header": (lambda path: cut(path, 4 * 512 + 100), "cannot be read as a tar file"),
    "cut in a picture": (lambda path: cut(path, 4 * 512 - 100), "cannot be read as a tar file"),
    "cut between": (lambda path: cut(path, 4 * 512), "cannot be read as a tar file"),
    "without end": (lambda path: cut(path, len(path.read_bytes().rstrip(b"\0")) // 512 * 512 + 512), "unexpected end"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a tar file"),
    "upwards": (lambda path: leads_out(path, "../ant/0.png"), r"has '../ant/0.png', which leads out of it"),
    "absolute": (lambda path: leads_out(path, "/ant/0.png"), r"has '/ant/0.png', which leads out of it"),
    "flat": (lambda path: leads_out(path, "0.png"), "not in class folders"),
    "nothing": (lambda path: leads_out(path, "ant/a.txt"), r"has no pictures but ant/a.txt"),
}


@pytest.mark.parametrize("fault", TARS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_tar_file_that_cannot_be_used_is_a_sentence(tmp_path: Path, split: str, fault: str) -> None:
    settings = config(make(tmp_path), "tar")
    spoil, text = TARS[fault]
    spoil(tmp_path / f"{split}.tar")
    field = {"train": "root", "val": "val_root", "test": "test_root"}[split]
    with pytest.raises(DataError, match=rf"data.{field}: .*{text}.*Possible"):
        look(settings)


@pytest.mark.parametrize("split", SPLITS)
def test_a_link_without_end_is_a_sentence(tmp_path: Path, split: str) -> None:
    root = make(tmp_path)
    (root / split / "bee" / "again").symlink_to(root / split)
    with pytest.raises(DataError, match="a link to a folder that it is in, without end"):
        look(config(root))


def test_links_to_other_folders_and_within_tar_files_are_followed(tmp_path: Path) -> None:
    root = make(tmp_path)
    (root / "train" / "bee").rename(root / "elsewhere")
    (root / "train" / "bee").symlink_to(root / "elsewhere")
    os.link(root / "train" / "ant" / "0.png", root / "train" / "ant" / "again.png")
    (root / "train" / "ant" / "link.png").symlink_to("1.png")
    os.mkfifo(root / "train" / "ant" / "pipe.png")
    (root / "train" / "ant" / "self.txt").symlink_to("self.txt")
    notes = ("2 training files are no pictures that Pillow reads and were left out (ant/pipe.png, ant/self.txt)",)
    images = open_data(config(root), model())[0]
    assert (len(images), images.notes) == (10, notes)
    with tarfile.open(root / "train.tar", "w", dereference=False) as tar:
        tar.add(root / "train" / "ant", arcname="ant")
        tar.add(root / "elsewhere", arcname="bee")
    packed = DataConfig("folder", root=str(root / "train.tar"), val_root=str(root / "val"))
    assert open_data(packed, model())[0].fingerprint == images.fingerprint


def test_folders_that_cannot_be_listed_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scan = make(tmp_path), os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(DataError, match=r"bee' cannot be listed: Permission denied.*Possible"):
        look(config(root))


def test_a_picture_as_large_as_an_attack_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path)
    Image.new("L", (100, 100)).save(root / "val" / "bee" / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"bee/0.png: Image size \(10000 pixels\) exceeds limit"):
        look(config(root))


def test_too_many_open_files_is_no_fault_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path)

    def fail(*arguments: object) -> object:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(data.FolderPictures, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        open_data(config(root, allow_unreadable=1.0), model())


def test_nothing_readable_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    root = make(tmp_path)
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="8 of 8 pictures cannot be read"):
        look(config(root, allow_unreadable=1.0))
    with pytest.raises(DataError, match="8 of 8 pictures cannot be read"):
        open_data(config(root, allow_unreadable=1.0), model())
