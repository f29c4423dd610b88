"""Files for ONNX Runtime and OpenVINO agree with PyTorch, say what they expect, and come from studies and schedules."""

from __future__ import annotations

import copy
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from fake_profiles import fake_profile
from PIL import Image
from torch import nn

from prunesearch import export_onnx, export_openvino
from prunesearch.cli import main
from prunesearch.config import DataConfig, MeasureConfig, ModelConfig, StudyConfig, Target
from prunesearch.errors import FileError, ModelError, RunError, ScheduleError, UserError
from prunesearch.evaluate import build_model, model_shape
from prunesearch.evaluate.data import open_validation
from prunesearch.export import deploy, onnx_file, read_facts
from prunesearch.export.runtimes import ONNX_RUNTIME, OPENVINO, RUNTIMES, Run
from prunesearch.files import save_schedule
from prunesearch.models import apply_schedule, learned_parts
from prunesearch.schedule import Schedule, Stage

NOTHING = Schedule()
DROP = Schedule((Stage(1, keep=0.5),))
DIGITS = ModelConfig("vit_digits_patch1_8", pretrained=True)
EXPORTS = {".onnx": export_onnx, ".xml": export_openvino}

SMALL: dict[str, tuple[str, dict]] = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=64, depth=3, embed_dim=48, num_heads=3)),
    "distilled": ("deit_tiny_distilled_patch16_224", dict(img_size=64, depth=2, embed_dim=48, num_heads=3)),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=64, window_size=2, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    ),
    "convnext": ("convnext_tiny", dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48))),
}
SCHEDULES = {
    "vit": Schedule((Stage(1, keep=0.5, reduce="squeeze"), Stage(2, keep=0.5, reduce="fuse"))),
    "swin": Schedule((Stage(1, at="pre", score="predictor", keep=0.5, reduce="hold"),)),
    "convnext": Schedule((Stage(1, at="pre", score="predictor", keep=0.5, reduce="hold"),)),
}


def small(name: str) -> nn.Module:
    """A tiny model of a family, with random weights."""
    torch.manual_seed(0)
    model_name, options = SMALL[name]
    return timm.create_model(model_name, pretrained=False, num_classes=5, **options)


def digits(schedule: Schedule = NOTHING) -> nn.Module:
    """The trained model."""
    return apply_schedule(build_model(DIGITS), schedule)


