"""Profiles of real models on this machine: every family, every runtime, and the studies that are searched by them.

Times are not judged here, only what they add up to and that all parts run: `benchmarks/profile.md` compares them.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import fake_search
import pytest
import timm
import torch
from fake_profiles import fake_profile
from small_models import small_model
from test_feature_map import map_model

from prunesearch.cli import main
from prunesearch.config import DeviceConfig, IsoBudget, Limit, ModelConfig, Objective, StudyConfig
from prunesearch.cost import total_cost
from prunesearch.device.measure import measure_profile
from prunesearch.device.profiles import measure_profiles
from prunesearch.device.runtimes import RUNTIMES, Settings, runtime_of
from prunesearch.errors import DeviceError, FileError, StudyError
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import load_profiles, load_study, save_profiles, write_yaml
from prunesearch.models import shape_of
from prunesearch.profile import Profile
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.problems import study_problems
from prunesearch.search.target_device import timing_notes
from prunesearch.strict import to_mapping
from prunesearch.study.reader import open_study_readonly

INSTALLED = [name for name, runtime in RUNTIMES.items() if name != "compile" and runtime.is_there]
LATENCY = "predicted_latency_ms"


def profiled(model: torch.nn.Module, runtime: str = "torch", **names: Any) -> Profile:
    settings = Settings(torch.device("cpu"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights of learned verbs
        return measure_profile(model, "small", 2, runtime_of(runtime), settings, 0.3, **names)


@pytest.mark.parametrize(
    "layout",
    [
        "class", "registers", "avg_no_class", "map", "qk_norm",
        "eva_post_norm", "eva_dinov3", "eva_mixed", "beit", "relpos_swin_mlp",
    ],
)  # fmt: skip
def test_every_score_and_verb_of_a_vit_is_measured(layout: str) -> None:
    model = small_model(layout)
    found = profiled(model)
    shape = shape_of(model)
    fitting = {"class_attention", "value_weighted"} if shape.has_class_token else set()
    names = {time.name for time in found.scores}
    assert fitting <= names and ("class_attention" in names) == shape.has_class_token and "key_norm" in names
    assert {time.name for time in found.verbs} == {
        "drop", "fuse", "squeeze", "absorb", "merge", "drop_or_merge", "pool"
    }  # fmt: skip
    assert found.attention is not None and found.attention.tokens[-1] == shape.patch_tokens + shape.prefix_tokens
    assert found.last is not None and found.dense_ms > 0 and len(found.check) == 2
    schedule = Schedule((Stage(1, keep=0.5, score="key_norm"), Stage(2, keep=0.7, reduce="merge")))
    assert 0 < total_cost(shape, schedule, found) < 100 * found.dense_ms


@pytest.mark.parametrize("layout", ["swin_padded", "convnext"])
def test_a_map_is_measured_as_the_rest_and_its_mlps(layout: str) -> None:
    model = map_model(layout).eval()
    found, shape = profiled(model), shape_of(model)
    assert found.attention is None and [time.name for time in found.verbs] == ["hold"]
    assert total_cost(shape, Schedule(), found) == pytest.approx(found.dense_ms)
    assert found.mlp.tokens[-1] == shape.patch_tokens


@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param(name, marks=[] if name == "onnxruntime" else pytest.mark.slow)
        for name in INSTALLED
        if name != "torch"
    ],
)
@pytest.mark.parametrize("layout", ["class", pytest.param("eva_mixed", marks=pytest.mark.slow)])
def test_runtimes_measure_the_same_parts(runtime: str, layout: str) -> None:
    found = profiled(small_model(layout, depth=2), runtime, verbs=["squeeze"], scores=["class_attention"])
    assert found.runtime == runtime and [time.name for time in found.verbs] == ["squeeze"]
    assert found.attention is not None and all(value > 0 for value in found.attention.ms)


def test_a_learned_score_alone_is_measured_beside_a_plain_one() -> None:
    """drop_or_merge has no masked form, so its stages need a score that does not learn."""
    found = profiled(small_model(), scores=["predictor"], verbs=["drop", "drop_or_merge"])
    assert [time.name for time in found.scores] == ["predictor", "class_attention"]


def test_a_model_of_one_patch_is_refused() -> None:
    with pytest.raises(DeviceError, match="it has 1 patch tokens"):
        profiled(small_model(img_size=4))


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    profiled(model, verbs=["drop"], scores=["class_attention"])
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_measures_says_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "p.json", tmp_path / "p.png"
    few = ["--verb", "drop", "--score", "class_attention", "--threads", "1", "--seconds", "0.5"]
    assert (
        main(["profile", "vit_digits_patch1_8", "--batch", "1,4", *few, "-o", str(path), "--plot", str(picture)]) == 0
    )
    found = load_profiles(path)
    assert [profile.batch for profile in found] == [1, 4] and found[0].threads == 1 and found[0].model
    said = capsys.readouterr().out
    assert "batch 1: " in said and "batch 4: " in said and "do not depend on tokens" in said and "How sure" in said
    assert picture.stat().st_size > 10_000
    assert main(["profile", "vit_digits_patch1_8", "--batch", "2", *few, "--brief"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert main(["profile", "vit_digits_patch1_8", "--batch", "2", *few, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["batch"] == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"batches": (8,), "runtime": "openvino", "threads": 2, "precision": "float16", "seconds": 9}),
        (["--batch", "1,2", "--seconds", "3"], {"batches": (1, 2), "seconds": 3, "runtime": "openvino"}),
        (["--set", "device.batch=4", "--runtime", "torch"], {"batches": (4,), "runtime": "torch"}),
        (["--set", "device.batch=null"], {"batches": (16,), "runtime": "openvino"}),
        (["--set", "device=null"], {"batches": (1, 16), "runtime": "torch", "threads": None, "seconds": 60}),
    ],
)
def test_a_study_says_what_its_device_is(
    flags: list[str],
    expected: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The profile that the study names is made by this command, so it need not be there."""
    monkeypatch.chdir(tmp_path)
    device = DeviceConfig("target.json", "openvino", batch=8, threads=2, precision="float16", seconds=9)
    write_yaml(to_mapping(replace(fake_search.study(), device=device)), Path("s.yaml"))
    asked: list[dict[str, object]] = []

    def note(model: ModelConfig, **options: object) -> list[Profile]:
        call = signature(measure_profiles).bind(model, **options)
        call.apply_defaults()
        asked.append({**call.arguments, "model": model.name})
        return []

    monkeypatch.setattr("prunesearch.device.profiles.measure_profiles", note)
    assert main(["profile", "s.yaml", *flags]) == 0
    assert asked[0].items() >= {"model": "vit_digits_patch1_8", **expected}.items()
    assert ("-o target.json" in capsys.readouterr().err) == ("device=null" not in flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--runtime", "tensorrt"], "runtime: 'tensorrt' is unknown. Possible: torch"),
        (["--precision", "int8"], "precision: 'int8'. Possible: float32"),
        (["--batch", "0"], "--batch 0: possible: a whole number from 1"),
        (["--batch", "1,many"], "--batch many"),
        (["--seconds", "nan"], "--seconds nan: possible: above 0"),
        (["--verb", "dropp"], 'Did you mean "drop"'),
        (["--score", "class_attentio"], 'Did you mean "class_attention"'),
        (["--threads", "100000"], "threads: 100000. Possible: 1 to "),
        (["--verb", "hold"], "verb hold: this model does not take it. In this model it is drop. Possible: squeeze"),
        (["--device", "gpu"], "'gpu' is not available"),
        (["--plot", "picture.doc"], "picture.doc"),
    ],
)
def test_mistakes_on_the_command_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "vit_digits_patch1_8", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_score_without_its_class_token_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "vit_base_patch16_siglip_224", "--score", "class_attention"]) == 2
    assert "score class_attention: this model has no class token, whose attention it reads" in capsys.readouterr().err


