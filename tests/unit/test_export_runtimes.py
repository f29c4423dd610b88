"""Files for runtimes, the light parts: names, libraries, flags, checks and timing with made-up runs, examples."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from prunesearch.cli import main
from prunesearch.errors import ModelError, RunError, UserError
from prunesearch.evaluate.images import ImageInput
from prunesearch.export.example import program
from prunesearch.export.file_checks import Check, compare, refuse_difference, time_side_by_side
from prunesearch.export.file_facts import FileFacts, written
from prunesearch.export.runtimes import ONNX_RUNTIME, OPENVINO, RUNTIMES, as_metadata, check_target, written_beside
from prunesearch.files import save_schedule
from prunesearch.schedule import Schedule, Stage

PREPROCESSING = ImageInput((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 0.875, "center", "bicubic")
FACTS = FileFacts("test_vit", PREPROCESSING, "stages: []", 1.0, 2.0, (9,), False, ("cat", "dog"))


def linear(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)[:, :4]


class Linear(nn.Module):
    """The first four pixels as logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :4]


# --- names and libraries ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.title)
def test_a_missing_library_names_the_extra(runtime: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(runtime, type(ONNX_RUNTIME))
    path = tmp_path / f"best{runtime.suffix}"
    check_target(runtime, path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=rf"{runtime.libraries[-1]} are not.*pip install 'prunesearch\[{runtime.extra}\]'"
    ):
        check_target(runtime, path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--onnx", "best.pt"], "best.pt: its suffix is '.pt'. Possible: .onnx, for ONNX Runtime."),
        (["--onnx", "best"], "Write for example best.onnx"),
        (["--openvino", "best.onnx"], "Write for example best.xml"),
        (["--onnx", "folder.onnx"], "it is a folder"),
        (["--openvino", "best.xml"], "best.bin: it is a folder"),
        (["--half"], "--half: a schedule file is written"),
        (["--root", "x", "--set", "data.root=y"], "--root, --set: a schedule file is written"),
        (["--trust-plugins"], "--trust-plugins: a schedule file is written"),
        (["--onnx", "a.onnx", "--weights"], "--weights: the files have their weights inside"),
    ],
)
def test_mistakes_are_said_before_anything_is_opened(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.onnx").mkdir()
    Path("best.bin").mkdir()
    assert main(["export", "no such study", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "it is a schedule file already. Possible: --onnx FILE.onnx"),
        (["--onnx", "a.onnx", "--trial", "0"], "--trial: "),
        (["--onnx", "a.onnx", "--weights", "-o", "b.yaml"], "--weights, --output: "),
        (["--onnx", "a.onnx"], "it names no model"),
        (["--onnx", "a.onnx", "--data", "digits"], "it names no model"),
        (["--onnx", "a.onnx", "--study", "nowhere"], "nowhere"),
        (["--onnx", "a.onnx", "--model", "vit_digits_patch1_8"], "thresholds, which need images"),
        (["--onnx", "a.onnx", "--model", "vit_digits_patch1_8", "--root", "x"], "data: values were given"),
    ],
)
def test_what_a_schedule_file_needs(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_schedule(Schedule((Stage(1, threshold=0.01),)), "mine.yaml")
    assert main(["export", "mine.yaml", *flags]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_plugins_of_a_schedule_file_are_not_imported_untrusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_schedule(Schedule((Stage(1, keep=0.5),)), tmp_path / "theirs.yaml", plugins=("theirs",))
    assert main(["export", str(tmp_path / "theirs.yaml"), "--onnx", str(tmp_path / "a.onnx")]) == 2
    assert "it names plug-ins, whose code would run here: theirs" in capsys.readouterr().err


def test_files_take_their_places_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "real.xml").write_text("old")
    (tmp_path / "best.xml").symlink_to("real.xml")

    def write(fails: type[BaseException] | None) -> None:
        with written_beside(tmp_path / "best.xml") as place:
            place.write_text("new")
            place.with_suffix(".bin").write_text("weights")
            if fails is not None:
                raise fails

    for error in (KeyboardInterrupt, RunError):
        with pytest.raises(error):
            write(error)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best.xml", "real.xml"]
        assert (tmp_path / "best.xml").read_text() == "old"
    write(None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.xml", "real.bin", "real.xml"]
    assert (tmp_path / "best.xml").is_symlink() and (tmp_path / "best.xml").read_text() == "new"


def test_metadata_are_texts() -> None:
    assert as_metadata({"a": "text", "b": [1, 2]}) == {"prunesearch.a": "text", "prunesearch.b": "[1, 2]"}
    assert json.loads(written(FACTS)["prunesearch.classes"]) == ["cat", "dog"]


# --- checks and timing ---------------------------------------------------------------------------------------------


def test_logits_are_compared_image_by_image() -> None:
    images = torch.randn(50, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    sizes = []

    def off(batch: np.ndarray) -> np.ndarray:
        sizes.append(len(batch))
        return linear(batch) + np.where(np.isclose(batch[:, :1, 0, 0], images[7, 0, 0, 0]), 5.0, 1e-3)

    check = compare(Linear(), off, images)
    assert sizes == [1, 32, 17], "one image is a batch too"
    assert check.images == check.same == 50
    assert check.usual == pytest.approx(1e-3, rel=1e-3) and check.largest == pytest.approx(5)
    assert check.scale == images.flatten(1)[:, :4].abs().max()
    with pytest.raises(ModelError, match=r"shape \(1, 3, 2, 2\)"):
        compare(nn.Identity(), off, images)
    with pytest.raises(RunError, match="cannot be run on 1 images: cannot reshape"):
        compare(Linear(), lambda batch: batch.reshape(7, 7), images)


@pytest.mark.parametrize(
    ("usual", "largest", "half", "passes"),
    [
        (9e-4, 2.9, False, True),
        (1.1e-3, 1.1e-3, False, False),
        (0, 3.1, False, False),
        (0.9, 9.9, True, True),
        (1.1, 1.1, True, False),
        (0, 10.1, True, False),
        (float("nan"), float("nan"), False, False),
    ],
)
def test_far_logits_are_refused_with_numbers(usual: float, largest: float, half: bool, passes: bool) -> None:
    check = Check(images=8, same=7, usual=usual, largest=largest, scale=10.0)
    if passes:
        refuse_difference(check, half, "best.onnx")
        return
    with pytest.raises(RunError, match=rf"best.onnx: .* {usual:.3g} for three.* {largest:.3g} for all; 7 of 8"):
        refuse_difference(check, half, "best.onnx")


def test_both_files_are_timed_in_turns() -> None:
    order = []

    def taking(name: str, seconds: float) -> Callable[[np.ndarray], np.ndarray]:
        def run(images: np.ndarray) -> np.ndarray:
            order.append((name, images[0, 0, 0, 0]))
            time.sleep(seconds)
            return images

        return run

    batches = [np.full((2, 1, 1, 1), value) for value in range(3)]
    ratio = time_side_by_side(taking("dense", 0.03), taking("pruned", 0.01), batches, 0.0)
    rounds = [order[-20:][start : start + 4] for start in range(0, 20, 4)]  # each call after one that warms up
    assert all({name for name, _ in one} == {"dense", "pruned"} for one in rounds)
    assert [{value for _, value in one} for one in rounds] == [{0}, {1}, {2}, {0}, {1}]
    assert ratio.batch_size == 2 and ratio.low <= ratio.median <= ratio.high and ratio.dense > ratio.pruned


# --- example programs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", [(32, 32), (32, 47), (201, 77), (20, 31), (33, 32)], ids=str)
@pytest.mark.parametrize(
    "wanted",
    [
        PREPROCESSING,
        replace(PREPROCESSING, crop_pct=1.0, interpolation="bilinear"),
        replace(PREPROCESSING, take_sized=True),
        replace(PREPROCESSING, crop_mode="squash"),
        replace(PREPROCESSING, size=(3, 24, 40)),
        replace(PREPROCESSING, size=(1, 32, 32), mean=(0.3,), std=(0.2,)),
    ],
    ids=["center", "whole", "sized", "squash", "oblong", "grey"],
)
def test_an_example_prepares_pictures_as_we_do(wanted: ImageInput, picture: tuple[int, int], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (picture[1], picture[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(tmp_path / "noise.png")
    code = program(replace(FACTS, preprocessing=wanted), Path("best.onnx"))
    preparing = code[: code.index("session =")].replace("import onnxruntime\n", "")
    names: dict = {}
    exec(preparing.replace("sys.argv[1]", repr(str(tmp_path / "noise.png"))), names)
    expected = wanted.normalise(wanted.transform(image)[None]).numpy()
    assert names["pixels"].dtype == np.float32
    np.testing.assert_allclose(names["pixels"], expected, atol=1e-5)


def test_an_example_says_what_it_knows() -> None:
    code = program(FACTS, Path('odd "name".onnx'))
    assert r'InferenceSession("odd \"name\".onnx")' in code and "json.loads" in code
    assert "json" not in program(replace(FACTS, classes=()), Path("best.onnx"))
    assert '"INFERENCE_PRECISION_HINT": "f32"' in program(FACTS, Path("best.xml"))
    assert "f32" not in program(replace(FACTS, half=True), Path("best.xml")), "fp16 files run as they were measured"
    with pytest.raises(UserError, match="crop mode 'border'"):
        program(replace(FACTS, preprocessing=replace(PREPROCESSING, crop_mode="border")), Path("best.onnx"))
    with pytest.raises(UserError, match=r"suffix is '.pt'. Possible: .onnx \(ONNX Runtime\) and .xml \(OpenVINO\)"):
        program(FACTS, Path("best.pt"))
    assert OPENVINO.suffix == ".xml"