def short(schedule: Schedule = NOTHING) -> nn.Module:
    """Its first two blocks with random weights, which are exported faster."""
    return apply_schedule(build_model(ModelConfig("vit_digits_patch1_8", options=(("depth", 2),))), schedule)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- from Python ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_dense_model_is_exported_and_stays_as_it_was(name: str, tmp_path: Path) -> None:
    model = small(name).train()
    before, keys = copy.deepcopy(model.state_dict()), set(vars(model))
    exported = export_onnx(model, tmp_path / "a.onnx")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert set(vars(model)) == keys and all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    check = exported.check
    assert exported.on_noise and check.images == check.same == 8 and check.largest < 1e-5 * check.scale
    assert exported.facts.gmacs == exported.facts.dense_gmacs and read_facts(tmp_path / "a.onnx") == exported.facts
    proto = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", onnx_file.OPSET)]
    assert all(one.data_location == onnx.TensorProto.DEFAULT for one in proto.graph.initializer)
    assert b".py" not in (tmp_path / "a.onnx").read_bytes(), "no paths of this machine"
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["batch", 3, *given.shape[2:]])
    assert (found.name, found.type, found.shape) == ("logits", "tensor(float)", ["batch", 5])
    images = torch.randn(5, *exported.facts.preprocessing.size)
    with torch.no_grad():
        expected = model.eval()(images)
    for count in (1, 2, 5):
        logits = torch.from_numpy(session.run(None, {"images": images[:count].numpy()})[0])
        torch.testing.assert_close(logits, expected[:count], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")
@pytest.mark.parametrize("suffix", EXPORTS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_exported(name: str, suffix: str, tmp_path: Path) -> None:
    model = apply_schedule(small(name), SCHEDULES[name])
    exported = EXPORTS[suffix](model, tmp_path / f"a{suffix}", name="mine", classes=list("abcde"))
    assert exported.check.same == 8 and exported.check.largest < 1e-4 * exported.check.scale
    facts = read_facts(tmp_path / f"a{suffix}")
    assert facts == exported.facts and facts.gmacs < facts.dense_gmacs
    assert facts.model == "mine" and facts.classes == tuple("abcde")
    (tmp_path / "again.yaml").write_text(facts.schedule)
    again = apply_schedule(small(name), tmp_path / "again.yaml")
    assert bool(learned_parts(again)) == bool(learned_parts(model))


@pytest.mark.parametrize("suffix", EXPORTS)
def test_half_keeps_float32_outside(suffix: str, tmp_path: Path) -> None:
    model = digits()
    images, _ = next(open_validation(DataConfig(), model).batches([torch.arange(64)], torch.device("cpu")))
    exported = EXPORTS[suffix](model, tmp_path / f"a{suffix}", half=True, batch_example=images)
    assert not exported.on_noise and exported.check.images == 64
    assert exported.check.same >= 62 and exported.check.largest > 0
    assert exported.facts.half and read_facts(tmp_path / f"a{suffix}").half
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights / 2 < (tmp_path / f"a{suffix.replace('xml', 'bin')}").stat().st_size < 0.75 * weights
    if suffix == ".onnx":
        graph = onnx.load(tmp_path / "a.onnx").graph
        assert onnx.TensorProto.FLOAT not in {one.data_type for one in graph.initializer}
        assert {one.type.tensor_type.elem_type for one in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}


@pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")
def test_learned_parts_stay_float32_in_an_fp16_file(tmp_path: Path) -> None:
    model = short(Schedule((Stage(1, at="pre", score="predictor", keep=0.5),)))
    exported = export_onnx(model, tmp_path / "a.onnx", half=True)
    assert exported.check.same >= 7
    parts = [one for one in onnx.load(tmp_path / "a.onnx").graph.initializer if "token_stages" in one.name]
    assert parts and all(one.data_type == onnx.TensorProto.FLOAT for one in parts)


def test_what_cannot_be_exported_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ScheduleError, match="prunesearch freeze"):
        export_onnx(short(Schedule((Stage(1, threshold=0.01),))), tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"shape is \(2, 3, 8, 8\). Possible: \(N, 1, 8, 8\)"):
        export_onnx(short(), tmp_path / "a.onnx", batch_example=torch.zeros(2, 3, 8, 8))
    with pytest.raises(UserError, match="classes: 2 names were given for a model with 10 outputs"):
        export_onnx(short(), tmp_path / "a.onnx", classes=["cat", "dog"])
    with pytest.raises(UserError, match=r"suffix is '.yaml'. Possible: .onnx"):
        export_onnx(short(), tmp_path / "a.yaml")
    with pytest.raises(ModelError, match="Linear is not supported"):
        export_onnx(nn.Linear(2, 2), tmp_path / "a.onnx")
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 10_000)
    with pytest.raises(UserError, match=r"GB.*or give half=True \(--half\)"):
        export_onnx(short(), tmp_path / "a.onnx")
    monkeypatch.undo()
    monkeypatch.setattr(torch, "zeros", lambda *size: torch.ones(2, 1, 9, 9))
    with pytest.raises(RunError, match=r"PyTorch's exporter cannot write this model: \w+: .*9"):
        export_onnx(short(), tmp_path / "a.onnx")
    assert files(tmp_path) == []


