"""Stage, Schedule, resolve, canonical: counts, order, and what is refused."""

from __future__ import annotations

import pickle
from decimal import Decimal
from fractions import Fraction
from math import ceil

import pytest

from prunesearch.errors import PruneSearchError, ScheduleError
from prunesearch.schedule import Schedule, Stage, canonical, options_of, refuse_everywhere, resolve
from prunesearch.shape import ModelShape


def shape(patch_tokens: int = 196, depth: int = 12, class_tokens: int = 1) -> ModelShape:
    return ModelShape(
        depth=depth, dim=384, heads=6, attention_dim=384, patch_tokens=patch_tokens, prefix_tokens=class_tokens,
        class_tokens=class_tokens, mlp_macs=1, stem_macs=1, head_macs=1,
    )  # fmt: skip


def kept(stage: Stage, patch_tokens: int) -> int:
    (step,) = resolve(Schedule((stage,)), shape(patch_tokens))
    return step.kept


def test_fractions_round_up_exactly() -> None:
    """Every two-digit fraction of every count below 300, against rational arithmetic."""
    assert kept(Stage(1, keep=0.28), 25) == 7  # in binary floats ceil(0.28 * 25) is 8
    assert ceil(0.28 * 25) == 8
    for hundredths in range(1, 101):
        for present in range(1, 300):
            expected = -(-hundredths * present // 100)
            assert kept(Stage(1, keep=hundredths / 100), present) == expected
    assert Fraction(Decimal("0.28")) * 25 == 7


def test_counts_follow_one_another() -> None:
    schedule = Schedule(tuple(Stage(block, keep=0.7, reduce="fuse") for block in (3, 6, 9)))
    steps = resolve(schedule, shape())
    assert [(step.before, step.kept, step.after) for step in steps] == [(196, 138, 139), (139, 98, 99), (99, 70, 71)]


def test_a_stage_that_removes_nothing_is_legal_and_idle() -> None:
    for stage in (Stage(1, keep=1.0), Stage(1, tokens=196), Stage(1, keep=0.999, reduce="fuse")):
        (step,) = resolve(Schedule((stage,)), shape())
        assert step.is_idle and step.after == step.before == 196


def test_stages_run_by_block_then_pre_then_as_given() -> None:
    a, b, c, d = Stage(5, keep=0.5), Stage(2, keep=0.5), Stage(5, at="pre", keep=0.9), Stage(5, keep=0.8)
    assert Schedule((a, b, c, d)).stages == (b, c, a, d)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(block=-1, keep=0.5), "whole number"),
        (dict(block=1.5, keep=0.5), "whole number"),
        (dict(block=1, keep=0.0), "above 0, up to 1"),
        (dict(block=1, keep=1.01), "above 0, up to 1"),
        (dict(block=1, keep=True), "above 0, up to 1"),
        (dict(block=1, tokens=0), "from 1"),
        (dict(block=1, tokens=3.0), "from 1"),
        (dict(block=1), "none of keep, tokens, threshold given"),
        (dict(block=1, keep=0.5, tokens=3), "keep and tokens given; write exactly one"),
        (dict(block=1, keep=0.5, at="post"), "pre, mid"),
    ],
)
def test_impossible_stages_are_refused_at_once(fields: dict, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        Stage(**fields)


@pytest.mark.parametrize(
    ("stage", "model", "says"),
    [
        (Stage(12, keep=0.5), shape(), "blocks 0 to 11"),
        (Stage(1, tokens=197), shape(), "only 196 patch tokens"),
        (Stage(1, keep=0.5, score="clas_attention"), shape(), 'Did you mean "class_attention"'),
        (Stage(1, keep=0.5, reduce="squeze"), shape(), 'Did you mean "squeeze"'),
        (Stage(1, keep=0.5), shape(class_tokens=0), "no class token. Possible: .*key_norm"),
        (Stage(1, keep=0.5, score="none"), shape(), "needs a score"),
        (Stage(1, keep=0.5, score="random", reduce="merge"), shape(), "does not rank"),
        (Stage(1, keep=0.4, reduce="merge"), shape(), "fewest it can keep is 98"),
        (Stage(0, at="pre", keep=0.5), shape(), "block 0 has none"),
        (Stage(0, at="pre", keep=0.5, reduce="merge"), shape(), "block 0 has none"),
        (Stage(1, keep=0.5, options={"temprature": 2}), shape(), "Known: momentum"),
        (Stage(1, keep=0.5, reduce="squeeze", options={"temprature": 2}), shape(), 'Did you mean "temperature"'),
        (Stage(1, keep=0.5, reduce="squeeze", options={"temperature": "hot"}), shape(), "of type float"),
    ],
)
def test_stages_that_do_not_fit_are_refused_with_a_remedy(stage: Stage, model: ModelShape, says: str) -> None:
    with pytest.raises(ScheduleError, match=says) as caught:
        resolve(Schedule((stage,)), model)
    assert f"block {stage.block}" in str(caught.value)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ScheduleError) as caught:
        resolve(Schedule((Stage(1, keep=0.5, score="x"), Stage(2, tokens=999), Stage(30, keep=0.5))), shape())
    assert len(caught.value.problems) == 3


