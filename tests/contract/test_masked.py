"""Learned decisions and adaptive counts: masked and gathered passes agree; images do not affect each other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_models import LAYOUTS, images, pairs, small_model, two_stages

from prunesearch.errors import ModelError, ScheduleError
from prunesearch.models import apply_schedule, schedule_of, trace
from prunesearch.models.masked_step import _cuts
from prunesearch.models.transformer import masked_softmax
from prunesearch.schedule import Schedule, Stage
from prunesearch.tokens import REDUCERS

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")

MASKABLE = [(score, verb) for score, verb in pairs() if REDUCERS[verb].masked is not None]
THRESHOLDS = {
    "class_attention": 0.02,
    "head_weighted_class_attention": 0.02,
    "value_weighted": 0.022,
    "attention_received": 0.024,
    "key_norm": 0.027,
    "random": 0.025,
    "predictor": 0.545,
    "none": 0.99,
}
TELLING = THRESHOLDS.keys() - {"random", "predictor"}
"""Scores that depend on the image without training. `random` ignores it, and the predictor is untrained."""
ADAPTIVE = [(score, verb) for score, verb in MASKABLE if REDUCERS[verb].takes_threshold]


def learned_first(score: str, verb: str, at: str) -> Schedule:
    """A learned drop at block 0 that removes little. Every later stage then runs masked in training."""
    first = Stage(0, at="mid", score="predictor", tokens=33)
    return Schedule((first, *two_stages(score, verb, at).stages))


def adaptive(score: str, verb: str, at: str = "mid") -> Schedule:
    """Thresholds at two blocks, then a fixed stage."""
    threshold = THRESHOLDS.get(score, 1 / 36)
    stages = [Stage(block, at=at, score=score, threshold=threshold, reduce=verb) for block in (1, 2)]  # type: ignore[arg-type]
    return Schedule((*stages, Stage(3, keep=0.8, score="key_norm", reduce="squeeze")))


@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize(("score", "verb"), MASKABLE)
def test_masked_and_gathered_agree(score: str, verb: str, at: str) -> None:
    for layout in ("class", "map") if score in ("none", "random", "predictor") else ("registers",):
        model, x = small_model(layout), images(4)
        apply_schedule(model, learned_first(score, verb, at))
        with torch.no_grad():
            gathered, masked = trace(model, x, masked=False), trace(model, x, masked=True)
        torch.testing.assert_close(masked.logits, gathered.logits, atol=1e-5, rtol=1e-5)
        left = gathered.patches_BnC.shape[1]
        assert masked.counts[-1].tolist() == [left] * 4
        there = masked.patches_BnC[masked.present_Bn > 0].view(4, left, -1)
        if verb != "pool":
            torch.testing.assert_close(there, gathered.patches_BnC, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("prr", "no_pool", "drop_path")])
def test_masked_and_gathered_agree_in_every_layout(layout: str) -> None:
    model, x = small_model(layout), images(4)
    stages = (
        Stage(0, score="predictor", keep=0.8, reduce="squeeze"),
        Stage(1, keep=0.8, reduce="merge"),
        Stage(2, score="predictor", keep=0.6, at="pre"),
        Stage(3, score="attention_received", keep=0.8, reduce="absorb"),
    )
    apply_schedule(model, Schedule(stages))
    with torch.no_grad():
        expected = trace(model, x, masked=False).logits
        torch.testing.assert_close(trace(model, x, masked=True).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize(("score", "verb"), ADAPTIVE)
def test_with_thresholds_an_image_does_not_depend_on_its_batch(score: str, verb: str, at: str) -> None:
    model, x = small_model("avg"), images(6)
    apply_schedule(model, adaptive(score, verb, at))
    with torch.no_grad():
        together = trace(model, x)
        alone = [trace(model, image[None]) for image in x]
        torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(x.flip(0)).flip(0), together.logits, atol=1e-5, rtol=1e-4)
        for step, counts in enumerate(together.counts):
            assert counts.tolist() == [one.counts[step].item() for one in alone]
        if score in TELLING:
            assert len(set(together.counts[0].tolist())) > 1, "the threshold should tell these images apart"
        masked = trace(model, x, masked=True)
        torch.testing.assert_close(masked.logits, together.logits, atol=1e-5, rtol=1e-4)


def test_thresholds_below_everything_keep_the_model_as_it_is() -> None:
    for layout in ("class", "avg", "map", "max", "distilled"):
        model, x = small_model(layout), images()
        before = model(x)
        score = "attention_received" if layout in ("map", "max") else "head_weighted_class_attention"
        stages = (Stage(1, at="pre", score=score, threshold=-1.0), Stage(2, threshold=1.01, reduce="merge"))
        apply_schedule(model, Schedule(stages))
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_the_best_token_stays_when_none_passes() -> None:
    for layout in ("class", "map"):
        model = small_model(layout)
        apply_schedule(model, Schedule((Stage(1, score="attention_received", threshold=2.0),)))
        assert trace(model, images()).counts[0].tolist() == [1, 1, 1]
        assert torch.isfinite(model(images())).all()


def test_gradients_reach_thresholds_predictors_queries_and_the_model() -> None:
    model, x = small_model("drop_path"), images()
    stages = (
        Stage(0, score="predictor", keep=0.7),
        Stage(1, score="class_attention", threshold=0.01, reduce="squeeze"),
        Stage(2, threshold=0.5, reduce="merge"),
        Stage(3, at="pre", tokens=4, reduce="pool"),
    )
    apply_schedule(model, Schedule(stages)).train()
    torch.manual_seed(0)
    trace(model, x).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name != "token_stages.block3_pre.reducer.norm.bias" and parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    for name in ("block0_mid.scorer.embed.weight", "block1_mid.threshold", "block3_pre.reducer.queries_KC"):
        assert model.get_parameter(f"token_stages.{name}").grad.abs().sum() > 0, name


@pytest.mark.parametrize("second", [verb for verb, entry in REDUCERS.items() if entry.takes_threshold])
@pytest.mark.parametrize("first", [verb for verb, entry in REDUCERS.items() if entry.takes_threshold])
def test_gradients_are_finite_whoever_goes(first: str, second: str) -> None:
    """Also when no token or nearly all tokens are removed, and when tokens have sizes."""
    for threshold in (-1.0, 0.99, 2.0):
        model, x = small_model("avg"), images(4)
        stages = tuple(
            Stage(block, score="none" if verb == "merge" else "key_norm", threshold=threshold, reduce=verb)
            for block, verb in ((0, first), (1, second), (2, "absorb"))
        )
        apply_schedule(model, Schedule(stages, target_gmacs=0.001)).train()
        outcome = trace(model, x)
        (outcome.logits.square().sum() + sum(count.sum() for count in outcome.counts)).backward()
        assert torch.isfinite(outcome.logits).all()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_counts_carry_gradients_to_the_thresholds() -> None:
    model, x = small_model(), images()
    apply_schedule(model, Schedule((Stage(1, threshold=0.02), Stage(2, threshold=0.5, reduce="merge")))).train()
    trace(model, x).counts[-1].sum().backward()
    for name in ("block1_mid", "block2_mid"):
        gradient = model.get_parameter(f"token_stages.{name}.threshold").grad
        assert gradient != 0
    assert model.get_parameter("token_stages.block1_mid.threshold").grad < 0, "a higher threshold keeps fewer"


def test_masked_softmax_is_the_softmax_over_what_is_present_and_the_query_itself() -> None:
    logits = torch.randn(2, 3, 6, 6)
    logits[..., 5] += 80  # an absent key far above the others makes the released softmax uniform
    present = torch.tensor([1.0, 1, 0, 1, 1, 0]).expand(2, 6)[:, None, None].clone().requires_grad_()
    expected = logits.masked_fill((present == 0) & ~torch.eye(6, dtype=torch.bool), -torch.inf).softmax(dim=-1)
    attention = masked_softmax(logits, present)
    torch.testing.assert_close(attention, expected)
    (attention * torch.randn_like(attention)).sum().backward()
    assert torch.isfinite(present.grad).all() and (present.grad[..., 2] != 0).all()


def test_learned_parts_are_drawn_from_the_seed_and_travel() -> None:
    schedule = Schedule((Stage(1, score="predictor", keep=0.5), Stage(2, at="pre", tokens=5, reduce="pool")))
    model, x = small_model(), images()
    one = apply_schedule(copy.deepcopy(model), schedule, seed=1)
    same = apply_schedule(copy.deepcopy(model), schedule, seed=1)
    other = apply_schedule(copy.deepcopy(model), schedule, seed=2)
    assert torch.equal(one(x), same(x)) and not torch.equal(one(x), other(x))
    assert torch.equal(apply_schedule(model, schedule, weights=one.state_dict())(x), one(x))
    assert torch.equal(pickle.loads(pickle.dumps(one))(x), one(x))
    with pytest.raises(ModelError, match=r"lacks token_stages.block1_mid.scorer"):
        apply_schedule(model, schedule, weights=small_model().state_dict())


@pytest.mark.filterwarnings("default")
def test_untrained_scores_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"block1_mid.scorer .* learn, and no weights were given"):
        apply_schedule(small_model(), Schedule((Stage(1, score="predictor", keep=0.5),)))


def test_the_schedule_of_a_model_has_its_thresholds_as_they_are() -> None:
    schedule = Schedule((Stage(1, threshold=0.001), Stage(1, threshold=0.9, reduce="merge")), target_gmacs=0.5)
    model = apply_schedule(small_model(), schedule)
    assert schedule_of(model) == schedule
    with torch.no_grad():
        model.token_stages["block1_mid_1"].threshold.fill_(0.25)
    assert [stage.threshold for stage in schedule_of(model).stages] == [0.001, 0.25]


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ((Stage(1, tokens=4, threshold=None, reduce="pool", score="class_attention"),), "does not rank"),
        ((Stage(1, threshold=0.1, reduce="pool"),), "pool keeps a fixed number"),
        (
            (Stage(1, threshold=0.1), Stage(2, keep=0.6, score="value_weighted", reduce="drop_or_merge")),
            "cannot follow a stage that learns",
        ),
        ((Stage(1, tokens=4, reduce="pool"), Stage(1, keep=0.5)), "pooled before"),
        ((Stage(1, tokens=4, reduce="pool"), Stage(2, at="pre", keep=0.5)), "pooled before"),
    ],
)
def test_what_cannot_be_combined_is_refused(stages: tuple[Stage, ...], says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        apply_schedule(small_model(), Schedule(stages))


@pytest.mark.parametrize("layout", ["class", "eva", "beit", "relpos"])
def test_a_pooling_that_is_taken_away_later_is_refused(layout: str) -> None:
    """The tokens would come with empty slots, which a tensor alone does not show."""
    for schedule, training in ((adaptive("key_norm", "drop"), False), (learned_first("key_norm", "drop", "mid"), True)):
        model = apply_schedule(small_model(layout), schedule).train(training)
        model.reset_classifier(0, "")
        with pytest.raises(ModelError, match="global_pool='' returns tokens"):
            model(images())


def test_groups_of_a_batch_compute_what_the_padded_batch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_model("avg"), images(8)
    stages = (
        Stage(1, score="attention_received", threshold=0.026, reduce="fuse"),
        Stage(2, at="pre", score="value_weighted", threshold=0.05),
        Stage(3, threshold=0.99, reduce="merge"),
    )
    apply_schedule(model, Schedule(stages))
    outcomes = []
    for most in (1, 2, 100):
        monkeypatch.setattr("prunesearch.models.transformer.MOST_GROUPS", most)
        with torch.no_grad():
            outcomes.append(trace(model, x))
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome.logits, outcomes[0].logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outcome.present_Bn, outcomes[0].present_Bn)
        for one, other in zip(outcome.counts, outcomes[0].counts, strict=True):
            assert torch.equal(one, other)


def test_cuts_separate_few_tokens_from_many() -> None:
    assert _cuts([5, 5, 5, 50, 50, 50], 8) == [3]
    assert _cuts([5, 5, 50, 50], 1) == [] and _cuts([7, 7, 7], 4) == []
    assert _cuts([1, 2, 30, 31, 90, 91], 3) == [2, 4]


def test_an_empty_slot_of_a_fused_token_does_not_spoil_later_merges() -> None:
    """The slot of a fused token has size 0 in images where nothing was fused."""
    model = small_model("class")
    stages = (
        Stage(0, score="none", reduce="merge", keep=0.8),
        Stage(1, score="class_attention", reduce="fuse", threshold=0.0),
        Stage(2, score="none", reduce="merge", keep=0.8),
    )
    x = images(3)
    apply_schedule(model, Schedule(stages))
    with torch.no_grad():
        expected = model.eval()(x)
    found = model.train()(x)
    found.sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "stages",
    [
        (Stage(1, score="none", reduce="merge", threshold=0.5),),
        (Stage(1, score="class_attention", reduce="absorb", threshold=0.03),),
        (Stage(1, at="pre", score="predictor", keep=0.7), Stage(2, at="pre", score="predictor", keep=0.7)),
        (
            Stage(0, score="none", reduce="merge", keep=0.8),
            Stage(1, score="class_attention", reduce="squeeze", threshold=0.03),
        ),
    ],
)
def test_learned_decisions_in_other_precisions(dtype: torch.dtype, stages: tuple[Stage, ...]) -> None:
    model = apply_schedule(small_model("class"), Schedule(stages), untrained=True).to(dtype)
    x = images(3).to(dtype)
    for mode in (True, False):
        found = model.train(mode)(x)
        assert found.dtype == dtype and found.isfinite().all()