def test_a_file_that_computes_something_else_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.onnx").write_text("an earlier file")

    def off(path: Path, half: bool) -> Run:
        right: Run = ONNX_RUNTIME.open(path, half)
        return lambda images: right(images) + 0.01

    monkeypatch.setattr(deploy, "ONNX_RUNTIME", replace(ONNX_RUNTIME, open=off))
    with pytest.raises(
        RunError, match=r"a.onnx \(ONNX Runtime\): its logits differ .* by up to 0.01 .* No file was kept"
    ):
        export_onnx(short(), tmp_path / "a.onnx")

    def interrupted(path: Path, half: bool) -> Run:
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy, "ONNX_RUNTIME", replace(ONNX_RUNTIME, open=interrupted))
    with pytest.raises(KeyboardInterrupt):
        export_onnx(short(), tmp_path / "a.onnx")
    assert files(tmp_path) == ["a.onnx"] and (tmp_path / "a.onnx").read_text() == "an earlier file"


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.title)
def test_foreign_and_damaged_files_are_refused(runtime: object, tmp_path: Path) -> None:
    assert runtime in (ONNX_RUNTIME, OPENVINO)
    path = tmp_path / f"a{runtime.suffix}"
    with pytest.raises(FileError, match="cannot be read as"):
        read_facts(path)
    path.write_text("<odd")
    with pytest.raises(FileError, match="cannot be read as"):
        read_facts(path)
    with pytest.raises(RunError, match="cannot open it"):
        runtime.open(path, False)
    source = tmp_path / "source.onnx"
    onnx_file.write_onnx(short(), source, (1, 8, 8), half=False, metadata={})
    runtime.write(source, path, {"someone.else": "x"}, False)
    with pytest.raises(FileError, match="no metadata of prunesearch"):
        read_facts(path)
    runtime.write(source, path, {}, False)
    if runtime is ONNX_RUNTIME:
        proto = onnx.load(path)
        proto.metadata_props.add(key="prunesearch.gmacs", value='"many"')
        onnx.save(proto, path)
        with pytest.raises(FileError, match=r"model: missing(?s:.*)gmacs: is 'many'"):
            read_facts(path)


# --- from the command line ------------------------------------------------------------------------------------------