@pytest.mark.skipif(not find_spec("onnxruntime"), reason="ONNX Runtime is not installed")
def test_a_runtime_refuses_what_it_cannot_do_here() -> None:
    model = fake_search.study().model
    with pytest.raises(DeviceError, match=r"bfloat16 is not measured\. Possible: float32"):
        next(measure_profiles(model, runtime="onnxruntime", precision="bfloat16"))


# --- studies -----------------------------------------------------------------------------------------------------


def by_latency(task: Task) -> Evaluation:
    """A made-up evaluation with the predicted latency."""
    evaluation = fake_search.evaluate(task)
    assert task.profile is not None
    value = total_cost(fake_search.SHAPE, task.schedule, task.profile)
    return replace(evaluation, metrics=(*evaluation.metrics, (LATENCY, value)))


def study(**changes: Any) -> StudyConfig:
    objectives = (Objective("top1", "maximize"), Objective(LATENCY, "minimize"))
    limits = ((LATENCY, Limit(at_most="80%")),)
    config = fake_search.study(
        8, objectives=objectives, limits=limits, device=DeviceConfig(table=fake_profile(fake_search.SHAPE))
    )
    return replace(config, **changes)


EVALUATE = f"{__name__}:by_latency"


def test_a_study_keeps_a_limit_on_predicted_latency(tmp_path: Path) -> None:
    config = study()
    fake_search.run_study(config, tmp_path / "fake", evaluate=EVALUATE)
    assert config.device is not None and config.device.table is not None
    dense = total_cost(fake_search.SHAPE, Schedule(), config.device.table)
    reader = open_study_readonly(tmp_path / "fake")
    values = [record.evaluation.value(LATENCY) for record in reader.records() if record.evaluation]
    assert len(values) == 8 and max(values) == pytest.approx(dense)  # the dense model itself is always measured
    assert sorted(values)[-2] <= 0.8 * dense
    assert reader.config == config  # with the whole profile
    reader.close()


