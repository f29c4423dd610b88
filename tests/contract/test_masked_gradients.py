"""Gradients of masked attention and masked squeezing agree with the published formulas, reimplemented in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import timm
import torch
from small_models import images, small_model
from torch import Tensor

import prunesearch.models.digits_vit  # noqa: F401  (registers the shipped model)
from prunesearch.evaluate.digits import load_digits
from prunesearch.evaluate.schedule_loss import ratio_loss
from prunesearch.models import apply_schedule, shape_of, steps_of, trace
from prunesearch.models.masked_step import join
from prunesearch.models.transformer import MOST_GAP, masked_softmax
from prunesearch.schedule import Schedule, Stage
from prunesearch.tokens import REDUCERS, MaskedInput

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")


def softmax_with_policy(logits: Tensor, present: Tensor) -> Tensor:
    """DynamicViT's masked softmax as in the paper: exp(logits - largest) * (policy + (1 - policy) * I), normalised."""
    logits, policy = logits.double(), present.double()
    policy = policy + (1 - policy) * torch.eye(logits.shape[-1], dtype=policy.dtype)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp() * policy
    return (weights / weights.sum(dim=-1, keepdim=True)).float()


def gradients(softmax: Callable[[Tensor, Tensor], Tensor], logits: Tensor, present: Tensor) -> tuple[Tensor, ...]:
    """The attention, and the gradients of a fixed random function of its output."""
    logits, present = logits.clone().requires_grad_(), present.clone().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(logits.shape[-1], 4, generator=generator)
    attention = softmax(logits, present[:, None, None])
    output = attention @ values
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    return attention.detach(), logits.grad, present.grad


def absent_above_present(gap: float) -> tuple[Tensor, Tensor]:
    """Logits (2, 3, 8, 8) whose two absent keys lie `gap` nats above the others, and the mask of present keys."""
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-0.4, 0.4)
    present = torch.tensor([[1.0, 1, 0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1, 0, 0]])
    logits[..., 2] = logits[..., 2] + gap
    logits[..., 6] = logits[..., 6] - gap
    return logits, present


@pytest.mark.parametrize("gap", [0.0, 3.0, 9.0])
def test_the_gradient_of_masked_attention_is_that_of_the_paper(gap: float) -> None:
    logits, present = absent_above_present(gap)
    for ours, theirs in zip(
        gradients(masked_softmax, logits, present), gradients(softmax_with_policy, logits, present), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gap", [9.0, 80.0, 500.0, 1e5])
def test_whatever_an_absent_key_would_get_gradients_stay_finite_and_bounded(gap: float) -> None:
    logits, present = absent_above_present(gap)
    attention, of_logits, of_presence = gradients(masked_softmax, logits, present)
    assert torch.isfinite(attention).all() and torch.isfinite(of_logits).all() and torch.isfinite(of_presence).all()
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 3, 8))
    # bound per row: exp(MOST_GAP) x distance of two values x outer gradient; there are 24 rows
    assert of_presence.abs().max() < 24 * math.exp(MOST_GAP) * 4 * 5 * 5
    assert of_presence[0, 2] != 0, "a token that matters most must not be muted"


@pytest.mark.parametrize("gap", [0.0, 9.0, 80.0, 500.0])
def test_present_tokens_get_the_softmax_over_present_keys(gap: float) -> None:
    logits, present = absent_above_present(gap)
    expected = logits.masked_fill(present[:, None, None] == 0, -torch.inf).softmax(dim=-1)
    rows = (present > 0)[:, None, :, None].expand_as(expected)
    torch.testing.assert_close(masked_softmax(logits, present[:, None, None])[rows], expected[rows])


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Held-out digits, normalised for the shipped ViT, and labels."""
    pixels, labels = load_digits("validation")
    return (pixels[:count, None].float() / 255 - 0.305) / 0.376, labels[:count]


def digits_vit(reduce: str) -> torch.nn.Module:
    """The shipped ViT with its weights and three learned stages (places and ratios of DynamicViT or dTPS).

    Its predictors keep about 80 % of the tokens that arrive.
    """
    model = timm.create_model("vit_digits_patch1_8", pretrained=True)
    counts = zip((2, 4, 6), (0.8, 0.64, 0.512), strict=True)
    stages = tuple(Stage(b, at="pre", score="predictor", tokens=int(r * 64), reduce=reduce) for b, r in counts)
    apply_schedule(model, Schedule(stages), seed=1)
    with torch.no_grad():
        for stage in model.token_stages.values():
            stage.scorer.decide[-1].weight.mul_(0.2)
            stage.scorer.decide[-1].bias.copy_(torch.tensor([1.4, 0.0]))
    return model


def predictor_gradients(model: torch.nn.Module, amp: torch.dtype | None = None) -> list[Tensor]:
    """Gradients of each stage's predictor, flattened, for one training step on each of four batches."""
    found = []
    for pictures, labels in zip(*(x.split(16) for x in digits(64)), strict=True):
        model.train().zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
            outcome = trace(model, pictures)
        loss = torch.nn.functional.cross_entropy(outcome.logits.float(), labels)
        (loss + 2 * ratio_loss(outcome, steps_of(model), shape_of(model))).backward()
        stages = model.token_stages.values()
        found += [torch.cat([p.grad.flatten() for p in stage.scorer.parameters()]) for stage in stages]
    return found