STUDY = """
version: 1
name: small
model: {name: vit_digits_patch1_8, pretrained: true}
data: {name: digits, train_images: 60, val_images: 90}
space: {blocks: [1, 3], keep: [0.5], reduce: [drop]}
finetune: {learning_rate: 1e-3, batch_size: 30}
measure: {speed_seconds: 0.05, speed_batch_size: 8}
rungs: [{images: 60}]
workers: {kind: serial}
stop: {trials: 2}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study: the dense model is trial 0, a pruned one trial 1."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "small.yaml").write_text(STUDY)
    assert main(["run", str(folder / "small.yaml"), "--output", str(folder / "outputs"), "--no-progress"]) == 0
    return folder / "outputs" / "small"


def test_a_candidate_goes_to_production(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    arguments = ["export", str(study), "--trial", "1", "--onnx", "out/best.onnx", "--openvino", "best.xml"]
    assert main([*arguments, "-o", "best.yaml"]) == 0
    said, notes = capsys.readouterr()
    assert files(tmp_path) == ["best.bin", "best.xml", "best.yaml", "out"] and files(tmp_path / "out") == ["best.onnx"]
    assert "weights" not in Path("best.yaml").read_text(), "without --weights"
    measured = float(re.search(r"top1 ([\d.]+)", said)[1])  # type: ignore[index]
    for name in ("out/best.onnx", "best.xml"):
        part = said[said.index(f"\n{name}:") :]
        assert "on 90 validation images: the same class for 90" in part
        assert f"top1 {measured:.5g} on 90 validation images; measured before: {measured:.5g}" in part
        assert re.search(r"\d\.\d\d times as fast as the dense model in .* in batches of 8 \(quartiles ", part)
        assert f"checking {name}" in notes and f"the accuracy of {name}" in notes
    check_examples(said, study)
    facts = read_facts("out/best.onnx")
    assert facts == read_facts("best.xml") and "block: 1" in facts.schedule and facts.classes == tuple("0123456789")
    assert facts.model == "vit_digits_patch1_8" and str(tmp_path) not in facts.schedule


def test_speed_is_timed_in_the_batches_of_the_studys_device(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def note(*args: Any, measure: MeasureConfig, **options: Any) -> None:
        seen.append(measure.speed_batch_size)
        raise UserError("enough")

    monkeypatch.setattr("prunesearch.export.deploy.deploy", note)
    target = Target(DIGITS, fake_profile(model_shape(DIGITS), batch=3))
    for of in (StudyConfig.target, property(lambda _: target)):
        monkeypatch.setattr(StudyConfig, "target", of)
        assert main(["export", str(study), "--trial", "1", "--onnx", str(tmp_path / "a.onnx")]) == 2
    assert seen == [8, 3]


def check_examples(said: str, study: Path) -> None:
    """The printed programs give the class that the candidate gives."""
    parts = said.split("How to run ")[1:]
    assert len(parts) == 2
    config = DataConfig(val_images=90)
    held_out = open_validation(config, digits())
    images = next(iter(held_out.batches([torch.arange(3)], torch.device("cpu"))))[0]
    session = onnxruntime.InferenceSession("out/best.onnx")
    expected = session.run(None, {"images": images.numpy()})[0].argmax(axis=1)
    for part in parts:
        Path("example.py").write_text(re.search(r"^import (?s:.*?)^print\(.*\n", part, re.MULTILINE)[0])  # type: ignore[index]
        for index in range(3):
            Image.fromarray(held_out.source[index][0][0].numpy()).save("digit.png")
            ran = subprocess.run(
                [sys.executable, "example.py", "digit.png"], capture_output=True, text=True, check=True
            )
            assert ran.stdout == f"{expected[index]} {expected[index]}\n"


def test_the_dense_model_of_a_study_has_nothing_to_be_timed_with(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx, yaml = str(tmp_path / "dense.onnx"), str(tmp_path / "best.yaml")
    assert main(["export", str(study), "--trial", "0", "--onnx", onnx, "--half", "--weights", "-o", yaml]) == 0
    said, notes = capsys.readouterr()
    assert "times as fast" not in said and "measured before" in said
    assert "most of an fp16 file in float32" in notes
    assert read_facts(onnx).half and files(tmp_path) == ["best.safetensors", "best.yaml", "dense.onnx"]


def test_a_schedule_file_with_thresholds_is_frozen_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = Schedule((Stage(2, score="class_attention", threshold=1 / 64),))
    data = {"name": "digits", "train_images": 50, "val_images": 40}
    save_schedule(schedule, tmp_path / "a.yaml", model={"name": DIGITS.name, "options": {"depth": 3}}, data=data)
    assert main(["export", str(tmp_path / "a.yaml"), "--onnx", str(tmp_path / "a.onnx")]) == 0
    said, notes = capsys.readouterr()
    assert "they become fixed counts" in notes and "GMACs for every image" in notes
    facts = read_facts(tmp_path / "a.onnx")
    assert "threshold" not in facts.schedule and "tokens: " in facts.schedule and facts.gmacs < facts.dense_gmacs
    assert "on 40 validation images" in said and files(tmp_path) == ["a.onnx", "a.yaml"]


SHORT = ["--set", "model.pretrained=false", "--set", "model.options={depth: 2}"]


@pytest.mark.parametrize("given", ["study", "model"])
def test_model_and_data_can_be_given(
    given: str, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_schedule(DROP, tmp_path / "a.yaml")
    flags = ["--study", str(study)] if given == "study" else ["--model", DIGITS.name, *SHORT]
    assert main(["export", str(tmp_path / "a.yaml"), "--onnx", str(tmp_path / "a.onnx"), *flags]) == 0
    said, notes = capsys.readouterr()
    if given == "study":
        assert "on 90 validation images" in said and "in batches of 8" in said
    else:
        assert "8 images of random numbers" in said and "top1" not in said and "no data was given" in notes
    assert "measured before" not in said


def test_learned_scores_are_not_exported_without_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = Schedule((Stage(1, at="pre", score="predictor", keep=0.5),))
    save_schedule(schedule, tmp_path / "a.yaml", model={"name": DIGITS.name, "pretrained": True})
    assert main(["export", str(tmp_path / "a.yaml"), "--onnx", str(tmp_path / "a.onnx")]) == 2
    assert "learns, but the file names no weights" in capsys.readouterr().err
    assert files(tmp_path) == ["a.yaml"]


def test_the_exporters_own_words_do_not_reach_the_user(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("vit_small_patch16_dinov3", img_size=32, depth=2, embed_dim=48, num_heads=3).eval()
    export_onnx(apply_schedule(model, DROP), tmp_path / "a.onnx")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")
