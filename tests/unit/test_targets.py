"""Targets of thresholds, in GMACs and in milliseconds: one amount and one cost table, from the file to the loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_profiles import fake_profile, stairs_profile

from prunesearch.cli import main
from prunesearch.config import (
    TARGETS,
    Budget,
    DataConfig,
    DeviceConfig,
    FinetuneConfig,
    ModelConfig,
    SpaceConfig,
    StudyConfig,
    Target,
    ThresholdRange,
)
from prunesearch.cost import MACS, CostTable, cost_of_counts, target_field, target_of, total_cost
from prunesearch.errors import DeviceError, ScheduleError
from prunesearch.evaluate import METRICS, Task, build_model, evaluate, model_shape
from prunesearch.evaluate.finetune import Progress, finetune
from prunesearch.evaluate.measures import Subject, target_miss
from prunesearch.evaluate.predict import Predictions
from prunesearch.evaluate.schedule_loss import ScheduleLoss, cost_by_counts
from prunesearch.export.schedules import measure_again
from prunesearch.files import load_schedule, load_schedule_file, save_schedule, to_mapping
from prunesearch.models import Trace, apply_schedule, shape_of, steps_of
from prunesearch.profile import Profile
from prunesearch.schedule import Schedule, Stage, canonical
from prunesearch.search.problems import study_problems
from prunesearch.search.target_device import without_predictions
from prunesearch.space.choices import uid_of

DIGITS = ModelConfig("vit_digits_patch1_8", pretrained=True)
SMALL = ModelConfig("vit_digits_patch1_8", options=(("depth", 3), ("embed_dim", 16), ("num_heads", 2)))
DATA = DataConfig(train_images=10, val_images=20)
SHAPE = model_shape(SMALL)
PROFILE = fake_profile(SHAPE)
CPU = torch.device("cpu")
STAGES = (Stage(1, threshold=0.02), Stage(2, threshold=0.9, reduce="merge"))
TABLES: dict[str, CostTable] = {"macs": MACS, "profile": PROFILE, "stairs": stairs_profile(SHAPE, 8)}
EACH_TABLE = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
MS = "target_predicted_latency_ms"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def aimed(table: CostTable, share: float = 0.6, stages: tuple[Stage, ...] = STAGES) -> Schedule:
    return Schedule(stages, **{target_field(table): share * total_cost(SHAPE, Schedule(), table)})


def profile_in(table: CostTable) -> Profile | None:
    return table if isinstance(table, Profile) else None


# --- what a target is --------------------------------------------------------------------------------------------


def test_each_target_is_a_table_a_metric_and_a_unit() -> None:
    assert [target_field(table) for table in (MACS, PROFILE)] == list(TARGETS)
    for field, unit in TARGETS.items():
        metric = METRICS[field.removeprefix("target_")]
        assert metric.unit == unit and metric.costs is not None
        assert target_field(metric.costs(Target(SMALL, PROFILE))) == field


@EACH_TABLE
def test_the_target_of_a_schedule_is_an_amount_in_the_unit_of_its_table(table: CostTable) -> None:
    schedule = aimed(table)
    assert target_of(schedule, profile_in(table)) == (schedule.target.amount, table)
    assert schedule.target.unit == table.unit and str(schedule).endswith(f" towards {schedule.target}")
    assert target_of(Schedule(STAGES), PROFILE) is None
    assert canonical(schedule, SHAPE).target == schedule.target
    assert canonical(replace(schedule, stages=(*STAGES[:1], Stage(2, keep=1.0))), SHAPE).target == schedule.target


@pytest.mark.parametrize("field", TARGETS)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages": (Stage(2, keep=0.5),)}, "{field} is given, but no stage has a threshold"),
        ({"amount": 0.0}, "{field} is 0.0; possible: {unit} above 0"),
        ({"amount": True}, "{field} is True; possible: {unit} above 0"),
        ({"amount": "60%"}, "{field} is '60%'; possible: {unit} above 0"),
    ],
)
def test_targets_that_cannot_be_are_refused(field: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ScheduleError, match=says.format(field=field, unit=TARGETS[field])):
        Schedule(changes.get("stages", STAGES), **{field: changes.get("amount", 1.0)})


def test_a_schedule_has_one_target(tmp_path: Path) -> None:
    says = f"target_gmacs and {MS} are given; possible: one"
    with pytest.raises(ScheduleError, match=says):
        Schedule(STAGES, 1.0, 2.0)
    save_schedule(Schedule(STAGES, 1.0), tmp_path / "both.yaml")
    (tmp_path / "both.yaml").write_text((tmp_path / "both.yaml").read_text() + f"{MS}: 2.0\n")
    with pytest.raises(ScheduleError, match=says):
        load_schedule(tmp_path / "both.yaml")


@EACH_TABLE
def test_a_target_survives_its_file(table: CostTable, tmp_path: Path) -> None:
    schedule = aimed(table)
    save_schedule(schedule, tmp_path / "s.yaml")
    assert load_schedule(tmp_path / "s.yaml") == schedule
    assert [field for field in TARGETS if field in (tmp_path / "s.yaml").read_text()] == [target_field(table)]


def test_what_an_old_study_stored_is_as_it_was() -> None:
    """Written by a version that knew GMACs only."""
    shape = model_shape(ModelConfig("vit_digits_patch1_8"))
    old = Schedule((Stage(2, threshold=0.02), Stage(4, threshold=0.9, reduce="merge")), target_gmacs=0.006)
    assert uid_of(old, shape) == "d0067a85d827"
    assert uid_of(Schedule((Stage(2, threshold=0.02),)), shape) == "74de5d6a7aa8"
    assert set(to_mapping(old)) == {"stages", "target_gmacs"}
    assert set(to_mapping(SpaceConfig(blocks=(1,), target_gmacs=(0.1,)))) == {"blocks", "target_gmacs"}


def test_the_same_number_in_another_unit_is_another_schedule() -> None:
    schedules = [Schedule(STAGES, **target) for target in ({"target_gmacs": 2.0}, {MS: 2.0}, {MS: 3.0}, {})]
    assert len({uid_of(schedule, SHAPE) for schedule in schedules}) == 4


# --- the loss, and what was reached ------------------------------------------------------------------------------


def traced(counts: list[list[float]]) -> tuple[Trace, list[torch.Tensor]]:
    tokens = [torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in counts]
    return Trace(torch.zeros(len(counts[0]), 10), torch.zeros(len(counts[0]), 64, 1), None, tuple(tokens)), tokens


@EACH_TABLE
@pytest.mark.parametrize("kind", ["absolute", "squared", "absolute_gmacs"])
def test_the_loss_is_the_distance_of_the_mean_cost_from_the_target(table: CostTable, kind: Any) -> None:
    schedule = aimed(table)
    model = apply_schedule(build_model(SMALL), schedule)
    config = FinetuneConfig(budget_loss=kind, budget_weight=3.0)
    trace, _ = traced([[40.0, 20.0], [36.0, 12.0]])
    steps = [step.step for step in steps_of(model)]
    costs = [cost_of_counts(SHAPE, steps, after, table)[0] / table.per_unit for after in ((40, 36), (20, 12))]
    dense = total_cost(SHAPE, Schedule(), table)
    miss = abs(sum(costs) / 2 - schedule.target.amount)
    expected = {"absolute": miss / dense, "squared": (miss / dense) ** 2, "absolute_gmacs": miss}[kind]
    assert miss > 0.01 * dense
    assert ScheduleLoss(model, config, profile_in(table))(trace, None).item() == pytest.approx(3.0 * expected)


@EACH_TABLE
def test_the_loss_follows_the_slopes_of_the_table(table: CostTable) -> None:
    """Its gradient is the change of the loss with a count, also between whole counts; none on the flat of a stair."""
    drops = (Stage(1, threshold=0.02), Stage(2, threshold=0.02))  # the MACs of merge have no gradient
    model = apply_schedule(build_model(SMALL), aimed(table, 0.2, drops))
    loss = ScheduleLoss(model, FinetuneConfig(), profile_in(table))
    counts = [[39.25, 19.5], [36.5, 12.25]]  # with the class token 40.25 is between two stairs
    trace, tokens = traced(counts)
    loss(trace, None).backward()
    for stage, image in ((0, 0), (0, 1), (1, 0), (1, 1)):
        ends = []
        for change in (-1e-3, 1e-3):
            moved = [list(one) for one in counts]
            moved[stage][image] += change
            ends.append(loss(traced(moved)[0], None).item())
        gradient = tokens[stage].grad
        assert gradient is not None
        assert gradient[image].item() == pytest.approx((ends[1] - ends[0]) / 2e-3, rel=1e-4, abs=1e-9)
        assert gradient[image] >= 0, "more tokens never cost less"
    assert tokens[0].grad is not None and tokens[0].grad.sum() > 0


@EACH_TABLE
def test_how_far_the_target_is_missed(table: CostTable) -> None:
    schedule, counts = aimed(table), (torch.tensor([40.0, 20.0]), torch.tensor([36.0, 12.0]))
    model = apply_schedule(build_model(SMALL), schedule)
    one = Subject(model, Target(SMALL, PROFILE), schedule, None, None, CPU, True, None, SMALL, None)  # type: ignore[arg-type]
    one.target = Target(SMALL, profile_in(table))
    one.outputs = Predictions(torch.zeros(2, 10), torch.zeros(2), counts)
    mean = cost_by_counts(counts, steps_of(model), shape_of(model), 2, table).mean().item() / table.per_unit
    assert target_miss(one) == pytest.approx(100 * abs(mean / schedule.target.amount - 1)) and target_miss(one) > 1


# --- without a profile -------------------------------------------------------------------------------------------

NO_PROFILE = f"{MS}: there is no profile of a device to predict .* by"


def test_nothing_is_trained_towards_milliseconds_without_a_profile() -> None:
    schedule = Schedule(STAGES, **{MS: 2.0})
    with pytest.raises(DeviceError, match=NO_PROFILE):
        finetune(apply_schedule(build_model(SMALL), schedule), None, Budget(images=5), FinetuneConfig(), None, CPU, 0,
                 Progress())  # type: ignore[arg-type]  # fmt: skip
    for budget, calibration_images in ((10, 0), (0, 10)):
        settings = FinetuneConfig(calibration_images=calibration_images, distill=False)
        result = evaluate(Task("x", SMALL, DATA, schedule, Budget(images=budget), ("top1",), settings))
        assert result.status == "failed" and NO_PROFILE.split(".*")[0] in result.error


def test_what_was_trained_by_a_profile_is_measured_without_it(tmp_path: Path) -> None:
    """But for the miss of its target, and only with its weights: without them its thresholds would be calibrated."""
    schedule = Schedule((Stage(1, threshold=0.02),), **{MS: 2.0})
    task = Task("x", SMALL, DATA, schedule, Budget(images=10), ("top1",), profile=PROFILE, save_to=str(tmp_path / "s"))
    trained = evaluate(task)
    assert trained.status == "complete" and trained.value("target_miss") >= 0
    for weights in ("s.safetensors", None):
        save_schedule(trained.schedule, tmp_path / "s.yaml", weights=weights)
        file = load_schedule_file(tmp_path / "s.yaml")
        sources: dict[str, Any] = {"model": SMALL, "data": DATA, "metrics": ("top1",)}
        study = StudyConfig(1, "x", SMALL, SpaceConfig((1,)), DATA, device=DeviceConfig(table=PROFILE))
        _, pruned = measure_again(file, tmp_path, study=study, **sources)
        assert set(dict(pruned.metrics)) == {"top1", "target_miss"}
        if weights is not None:
            _, pruned = measure_again(file, tmp_path, **sources)
            assert set(dict(pruned.metrics)) == {"top1"}
            sources["metrics"] = ("target_miss",)
        with pytest.raises(DeviceError, match=NO_PROFILE):
            measure_again(file, tmp_path, **sources)


# --- studies -----------------------------------------------------------------------------------------------------

THRESHOLDS: dict[str, Any] = {"blocks": (1, 2), "amount": ("threshold", "none"), "threshold": (0.01, 0.02)}


def study(device: DeviceConfig | None = None, **space: Any) -> StudyConfig:
    return StudyConfig(1, "x", SMALL, SpaceConfig(**{**THRESHOLDS, **space}), DATA, device=device)


def test_a_space_with_a_target_in_milliseconds_needs_a_device() -> None:
    """Nothing else has to be predicted by it."""
    target: dict[str, Any] = {MS: (2.0, 3.0)}
    (problem,) = study_problems(study(**target))
    assert problem.startswith(f"device: absent, but space.{MS} is predicted by a profile of a device. Possible:")
    assert study_problems(study(DeviceConfig(table=PROFILE), **target)) == []
    measured_later = study(DeviceConfig(batch=16), **target)
    assert study_problems(measured_later) == [] and without_predictions(measured_later) == measured_later
    (problem,) = study_problems(study(DeviceConfig(table=PROFILE), target_gmacs=(0.0005,)))
    assert "no objective, limit, budget, metric or target is predicted by it" in problem


@pytest.mark.parametrize("values", [(2.0, 99.0), ThresholdRange(2.0, 99.0)])
def test_a_target_above_the_dense_models_time_is_refused(values: Any) -> None:
    problems = study_problems(study(DeviceConfig(table=PROFILE), **{MS: values}))
    dense = total_cost(SHAPE, Schedule(), PROFILE)
    assert f"space.{MS}: 99; possible: above 0, up to the dense model's {dense:.4g}. Correct it." in problems


def test_a_start_schedule_with_a_target_in_milliseconds_needs_a_device_too(tmp_path: Path) -> None:
    file = tmp_path / "start.yaml"
    save_schedule(Schedule((Stage(1, threshold=0.02),), **{MS: 2.0}), file)
    starts = (str(tmp_path / "absent.yaml"), str(file))
    problems = study_problems(study(start_from=starts))
    assert any(f"absent, but space.start_from[1].{MS} is predicted" in problem for problem in problems)
    assert study_problems(study(DeviceConfig(table=PROFILE), start_from=starts[1:])) == []
    assert len(study_problems(study(DeviceConfig(table=PROFILE), start_from=starts))) == 1  # the absent file


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"target_gmacs": 0.0064}, "0.0064 GMACs on average, which its thresholds are trained for"),
        ({MS: 12.5}, "GMACs; its thresholds are trained for 12.5 ms on average"),
        ({}, "GMACs; with thresholds it depends on the images"),
    ],
)
def test_check_says_what_thresholds_are_trained_for(
    target: dict[str, float], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_schedule(Schedule((Stage(1, threshold=0.02),), **target), tmp_path / "s.yaml", model=to_mapping(DIGITS))
    assert main(["check", str(tmp_path / "s.yaml")]) == 0
    assert says in " ".join(capsys.readouterr().out.split())


def test_a_schedule_file_with_thresholds_is_measured_with_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prunesearch.files import save_profiles

    shape = model_shape(DIGITS)
    save_profiles([fake_profile(shape, DIGITS.name)], tmp_path / "p.json")
    save_schedule(Schedule((Stage(1, threshold=0.02),)), tmp_path / "s.yaml", model=to_mapping(DIGITS))
    again = ["evaluate", str(tmp_path / "s.yaml"), "--data", "digits", "--set", "data.val_images=8"]
    assert main([*again, "--profile", str(tmp_path / "p.json"), "--device", "cpu"]) == 0
    assert "predicted_latency_ms" in capsys.readouterr().out


def test_the_schemas_know_both(capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("schedule", "study"):
        assert main(["schema", what]) == 0
        schema = json.dumps(json.loads(capsys.readouterr().out))
        assert all(f'"{field}": ' in schema for field in TARGETS)
