"""Contract of every scorer and reducer, tested on tensors."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import pairs

from prunesearch.models.step import TokenState, add_up, gather_evidence, mean_keys, regroup, take_step
from prunesearch.registry import Named
from prunesearch.schedule import Schedule, Stage, resolve
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS, SCORERS, Attended, ReduceInput, Reducer, Scorer
from prunesearch.tokens.class_attention import class_rows_BHRN, head_weights_BHn
from prunesearch.tokens.select import gather, unit

PREFIX, PATCHES = 3, 25
SHAPE = ModelShape(
    depth=2, dim=16, heads=4, attention_dim=16, patch_tokens=PATCHES, prefix_tokens=PREFIX, class_tokens=1, mlp_macs=0,
    stem_macs=0, head_macs=0,
)  # fmt: skip


@pytest.mark.parametrize("entry", [*SCORERS.values(), *REDUCERS.values()], ids=lambda entry: entry.name)
def test_the_tables_name_functions_that_are_there(entry: Scorer | Reducer) -> None:
    named = [value for value in vars(entry).values() if isinstance(value, Named)]
    assert named and all(callable(one.function) for one in named)
    documented = entry.function.function.__doc__  # type: ignore[union-attr]
    assert entry.summary == documented.split("\n")[0]


def attended(class_tokens: int = 1, bias: bool = False) -> Attended:
    q, k, v = torch.randn(3, 2, 4, PREFIX + PATCHES, 4, generator=torch.Generator().manual_seed(0))
    bias_B11N = torch.rand(2, 1, 1, PREFIX + PATCHES) if bias else None
    attention = (q * 0.5 @ k.transpose(-2, -1) + (0 if bias_B11N is None else bias_B11N)).softmax(-1)
    keys_BnD = mean_keys(k, PREFIX)
    return Attended(q, k, v, attention @ v, bias_B11N, 0.5, PREFIX, class_tokens, keys_BnD=keys_BnD)


def patches() -> torch.Tensor:
    return torch.randn(2, PATCHES, 16, generator=torch.Generator().manual_seed(1))


def part_of(score: str) -> torch.nn.Module | None:
    make = None if score == "none" else SCORERS[score].part
    torch.manual_seed(3)
    return None if make is None else make(SHAPE)


def grouping_of(score: str, verb: str, kept: int, training: bool = False):
    stage = Stage(1, score=score, tokens=kept, reduce=verb)
    evidence = gather_evidence(stage, patches(), attended(), training, part=part_of(score))
    options = dict(REDUCERS[verb].options)
    size = torch.randint(1, 5, (2, PATCHES)).float()
    return REDUCERS[verb].function(
        ReduceInput(patches(), evidence.scores_Bn, evidence.keys_BnD, size, kept), **options
    ), size


@pytest.mark.parametrize("score", SCORERS)
def test_scores_are_finite_nonnegative_fp32_and_one_per_patch(score: str) -> None:
    for training in (False, True):
        stage, part = Stage(1, score=score, keep=0.5), part_of(score)
        scores = gather_evidence(stage, patches(), attended(), training, part=part).scores_Bn
        assert scores.shape == (2, PATCHES) and scores.dtype == torch.float32
        assert torch.isfinite(scores).all() and (scores >= 0).all()


@pytest.mark.parametrize("class_tokens", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_the_class_rows_are_rows_of_the_full_softmax(bias: bool, class_tokens: int) -> None:
    a = attended(class_tokens, bias)
    logits = (a.query_BHND * a.scale) @ a.key_BHND.transpose(-2, -1)
    full = (logits if a.bias is None else logits + a.bias).softmax(dim=-1)
    torch.testing.assert_close(class_rows_BHRN(a), full[:, :, :class_tokens])
    received = gather_evidence(Stage(1, score="attention_received", keep=0.5), patches(), a, False).scores_Bn
    torch.testing.assert_close(received, full.mean(dim=(1, 2))[:, PREFIX:])


def test_normalised_scores_sum_to_one() -> None:
    torch.testing.assert_close(head_weights_BHn(attended()).sum(dim=1), torch.ones(2, PATCHES))
    for score in ("value_weighted", "key_norm", "random"):
        scores = gather_evidence(Stage(1, score=score, keep=0.5), patches(), attended(), False).scores_Bn
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))


def test_random_is_fixed_in_eval_differs_by_block_and_seed_and_is_fresh_in_training() -> None:
    def ranks(block: int, training: bool = False, seed: int = 0) -> list[int]:
        stage = Stage(block, score="random", keep=0.5, options={"seed": seed})
        return gather_evidence(stage, patches(), None, training).scores_Bn[0].argsort().tolist()

    assert ranks(1) == ranks(1)
    assert len({tuple(r) for r in (ranks(1), ranks(2), ranks(1, seed=1), ranks(1, True), ranks(1, True))}) == 5


@pytest.mark.parametrize("kept", [13, 20, 24])
@pytest.mark.parametrize(("score", "verb"), [pair for pair in pairs() if pair[1] != "pool"])
def test_a_grouping_partitions_the_tokens_in_image_order(score: str, verb: str, kept: int) -> None:
    grouping, _ = grouping_of(score, verb, kept)
    assert grouping.kept_BK.shape == (2, kept)
    assert (grouping.kept_BK.diff(dim=1) > 0).all()
    if grouping.guests_BG is not None:
        everyone = torch.cat([grouping.kept_BK, grouping.guests_BG], dim=1).sort(dim=1).values
        assert torch.equal(everyone, torch.arange(PATCHES).expand(2, -1))


@pytest.mark.parametrize(("score", "verb"), [pair for pair in pairs() if pair[1] in ("squeeze", "merge", "absorb")])
def test_a_token_becomes_a_mean(score: str, verb: str) -> None:
    grouping, _ = grouping_of(score, verb, 15)
    ones = regroup(torch.ones(2, PATCHES, 3), grouping)
    torch.testing.assert_close(ones, torch.ones(2, 15, 3))


def test_squeeze_is_the_formula_of_the_paper() -> None:
    grouping, _ = grouping_of("class_attention", "squeeze", 10)
    x, result = patches()[0], regroup(patches(), grouping)[0]
    kept, guests = grouping.kept_BK[0].tolist(), grouping.guests_BG[0].tolist()
    cosine = torch.nn.functional.cosine_similarity(x[guests][:, None], x[kept][None], dim=-1)
    for j in range(len(kept)):
        weights = {g: math.exp(cosine[i, j]) for i, g in enumerate(guests) if int(cosine[i].argmax()) == j}
        mixed = math.e * x[kept[j]] + sum(w * x[g] for g, w in weights.items())
        torch.testing.assert_close(result[j], mixed / (math.e + sum(weights.values())))


def test_fuse_is_the_score_weighted_sum_appended_last() -> None:
    stage = Stage(1, score="class_attention", tokens=10, reduce="fuse")
    scores = gather_evidence(stage, patches(), attended(), False).scores_Bn
    grouping, _ = grouping_of("class_attention", "fuse", 10)
    result = regroup(patches(), grouping)
    expected = sum(scores[0, g] * patches()[0, g] for g in grouping.guests_BG[0].tolist())
    torch.testing.assert_close(result[0, -1], expected)
    assert result.shape[1] == 11


def test_merge_conserves_size_and_averages_by_it() -> None:
    grouping, size = grouping_of("none", "merge", 15)
    merged = add_up(size, grouping)
    torch.testing.assert_close(merged.sum(dim=1), size.sum(dim=1))
    result = regroup(patches(), grouping)
    # size-weighted means conserve the size-weighted sum
    torch.testing.assert_close(
        (result * merged[..., None]).sum(1), (patches() * size[..., None]).sum(1), atol=1e-4, rtol=1e-4
    )


def test_merge_pairs_the_most_similar_keys() -> None:
    grouping, _ = grouping_of("none", "merge", 20)
    keys = torch.nn.functional.normalize(attended().key_BHND[0, :, PREFIX:].mean(dim=0), dim=-1)
    similarity = keys[1::2] @ keys[0::2].T
    best = similarity.max(dim=1).values.topk(5).indices
    assert sorted((2 * best + 1).tolist()) == sorted(grouping.guests_BG[0].tolist())
    for guest, host in zip(grouping.guests_BG[0], grouping.host_BG[0], strict=True):
        assert host == 2 * similarity[guest // 2].argmax()


@pytest.mark.parametrize(("score", "verb"), pairs())
def test_prefix_tokens_are_untouched_and_counts_as_resolved(score: str, verb: str) -> None:
    tokens = torch.randn(2, PREFIX + PATCHES, 16)
    (step,) = resolve(Schedule((Stage(1, score=score, keep=0.6, reduce=verb),)), SHAPE)
    own = gather_evidence(step.stage, tokens[:, PREFIX:], attended(), False, part=part_of(score))
    make = REDUCERS[verb].part
    part = None if make is None else make(SHAPE, step.kept)
    state, _ = take_step(step, TokenState(tokens), PREFIX, own, (), part)
    assert torch.equal(state.tokens_BNC[:, :PREFIX], tokens[:, :PREFIX])
    assert state.tokens_BNC.shape[1] == PREFIX + step.after


def test_evidence_of_a_later_stage_follows_the_tokens() -> None:
    """Two stages in one block: the second ranks the tokens kept by the first, with scores of the same attention."""
    tokens = torch.randn(2, PREFIX + PATCHES, 16)
    first, second = resolve(Schedule((Stage(1, tokens=20), Stage(1, tokens=10))), SHAPE)
    evidence = gather_evidence(first.stage, tokens[:, PREFIX:], attended(), False)
    state, (later,) = take_step(first, TokenState(tokens), PREFIX, evidence, (evidence,))
    twice, _ = take_step(second, state, PREFIX, later, ())
    (once,) = resolve(Schedule((Stage(1, tokens=10),)), SHAPE)
    direct, _ = take_step(once, TokenState(tokens), PREFIX, evidence, ())
    assert torch.equal(twice.tokens_BNC, direct.tokens_BNC)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("images", [1, 3])
def test_rows_are_copied_as_gather_does(images: int, channels: int) -> None:
    """With gradients, and from a slice of a larger tensor."""
    every, places = torch.randn(images, 9, channels), torch.stack([torch.randperm(8)[:4] for _ in range(images)])
    grads = []
    for pick in (gather, lambda values, at: values.gather(1, at[..., None].expand(-1, -1, channels))):
        values = every.clone().requires_grad_()
        picked = pick(values[:, 1:], places)
        (picked**2).sum().backward()
        grads.append((picked.detach(), values.grad))
    assert all(torch.equal(ours, expected) for ours, expected in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unit_vectors_are_those_of_pytorch(dtype: torch.dtype) -> None:
    vectors = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    vectors[0, 0] = 0
    assert torch.equal(unit(vectors), torch.nn.functional.normalize(vectors.float(), dim=-1, eps=1e-6))
