"""NaFlexVit on patches of images of different sizes: each image gives what it gives alone, without padding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_models import NAFLEX_LAYOUTS, pairs, small_model
from test_masked import ADAPTIVE, THRESHOLDS
from torch import Tensor, nn

from prunesearch.errors import ModelError, ScheduleError
from prunesearch.models import apply_schedule, remove_schedule, shape_of, trace
from prunesearch.models.naflexvit import patches_of
from prunesearch.schedule import Schedule, Stage

pytestmark = [
    pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

SIZES = [(24, 24), (16, 24), (24, 16), (8, 40), (24, 24), (12, 20)]  # 36, 24, 24, 20, 36 and 15 patches
LENGTH = 40
CLOSE = dict(atol=1e-5, rtol=1e-5)
JOINING = ("squeeze", "absorb", "merge", "drop_or_merge")
ROTARY = [layout for layout, options in NAFLEX_LAYOUTS.items() if "rope_type" in options]
POOLS = {f"naflex_{pool}": ("naflex", dict(global_pool=pool)) for pool in ("avg", "avgmax", "max")}
WAYS = {layout: (layout, {}) for layout in NAFLEX_LAYOUTS} | POOLS
"""Every kind of position, of prefix and of pooling."""


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, *size, generator=generator) for size in SIZES]


def patched(images: list[Tensor], length: int | None = None) -> dict[str, Tensor]:
    """The images as timm's Patchify and NaFlexCollator give them."""
    made = []
    for image in images:
        height, width = image.shape[2] // 4, image.shape[3] // 4
        patches = image[0].reshape(3, height, 4, width, 4).permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
        made.append((patches, torch.cartesian_prod(torch.arange(height), torch.arange(width))))
    length = max(len(patches) for patches, _ in made) if length is None else length
    batch = dict(
        patches=torch.zeros(len(images), length, 48),
        patch_coord=torch.zeros(len(images), length, 2, dtype=torch.int64),
        patch_valid=torch.zeros(len(images), length, dtype=torch.bool),
    )
    for image, (patches, coord) in enumerate(made):
        batch["patches"][image, : len(patches)] = patches
        batch["patch_coord"][image, : len(patches)] = coord
        batch["patch_valid"][image, : len(patches)] = True
    return batch


def one_of(batch: dict[str, Tensor], image: int) -> dict[str, Tensor]:
    return {name: value[image : image + 1] for name, value in batch.items()}


def with_holes() -> dict[str, Tensor]:
    """A batch of which patches are missing, also the first."""
    batch = patched(pictures(), LENGTH)
    batch["patch_valid"] &= torch.rand(batch["patch_valid"].shape, generator=torch.Generator().manual_seed(2)) < 0.7
    batch["patch_valid"][1, :2] = False
    return batch


def model_of(way: str, **options: object) -> nn.Module:
    layout, given = WAYS[way]
    return small_model(layout, **{**given, **options})


def score_for(model: nn.Module) -> str:
    return "class_attention" if shape_of(model).has_class_token else "key_norm"


def agree(model: nn.Module, schedule: Schedule, images: list[Tensor] | None = None) -> Tensor:
    """In a padded batch, alone, and as a plain tensor."""
    apply_schedule(model, schedule)
    images = pictures() if images is None else images
    with torch.no_grad():
        together = model(patched(images, LENGTH))
        torch.testing.assert_close(together, torch.cat([model(patched([image])) for image in images]), **CLOSE)
        torch.testing.assert_close(together, torch.cat([model(image) for image in images]), **CLOSE)
    return together


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_without_stages_it_is_timms_own(way: str, training: bool) -> None:
    model, batch = model_of(way).train(training), with_holes()
    with torch.no_grad():
        expected, features = model(batch), model.forward_features(**batch)
        apply_schedule(model, Schedule())
        assert torch.equal(model(batch), expected) and torch.equal(
            model(batch["patches"], *list(batch.values())[1:]), expected
        )
        outcome = trace(model, batch)
        assert torch.equal(outcome.logits, expected)
        assert torch.equal(outcome.present_Bn, batch["patch_valid"].float())
        assert torch.equal(outcome.patches_BnC, patches_of(model, features["patches"]))
        found = model.forward_features(**batch)
        assert found.keys() == features.keys() and all(torch.equal(found[name], features[name]) for name in found)
        assert torch.equal(model.forward_head(**found), expected)
        mask = torch.zeros(len(SIZES), 1, 1, LENGTH + model.num_prefix_tokens)
        assert torch.equal(model(batch, attn_mask=mask), remove_schedule(model)(batch, attn_mask=mask))