def test_candidates_of_a_latency_budget_cost_it(tmp_path: Path) -> None:
    config = study(budget=IsoBudget(predicted_latency_ms="70%"), limits=())
    fake_search.run_study(config, tmp_path / "fake", evaluate=EVALUATE)
    assert config.device is not None and config.device.table is not None
    amount = 0.7 * total_cost(fake_search.SHAPE, Schedule(), config.device.table)
    reader = open_study_readonly(tmp_path / "fake")
    sampled = [record for record in reader.records() if record.origin == "sampler" and record.evaluation]
    assert len(sampled) == 7
    assert all(record.evaluation.value(LATENCY) <= amount for record in sampled if record.evaluation)
    reader.close()


def test_a_device_without_a_profile_is_measured_once(tmp_path: Path) -> None:
    small = replace(fake_search.SPACE, score=("class_attention",), reduce=("drop",), start_from=("evit-fuse-0.7",))
    config = study(device=DeviceConfig(batch=2, threads=1, seconds=0.3), space=small, limits=())
    fake_search.run_study(config, tmp_path / "fake", evaluate=EVALUATE)
    (profile,) = load_profiles(tmp_path / "fake" / "profile.json")
    assert (profile.batch, profile.threads, sorted(time.name for time in profile.verbs)) == (2, 1, ["drop", "fuse"])
    (tmp_path / "fake" / "profile.json").unlink()
    fake_search.run_study(replace(config, stop=replace(config.stop, trials=9)), tmp_path / "fake", evaluate=EVALUATE)
    assert not (tmp_path / "fake" / "profile.json").exists()  # it was not measured again
    reader = open_study_readonly(tmp_path / "fake")
    assert reader.config.device is not None and reader.config.device.table == profile
    reader.close()


def test_other_settings_of_the_device_are_refused_before_measuring(tmp_path: Path) -> None:
    config = study()
    fake_search.run_study(config, tmp_path / "fake", evaluate=EVALUATE)
    asked = replace(config, device=DeviceConfig(batch=8, seconds=86_400))
    with pytest.raises(StudyError, match=r"device\.batch: absent -> 8"):
        fake_search.run_study(asked, tmp_path / "fake", evaluate=EVALUATE)
    longer = replace(config, device=DeviceConfig(seconds=86_400), stop=replace(config.stop, trials=9))
    fake_search.run_study(longer, tmp_path / "fake", evaluate=EVALUATE)  # how long was measured does not matter


def test_another_profile_cannot_continue_a_study(tmp_path: Path) -> None:
    config = study()
    fake_search.run_study(config, tmp_path / "fake", evaluate=EVALUATE)
    other = replace(fake_profile(fake_search.SHAPE), fixed=3.0)
    with pytest.raises(StudyError, match=r"device.table: .*torch on none, batch 1.* -> .*torch on none"):
        fake_search.run_study(replace(config, device=DeviceConfig(table=other)), tmp_path / "fake", evaluate=EVALUATE)


STUDY = """
version: 1
name: ms
model: {name: vit_digits_patch1_8}
space: {blocks: [1, 2], keep: [0.5, 1.0]}
objectives: [{metric: top1, goal: maximize}, {metric: predicted_latency_ms, goal: minimize}]
"""


def written(folder: Path, device: str) -> Path:
    profile = fake_profile(fake_search.SHAPE)
    save_profiles([profile, replace(profile, batch=16)], folder / "p.json")
    path = folder / "ms.yaml"
    path.write_text(f"{STUDY}device: {device}\n")
    return path


