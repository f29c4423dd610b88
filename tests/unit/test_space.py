"""The search space: parameters to schedules and back, uids, and every possible mistake."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from fake_search import SHAPE, SPACE

from prunesearch.config import TARGETS, BlockSpace, Range, SpaceConfig, ThresholdRange
from prunesearch.errors import ScheduleError
from prunesearch.schedule import Schedule, Stage
from prunesearch.space.choices import (
    Choice,
    Interval,
    anything,
    combination,
    combinations,
    dimensions,
    parameters_of,
    schedule_from,
    uid_of,
)
from prunesearch.space.problems import space_problems

SPACES = {
    "plain": SPACE,
    "uneven": replace(SPACE, keep=(0.5, 0.55, 1.0)),
    "range": replace(SPACE, keep=Range(0.3, 1.0)),
    "steps": replace(SPACE, keep=Range(0.3, 1.0, 0.1), at=("mid", "pre"), reduce=("drop", "merge")),
    "same": replace(SPACE, same=("keep", "at", "score", "reduce"), at=("pre", "mid")),
    "few": replace(SPACE, max_stages=2),
    "own": replace(SPACE, blocks=(1, BlockSpace(2, keep=(0.7,), reduce=("drop",)), BlockSpace(4, reduce=("merge",)))),
    "merge": replace(SPACE, reduce=("merge",), score=("class_attention",)),
    "adaptive": replace(
        SPACE,
        reduce=("drop",),
        amount=("threshold", "none"),
        threshold=ThresholdRange(1e-3, 0.05, log=True),
        target_gmacs=ThresholdRange(0.004, 0.01),
    ),
    "adaptive in ms": replace(
        SPACE,
        reduce=("drop", "merge"),
        amount=("threshold", "none"),
        threshold=(0.01, 0.02),
        merge_threshold=(0.8, 0.9),
        target_predicted_latency_ms=(4.0, 6.0, 7.5),
    ),
    "shared amount": replace(
        SPACE,
        reduce=("drop", "pool", "squeeze"),
        score=("class_attention", "predictor"),
        amount=("threshold", "none", "keep"),
        threshold=(0.01, 0.02, 0.05),
        same=("amount", "threshold", "reduce"),
    ),
    "back": replace(SPACE, reduce=("drop", "squeeze", "hold"), until=("never", "next", "end"), at=("mid", "pre")),
    "back alike": replace(SPACE, reduce=("drop", "pool"), until=("next", "end"), same=("until",)),
    "counts": replace(SPACE, reduce=("pool", "fuse"), tokens=(4, 8, 16)),
    "everything": SpaceConfig(
        blocks=(1, BlockSpace(2, amount=("threshold",), reduce=("merge", "drop"), score=("key_norm",)), 3, 4, 5, 6),
        keep=(0.3, 0.5, 0.7, 1.0),
        at=("mid", "pre"),
        score=("class_attention", "predictor", "attention_received"),
        reduce=("drop", "fuse", "squeeze", "merge", "absorb", "pool"),
        amount=("keep", "threshold", "none"),
        threshold=ThresholdRange(1e-3, 0.05, log=True),
        merge_threshold=(0.7, 0.8, 0.9, 0.97),
        tokens=(4, 8, 16),
        target_gmacs=(0.005, 0.007, 0.01),
        max_stages=4,
    ),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_candidates_lie_in_the_space_and_come_back_from_their_schedule(space: SpaceConfig) -> None:
    assert space_problems(space, SHAPE) == []
    drawn = set()
    for seed in range(200):
        try:
            schedule = schedule_from(anything(dimensions(space), random.Random(seed)), space, SHAPE)
        except ScheduleError:
            refusable = {"merge", "drop_or_merge", "pool"} & set(space.reduce) or space.until != ("never",)
            assert space.max_stages is not None or refusable
            continue
        parameters = parameters_of(schedule, space)
        assert parameters is not None and set(parameters) == set(dimensions(space))
        assert schedule_from(parameters, space, SHAPE) == schedule
        drawn.add(schedule)
    assert len(drawn) > 3


def test_a_value_is_exactly_what_was_written() -> None:
    space = SpaceConfig(blocks=(2,), keep=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
    assert dimensions(space) == {"block2.keep": Interval(0.3, 1.0, 0.1)}
    assert schedule_from({"block2.keep": 0.3 + 4 * 0.1}, space, SHAPE).stages[0].keep == 0.7  # the sum is 0.7000...01
    assert schedule_from({"block2.keep": 0.9999999999999999}, space, SHAPE) == Schedule()


def test_dimensions_know_order_sharing_and_single_values() -> None:
    space = SpaceConfig(
        blocks=(1, BlockSpace(3, keep=(0.5, 0.9, 1.0), score=("key_norm",))),
        keep=Range(0.5, 1.0),
        score=("class_attention", "key_norm"),
        reduce=("drop", "merge"),
        same=("reduce",),
    )
    assert dimensions(space) == {
        "block1.keep": Interval(0.5, 1.0, None),
        "block1.score": Choice(("class_attention", "key_norm")),
        "reduce": Choice(("drop", "merge")),
        "block3.keep": Choice((0.5, 0.9, 1.0)),
    }
    assert dimensions(replace(SPACE, reduce=("merge",))).keys() == {f"block{block}.keep" for block in range(1, 6)}


def test_parameters_without_effect_are_at_their_first_choice() -> None:
    parameters = {"block1.keep": 1.0, "block1.score": "key_norm", "block1.reduce": "fuse", "block2.keep": 0.5}
    parameters |= {"block2.reduce": "merge", "block2.score": "key_norm"}
    parameters |= {f"block{block}.keep": 1.0 for block in (3, 4, 5)}
    schedule = schedule_from(parameters, SPACE, SHAPE)
    assert schedule == Schedule((Stage(2, keep=0.5, reduce="merge"),))
    canonical = parameters_of(schedule, SPACE)
    assert canonical is not None
    assert {name: canonical[name] for name in parameters} == {
        **parameters,
        "block1.score": "class_attention",
        "block1.reduce": "drop",
        "block2.score": "class_attention",
    }


@pytest.mark.parametrize("field", TARGETS)
def test_a_stage_that_goes_takes_its_threshold_and_the_target_along(field: str) -> None:
    space = replace(SPACES["adaptive"], **{**dict.fromkeys(TARGETS), field: ThresholdRange(0.004, 0.01)})
    none: dict[str, Any] = {f"block{block}.amount": "none" for block in range(1, 6)}
    assert schedule_from({**none, "block2.threshold": 0.02, field: 0.009}, space, SHAPE) == Schedule()
    one = schedule_from({**none, "block2.amount": "threshold", "block2.threshold": 0.02}, space, SHAPE)
    assert one == Schedule((Stage(2, threshold=0.02),), **{field: 0.004})
    parameters = parameters_of(one, space)
    assert parameters is not None and parameters["block3.threshold"] == 0.001  # the first choice


def test_a_learned_score_and_pool_take_the_count_beside_a_threshold() -> None:
    space = replace(SPACES["everything"], blocks=(2,))
    values: dict[str, Any] = {"block2.amount": "threshold", "block2.keep": 0.5, "block2.at": "pre"}
    (learned,) = schedule_from({**values, "block2.score": "predictor"}, space, SHAPE).stages
    assert learned == Stage(2, at="pre", score="predictor", keep=0.5)
    (pooled,) = schedule_from({**values, "block2.reduce": "pool", "block2.tokens": 8.0}, space, SHAPE).stages
    assert pooled == Stage(2, at="pre", reduce="pool", tokens=8)
    with pytest.raises(ScheduleError, match="all stages have a threshold, but pool"):
        schedule_from({"amount": "threshold", "block2.reduce": "pool"}, replace(space, same=("amount",)), SHAPE)


@pytest.mark.parametrize("low", [1e-3, 0.0021, 0.0049, 0.03])
def test_a_logarithmic_range_ends_where_it_was_written(low: float) -> None:
    space = replace(SPACES["adaptive"], threshold=ThresholdRange(low, 0.05, log=True), blocks=(2,), target_gmacs=None)
    ends = [math.exp(math.log(end)) * factor for end in (low, 0.05) for factor in (1 - 1e-15, 1 + 1e-15)]
    for end in ends:
        schedule = schedule_from({"block2.amount": "threshold", "block2.threshold": end}, space, SHAPE)
        assert parameters_of(schedule, space) is not None


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule((Stage(2, keep=0.55),)),
        Schedule((Stage(7, keep=0.5),)),
        Schedule((Stage(2, tokens=32),)),
        Schedule((Stage(2, keep=0.5, reduce="squeeze"),)),
        Schedule((Stage(2, keep=0.5, score="random"),)),
        Schedule((Stage(2, keep=0.5, at="pre"),)),
        Schedule((Stage(2, keep=0.5), Stage(2, keep=0.5))),
        Schedule((Stage(2, keep=0.5, until="end"),)),
        Schedule((Stage(2, keep=0.5, reduce="merge", options={"proportional_attention": False}),)),
    ],
    ids=str,
)
def test_schedules_outside_the_space_have_no_parameters(schedule: Schedule) -> None:
    assert parameters_of(schedule, SPACE) is None


def test_sharing_and_max_stages_bound_the_space() -> None:
    two = Schedule((Stage(1, keep=0.5), Stage(2, keep=0.7)))
    assert parameters_of(two, SPACE) is not None
    assert parameters_of(two, replace(SPACE, same=("keep",))) is None
    assert parameters_of(two, replace(SPACE, max_stages=1)) is None
    all_blocks = {f"block{block}.keep": 0.5 for block in SPACE.blocks}
    with pytest.raises(ScheduleError, match="5 stages; possible: at most 4"):
        schedule_from(all_blocks, replace(SPACE, max_stages=4), SHAPE)


def test_the_dense_model_is_outside_where_every_block_must_have_a_stage() -> None:
    assert parameters_of(Schedule(), SPACE) is not None
    assert parameters_of(Schedule(), replace(SPACE, keep=(0.5, 0.7))) is None


def test_uid_is_the_identity_of_what_is_done_to_the_model() -> None:
    plain = uid_of(Schedule((Stage(2, keep=0.5),)), SHAPE)
    assert plain == uid_of(Schedule((Stage(2, tokens=32), Stage(4, keep=1.0))), SHAPE)
    others = [Stage(2, keep=0.52), Stage(3, keep=0.5), Stage(2, keep=0.5, at="pre"), Stage(2, keep=0.5, reduce="fuse")]
    assert len({plain, *(uid_of(Schedule((stage,)), SHAPE) for stage in others)}) == 5
    assert len(plain) == 12 and int(plain, 16) >= 0
    thresholds = [Schedule((Stage(2, threshold=t),), g) for t in (0.01, 0.02) for g in (None, 0.005, 0.006)]
    assert len({uid_of(schedule, SHAPE) for schedule in thresholds}) == 6
    assert uid_of(Schedule(), SHAPE) == "f48212d320c4"  # stored in databases, so they must never change
    assert plain == "33753f82e1cd"


def test_a_finite_space_can_be_counted() -> None:
    space = SpaceConfig(blocks=(1, 2), keep=(0.5, 0.7, 1.0), reduce=("drop", "fuse"), same=("reduce",))
    assert combinations(space) == 18
    assert len({tuple(combination(space, index).items()) for index in range(18)}) == 18
    assert combinations(replace(space, keep=Range(0.5, 1.0))) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"blocks": ()}, "space.blocks: is empty"),
        ({"blocks": (1, 8)}, "space.blocks[1]: block 8; possible: 0 to 7"),
        ({"blocks": (1, BlockSpace(1))}, "space.blocks[1]: block 1 is space.blocks[0] too"),
        ({"keep": (0.5, 1.5)}, "space.keep: 1.5; possible: above 0, up to 1"),
        ({"keep": ()}, "space.keep: is empty"),
        ({"keep": (0.5, 0.5)}, "space.keep: 0.5 is there 2 times"),
        ({"keep": Range(0.9, 0.5)}, "space.keep: low 0.9 is above high 0.5"),
        ({"keep": Range(0.5, 1.0, 0.15)}, "steps of 0.15 from 0.5 reach 0.95 and miss high 1"),
        ({"score": ("clas_attention",)}, 'Did you mean "class_attention"?'),
        ({"reduce": ("dropp",)}, 'Did you mean "drop"?'),
        ({"at": ("middle",)}, "space.at: 'middle'; possible: pre, mid."),
        ({"blocks": (BlockSpace(2, reduce=("dropp",)),)}, "space.blocks[0].reduce: unknown reduce verb 'dropp'"),
        ({"blocks": (BlockSpace(2, at=("mid",)),), "same": ("at",)}, "space.blocks[0].at: all blocks share at"),
        ({"blocks": (0,), "at": ("pre", "mid")}, "space.blocks[0]: stage at block 0 (pre): class_attention at pre"),
        ({"score": ("none", "key_norm")}, "drop needs a score, but score is none"),
        (
            {"keep": (0.1, 0.2), "reduce": ("merge",), "score": ("class_attention",)},
            "merge cannot go from 64 to 13 patch tokens",
        ),
        ({"reduce": ("pool",)}, "space.score: no verb here ranks tokens"),
        (
            {"blocks": (BlockSpace(2, reduce=("pool",), score=("key_norm",)), 3)},
            "space.blocks[0].score: pool ranks no tokens",
        ),
        ({"amount": ("treshold",)}, "space.amount: 'treshold'; possible: keep, threshold, none. Did you mean \"thresh"),
        (
            {"amount": ("keep", "threshold")},
            "space.threshold: amount threshold is possible at block 1",
        ),
        ({"amount": ("threshold",), "threshold": (0.1,)}, "but no merge_threshold is given"),
        ({"threshold": (0.1,)}, "space.threshold: no block can take it"),
        ({"threshold": ThresholdRange(0.2, 0.1)}, "space.threshold: low 0.2 is above high 0.1"),
        ({"threshold": ThresholdRange(0.0, 0.1, log=True)}, "low is 0; possible with log: above 0"),
        ({"target_gmacs": (0.005,)}, "space.target_gmacs: no stage can have a threshold"),
        (
            {"target_predicted_latency_ms": ThresholdRange(3, 5)},
            "space.target_predicted_latency_ms: no stage can have a threshold",
        ),
        (
            {
                "amount": ("threshold",),
                "threshold": (0.1,),
                "reduce": ("drop",),
                "target_gmacs": (0.005,),
                "target_predicted_latency_ms": (3.0,),
            },
            "space: target_gmacs and target_predicted_latency_ms are given. Possible: one target",
        ),
        (
            {"amount": ("threshold",), "threshold": (0.1,), "reduce": ("drop",), "target_gmacs": (5.0,)},
            "space.target_gmacs: 5; possible: above 0, up to the dense model's 0.01",
        ),
        (
            {"amount": ("threshold",), "threshold": (0.1,), "reduce": ("drop",), "score": ("predictor",)},
            "amount is threshold, but drop by predictor takes a count",
        ),
        ({"score": ("predictor",), "reduce": ("drop_or_merge",)}, "drop_or_merge cannot follow a stage that learns"),
        (
            {"amount": ("keep", "threshold"), "reduce": ("drop_or_merge",), "score": ("value_weighted",)},
            "space.amount: threshold is given, but every verb and score here takes a count",
        ),
        (
            {
                "blocks": (2, BlockSpace(1, keep=(0.5,), score=("predictor",), reduce=("drop",))),
                "reduce": ("drop", "drop_or_merge"),
            },
            "drop_or_merge at block 2 cannot follow a stage that learns its decisions",
        ),
        ({"until": ("soon",)}, "space.until: 'soon'; possible: never, next, end. Choose one of those."),
        ({"until": ()}, "space.until: is empty"),
        (
            {"until": ("end",), "reduce": ("pool",), "score": ("class_attention",)},
            "space.until: no verb here has tokens",
        ),
        ({"tokens": (8,)}, "space.tokens: no block can pool to a count"),
        ({"tokens": (8, 0), "reduce": ("pool", "drop")}, "space.tokens: 0; possible: 1 to 64 patch tokens"),
        ({"tokens": (8, 65), "reduce": ("pool", "drop")}, "space.tokens: 65; possible: 1 to 64"),
    ],
)
def test_mistakes_are_named_with_their_field(changes: dict[str, Any], says: str) -> None:
    problems = space_problems(replace(SPACE, **changes), SHAPE)
    assert says in "\n".join(problems)
    assert len(problems) == len(set(problems))


def test_all_mistakes_come_at_once_and_a_missing_class_token_is_one() -> None:
    problems = space_problems(replace(SPACE, blocks=(9, 9), keep=(2.0,), score=("x",)), SHAPE)
    assert len(problems) == 5
    headless = replace(SHAPE, class_tokens=0, prefix_tokens=0)
    assert "has no class token" in space_problems(SPACE, headless)[0]


@pytest.mark.parametrize(("keep", "fine"), [((0.5,), False), ((0.5, 1.0), True)])
def test_a_space_without_any_possible_combination_is_refused(keep: tuple[float, ...], fine: bool) -> None:
    """Each block brings tokens back just before the next one, which reads attention that has not seen them."""
    space = SpaceConfig(
        blocks=(1, 2, 3), keep=keep, at=("pre",), score=("class_attention",), reduce=("drop",), until=("next",)
    )
    problems = space_problems(space, SHAPE)
    assert (
        problems == [] if fine else "none of its 1 combinations is possible. The first: stage at block 2" in problems[0]
    )
