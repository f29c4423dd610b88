"""Device profiles: curves, the latency of a schedule as a sum of parts, files, and what they say in words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_profiles import fake_profile

from prunesearch.cost import MACS, doubts, estimate_cost, total_cost
from prunesearch.errors import DeviceError, FileError
from prunesearch.files import load_profiles, save_profiles
from prunesearch.profile import Curve, StageTime
from prunesearch.report.plot_profile import plot_profile
from prunesearch.report.profile_words import floor_ms, profile_lines
from prunesearch.schedule import Schedule, Stage
from prunesearch.shape import ModelShape

SHAPE = ModelShape(
    depth=4, dim=32, heads=4, attention_dim=32, patch_tokens=40, prefix_tokens=1, class_tokens=1, mlp_macs=4096,
    stem_macs=1000, head_macs=320,
)  # fmt: skip
PROFILE = fake_profile(SHAPE)


def test_a_curve_is_linear_between_its_points_and_flat_beyond_them() -> None:
    curve = Curve((10, 20, 40), (1.0, 3.0, 4.0), (0.0, 0.0, 0.0))
    values = {0: 1.0, 10: 1.0, 15: 2.0, 20: 3.0, 30: 3.5, 40: 4.0, 60: 4.0}
    for tokens, expected in values.items():
        assert curve.at(tokens) == pytest.approx(expected)
    many = curve.at(torch.tensor(list(values), dtype=torch.float64))
    assert many.tolist() == pytest.approx(list(values.values()))
    assert Curve((7,), (2.0,), (0.0,)).at(3) == 2.0


def test_gradients_pass_through_a_curve() -> None:
    curve = Curve((10, 20, 40), (1.0, 3.0, 4.0), (0.0, 0.0, 0.0))
    tokens = torch.tensor([15.0, 30.0], requires_grad=True)
    curve.at(tokens).sum().backward()
    assert tokens.grad is not None and tokens.grad.tolist() == pytest.approx([0.2, 0.05])


def test_the_latency_of_a_schedule_is_the_sum_of_its_parts() -> None:
    """40 patches and a class token; block 1 (mid) drops to 20, block 2 (pre) merges to 15."""
    schedule = Schedule((Stage(1, tokens=20), Stage(2, at="pre", tokens=15, reduce="merge")))
    attention = 0.02 * 41 + 0.02 * 41 + 0.03 * 16 + 0.03 * 16  # merged tokens have sizes from block 2 on
    mlp = 1.0 + 1.0 + 0.5 + 0.5  # 41, 21, 16, 16: the stair is at 20 tokens
    drop = 0.05 + 0.001 * 40 + 0.002 * 20 + 0.0001 * 40 * 20 + (0.05 + 0.0005 * 41)  # the score reads 41 tokens
    merge = 0.1 + 0.001 * 20 + 0.002 * 15 + 0.0001 * 20 * 15
    assert total_cost(SHAPE, schedule, PROFILE) == pytest.approx(2.0 + attention + mlp + drop + merge + 0.3)
    assert total_cost(SHAPE, Schedule(), PROFILE) == pytest.approx(PROFILE.dense_ms)


def test_tokens_that_come_back_take_their_time() -> None:
    """40 patches and a class token; 25 of them skip block 2, or block 3, before which they are back."""
    gone = Stage(1, tokens=15)
    for until in (2, 3, "next", "end"):
        back = replace(gone, until=until)
        inside = {2: 0, 3: 1, "next": 2, "end": 2}[until]
        blocks = 0.5 + inside * (0.02 * 16 + 0.5) + (2 - inside) * (0.02 * 41 + 1.0)
        dense = 2.0 + 2 * 0.02 * 41 + 1.0 + 0.3
        drop = 0.05 + 0.001 * 40 + 0.002 * 15 + 0.0001 * 40 * 15 + (0.05 + 0.0005 * 41)
        returning = 0.01 + 0.002 * 40 + 0.003 * 25
        assert total_cost(SHAPE, Schedule((back,)), PROFILE) == pytest.approx(dense + blocks + drop + returning)
    with pytest.raises(
        DeviceError, match=r"'drop' was not measured with until\. Possible with until: none\. Profile again"
    ):
        total_cost(SHAPE, Schedule((replace(gone, until=2),)), replace(PROFILE, returning=()))


def test_a_running_mean_reads_every_block_since() -> None:
    mean = Stage(1, keep=1 / 2, options={"momentum": 0.5})
    schedules = [Schedule((mean, replace(mean, block=3, options=options))) for options in ({}, {"momentum": 0.5})]
    one, both = (total_cost(SHAPE, schedule, PROFILE) for schedule in schedules)
    assert both - one == pytest.approx(0.05 + 0.0005 * 21)  # the score of block 2, which has no stage


def test_merging_without_sizes_in_attention_costs_the_plain_attention() -> None:
    plain = Stage(1, tokens=30, reduce="merge", options=(("proportional_attention", False),))
    sized = replace(plain, options=())
    after = 0.02 * 31 * 2  # blocks 2 and 3
    difference = total_cost(SHAPE, Schedule((sized,)), PROFILE) - total_cost(SHAPE, Schedule((plain,)), PROFILE)
    assert difference == pytest.approx(0.5 * after)


def test_a_stage_that_removes_nothing_costs_nothing() -> None:
    assert total_cost(SHAPE, Schedule((Stage(1, keep=1.0),)), PROFILE) == pytest.approx(PROFILE.dense_ms)


def test_macs_are_the_same_by_both_ways() -> None:
    schedule = Schedule((Stage(1, keep=0.5), Stage(2, keep=0.7, reduce="squeeze")))
    assert total_cost(SHAPE, schedule) == estimate_cost(SHAPE, schedule).gmacs == total_cost(SHAPE, schedule, MACS)


@pytest.mark.parametrize(
    ("stage", "named"),
    [
        (Stage(1, keep=0.5, reduce="pool", score="none"), "verb 'pool'"),
        (Stage(1, keep=0.5, score="predictor"), "score"),
    ],
)
def test_a_stage_that_was_not_measured_is_named(stage: Stage, named: str) -> None:
    with pytest.raises(DeviceError, match=f"{named}.*was not measured.*Possible: .*Profile again"):
        total_cost(SHAPE, Schedule((stage,)), PROFILE)


# --- the file ----------------------------------------------------------------------------------------------------


def test_profiles_survive_their_file(tmp_path: Path) -> None:
    both = (PROFILE, replace(PROFILE, batch=16, attention=None, sized_attention=None, last=None))
    save_profiles(both, tmp_path / "p.json")
    assert load_profiles(tmp_path / "p.json") == both


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content.update(profiles=[]), "it has no profile"),
        (lambda content: content["profiles"][0]["mlp"].update(tokens=[1, 2]), "not of one length"),
        (lambda content: content["profiles"][0]["mlp"].update(tokens=[4, 3, 2, 1]), "do not ascend"),
        (lambda content: content["profiles"][0]["mlp"].update(ms=[1, 1, 1, -1]), "ms and error from 0"),
        (lambda content: content["profiles"][0]["mlp"].update(ms=[1, 1, 1, 1e308]), "ms and error from 0"),
        (lambda content: content["profiles"][0]["mlp"].update(error=[0, 0, 0, math.nan]), "ms and error from 0"),
        (lambda content: content["profiles"][0]["mlp"].update(tokens=[-4, 3, 7, 9]), "tokens from 1"),
        (lambda content: content["profiles"][0]["mlp"].update(tokens=[1, 3, 7, 10**400]), "tokens from 1"),
        (
            lambda content: content["profiles"][0]["mlp"].update(
                tokens=list(range(1, 5000)), ms=[1.0] * 4999, error=[0.0] * 4999
            ),
            "1 to 1000",
        ),
        (lambda content: content["profiles"][0].update(dense_ms=0.0), "dense_ms"),
        (lambda content: content["profiles"][0].update(fixed=-1.0), "fixed or dense_ms"),
        (lambda content: content["profiles"][0].update(fixed=math.nan), "fixed or dense_ms"),
        (lambda content: content["profiles"][0]["verbs"][0].update(per_before=-0.1), "fuse: a time is not within"),
        (lambda content: content["profiles"][0]["verbs"].append(content["profiles"][0]["verbs"][0]), "there twice"),
        (lambda content: content["profiles"][0].update(check=[math.nan]), "check has something else"),
        (lambda content: content["profiles"][0].update(batch=10**30), "batch is not within"),
        (lambda content: content["profiles"][0].update(threads=-7), "threads not within"),
        (lambda content: content["profiles"][0].update(device="x" * 1000), "longer than 200 letters"),
        (lambda content: content["profiles"][0].update(batch="many"), "batch"),
        (lambda content: content["profiles"][0].update(speed=1), "speed"),
        (lambda content: content.update(version=2), "version"),
    ],
)
def test_a_damaged_profile_is_refused(change: object, problem: str, tmp_path: Path) -> None:
    save_profiles([PROFILE], tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    change(content)  # type: ignore[operator]
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(FileError, match=problem):
        load_profiles(tmp_path / "p.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_what_is_no_profile_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(FileError, match=r"p\.json"):
        load_profiles(tmp_path / "p.json")


# --- in words ----------------------------------------------------------------------------------------------------


def test_the_words_say_what_can_be_gained() -> None:
    lines = profile_lines(PROFILE)
    assert lines[0] == "some_vit on none, 2 threads, torch, float32"
    assert lines[1].startswith("batch 1: 4.38 ms of 9.58 ms do not depend on tokens")
    floor = 2.0 + 4 * (0.02 + 0.5) + 0.3
    assert floor_ms(PROFILE) == pytest.approx(floor)
    assert f"more than {PROFILE.dense_ms / floor:.1f} x as fast" in lines[1]
    half = total_cost(SHAPE, Schedule((Stage(1, keep=0.5, score="class_attention", reduce="squeeze"),)), PROFILE)
    assert f"; half the tokens from block 1 on (squeeze) give {PROFILE.dense_ms / half:.2f} x" in lines[1]
    assert lines[-1].startswith("How sure: 2 schedules that were measured whole are within 2%")


def test_no_schedule_is_predicted_below_what_is_said_to_be_the_least() -> None:
    """The MLP of a noisy profile is slower at few tokens than at half of them."""
    noisy = replace(PROFILE, mlp=Curve((1, 20, 21, 41), (2.0, 2.0, 0.2, 1.0), (0.0,) * 4))
    found = total_cost(SHAPE, Schedule((Stage(0, tokens=20),)), noisy)
    assert floor_ms(noisy) == pytest.approx(2.0 + 4 * (0.02 + 0.2) + 0.3)
    assert floor_ms(noisy) < found < 2.0 + 4 * (0.02 + 2.0) + 0.3


def test_verbs_that_cost_more_than_they_save_are_named() -> None:
    dear = replace(PROFILE, verbs=(StageTime("drop", 0.01), StageTime("merge", 5.0)))
    assert any("costs as much as it saves, or more: " in line and "merge" in line for line in profile_lines(dear))
    free = replace(PROFILE, verbs=(StageTime("merge", 0.0),), sized_attention=PROFILE.attention)
    assert any(line.startswith("A stage in every block that keeps 92%: merge 1.") for line in profile_lines(free))


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    plot_profile([PROFILE, replace(PROFILE, batch=16, attention=None, sized_attention=None)], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def rough(curve: Curve | None) -> Curve:
    assert curve is not None
    return replace(curve, error=(0.3,) * len(curve.error))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {name: rough(getattr(PROFILE, name)) for name in ("attention", "sized_attention", "mlp", "last")},
            "parts were measured within 30% (median)",
        ),
        ({"check": (0.02, -0.4)}, "whole schedules are within 40% of their parts"),
        ({"dense_ms": 2 * PROFILE.dense_ms}, "the dense model is within 50% of its parts"),
    ],
)
def test_a_profile_that_is_noise_says_so(change: dict[str, object], said: str) -> None:
    assert doubts(PROFILE) == []
    (found,) = doubts(replace(PROFILE, **change))
    assert found.startswith(f"Not sure: {said}. ") and "--seconds" in found
