"""Evaluate schedules that learn: thresholds reach their target, learned parts are saved, freezing fixes counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_profiles import fake_profile, stairs_profile

from prunesearch.config import Budget, DataConfig, FinetuneConfig, ModelConfig
from prunesearch.cost import MACS, estimate_cost, target_field, total_cost
from prunesearch.errors import ModelError, ScheduleError
from prunesearch.evaluate import Evaluation, Task, build_model, evaluate, model_shape
from prunesearch.evaluate.finetune import parameter_groups
from prunesearch.evaluate.schedule_loss import cost_by_counts, ratio_loss, token_loss
from prunesearch.export.freeze import freeze
from prunesearch.files import from_mapping, load_schedule_file, save_schedule, to_mapping
from prunesearch.models import Trace, apply_schedule, schedule_of, shape_of, steps_of, trace
from prunesearch.schedule import Schedule, Stage

MODEL = ModelConfig("vit_digits_patch1_8", pretrained=True)
DATA = DataConfig(train_images=256, val_images=200)
SHAPE = model_shape(MODEL)
DENSE = estimate_cost(SHAPE).gmacs
PROFILES = {"fake": fake_profile(SHAPE), "stairs": stairs_profile(SHAPE)}
ADAPTIVE = (
    Stage(2, at="pre", score="head_weighted_class_attention", threshold=0.0),
    Stage(4, threshold=0.95, reduce="merge"),
    Stage(5, score="attention_received", threshold=0.0),
)
LEARNED = Schedule((Stage(2, at="pre", score="predictor", keep=0.6), Stage(5, at="pre", tokens=6, reduce="pool")))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(schedule: Schedule, images: int = 0, **changes) -> Evaluation:
    settings = FinetuneConfig(learning_rate=1e-3, batch_size=64, calibration_images=256)
    metrics = ("top1", "gmacs", "gmacs_p95") + ("predicted_latency_ms",) * (changes.get("profile") is not None)
    task = Task("x", MODEL, DATA, schedule, Budget(images=images), metrics, settings)
    result = evaluate(replace(task, **changes))
    assert result.status == "complete", result.traceback
    return result


@pytest.mark.parametrize(("profile", "share"), [(None, 0.5), (None, 0.8), ("fake", 0.65), ("stairs", 0.65)])
def test_thresholds_are_calibrated_onto_their_target(profile: str | None, share: float) -> None:
    device = None if profile is None else PROFILES[profile]
    table = device or MACS
    amount = share * total_cost(SHAPE, Schedule(), table)
    result = run(Schedule(ADAPTIVE, **{target_field(table): amount}), profile=device)
    reached, spread = result.value(table.metric), dict(result.spread)[table.metric]
    assert reached == pytest.approx(amount, rel=0.02)
    assert result.value("target_miss") == pytest.approx(100 * abs(reached / amount - 1))
    assert result.value("gmacs_p95") > result.value("gmacs")
    assert spread > 0
    assert result.schedule.target == (target_field(table), amount, table.unit)
    assert all(
        after.threshold > before.threshold if before.score != "none" else after.threshold < before.threshold
        for before, after in zip(ADAPTIVE, result.schedule.stages, strict=True)
    )
    assert from_mapping(Evaluation, to_mapping(result), "here").schedule == result.schedule


@pytest.mark.parametrize("profile", [None, "stairs"])
def test_training_alone_moves_thresholds_towards_the_target_and_the_schedule_says_where_they_are(
    profile: str | None,
) -> None:
    device = None if profile is None else PROFILES[profile]
    table = device or MACS
    dense = total_cost(SHAPE, Schedule(), table)
    target = {target_field(table): 0.5 * dense}
    config = FinetuneConfig(batch_size=32, threshold_learning_rate=0.1, calibration_images=0)
    stages = (Stage(2, at="pre", score="head_weighted_class_attention", threshold=0.0),)
    before = run(Schedule(stages, **target), finetune=config, profile=device)
    after = run(Schedule(stages, **target), images=512, finetune=config, profile=device)
    assert before.value(table.metric) > 0.95 * dense
    assert after.value(table.metric) < 0.8 * dense
    assert after.schedule.stages[0].threshold > 0.001


def test_without_a_target_thresholds_stay() -> None:
    stages = (Stage(2, at="pre", score="head_weighted_class_attention", threshold=0.004),)
    assert run(Schedule(stages), images=64).schedule == Schedule(stages)


def test_the_cost_is_the_mean_of_each_images_own() -> None:
    model = apply_schedule(build_model(MODEL), Schedule((Stage(2, threshold=0.01),)))
    counts = (torch.tensor([10.0, 50.0]),)
    macs = cost_by_counts(counts, steps_of(model), shape_of(model), 2)
    by_hand = [estimate_cost(shape_of(model), Schedule((Stage(2, tokens=n),))).macs for n in (10, 50)]
    assert macs.tolist() == by_hand
    mean_count = estimate_cost(shape_of(model), Schedule((Stage(2, tokens=30),))).macs
    assert macs.mean() > mean_count, "attention is quadratic"


def test_what_is_exported_is_what_was_measured(tmp_path: Path) -> None:
    for name, schedule in {"learned": LEARNED, "adaptive": Schedule(ADAPTIVE, target_gmacs=0.7 * DENSE)}.items():
        result = run(schedule, images=64, save_to=str(tmp_path / name))
        weights = tmp_path / f"{name}.safetensors"
        again = run(result.schedule or schedule, weights=str(weights))
        assert again.value("top1") == result.value("top1") and again.value("gmacs") == result.value("gmacs")
        save_schedule(result.schedule or schedule, tmp_path / f"{name}.yaml", weights=weights.name)
        model = apply_schedule(build_model(MODEL), tmp_path / f"{name}.yaml")
        assert schedule_of(model) == (result.schedule or schedule)


def test_training_continues_with_what_was_learned(tmp_path: Path) -> None:
    run(LEARNED, images=64, save_to=str(tmp_path / "a"))
    on = run(LEARNED, images=128, resume_from=str(tmp_path / "a"), save_to=str(tmp_path / "b"))
    assert on.images == 128
    with pytest.raises(ModelError, match="token_stages"):
        apply_schedule(build_model(MODEL), Schedule((Stage(3, score="predictor", keep=0.5),)),
                       weights=tmp_path / "a.safetensors")  # fmt: skip


def test_parameter_groups_have_their_own_rates() -> None:
    schedule = Schedule((*LEARNED.stages[:1], *ADAPTIVE[1:]), target_gmacs=0.5 * DENSE)
    model = apply_schedule(build_model(MODEL), schedule, untrained=True)
    config = FinetuneConfig(learning_rate=1e-5, learned_learning_rate=1e-3, threshold_learning_rate=0.02)
    rates = {}
    for group in parameter_groups(model, config):
        rates.setdefault(group["part"], set()).add(group["lr"])
        assert group["part"] != "threshold" or group["weight_decay"] == 0
    assert rates == {"backbone": {1e-5}, "learned": {1e-3}, "threshold": {0.02, 0.02 / 64}}
    frozen = parameter_groups(model, replace(config, freeze_backbone=1.0))
    assert {group["part"] for group in frozen} == {"learned", "threshold"}
    assert not model.blocks[0].attn.qkv.weight.requires_grad


def test_a_frozen_backbone_does_not_change(tmp_path: Path) -> None:
    config = FinetuneConfig(batch_size=32, freeze_backbone=1.0, learned_learning_rate=1e-2)
    run(LEARNED, images=64, finetune=config, save_to=str(tmp_path / "a"))
    fresh = build_model(MODEL)
    trained = apply_schedule(build_model(MODEL), LEARNED, weights=tmp_path / "a.safetensors")
    for name, value in fresh.state_dict().items():
        assert torch.equal(trained.state_dict()[name], value)
    start = apply_schedule(build_model(MODEL), LEARNED, seed=0, untrained=True)
    key = "token_stages.block2_pre.scorer.embed.weight"
    assert not torch.equal(trained.state_dict()[key], start.state_dict()[key])


def test_ratio_and_token_losses_by_hand() -> None:
    model = apply_schedule(build_model(MODEL), Schedule((Stage(2, score="predictor", tokens=32),)), untrained=True)
    logits, present = torch.zeros(2, 10), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    patches = torch.tensor([[[1.0], [9.0]], [[2.0], [4.0]]])
    one = Trace(logits, patches, present, (torch.tensor([16.0, 48.0]),))
    assert ratio_loss(one, steps_of(model), shape_of(model)) == pytest.approx((16 / 64) ** 2)
    assert token_loss(one, torch.zeros(2, 2, 1)) == pytest.approx((1 + 4 + 16) / 3)


def test_freezing_gives_every_image_the_mean_count(tmp_path: Path) -> None:
    result = run(Schedule(ADAPTIVE, target_gmacs=0.6 * DENSE), images=64, save_to=str(tmp_path / "a"))
    save_schedule(result.schedule, tmp_path / "a.yaml", weights="a.safetensors")
    file = load_schedule_file(tmp_path / "a.yaml")
    frozen = freeze(file, tmp_path, tmp_path / "f.yaml", model=MODEL, data=DATA)
    assert not frozen.schedule.is_adaptive and all(stage.tokens for stage in frozen.schedule.stages)
    assert frozen.gmacs == pytest.approx(frozen.adaptive_gmacs, rel=0.05)
    assert frozen.gmacs < frozen.adaptive_gmacs
    model = apply_schedule(build_model(MODEL), tmp_path / "f.yaml")
    assert not hasattr(model, "token_stages")
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend="eager")(torch.randn(2, 1, 8, 8))
    with pytest.raises(ScheduleError, match="has no threshold"):
        freeze(load_schedule_file(tmp_path / "f.yaml"), tmp_path, tmp_path / "g.yaml", model=MODEL, data=DATA)


def test_batch_size_changes_nothing(tmp_path: Path) -> None:
    result = run(Schedule(ADAPTIVE, target_gmacs=0.5 * DENSE))
    model = apply_schedule(build_model(MODEL), result.schedule)
    images = torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        together = trace(model, images)
        alone = [trace(model, image[None]) for image in images]
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]), atol=1e-4, rtol=1e-4)
    assert [count.tolist() for count in together.counts] == [
        [one.counts[step].item() for one in alone] for step in range(3)
    ]