def test_a_study_reads_the_profile_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_study(written(tmp_path, "{profile: p.json, batch: 16}"))
    assert config.device is not None and config.device.table is not None and config.device.table.batch == 16
    assert study_problems(config) == []


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("{profile: p.json}", "2 of its profiles fit what is asked for"),
        ("{profile: p.json, batch: 8}", "0 of its profiles fit what is asked for .batch 8.. Possible: torch, batch 1"),
        ("{profile: p.json, batch: 1, runtime: openvino}", "0 of its profiles fit"),
        ("{profile: p.json, batch: 1, threads: 4}", "0 of its profiles fit"),
        ("{profile: nowhere.json}", "nowhere.json: there is no such file .looked in /"),
        ("{runtime: tensorrt}", "runtime"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(
    device: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=said):
        load_study(written(tmp_path, device))


def test_one_thread_is_not_called_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = written(tmp_path, "{profile: one.json, batch: 8}")
    save_profiles([replace(load_profiles("p.json")[0], threads=1)], "one.json")
    with pytest.raises(FileError, match="batch 1, 1 thread, float32"):
        load_study(study)


DEEPER = replace(fake_search.SHAPE, depth=9)
BEFORE_UNTIL = DeviceConfig(table=replace(fake_profile(fake_search.SHAPE), returning=()))
"""Of a profile that an earlier version made."""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": None}, "device: absent, but predicted_latency_ms is predicted"),
        (
            {"objectives": (Objective("top1", "maximize"), Objective("gmacs", "minimize")), "limits": ()},
            "device: no objec",
        ),
        (
            {"device": DeviceConfig(table=fake_profile(replace(fake_search.SHAPE, depth=9)))},
            "it is of some_vit, 9 blocks",
        ),
        ({"space": replace(fake_search.SPACE, reduce=("drop", "pool"))}, "device.profile: pool was not measured"),
        ({"space": replace(fake_search.SPACE, score=("predictor",))}, "device.profile: predictor was not measured"),
        (
            {"space": replace(fake_search.SPACE, reduce=("hold",)), "device": BEFORE_UNTIL},
            "device.profile: drop was not measured with until. Possible with until: none",
        ),
        (
            {"space": replace(fake_search.SPACE, reduce=("fuse",), until=("next",)), "device": BEFORE_UNTIL},
            "device.profile: fuse was not measured with until",
        ),
        ({"limits": ((LATENCY, Limit(at_most="1%")),)}, "limits.predicted_latency_ms: at_most 1 %"),
        ({"budget": IsoBudget(predicted_latency_ms=1.0)}, "budget.predicted_latency_ms: 1; possible: from"),
        (
            {"device": DeviceConfig(runtime="openvino", precision="float16")},
            "device.precision: float16 is not measured in",
        ),
        ({"budget": IsoBudget(0.01, 5.0)}, "budget: 2 costs are given"),
        ({"budget": IsoBudget()}, "budget: 0 costs are given"),
    ],
)
def test_mistakes_around_the_device(changes: dict[str, Any], said: str) -> None:
    problems = study_problems(study(**changes))
    assert any(said in problem for problem in problems), problems


def test_noise_of_measured_latency_is_told() -> None:
    objectives = (Objective("top1", "maximize"), Objective("latency_ms", "minimize"))
    config = fake_search.study(objectives=objectives)
    assert timing_notes(config) == []  # one worker in this process
    together = replace(config, workers=replace(config.workers, kind="ray"))
    assert "noise" in timing_notes(together)[0] and "predicted_latency_ms" in timing_notes(together)[0]
    assert timing_notes(replace(together, workers=replace(together.workers, count=1))) == []


def test_timm_models_of_the_registry_can_be_profiled_without_weights() -> None:
    """A model's own options reach the model that is measured."""
    options = (("depth", 2), ("embed_dim", 32), ("num_heads", 2))
    config = replace(fake_search.study().model, name="vit_tiny_patch16_224", image_size=64, options=options)
    (found,) = measure_profiles(config, batches=(1,), threads=1, seconds=0.3, verbs=["drop"], scores=["key_norm"])
    assert (found.shape.depth, found.shape.dim, found.shape.patch_tokens) == (2, 32, 16)
    assert found.shape == shape_of(timm.create_model(config.name, img_size=64, **dict(options)))


# --- looking with a profile --------------------------------------------------------------------------------------


def test_a_schedule_is_checked_against_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_profiles([fake_profile(fake_search.SHAPE)], tmp_path / "p.json")
    (tmp_path / "best.yaml").write_text("version: 1\nstages: [{block: 2, keep: 0.5}]\n")
    check = ["check", str(tmp_path / "best.yaml"), "--profile", str(tmp_path / "p.json"), "--model"]
    assert main([*check, "vit_digits_patch1_8"]) == 0
    profile = fake_profile(fake_search.SHAPE)
    ms, dense = (total_cost(profile.shape, one, profile) for one in (Schedule((Stage(2, keep=0.5),)), Schedule()))
    assert f"{ms:.4g} ms predicted, dense {dense:.4g}, {dense / ms:.2f} x as fast" in capsys.readouterr().out
    assert main([*check, "deit_tiny_patch16_224"]) == 2
    assert "it is of some_vit with 64 patch tokens, not of this model" in capsys.readouterr().err


def test_start_schedules_are_checked_in_milliseconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(written(tmp_path, "{profile: p.json, batch: 16}"))]) == 0
    dense = total_cost(fake_search.SHAPE, Schedule(), fake_profile(fake_search.SHAPE))
    said = capsys.readouterr().out
    assert f"tokens in the last block, {dense:.4g} ms" in said and "batch 16: " in said