def cosine_and_norm(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    return torch.cosine_similarity(ours, theirs, dim=0).item(), (ours.norm() / theirs.norm()).item()


@pytest.mark.parametrize("reduce", ["drop", "squeeze"])
def test_predictors_of_a_trained_model_get_the_gradient_of_the_paper(
    reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = digits_vit(reduce)
    ours = predictor_gradients(model)
    monkeypatch.setattr(
        "prunesearch.models.transformer.masked_softmax",
        lambda logits, present, most_gap: softmax_with_policy(logits, present),
    )
    agreements = [cosine_and_norm(*pair) for pair in zip(ours, predictor_gradients(model), strict=True)]
    agree = [cosine > 0.9999 and abs(norm - 1) < 0.01 for cosine, norm in agreements]
    # with a gap above MOST_GAP ours is bounded and the paper's formula is not
    assert sum(agree) >= 10 and len(agree) == 12, agreements


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_gives_the_same_gradient(precision: torch.dtype) -> None:
    model = digits_vit("drop")
    exact = predictor_gradients(model)
    for mine, theirs in zip(predictor_gradients(model, precision), exact, strict=True):
        cosine, norm = cosine_and_norm(mine, theirs)
        assert cosine > 0.9 and norm == pytest.approx(1, abs=0.2)


def test_an_absent_token_counts_as_the_patches_it_stands_for() -> None:
    """The gradient of the presence of a merged token is scaled by its size, whether it is present or not."""
    of_presence = []
    for size in (1.0, 4.0):
        logits, present = absent_above_present(0.0)
        logits[..., 2] += math.log(size)  # proportional attention
        of_presence.append(gradients(masked_softmax, logits, present)[2][0, 2])
    assert of_presence[1] / of_presence[0] == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ((Stage(1, at="pre", score="predictor", keep=0.5),), MOST_GAP),
        ((Stage(1, at="pre", score="predictor", threshold=0.5),), MOST_GAP),
        ((Stage(1, at="pre", score="predictor", keep=0.5), Stage(2, score="key_norm", threshold=0.01)), MOST_GAP),
        ((Stage(1, score="class_attention", threshold=0.01),), 0.0),
        ((Stage(1, reduce="merge", threshold=0.5), Stage(1, score="attention_received", threshold=0.01)), 0.0),
    ],
)
def test_predictors_get_gradients_over_gaps_and_thresholds_do_not(
    stages: tuple[Stage, ...], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds are trained by the loss on the cost; see benchmarks/masked_gradients.md for the effect of gaps."""
    seen = []

    def spy(logits: Tensor, present: Tensor, most_gap: float) -> Tensor:
        seen.append(most_gap)
        return masked_softmax(logits, present, most_gap)

    monkeypatch.setattr("prunesearch.models.transformer.masked_softmax", spy)
    trace(apply_schedule(small_model(), Schedule(stages)).train(), images())
    assert set(seen) == {expected}
    logits, present = absent_above_present(5.0)
    one, other = (gradients(lambda x, m, gap=gap: masked_softmax(x, m, gap), logits, present)[2] for gap in (0.0, 10.0))
    assert other[0, 2].abs() > 10 * one[0, 2].abs() > 0


@pytest.mark.parametrize("most_gap", [0.0, MOST_GAP])
def test_with_every_token_present_the_gradients_are_those_of_softmax(most_gap: float) -> None:
    logits, present = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5)
    _, of_logits, _ = gradients(lambda x, m: masked_softmax(x, m, most_gap), logits, present)
    _, expected, _ = gradients(lambda x, m: x.softmax(dim=-1) + 0 * m, logits, present)
    torch.testing.assert_close(of_logits, expected)


def test_sizes_of_absent_tokens_reach_the_masked_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model that merges and then drops, the log size is added to the logits of dropped tokens too."""
    seen = []

    def spy(logits: Tensor, present: Tensor, most_gap: float) -> Tensor:
        seen.append((logits.detach(), present.detach()))
        return masked_softmax(logits, present, most_gap)

    monkeypatch.setattr("prunesearch.models.transformer.masked_softmax", spy)
    drop = Stage(1, at="pre", score="key_norm", threshold=2.0)  # all but one
    logits = {}
    for proportional in (True, False):
        seen.clear()
        options = {"proportional_attention": proportional}
        merge = Stage(0, threshold=-1.0, reduce="merge", options=options)  # every second token joins a neighbour
        trace(apply_schedule(small_model(), Schedule((merge, drop))).train(), images())
        logits[proportional] = seen[0][0]
        absent = seen[0][1][:, 0, 0] == 0
    log_sizes = (logits[True] - logits[False])[:, 0, 0]
    hosts = log_sizes > 0.5  # at least two patches
    assert (hosts & absent).any(), "a dropped host"
    torch.testing.assert_close(log_sizes.exp(), log_sizes.exp().round(), atol=1e-4, rtol=0)


# --- squeezing ---------------------------------------------------------------------------------------------------


def squeezed(x: Tensor, present: Tensor, stays: Tensor) -> Tensor:
    """TPS, eq. 3-5, in float64: guests (present, do not stay) join their nearest other token that stays."""
    share, weight = _to_hosts(x, present, stays), math.e
    weights = share * (x @ x.transpose(1, 2) / (x.norm(dim=-1)[:, :, None] * x.norm(dim=-1)[:, None])).exp()
    total = weight + weights.sum(dim=1)
    return (weight * x + weights.transpose(1, 2) @ x) / total[..., None]


def absorbed(x: Tensor, present: Tensor, stays: Tensor) -> Tensor:
    """DiffRate's merging: the unweighted mean of a token and the tokens that join it."""
    share = _to_hosts(x, present, stays)
    return (x + share.transpose(1, 2) @ x) / (1 + share.sum(dim=1))[..., None]


def _to_hosts(x: Tensor, present: Tensor, stays: Tensor) -> Tensor:
    """Matrix with 1 at (guest, host), differentiable in the masks. No token is its own host."""
    unit = x / x.norm(dim=-1, keepdim=True)
    cosine = (unit @ unit.transpose(1, 2)).masked_fill(torch.eye(x.shape[1], dtype=torch.bool), -100)
    nearest = cosine.masked_fill(stays[:, None] == 0, -100).argmax(dim=-1)
    return torch.nn.functional.one_hot(nearest, x.shape[1]) * (present - stays)[..., None]


FORMULAS = {"squeeze": squeezed, "absorb": absorbed}


def test_there_is_a_formula_for_every_verb_whose_guests_look_for_a_host() -> None:
    with_hosts = set()
    for verb, entry in REDUCERS.items():
        if entry.ranks and entry.masked is not None:
            joining = entry.masked(scene(*tokens(), torch.ones(2, 12)), **dict(entry.options))
            with_hosts |= {verb} if joining.host_Bn is not None else set()
    assert with_hosts == FORMULAS.keys()


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 12, 6, generator=generator)
    present = torch.tensor([[1.0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1], [1] * 12])
    stays = present * torch.tensor([0.0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1])
    return x, present, stays