@pytest.mark.parametrize("way", WAYS)
def test_with_a_schedule_that_keeps_all_it_is_timms_to_rounding(way: str) -> None:
    """Also where patches are missing: positions are those of the patches that are there."""
    model = model_of(way)
    for batch in (patched(pictures(), LENGTH), with_holes()):
        with torch.no_grad():
            expected = remove_schedule(model)(batch)
            for stage in (Stage(1, score="key_norm", keep=1.0), Stage(1, at="pre", score="random", threshold=-1.0)):
                torch.testing.assert_close(apply_schedule(model, Schedule((stage,)))(batch), expected, **CLOSE)


@pytest.mark.parametrize("at", ["pre", "mid"])
@pytest.mark.parametrize("way", ["naflex_avg", "naflex_map", "naflex_rotary", "naflex_mixed"])
def test_an_image_alone_is_as_in_a_batch_and_as_a_tensor(way: str, at: str) -> None:
    model = model_of(way)
    with_class = shape_of(model).has_class_token
    ranking = "class_attention" if with_class else "key_norm"
    for score, verb in pairs(with_class):
        if verb != "drop" and score not in (ranking, "none"):  # every score and every verb; all pairs take a minute
            continue
        amount = dict(tokens=7) if verb == "pool" else dict(keep=0.6)
        later = () if verb == "pool" else (Stage(2, at=at, score="key_norm", keep=0.8, reduce="fuse"),)  # type: ignore[arg-type]
        for position in ("host", "mean") if verb in JOINING and WAYS[way][0] in ROTARY else (None,):
            options = () if position is None else (("position", position),)
            first = Stage(1, at=at, score=score, reduce=verb, options=options, **amount)  # type: ignore[arg-type]
            agree(model, Schedule((first, *later)), pictures()[1:5])


