"""ToMe and LTMP in one block agree with the papers' formulas, reimplemented with plain loops over images."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from small_models import images, small_model
from torch import Tensor

from prunesearch.models import apply_schedule, shape_of, trace
from prunesearch.models.step import Evidence, TokenState, gather_evidence, mean_keys, take_step
from prunesearch.presets import load_preset, presets
from prunesearch.schedule import Schedule, Stage, canonical, options_of, resolve
from prunesearch.tokens import REDUCERS, SCORERS, Attended, Grouping

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")

PREFIXES = {"avg_no_class": 0, "class": 1, "distilled": 2, "registers": 5}
"""Layouts by their number of prefix tokens."""
BLOCK = 1


class Merged(NamedTuple):
    """Tokens (1, N, C) of one image, prefix first, with the size of and the attention received by each token."""

    tokens: Tensor
    size: Tensor
    importance: Tensor


def attended_in(model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For one image at BLOCK: tokens after attention, keys (head mean), attention received (mean over queries)."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    for block in model.blocks[:BLOCK]:
        x = block(x)
    block = model.blocks[BLOCK]
    attention, tokens = block.attn, x.shape[1]
    normed = block.norm1(x)
    qkv = attention.qkv(normed).reshape(1, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    weights = (query @ key.transpose(-2, -1) * attention.scale).softmax(dim=-1)
    return x + block.ls1(attention(normed)), key.mean(dim=1)[0], weights.mean(dim=(1, 2))[0]


def matched(model, x: Tensor, joins) -> Merged:
    """ToMe: each token at an even place finds the most similar one at an odd place. Prefix tokens take no part.

    joins: best cosine of each even place -> which of them merge. Order of the result: [unmerged even, odd].
    """
    tokens, keys, importance = attended_in(model, x)
    keys, prefix = keys / keys.norm(dim=-1, keepdim=True), model.num_prefix_tokens
    cosine = keys[0::2] @ keys[1::2].T
    is_prefix = torch.arange(len(keys)) < prefix
    cosine[is_prefix[0::2]] = -torch.inf
    cosine[:, is_prefix[1::2]] = -torch.inf
    best, partner = cosine.max(dim=-1)
    goes = joins(best)
    even, odd, size = tokens[0, 0::2], tokens[0, 1::2].clone(), torch.ones(len(keys) // 2)
    largest = importance[1::2].clone()
    for guest in goes.nonzero()[:, 0].tolist():
        host = partner[guest]
        odd[host] += even[guest]
        size[host] += 1
        largest[host] = torch.maximum(largest[host], importance[0::2][guest])
    stays = ~goes
    result = torch.cat([even[stays], odd / size[:, None]])
    places = torch.cat([torch.arange(len(keys))[0::2][stays], torch.arange(len(keys))[1::2]])
    # prefix tokens must come first for the head; the order of the others does not matter
    order = torch.cat([places.argsort()[:prefix], (places >= prefix).nonzero()[:, 0]])
    sizes = torch.cat([torch.ones(int(stays.sum())), size])
    importances = torch.cat([importance[0::2][stays], largest])
    return Merged(result[order][None], sizes[order], importances[order])


def logits_of(model, merged: Merged) -> Tensor:
    """Run the rest of the model, with proportional attention (log size added to the logits of each key)."""
    block, bias = model.blocks[BLOCK], merged.size.log()[None, None, None]
    x = merged.tokens + block.ls2(block.mlp(block.norm2(merged.tokens)))
    for block in model.blocks[BLOCK + 1 :]:
        x = block(x, attn_mask=bias)
    x = model.norm(x)
    if model.global_pool == "avg":
        pooled = (x * merged.size[:, None]).sum(dim=1) / merged.size.sum()
        return model.head(model.fc_norm(pooled))
    return model.forward_head(x)


@torch.no_grad()
def merged_logits(layout: str, **stage: object) -> Tensor:
    model = small_model(layout)
    return apply_schedule(model, Schedule((Stage(BLOCK, reduce="merge", **stage),)))(images())  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", PREFIXES)
@torch.no_grad()
def test_tome_in_one_block_is_the_papers(layout: str) -> None:
    model, pairs_to_merge = small_model(layout), 11
    assert model.num_prefix_tokens == PREFIXES[layout]

    def closest(best: Tensor) -> Tensor:
        return torch.zeros_like(best).scatter(0, best.topk(pairs_to_merge).indices, 1.0) > 0

    expected = torch.cat([logits_of(model, matched(model, image[None], closest)) for image in images()])
    ours = merged_logits(layout, tokens=36 - pairs_to_merge, options={"parity": "all"})
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    by_patches = merged_logits(layout, tokens=36 - pairs_to_merge)
    assert torch.equal(by_patches, ours) == (PREFIXES[layout] % 2 == 1)


@pytest.mark.parametrize("layout", PREFIXES)
@torch.no_grad()
def test_ltmp_in_one_block_is_the_papers(layout: str) -> None:
    """Pairs above one threshold merge; then tokens above another one stay. A merged token has the largest score."""
    model, x = small_model(layout), images()
    importance = attended_in(model, x[:1])[2]
    by_cosine, by_importance = 0.9, importance.sort().values[17:19].mean().item()  # between the values of two tokens
    expected, found = [], []
    for image in x:
        merged = matched(model, image[None], lambda best: best > by_cosine)
        stays = (merged.importance > by_importance) | (torch.arange(len(merged.size)) < model.num_prefix_tokens)
        found.append(int(stays.sum()) - model.num_prefix_tokens)
        expected.append(logits_of(model, Merged(merged.tokens[:, stays], merged.size[stays], merged.importance[stays])))
    ours = {}
    for rule in ("max", "sum"):
        stages = (
            Stage(BLOCK, reduce="merge", threshold=by_cosine, options={"parity": "all"}),
            Stage(BLOCK, score="attention_received", threshold=by_importance, options={"merged": rule}),
        )
        ours[rule] = trace(apply_schedule(small_model(layout), Schedule(stages)), x)
    torch.testing.assert_close(ours["max"].logits, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert ours["max"].counts[1].tolist() == found
    assert not torch.equal(ours["max"].counts[1], ours["sum"].counts[1]), "the two rules should differ here"
    for rule in ours:
        stages = (stages[0], replace(stages[1], options={"merged": rule}))
        masked = trace(apply_schedule(small_model(layout), Schedule(stages)), x, masked=True)
        torch.testing.assert_close(masked.logits, ours[rule].logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", PREFIXES)
@torch.no_grad()
def test_parity_counts_the_tokens_of_each_image_alone(layout: str) -> None:
    """Masked and gathered passes pair the same tokens, even in images with a single token."""
    model, x = small_model(layout), images(4)
    for threshold in (0.028, 0.03, 2.0):
        for amount in (dict(threshold=0.5), dict(keep=0.7)):
            stages = (
                Stage(0, score="key_norm", threshold=threshold),
                Stage(1, reduce="merge", options={"parity": "all"}, **amount),  # type: ignore[arg-type]
                Stage(2, reduce="merge", options={"parity": "all"}, **amount),  # type: ignore[arg-type]
            )
            outcome = trace(apply_schedule(small_model(layout), Schedule(stages)), x)
            masked = trace(apply_schedule(small_model(layout), Schedule(stages)), x, masked=True)
            torch.testing.assert_close(masked.logits, outcome.logits, atol=1e-5, rtol=1e-5)
            alone = [apply_schedule(small_model(layout), Schedule(stages))(image[None]) for image in x]
            torch.testing.assert_close(torch.cat(alone), outcome.logits, atol=1e-5, rtol=1e-5)
    assert threshold == 2.0 and set(outcome.counts[0].tolist()) == {1}
    assert model.num_prefix_tokens == PREFIXES[layout]


# --- the score of tokens that joined, for every verb -------------------------------------------------------------

JOINS = [verb for verb, entry in REDUCERS.items() if not entry.holds and verb != "pool"]


@pytest.mark.parametrize("verb", JOINS)
@pytest.mark.parametrize("rule", ["sum", "max"])
def test_the_score_of_a_token_is_the_sum_or_the_largest_of_its_parts(verb: str, rule: str) -> None:
    """Compares with a computation from the groups of merged tokens. All scores differ."""
    model, x = small_model(), torch.randn(2, 1 + 36, 32)
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 2, 4, 37, 8, generator=generator)
    attended = Attended(q, k, v, v, None, 8**-0.5, 1, 1, keys_BnD=mean_keys(k, 1))
    (step,) = resolve(Schedule((stage_of(verb),)), shape_of(model))
    own = gather_evidence(step.stage, x[:, 1:], attended, False)
    second = Stage(1, score="attention_received", keep=0.5, options={"merged": rule})
    before = gather_evidence(second, x[:, 1:], attended, False)
    grouping: list[Grouping] = []
    entry = REDUCERS[verb]

    def spy(*arguments, **options):
        grouping.append(entry.function(*arguments, **options))
        return grouping[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REDUCERS._things, verb, replace(entry, function=spy))
        (step,) = resolve(Schedule((stage_of(verb),)), shape_of(model))
        _, (after,) = take_step(step, TokenState(x), 1, own, (before,))
    for image in range(2):
        assert_close(after.scores_Bn[image].tolist(), by_hand(grouping[0], before, rule, image))


def stage_of(verb: str) -> Stage:
    score = "class_attention" if REDUCERS[verb].ranks else "none"
    return Stage(1, score=score, keep=0.6, reduce=verb, options={"variance": 1.0} if verb == "drop_or_merge" else {})


def by_hand(grouping: Grouping, before: Evidence, rule: str, image: int) -> list[float]:
    scores, result = before.scores_Bn[image].tolist(), []
    guests = [] if grouping.guests_BG is None else grouping.guests_BG[image].tolist()
    for place, kept in enumerate(grouping.kept_BK[image].tolist()):
        host = kept if grouping.ordered_BnC is None else place
        hosted = [] if grouping.host_BG is None else (grouping.host_BG[image] == host).nonzero()[:, 0].tolist()
        shares = [1.0 if grouping.size_share_BG is None else grouping.size_share_BG[image, g].item() for g in hosted]
        parts = [scores[guests[g]] for g in hosted]
        summed = scores[kept] + sum(share * part for share, part in zip(shares, parts, strict=True))
        result.append(max([scores[kept], *parts]) if rule == "max" else summed)
    if guests and grouping.host_BG is None:
        result.append(max(scores[g] for g in guests) if rule == "max" else sum(scores[g] for g in guests))
    return result


def assert_close(one: list[float], other: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("verb", [verb for verb in JOINS if REDUCERS[verb].masked is not None])
@torch.no_grad()
def test_the_largest_part_is_the_same_masked_and_gathered(verb: str) -> None:
    stages = (
        Stage(0, score="predictor", tokens=33),
        stage_of(verb),
        Stage(1, score="attention_received", keep=0.6, options={"merged": "max"}),
        Stage(2, at="pre", score="attention_received", keep=0.8, options={"merged": "max"}),
    )
    model = apply_schedule(small_model("registers"), Schedule(stages))
    gathered, masked = (trace(model, images(4), masked=mode) for mode in (False, True))
    torch.testing.assert_close(masked.logits, gathered.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_drop_or_merge_merges_one_image_and_drops_in_the_other(sized: bool, largest: bool) -> None:
    """In one batch. Tokens, sizes and the evidence of later stages are those of the verb that each image needs."""
    shape, generator = shape_of(small_model()), torch.Generator().manual_seed(0)
    x, scores, keys = (torch.rand(of, generator=generator) for of in ((2, 37, 32), (2, 36), (2, 36, 8)))
    scores[0] = 0.5 + 0.001 * scores[0]
    size = torch.randint(1, 4, (2, 36), generator=generator).float()
    later = (Evidence(scores.flip(1), takes_largest=largest), Evidence(None, keys.flip(1)))

    def after(verb: str, score: str, **options: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (step,) = resolve(Schedule((Stage(1, score=score, keep=0.6, reduce=verb, options=options),)), shape)
        state, (first, second) = take_step(step, TokenState(x, size if sized else None), 1, own, later)
        sizes = torch.ones(2, step.after) if state.size_Bn is None else state.size_Bn
        assert first.scores_Bn is not None and second.keys_BnD is not None
        return state.tokens_BNC, sizes, first.scores_Bn, second.keys_BnD

    own = Evidence(scores, keys)
    either = after("drop_or_merge", "value_weighted", variance=1e-4)
    merged, dropped = after("merge", "none"), after("drop", "value_weighted")
    for ours, of_merge, of_drop in zip(either, merged, dropped, strict=True):
        assert torch.equal(ours[0], of_merge[0])
        if sized and ours.ndim == 3:  # a mean weighted by size: what nothing joins is multiplied and divided by its own
            torch.testing.assert_close(ours[1], of_drop[1], atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(ours[1], of_drop[1])
        assert not torch.equal(of_merge[0], of_drop[0]) and not torch.equal(of_merge[1], of_drop[1])


# --- presets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in presets() if not name.startswith(("diffrate", "dyn"))])
def test_presets_name_what_their_paper_does(name: str) -> None:
    """Alternating verbs have parity "all". Where merged tokens have a score, it is the largest of the parts."""
    shape = replace(shape_of(small_model()), depth=12, patch_tokens=196, prefix_tokens=2, class_tokens=2)
    stages = load_preset(name, shape).stages
    merges_before = False
    for stage in stages:
        if "parity" in REDUCERS[stage.reduce].options:
            assert options_of(stage)["parity"] == "all"
        if merges_before and "merged" in options_of(stage):
            assert options_of(stage)["merged"] == "max"
        merges_before = merges_before or REDUCERS[stage.reduce].merges


def test_an_option_without_effect_does_not_make_another_schedule() -> None:
    """With one prefix token both parities give the same pairs, so a study can continue with the other parity."""
    shape = shape_of(small_model())
    for verb in ("merge", "drop_or_merge"):
        score = "value_weighted" if REDUCERS[verb].ranks else "none"
        plain, counted = (
            Schedule((Stage(1, score=score, keep=0.6, reduce=verb, options=options),))
            for options in ({}, {"parity": "all"})
        )
        for prefix_tokens in (0, 1, 2, 5):
            there = replace(shape, prefix_tokens=prefix_tokens)
            assert (canonical(plain, there) == canonical(counted, there)) == (prefix_tokens % 2 == 1)


def test_every_entry_has_the_default_of_its_first_release() -> None:
    """A released default never changes. New behaviour gets a new option value."""
    assert {entry.options.get("merged", "sum") for entry in SCORERS.values()} == {"sum"}
    assert {entry.options.get("parity", "patches") for entry in REDUCERS.values()} == {"patches"}