def scene(x: Tensor, present: Tensor, stays: Tensor, scores: Tensor) -> MaskedInput:
    return MaskedInput(x, scores, None, torch.ones_like(present), present, stays)


@pytest.mark.parametrize("verb", FORMULAS)
def test_the_gradient_of_masked_joining_is_that_of_the_paper(verb: str) -> None:
    outer = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(6))
    found = []
    for dtype in (torch.float32, torch.float64):
        x, present, stays = (value.to(dtype).requires_grad_() for value in tokens())
        if dtype == torch.float64:
            result = FORMULAS[verb](x, present, stays)
        else:
            entry = REDUCERS[verb]
            result = join(x, entry.masked(scene(x, present, stays, torch.ones(2, 12)), **dict(entry.options)))
        result = torch.where(stays[..., None] > 0, result, 0)
        (result * outer).sum().backward()
        found.append([value.detach().float() for value in (result, x.grad, present.grad, stays.grad)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("verb", FORMULAS)
def test_a_token_that_alone_stays_is_left_as_it_is(verb: str) -> None:
    """It has no host. Only its guests change its features, and all gradients are finite."""
    x, present, _ = tokens()
    stays = torch.zeros_like(present)
    stays[:, 4] = 1
    for there in (stays, present):
        leaves = [value.clone().requires_grad_() for value in (x, there, stays)]
        joining = REDUCERS[verb].masked(scene(*leaves, torch.ones(2, 12)), **dict(REDUCERS[verb].options))
        result = join(leaves[0], joining)
        assert (result[:, 4] == x[:, 4]).all() == (there is stays)
        (result * torch.randn_like(result)).sum().backward()
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)