@pytest.mark.parametrize("way", WAYS)
def test_merged_tokens_are_pooled_by_size_also_when_some_images_merge_nothing(way: str) -> None:
    """At 0.95, images of 15 and 20 patches keep all of them."""
    model = model_of(way)
    stages = (Stage(1, score="none", keep=0.95, reduce="merge"), Stage(2, score="none", keep=0.95, reduce="merge"))
    merged = agree(model, Schedule(stages))
    assert not torch.allclose(merged, agree(model, Schedule()), atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_missing_patches_are_as_if_they_were_never_there(way: str) -> None:
    """Alone and with other content in the padding."""
    model, batch = model_of(way), with_holes()
    score = score_for(model)
    apply_schedule(
        model,
        Schedule((Stage(0, at="pre", score="random", keep=0.8), Stage(1, score=score, keep=0.6, reduce="squeeze"))),
    )
    with torch.no_grad():
        expected = model(batch)
        torch.testing.assert_close(torch.cat([model(one_of(batch, image)) for image in range(6)]), expected, **CLOSE)
        noise = torch.randn(batch["patches"].shape)
        other = torch.where(batch["patch_valid"][..., None], batch["patches"], noise)
        torch.testing.assert_close(model({**batch, "patches": other}), expected, **CLOSE)
        assert (trace(model, batch).present_Bn.sum(dim=1) < batch["patch_valid"].sum(dim=1)).all()


@pytest.mark.parametrize("at", ["pre", "mid"])
@pytest.mark.parametrize(("score", "verb"), ADAPTIVE)
def test_thresholds_and_learned_scores(score: str, verb: str, at: str) -> None:
    stages = (
        Stage(1, at=at, score=score, threshold=THRESHOLDS.get(score), reduce=verb),  # type: ignore[arg-type]
        Stage(3, keep=0.8, score="predictor", reduce="fuse"),
    )
    for way in ("naflex_avg", "naflex_rotary"):
        model, batch = model_of(way), patched(pictures(), LENGTH)
        agree(model, Schedule(stages))
        with torch.no_grad():
            gathered, masked = trace(model, batch), trace(model, batch, masked=True)
            alone = [trace(model, image) for image in pictures()]
        torch.testing.assert_close(masked.logits, gathered.logits, atol=1e-5, rtol=1e-4)
        assert len(gathered.counts) == len(masked.counts) == 2
        for step, count_B in enumerate(gathered.counts):
            assert count_B.tolist() == [one.counts[step].item() for one in alone]


def test_counts_are_after_the_same_steps_for_all_images() -> None:
    """At 0.95, the last two stages remove nothing from images of 20 patches and less."""
    stages = (
        Stage(0, score="none", threshold=1.1, reduce="merge"),
        Stage(1, score="key_norm", keep=0.95),
        Stage(1, score="key_norm", keep=0.95),
        Stage(2, at="pre", score="key_norm", keep=0.5),
    )
    model = apply_schedule(model_of("naflex_map"), Schedule(stages))
    for masked in (False, True):
        counts = trace(model, patched(pictures(), LENGTH), masked=masked).counts
        assert [count_B.tolist() for count_B in counts] == [
            [36, 24, 24, 20, 36, 15],
            [35, 23, 23, 19, 35, 15],
            [34, 22, 22, 19, 34, 15],
            [17, 11, 11, 10, 17, 8],
        ]


def test_counts_of_images_in_which_an_earlier_step_does_nothing() -> None:
    """Of 8 patches, 0.9 keeps all, so that the first predictor does not run, and its step and the next have no counts.

    Before it, half of the patches went.
    """
    stages = (
        Stage(0, score="key_norm", keep=0.5),
        Stage(1, score="predictor", keep=0.9),
        Stage(2, at="pre", score="key_norm", keep=0.5, reduce="fuse"),
        Stage(2, score="predictor", keep=0.5),
    )
    model = apply_schedule(model_of("naflex_avg"), Schedule(stages))
    counts = trace(model, patched(pictures(), LENGTH), masked=True).counts
    assert [count_B.tolist() for count_B in counts] == [
        [17, 11, 11, 9, 17, 8],
        [10, 7, 7, 6, 10, 5],
        [5, 4, 4, 3, 5, 3],
    ]


@pytest.mark.parametrize("way", ["naflex_avg", "naflex_rotary"])
def test_gradients_of_a_batch_are_those_of_its_images(way: str) -> None:
    """With masked training of a threshold, and with gradient checkpointing."""
    score = score_for(model_of(way))
    stages = (
        Stage(0, score="key_norm", keep=0.8, reduce="squeeze"),
        Stage(1, score=score, threshold=0.03, reduce="fuse"),
        Stage(2, score="none", keep=0.8, reduce="merge"),
    )
    model, gradients = apply_schedule(model_of(way), Schedule(stages)).train(), []
    for inputs in ([patched(pictures(), LENGTH)], [patched([image]) for image in pictures()], pictures()):
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            sum(trace(model, x).logits.square().sum() + trace(model, x).counts[-1].sum() for x in inputs).backward()
            gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0]["token_stages.block1_mid.threshold"].abs() > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-3, rtol=1e-3)


