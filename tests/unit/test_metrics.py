"""Metrics: sensible values on the digits model, checked by hand where possible."""

from __future__ import annotations

import pytest
import torch
from fake_profiles import fake_profile
from torch import nn

from prunesearch.config import DataConfig, MeasureConfig, ModelConfig, Target
from prunesearch.errors import DataError, UnknownNameError
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.images import ImageInput
from prunesearch.evaluate.measures import Subject, agreement, loss, top1, top5
from prunesearch.evaluate.metrics import METRICS, Measured
from prunesearch.evaluate.predict import Predictions
from prunesearch.evaluate.shapes import model_shape
from prunesearch.evaluate.speed import peak_memory, time_batches
from prunesearch.models import apply_schedule
from prunesearch.schedule import Schedule, Stage

CPU = torch.device("cpu")
DIGITS = ModelConfig("vit_digits_patch1_8", pretrained=True)
PRUNED = Schedule((Stage(1, keep=0.3),))
TARGET = Target(DIGITS, fake_profile(model_shape(DIGITS)))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def subject(model: nn.Module, schedule: Schedule = PRUNED) -> Subject:
    train, validation = open_data(DataConfig(train_images=10, val_images=60), build_model(DIGITS))
    settings = MeasureConfig(speed_batch_size=4, speed_seconds=0.0)
    return Subject(model, TARGET, schedule, validation, settings, CPU, True, lambda: DENSE[:60], DIGITS, train)


def given(logits: torch.Tensor, labels: list[int]) -> Subject:
    made = subject(nn.Identity())
    made.outputs = Predictions(logits, torch.tensor(labels), ())
    return made


DENSE = torch.eye(6)[[0, 1, 2, 3]]


def test_accuracies_by_hand():
    logits = torch.eye(6)[[0, 1, 5, 5]] * 10
    one = given(logits, [0, 1, 2, 3])
    one.dense_logits = lambda: DENSE
    assert top1(one) == 50
    assert agreement(one) == 50
    assert top5(given(torch.arange(6.0).repeat(2, 1), [0, 1])) == 50
    assert loss(given(torch.zeros(3, 6), [0, 1, 2])) == pytest.approx(1.791759, abs=1e-5)


def test_top5_needs_more_than_five_classes():
    with pytest.raises(DataError, match="5 classes"):
        top5(given(torch.zeros(1, 5), [0]))


@pytest.mark.parametrize("name", [name for name, one in METRICS.items() if one.of_output != ("patches",)])
def test_every_metric_on_the_shipped_model(name: str):
    metric = METRICS[name]
    schedule = Schedule((Stage(1, keep=0.3, until="end"),)) if metric.needs_places else PRUNED
    dense, pruned = subject(build_model(DIGITS), Schedule()), subject(apply_schedule(build_model(DIGITS), schedule))
    for one in (dense, pruned):
        one.dense_logits = lambda: dense.outputs.logits
    values = [metric.measure(one) for one in (dense, pruned)]
    numbers = [value.value if isinstance(value, Measured) else value for value in values]
    assert numbers == [0, 0] if name == "target_miss" else all(number > 0 for number in numbers)
    if isinstance(values[0], Measured):
        assert values[0].spread >= 0
    if name in ("gmacs", "agreement"):
        assert numbers[1] < numbers[0]
    if metric.computed:
        assert numbers[1] == metric.of(TARGET, PRUNED)


def test_unknown_metric_is_named():
    with pytest.raises(UnknownNameError, match='Did you mean "top1"'):
        METRICS["top_1"]


class TwoBuffers(nn.Module):
    """Holds at most 3 tensors like its input on top of it: `a`, `b`, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):  # buffers of an earlier round are freed
            a = x + 1
            b = x.view(-1).view(x.shape) + 1
            x = a + b
            del a, b
        return x


def test_peak_memory_counts_what_is_alive_at_once():
    one = 2 * 3 * 10 * 10 * 4
    # the weights, the input, and in the second round: a, b, their sum and the sum before
    assert peak_memory(TwoBuffers(), torch.randn(2, 3, 10, 10), amp=False) == 4000 + one + 4 * one


def test_timing_is_ordered_and_leaves_evaluation_mode():
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            assert torch.is_inference_mode_enabled()
            return x

    timing = time_batches(Model(), [torch.randn(2, 3, 4, 4)], 0.0, amp=False)
    assert 0 < timing.low <= timing.median <= timing.high


def test_normalise_is_mean_and_std():
    wanted = ImageInput((1, 1, 2), (0.5,), (0.25,), 1.0, "center", "bicubic")
    pixels = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    assert wanted.normalise(pixels).flatten().tolist() == [-2.0, 2.0]
