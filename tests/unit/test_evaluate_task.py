"""evaluate(Task): metrics, reproducibility, caches between tasks, and failures."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from prunesearch.config import Budget, DataConfig, FinetuneConfig, MeasureConfig, ModelConfig
from prunesearch.errors import DataError
from prunesearch.evaluate import METRICS, Task, data, evaluate, measured_metric, run
from prunesearch.evaluate.build import _dense_model
from prunesearch.evaluate.digits import load_digits
from prunesearch.evaluate.outcome import hopeless
from prunesearch.models import apply_schedule
from prunesearch.schedule import Schedule, Stage

PRUNED = Schedule((Stage(0, keep=0.5),))
SMALL = Task(
    uid="small",
    model=ModelConfig("vit_digits_patch1_8", options=(("depth", 2),)),
    data=DataConfig(train_images=120, val_images=50),
    schedule=PRUNED,
    budget=Budget(images=80),
    metrics=("top1", "loss", "gmacs"),
    finetune=FinetuneConfig(learning_rate=1e-3, batch_size=32),
    seed=4,
    device="cpu",
    threads=1,
)
SHIPPED = replace(SMALL, model=ModelConfig("vit_digits_patch1_8", pretrained=True), data=DataConfig(train_images=64))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch):
    """Unregister metrics of a test after it."""
    monkeypatch.setattr(METRICS, "_things", dict(METRICS._things))


def digits_top1(model: torch.nn.Module) -> float:
    """Straight from scikit-learn's images, without this package's data or metrics."""
    images, labels = load_digits("validation")
    mean, std = model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
    with torch.inference_mode():
        guesses = model.eval()(((images.float() / 255 - mean) / std)[:, None]).argmax(dim=1)
    return 100 * (guesses == labels).double().mean().item()


@pytest.mark.parametrize("schedule", [Schedule(), PRUNED], ids=str)
def test_as_it_comes_is_what_timm_gives(schedule: Schedule):
    evaluation = evaluate(replace(SHIPPED, schedule=schedule, budget=Budget(images=0), metrics=("top1", "agreement")))
    model = apply_schedule(timm.create_model("vit_digits_patch1_8", pretrained=True), schedule)
    assert evaluation.status == "complete"
    assert evaluation.value("top1") == digits_top1(model)
    assert (evaluation.value("agreement") == 100) == (not schedule.stages)
    assert evaluation.images == 0
    assert set(dict(evaluation.seconds)) == {"load", "measure"}


@pytest.mark.parametrize("schedule", [PRUNED, Schedule((Stage(0, score="random", keep=0.5),))], ids=str)
def test_the_same_task_twice_gives_the_same_numbers(schedule: Schedule):
    task = replace(SMALL, schedule=schedule, finetune=replace(SMALL.finetune, augment="flip"))
    run.dense_logits.cache_clear()
    first = evaluate(task)
    torch.manual_seed(123)  # the global random state must not matter
    second = evaluate(
        replace(task, metrics=("gmacs", "throughput", "loss", "top1"), measure=MeasureConfig(speed_seconds=0))
    )
    assert first.status == second.status == "complete"
    assert first.images == second.images == 80
    assert dict(first.metrics) == {name: second.value(name) for name in ("top1", "loss", "gmacs")}
    assert evaluate(replace(task, seed=5)).value("loss") != first.value("loss")


def test_everything_is_reported():
    evaluation = evaluate(
        replace(SMALL, rung=1, attempt=2, metrics=("top1", "throughput"), measure=MeasureConfig(speed_seconds=0))
    )
    assert (evaluation.uid, evaluation.rung, evaluation.attempt) == ("small", 1, 2)
    assert evaluation.tokens == (33, 33)
    assert list(dict(evaluation.spread)) == ["throughput"]
    assert set(dict(evaluation.seconds)) == {"load", "train", "measure"}
    assert dict(evaluation.versions)["timm"] == timm.__version__
    assert dict(evaluation.versions)["data"].startswith("120:")
    assert evaluation.host
    assert evaluation.device == "cpu (threads: 1)"
    assert evaluation.checkpoint is None


def test_the_test_split_is_measured_instead():
    halves = DataConfig(train_images=64, val_split="first half", test_split="second half")
    task = replace(SHIPPED, data=halves, budget=Budget(images=0), metrics=("loss", "agreement"))
    dense = replace(task, schedule=Schedule())
    found = [evaluate(replace(one, split=split)) for one in (task, dense) for split in ("validation", "test")]
    assert len({one.value("loss") for one in found}) == 4
    assert [one.value("agreement") for one in found[2:]] == [100, 100]  # with the dense model on the same images
    assert found[0].versions != found[1].versions  # by the hash of the images


def test_only_the_first_task_loads(monkeypatch: pytest.MonkeyPatch):
    counts = {"model": 0, "data": 0, "predict": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for cached in (_dense_model, data._open, data._open_split, run.dense_logits):
        cached.cache_clear()
    monkeypatch.setattr(timm, "create_model", counted("model", timm.create_model))
    monkeypatch.setitem(data.DATASETS._things, "digits", counted("data", data.DATASETS["digits"]))
    monkeypatch.setattr(run, "predict", counted("predict", run.predict))
    evaluate(replace(SMALL, metrics=("agreement",)))
    first = dict(counts)
    assert first["data"] == 2  # two splits
    assert first["predict"] == 2  # the dense model on the training images, for distillation, and on the validation ones
    for schedule in (Schedule(), Schedule((Stage(1, keep=0.5),))):
        assert evaluate(replace(SMALL, schedule=schedule, metrics=("agreement",))).status == "complete"
    assert counts == first


def test_saved_weights_reproduce_the_measured_top1(tmp_path: Path):
    schedule = Schedule((Stage(2, keep=0.5, reduce="squeeze"), Stage(4, tokens=20, reduce="merge")))
    path = str(tmp_path / "folder" / "weights")
    evaluation = evaluate(replace(SHIPPED, schedule=schedule, save_to=path))
    assert evaluation.checkpoint == path
    model = timm.create_model("vit_digits_patch1_8")
    model.load_state_dict(safetensors.torch.load_file(path + ".safetensors"))
    assert digits_top1(apply_schedule(model, schedule)) == evaluation.value("top1")


def test_a_later_budget_continues(tmp_path: Path):
    first = evaluate(replace(SMALL, save_to=str(tmp_path / "a")))
    second = evaluate(
        replace(SMALL, budget=Budget(images=200), resume_from=first.checkpoint, save_to=str(tmp_path / "b"))
    )
    assert (first.images, second.images) == (80, 200)
    moments = torch.load(tmp_path / "b.state", weights_only=True)["moments"]
    assert {int(m["step"]) for m in moments.values()} == {3 + 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "a.state", "b.safetensors", "b.state"]


def test_nothing_is_written_without_training(tmp_path: Path):
    evaluation = evaluate(replace(SMALL, budget=Budget(images=0), save_to=str(tmp_path / "a")))
    assert evaluation.checkpoint is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_streamed_images_train_as_those_in_memory(augment: str):
    """Logits of the dense model are cached for images in memory, and computed in each step for a stream."""
    task = replace(SMALL, finetune=replace(SMALL.finetune, augment=augment))
    memory = evaluate(task)
    streamed = evaluate(replace(task, data=replace(task.data, in_memory=False, loaders=0)))
    assert streamed.status == "complete", streamed.traceback
    assert streamed.value("loss") == pytest.approx(memory.value("loss"), rel=1e-4)


def test_a_learning_rate_that_explodes_is_nan():
    settings = FinetuneConfig(learning_rate=1e30, batch_size=16, clip_grad=None)
    evaluation = evaluate(replace(SMALL, finetune=settings, budget=Budget(images=120)))
    assert (evaluation.status, evaluation.cause) == ("failed", "nan")
    assert 0 < evaluation.images < 120
    assert "training loss" in evaluation.error


def plugin(monkeypatch: pytest.MonkeyPatch, measure) -> Task:
    """A task with the metric `theirs`, registered by a module that evaluate must import."""
    name = "prunesearch_test_plugin"
    loader = types.SimpleNamespace(
        create_module=lambda spec: None,
        exec_module=lambda loaded: measured_metric("theirs", unit="", goal="minimize", summary="")(measure),
    )
    finder = types.SimpleNamespace(
        find_spec=lambda wanted, *rest: (
            __import__("importlib.machinery").machinery.ModuleSpec(name, loader) if wanted == name else None
        )
    )
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, name, raising=False)
    return replace(SMALL, budget=Budget(images=0), metrics=("gmacs", "theirs", "top1"), plugins=(name,))


def raising(error: BaseException):
    def measure(subject):
        raise error

    return measure


@pytest.mark.parametrize(
    ("measure", "cause"),
    [
        (lambda subject: math.nan, "nan"),
        (raising(torch.cuda.OutOfMemoryError("CUDA out of memory")), "oom"),
        (raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")), "oom"),
        (raising(ZeroDivisionError("by design")), "error"),
    ],
)
def test_failures_come_back_with_what_was_finished(registry, monkeypatch: pytest.MonkeyPatch, measure, cause: str):
    evaluation = evaluate(plugin(monkeypatch, measure))
    assert (evaluation.status, evaluation.cause) == ("failed", cause)
    assert [name for name, _ in evaluation.metrics] == ["gmacs"]
    assert "_run" in evaluation.traceback
    assert evaluation.error


def test_a_mistake_of_the_user_needs_no_traceback(registry, monkeypatch: pytest.MonkeyPatch):
    evaluation = evaluate(plugin(monkeypatch, raising(DataError("mask a.png is wrong. Mend it."))))
    assert (evaluation.error, evaluation.traceback) == ("mask a.png is wrong. Mend it.", "")
    assert "is wrong. Mend it. Mend its cause" in hopeless([evaluation])


def test_a_plugin_metric_is_measured(registry, monkeypatch: pytest.MonkeyPatch):
    evaluation = evaluate(plugin(monkeypatch, lambda subject: len(subject.validation)))
    assert evaluation.value("theirs") == 50


def test_interrupts_pass_through(registry, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(KeyboardInterrupt):
        evaluate(plugin(monkeypatch, raising(KeyboardInterrupt())))


@pytest.mark.parametrize(
    ("changes", "cause", "text"),
    [
        ({"schedule": Schedule((Stage(7, keep=0.5),))}, "invalid", "blocks 0 to 1"),
        ({"metrics": ("top_1",)}, "error", 'Did you mean "top1"'),
        ({"device": "gpu"}, "error", "device: 'gpu' is not available"),
        ({"data": DataConfig("folder", root="/nowhere")}, "error", "data.root"),
        ({"model": ModelConfig("vit_digit")}, "error", "model.name"),
        ({"plugins": ("prunesearch_no_such_plugin",)}, "error", "prunesearch_no_such_plugin"),
        ({"resume_from": "/nowhere/a"}, "error", "resume_from"),
        ({"budget": Budget()}, "error", "budget"),
    ],
)
def test_what_cannot_run_says_why(changes: dict, cause: str, text: str):
    evaluation = evaluate(replace(SMALL, **changes))
    assert (evaluation.status, evaluation.cause) == ("failed", cause)
    assert text in evaluation.error