def test_a_predictor_trains() -> None:
    schedule = Schedule((Stage(1, score="predictor", keep=0.7, reduce="squeeze"), Stage(2, score="random", keep=0.5)))
    model = apply_schedule(model_of("naflex_mixed"), schedule).train()
    outcome = trace(model, patched(pictures(), LENGTH))
    (outcome.logits.square().sum() + outcome.counts[0].sum()).backward()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)
    assert model.get_parameter("token_stages.block1_mid.scorer.embed.weight").grad.abs().sum() > 0


@pytest.mark.parametrize("way", WAYS)
def test_features_are_a_dict_and_make_the_logits(way: str) -> None:
    model, batch = model_of(way), patched(pictures(), LENGTH)
    schedules = [Schedule((Stage(1, score="key_norm", keep=0.6),)), Schedule((Stage(1, score="key_norm", tokens=9),))]
    schedules.append(Schedule((Stage(1, score="key_norm", threshold=0.03, reduce="fuse"),)))
    for schedule in schedules:
        apply_schedule(model, schedule)
        with torch.no_grad():
            for features in (model.forward_features(batch), model.forward_features(**batch)):
                assert features["patch_valid"].dtype == torch.bool
                torch.testing.assert_close(model.forward_head(**features), model(batch), **CLOSE)
    assert model.forward_head(**features, pre_logits=True).shape == (6, 32)


def test_a_batch_without_images_of_one_size_and_in_half_precision() -> None:
    batch = patched(pictures(), LENGTH)
    for way in ("naflex_map", "naflex_max"):
        model = apply_schedule(model_of(way), Schedule((Stage(1, score="key_norm", keep=0.5, reduce="fuse"),)))
        none = {name: value[:0] for name, value in batch.items()}
        assert model(none).shape == (0, 10) and model.train()(none).shape == (0, 10)
        model.eval()
        alike = one_of(batch, 0)
        torch.testing.assert_close(model(alike), model(pictures()[0]), **CLOSE)
        assert trace(model, alike).present_Bn is None
        half = {**batch, "patches": batch["patches"].bfloat16()}
        outcome = trace(copy.deepcopy(model).bfloat16(), half)
        assert outcome.logits.dtype == torch.bfloat16 and outcome.logits.isfinite().all()
        assert outcome.present_Bn.dtype == torch.float32, "so that sums of it are counts"


def test_pickle_hooks_and_removal() -> None:
    model, batch, lengths = model_of("naflex_rotary"), patched(pictures(), LENGTH), []
    before = model(batch)
    apply_schedule(model, Schedule((Stage(1, score="key_norm", keep=0.5),)))
    expected = model(batch)
    assert torch.equal(pickle.loads(pickle.dumps(model))(batch), expected)
    hook = model.blocks[2].register_forward_hook(lambda module, given, left: lengths.append(tuple(left.shape[:2])))
    model(batch)
    hook.remove()
    assert lengths == [(2, 21), (1, 15), (1, 15), (1, 13), (1, 11)], "a call for each height and width"
    assert torch.equal(remove_schedule(model)(batch), before)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", ["patches", "patch_coord", "patch_valid"])
def test_all_three_are_needed(name: str, empty: bool) -> None:
    model, batch = model_of("naflex"), patched(pictures())
    apply_schedule(model, Schedule(() if empty else (Stage(1, keep=0.5),)))
    del batch[name]
    with pytest.raises(ModelError, match=f"patches without {name}"):
        model(batch)
    if "patches" in batch:
        with pytest.raises(ModelError, match=f"patches without {name}"):
            model(**{"x": batch.pop("patches"), **batch})
        with pytest.raises(ModelError, match="a tensor of 3 dimensions is no batch of images"):
            model(torch.zeros(2, 36, 48))


