"""Fine-tuning: the order of images, the learning rate, the loss, and continuing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from prunesearch.config import Budget, DataConfig, FinetuneConfig, ModelConfig
from prunesearch.errors import UserError
from prunesearch.evaluate import finetune as module
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.finetune import (
    DenseOutput,
    LossNotFinite,
    Progress,
    distillation_loss,
    finetune,
    load_checkpoint,
    save_checkpoint,
    training_order,
)
from prunesearch.models import apply_schedule
from prunesearch.schedule import Schedule, Stage

CPU = torch.device("cpu")
SMALL = ModelConfig("vit_digits_patch1_8", options=(("depth", 2),))
DATA = DataConfig(train_images=100, val_images=20)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(budget: Budget, progress: Progress | None = None, model: torch.nn.Module | None = None, **settings) -> tuple:
    """Train the small model; returns it, its progress, and the learning rate of each step."""
    model = model or build_model(SMALL)
    train = open_data(DATA, model)[0]
    progress = progress or Progress()
    rates: list[float] = []

    def teacher(images, indices, mirrored):  # called once in each step, after the scheduler
        rates.append(optimizers[-1].param_groups[0]["lr"])
        return DenseOutput(torch.zeros(len(images), 10))

    optimizers = []
    create = module.create_optimizer_v2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "create_optimizer_v2", lambda *a, **k: optimizers.append(create(*a, **k)) or optimizers[-1]
        )
        config = FinetuneConfig(**{"learning_rate": 1e-3, "batch_size": 32, **settings})
        finetune(model, train, budget, config, teacher, CPU, 3, progress)
    return model, progress, rates


def test_order_visits_every_image_once_an_epoch_and_stops_exactly():
    batches = list(training_order(10, 4, seed=1, first=0, last=23))
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]
    flat = torch.cat(batches).tolist()
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert torch.cat(list(training_order(10, 4, seed=2, first=0, last=23))).tolist() != flat


def test_order_continues_where_it_was():
    whole = torch.cat(list(training_order(10, 4, seed=1, first=0, last=40)))
    later = torch.cat(list(training_order(10, 7, seed=1, first=13, last=40)))
    assert torch.equal(whole[13:], later)


def test_exactly_the_budget_with_a_cosine_that_ends_with_it():
    _, progress, rates = run(Budget(images=210))
    assert progress.images == 210
    assert len(rates) == 7
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * 32 * step / 210)) for step in range(7)]
    assert rates == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert rates[-1] < 1e-5 * 2


def test_warm_up_rises_first():
    _, _, rates = run(Budget(images=320), warmup=0.5)
    assert rates[0] == 0
    assert rates.index(max(rates)) == 5
    assert rates[5] == pytest.approx(1e-3)
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_seconds_end_it_too_and_the_cosine_follows():
    _, progress, rates = run(Budget(images=10**6, seconds=0.3))
    assert progress.images < 10**6
    assert progress.seconds >= 0.3
    assert rates[-1] < rates[0]
    assert rates == sorted(rates, reverse=True)


def test_a_budget_needs_a_bound():
    with pytest.raises(UserError, match="neither images nor seconds"):
        run(Budget())


def test_no_images_means_no_training():
    model, progress, rates = run(Budget(images=0))
    assert (progress.images, rates) == (0, [])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), build_model(SMALL).parameters(), strict=True))


def test_training_lowers_the_loss():
    losses = []
    for budget in (0, 400):
        model = build_model(ModelConfig("vit_digits_patch1_8", pretrained=True))
        train = open_data(DATA, model)[0]
        apply_schedule(model, Schedule((Stage(0, keep=0.3),)))
        settings = FinetuneConfig(learning_rate=5e-4, batch_size=32)
        finetune(model, train, Budget(images=budget), settings, None, CPU, 0, Progress())
        images, labels = next(train.batches([torch.arange(100)], CPU))
        with torch.no_grad():
            losses.append(F.cross_entropy(model(images), labels).item())
    assert losses[1] < losses[0] / 2


def test_continuing_keeps_moments_and_counts(tmp_path: Path):
    model, progress, _ = run(Budget(images=64))
    save_checkpoint(str(tmp_path / "c"), model, progress)
    again = build_model(SMALL)
    loaded = load_checkpoint(str(tmp_path / "c"), again)
    assert loaded.images == 64
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    _, finished, rates = run(Budget(images=160), loaded, again)
    assert finished.images == 160
    assert len(rates) == 3
    assert rates[0] == pytest.approx(1e-3)  # a new cosine over the rest
    steps = {int(moments["step"]) for moments in finished.moments.values()}
    assert steps == {5}  # 2 of the first budget, 3 of the second


def test_a_missing_checkpoint_is_said():
    with pytest.raises(UserError, match=r"no file '/nowhere/c\.safetensors'"):
        load_checkpoint("/nowhere/c", build_model(SMALL))


def test_flips_mirror_some_images_and_tell_the_teacher():
    train = open_data(DATA, build_model(SMALL))[0]
    seen = []

    def teacher(images, indices, mirrored):
        straight, _ = next(train.batches([indices], CPU))
        expected = torch.where(mirrored[:, None, None, None], straight.flip(-1), straight)
        assert torch.equal(images, expected)
        seen.append(mirrored)
        return DenseOutput(torch.zeros(len(images), 10))

    for augment in ("none", "flip"):
        settings = FinetuneConfig(batch_size=50, augment=augment)
        finetune(build_model(SMALL), train, Budget(images=100), settings, teacher, CPU, 0, Progress())
    assert not torch.cat(seen[:2]).any()
    assert 0.3 < torch.cat(seen[2:]).double().mean() < 0.7


def test_loss_mixes_labels_and_the_dense_model():
    logits, dense, labels = torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)
    hard = F.cross_entropy(logits, labels)
    both = FinetuneConfig(distill_weight=0.25, temperature=2.0)
    p, q = (dense / 2).softmax(1), (logits / 2).softmax(1)
    soft = 4 * (p * (p / q).log()).sum(dim=1).mean()
    assert distillation_loss(logits, labels, None, both) == hard
    assert distillation_loss(logits, labels, dense, both).item() == pytest.approx(
        (0.75 * hard + 0.25 * soft).item(), rel=1e-5
    )
    assert distillation_loss(logits, labels, logits, FinetuneConfig(distill_weight=1.0)).item() == pytest.approx(
        0, abs=1e-6
    )


def test_a_loss_that_is_not_finite_stops_training():
    model = build_model(SMALL)
    with torch.no_grad():
        model.head.bias.fill_(math.nan)
    with pytest.raises(LossNotFinite, match="nan after 0 images"):
        run(Budget(images=64), model=model)