def test_two_learned_scores_in_one_block_are_refused() -> None:
    learned = Stage(3, at="pre", score="predictor", keep=0.7), Stage(3, score="predictor", keep=0.7)
    with pytest.raises(ScheduleError, match="second learned score of block 3"):
        resolve(Schedule(learned), shape())
    resolve(Schedule((learned[0], Stage(3, keep=0.7), Stage(4, score="predictor", keep=0.7))), shape())


def test_canonical_joins_spellings_of_the_same_schedule() -> None:
    spellings = [
        Schedule((Stage(3, keep=0.7), Stage(6, keep=1.0))),
        Schedule((Stage(3, keep=0.701),)),
        Schedule((Stage(3, tokens=138),)),
        Schedule((Stage(2, keep=0.9999), Stage(3, tokens=138))),
    ]
    assert len({canonical(schedule, shape()) for schedule in spellings}) == 1
    squeezed = [
        Schedule((Stage(3, keep=0.7, reduce="squeeze", options=options),)) for options in ({}, {"temperature": 1.0})
    ]
    assert len({canonical(schedule, shape()) for schedule in squeezed}) == 1
    assert canonical(Schedule((Stage(3, keep=0.7, reduce="squeeze", options={"temperature": 2.0}),)), shape()) not in {
        canonical(schedule, shape()) for schedule in squeezed
    }
    assert canonical(Schedule((Stage(3, keep=1.0),)), shape()) == Schedule()


def test_schedules_hash_and_pickle_and_read_well() -> None:
    schedule = Schedule((Stage(3, keep=0.7, reduce="squeeze", options={"temperature": 2.0}),))
    assert pickle.loads(pickle.dumps(schedule)) == schedule and hash(schedule) == hash(Schedule(schedule.stages))
    assert str(schedule) == "block 3 mid: squeeze to keep 0.7 by class_attention with temperature 2.0"
    usual = Schedule((Stage(3, keep=0.7, reduce="squeeze", options={"temperature": 1.0}),))
    assert str(usual) == "block 3 mid: squeeze to keep 0.7 by class_attention"
    assert str(Schedule()) == "dense"
    back = Schedule((Stage(3, keep=0.7, until=5), Stage(5, keep=0.5, reduce="fuse", until="end")))
    assert str(back) == (
        "block 3 mid: drop to keep 0.7 by class_attention until block 5; "
        "block 5 mid: fuse to keep 0.5 by class_attention until the end"
    )
    assert options_of(back.stages[1]) == {"normalised": False, "returns": "residual"}
    assert options_of(schedule.stages[0]) == {"temperature": 2.0, "position": "host"}


def test_what_fits_no_model_is_refused_without_one() -> None:
    for fine in (
        Schedule((Stage(30, tokens=900), Stage(31, keep=0.5, until=40))),
        Schedule(tuple(Stage(block, at="pre", score="predictor", keep=0.5, reduce="hold") for block in (2, 4))),
        Schedule(),
    ):
        refuse_everywhere(fine)
    held = Stage(2, at="pre", keep=0.5, reduce="hold")
    with pytest.raises(ScheduleError, match=r"block 4 \(pre\): it reads the attention of block 3"):
        refuse_everywhere(Schedule((held, Stage(4, at="pre", keep=0.5))))
    with pytest.raises(ScheduleError, match="at pre reads the attention of the block before"):
        refuse_everywhere(Schedule((Stage(0, at="pre", keep=0.5),)))


def test_errors_pickle_with_their_problems() -> None:
    error = pickle.loads(pickle.dumps(ScheduleError("schedule", ["one", "two"])))
    assert isinstance(error, PruneSearchError) and error.problems == ("one", "two")
    assert str(error) == "schedule: 2 mistakes\n  - one\n  - two"