def test_what_patches_cannot_have_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = patched(pictures(), LENGTH)
    model = apply_schedule(model_of("naflex_rotary"), Schedule((Stage(1, keep=0.5, reduce="merge", score="none"),)))
    nothing = batch["patch_valid"].clone()
    nothing[3] = False
    with pytest.raises(ModelError, match="image 3 of the batch has no valid patch"):
        model({**batch, "patch_valid": nothing})
    with pytest.raises(ModelError, match="patches of image 0 of the batch are not in the order of their coordinates"):
        model({name: value.flip(1) for name, value in batch.items()})
    for name, value in (("patch_coord", batch["patch_coord"][:, :20]), ("patch_valid", batch["patch_valid"][:1])):
        with pytest.raises(ModelError, match=r"patch_coord of .* and patch_valid of .* do not go together"):
            model({**batch, name: value})
    with pytest.raises(ModelError, match="with at least one patch"):
        model({name: value[:, :0] for name, value in batch.items()})
    with pytest.raises(ModelError, match="attn_mask and is_causal cannot be combined"):
        model(batch, attn_mask=torch.zeros(1))
    with pytest.raises(ModelError, match=r"pools over merged .*Call the whole model"):
        model.forward_head(**model.forward_features(batch))
    few = apply_schedule(model_of("naflex_map"), Schedule((Stage(1, score="key_norm", tokens=18),)))
    with pytest.raises(ScheduleError, match=r"on images of 15 patch tokens .*: stage at block 1"):
        few(batch)
    learns = apply_schedule(model_of("naflex_map"), Schedule((Stage(1, score="key_norm", threshold=0.1),))).train()
    with pytest.raises(ModelError, match="forward_features: this schedule trains with tokens masked"):
        learns.forward_features(batch)
    drops = apply_schedule(
        model_of("naflex_map", patch_drop_rate=0.5), Schedule((Stage(1, score="key_norm", keep=0.5),))
    )
    assert drops(batch).isfinite().all()
    with pytest.raises(ModelError, match="patch_drop_rate drops patch tokens at random"):
        drops.train()(batch)
    tokens = apply_schedule(
        model_of("naflex", global_pool="", num_classes=0), Schedule((Stage(1, score="key_norm", keep=0.5),))
    )
    assert tokens.forward_features(batch)["patch_valid"].sum(dim=1).tolist() == [18, 12, 12, 10, 18, 8]
    with pytest.raises(ModelError, match="global_pool='' returns tokens"):
        tokens(batch)
    monkeypatch.setattr("prunesearch.models.naflexvit.is_distributed", lambda blocks: True)
    with pytest.raises(ModelError, match=r"sharded \(FSDP\) must be called equally often"):
        model(batch)


@pytest.mark.parametrize("way", ["jit.trace", "export", "strict export", "compile"])
def test_recorded_graphs_are_refused(way: str) -> None:
    model, batch = model_of("naflex"), patched(pictures(), LENGTH)
    apply_schedule(model, Schedule((Stage(1, keep=0.5),)))
    torch._dynamo.reset()
    record = {
        "jit.trace": lambda: torch.jit.trace(model, tuple(batch.values()), check_trace=False),
        "export": lambda: torch.export.export(model, (batch,)),
        "strict export": lambda: torch.export.export(model, tuple(batch.values()), strict=True),
        "compile": lambda: torch.compile(model, fullgraph=True, backend="eager")(batch),
    }
    with torch.no_grad():
        expected = model(batch)
        with pytest.raises(Exception, match="would hold the groups of the batch") as caught:
            record[way]()
        assert isinstance(caught.value, ModelError) or "ModelError" in str(caught.value)
        assert torch.equal(model(batch), expected)


@pytest.mark.slow
def test_without_fullgraph_patches_run_uncompiled() -> None:
    model, batch = model_of("naflex_rotary", depth=2), patched(pictures(), LENGTH)
    apply_schedule(model, Schedule((Stage(0, score="key_norm", keep=0.5),)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for x in (batch, one_of(batch, 1), {name: value.flip(0) for name, value in batch.items()}):
            torch.testing.assert_close(compiled(x), model(x), **CLOSE)
