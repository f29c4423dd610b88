"""`apply_schedule` either applies a whole schedule or leaves the model unchanged, with its former schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_models import images, small_model
from test_feature_map import HOLDS, inputs, map_model
from torch import nn

from prunesearch.errors import FileError, ModelError, PruneSearchError, ScheduleError, UntrainedWarning
from prunesearch.models import apply_schedule, learned_parts, remove_schedule, schedule_of, steps_of
from prunesearch.models.plan import StageParts
from prunesearch.schedule import Schedule, Stage
from prunesearch.tokens import REDUCERS

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")

OLD = {
    "none": None,
    "fixed": Schedule((Stage(1, keep=0.5),)),
    "learned": Schedule((Stage(1, score="predictor", keep=0.5), Stage(2, threshold=0.3, reduce="merge"))),
}
NEW = Schedule((Stage(2, score="predictor", keep=0.5),))


def _no_part(shape: object, kept: int) -> nn.Module:
    raise ZeroDivisionError("a plug-in's own mistake")


@pytest.fixture
def broken_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered verb whose learned part raises when it is built."""
    entry = replace(REDUCERS["pool"], name="broken", part=_no_part)
    monkeypatch.setitem(REDUCERS._things, "broken", entry)


def good_weights() -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in apply_schedule(small_model(), NEW).state_dict().items()}


def damaged(change: Callable[[dict], object]) -> dict:
    weights = good_weights()
    change(weights)
    return weights


def no_file(folder: Path) -> dict:
    return dict(schedule=folder / "none.yaml")


def file_without_weights(folder: Path) -> dict:
    path = folder / "it.yaml"
    path.write_text(
        "version: 1\nweights: missing.safetensors\nschedule:\n"
        "  - {block: 2, at: mid, score: predictor, keep: 0.5, reduce: drop}\n"
    )
    return dict(schedule=path)


def damaged_weights_file(folder: Path) -> dict:
    path = folder / "it.safetensors"
    path.write_bytes(safetensors.torch.save(good_weights())[:-8])
    return dict(schedule=NEW, weights=path)


FAILURES: dict[str, tuple[Callable[[Path], dict], type[Exception]]] = {
    "no such block": (lambda _: dict(schedule=Schedule((Stage(9, keep=0.5),))), ScheduleError),
    "tokens that come back too late": (
        lambda _: dict(schedule=Schedule((Stage(1, at="pre", score="random", keep=0.5, reduce="hold", until=9),))),
        ScheduleError,
    ),
    "no schedule file": (no_file, FileError),
    "a file whose weights are missing": (file_without_weights, PruneSearchError),
    "a damaged weights file": (damaged_weights_file, ModelError),
    "a weight too few": (lambda _: dict(schedule=NEW, weights=damaged(lambda w: w.pop("head.weight"))), ModelError),
    "a weight too many": (
        lambda _: dict(schedule=NEW, weights=damaged(lambda w: w.update(x=w["norm.bias"]))),
        ModelError,
    ),
    "weights of the dense model": (lambda _: dict(schedule=NEW, weights=small_model().state_dict()), ModelError),
    "another shape": (
        lambda _: dict(schedule=NEW, weights=damaged(lambda w: w.update({"head.bias": torch.zeros(3)}))),
        ModelError,
    ),
    "not a tensor": (lambda _: dict(schedule=NEW, weights=damaged(lambda w: w.update({"head.bias": 3}))), ModelError),
    "a tensor without values": (
        lambda _: dict(
            schedule=NEW, weights=damaged(lambda w: w.update({"norm.bias": torch.zeros(32, device="meta")}))
        ),
        ModelError,
    ),
    "a part that cannot be made": (
        lambda _: dict(schedule=Schedule((Stage(1, score="none", keep=0.5, reduce="broken"),))),
        ZeroDivisionError,
    ),
    "a warning that is an error": (lambda _: dict(schedule=NEW), UntrainedWarning),
}


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_the_model_as_it_was(failure: str, old: str, tmp_path: Path, broken_verb: None) -> None:
    model, x = small_model(), images()
    if OLD[old] is not None:
        apply_schedule(model, OLD[old])
    if old == "learned":
        with torch.no_grad():
            model.token_stages["block2_mid"].threshold.fill_(0.9)
    modules = [(name, module, type(module)) for name, module in model.named_modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    before, steps, parts, schedule = model(x), steps_of(model), learned_parts(model), schedule_of(model)
    arguments, error = FAILURES[failure]
    given = arguments(tmp_path)
    with warnings.catch_warnings():
        if error is UntrainedWarning:
            warnings.simplefilter("error", UntrainedWarning)
        with pytest.raises(error):
            apply_schedule(model, **given)
    assert [(name, module, type(module)) for name, module in model.named_modules()] == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert (steps_of(model), learned_parts(model), schedule_of(model)) == (steps, parts, schedule)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("old", OLD)
def test_success_leaves_nothing_of_the_old_schedule(old: str) -> None:
    model, x, weights = small_model(), images(), good_weights()
    if OLD[old] is not None:
        apply_schedule(model, OLD[old])
    fresh = apply_schedule(small_model(), NEW, weights=weights)
    assert torch.equal(apply_schedule(model, NEW, weights=weights)(x), fresh(x))
    assert list(model.state_dict()) == list(fresh.state_dict()) and schedule_of(model) == NEW
    assert {name: type(module) for name, module in remove_schedule(model).named_modules()} == {
        name: type(module) for name, module in small_model().named_modules()
    }


@pytest.mark.parametrize("layout", ["swin", "convnext"])
def test_maps_too(layout: str) -> None:
    model = apply_schedule(map_model(layout), HOLDS)
    x, state = inputs(model, 2), model.state_dict()
    before = model(x)
    for schedule, weights in ((Schedule((Stage(1, keep=0.5),)), None), (Schedule(HOLDS.stages[:1]), state)):
        with pytest.raises(PruneSearchError):
            apply_schedule(model, schedule, weights=weights)
        assert schedule_of(model) == HOLDS and torch.equal(model(x), before)


def test_thresholds_of_earlier_versions_load() -> None:
    """They were 0-dimensional, which fully_shard refuses."""
    schedule = Schedule((Stage(1, threshold=0.02),))
    name = "token_stages.block1_mid.threshold"
    weights = {**apply_schedule(small_model(), schedule).state_dict(), name: torch.tensor(0.25)}
    model = apply_schedule(small_model(), schedule, weights=weights)
    assert model.get_parameter(name).shape == (1,) and schedule_of(model).stages[0].threshold == 0.25
    fresh = apply_schedule(small_model(), schedule)
    fresh.load_state_dict(weights)
    assert schedule_of(fresh) == schedule_of(model)
    assert isinstance(fresh.token_stages["block1_mid"], StageParts)
