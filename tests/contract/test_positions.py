"""Positions travel with their tokens: against timm's own patch dropout, and between the places of the image."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from small_models import EVA_LAYOUTS, KINDS, NAFLEX_LAYOUTS, images, small_model
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from prunesearch.errors import ModelError
from prunesearch.models import apply_schedule, block_inputs, remove_schedule, run_from, shape_of, steps_of, trace
from prunesearch.models.places import grid_places
from prunesearch.models.rotary import Rotary
from prunesearch.models.step import Evidence, TokenState, centre, take_step
from prunesearch.schedule import Schedule, Stage, resolve
from prunesearch.tokens import SCORERS, ScoreInput, Scorer

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")

READ_PLACES = [layout for layout in KINDS if shape_of(small_model(layout)).has_positions]
"""Layouts whose attention reads where tokens are."""
KEPT = torch.tensor([[1, 2, 3, 7, 8, 20, 30, 31, 35], [0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 17, 29, 33, 34, 35]])
MEAN, HOST = (("position", "mean"),), (("position", "host"),)
JOINING = ("squeeze", "absorb", "merge", "drop_or_merge")


class Dropout(nn.Module):
    """timm's patch dropout, with tokens that are known."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        index = KEPT[..., None].expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, index)], dim=1), KEPT


@pytest.fixture
def chosen() -> Iterator[str]:
    """A score that keeps the tokens of KEPT."""

    def score(scene: ScoreInput) -> Tensor:
        return torch.zeros(scene.patches_BnC.shape[:2]).scatter(1, KEPT, 1.0)

    entry = Scorer("chosen", score, summary="", source="", needs_attention=False, macs=lambda shape, tokens: 0)
    SCORERS.add("chosen", entry)
    yield "chosen"
    del SCORERS._things["chosen"]


@pytest.mark.parametrize("layout", EVA_LAYOUTS)
def test_dropping_at_the_first_block_is_timms_patch_dropout(layout: str, chosen: str) -> None:
    model, x = small_model(layout), images()
    model.patch_drop = Dropout(model.num_prefix_tokens)
    with torch.no_grad():
        expected = model(x)
        model.patch_drop = None
        apply_schedule(model, Schedule((Stage(0, at="pre", score=chosen, tokens=9),)))
        assert torch.equal(model(x), expected)
        # a later stage that leaves the places of the image makes other angles, which are the same at those places
        later = Stage(3, score="key_norm", keep=0.9, reduce="fuse")
        apply_schedule(model, Schedule((Stage(0, at="pre", score=chosen, tokens=9), later)))
        inputs = {}
        hook = model.blocks[3].register_forward_pre_hook(lambda _, given: inputs.update(here=given[0]))
        model(x)
        hook.remove()
        remove_schedule(model)
        model.patch_drop = Dropout(model.num_prefix_tokens)
        hook = model.blocks[3].register_forward_pre_hook(lambda _, given: inputs.update(there=given[0]))
        model(x)
        hook.remove()
    torch.testing.assert_close(inputs["here"], inputs["there"], atol=1e-5, rtol=1e-5)


def rows(positions: Rotary, place_Bn2: Tensor, index: int = 0) -> Tensor:
    return positions.keywords(index, positions.found(place_Bn2))["rope"]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_between_places_are_the_angles_of_a_finer_grid(half: bool, indexing: str) -> None:
    """Every second place of a grid of 12 x 16 is a place of 6 x 8, where the coordinates have the same scale."""
    options = dict(in_pixels=False, ref_feat_shape=[6, 8], grid_indexing=indexing, rotate_half=half)
    coarse = RotaryEmbeddingCat(32, feat_shape=[6, 8], **options).get_embed()
    fine = RotaryEmbeddingCat(32, feat_shape=[12, 16], **options).get_embed()
    positions = Rotary(coarse, 6, 8, between=True)
    place_n2 = Rotary(fine, 12, 16, between=True).grid_n2 / 2
    within = (place_n2[:, 0] <= 5) & (place_n2[:, 1] <= 7)
    found = rows(positions, place_n2[within][None])[0, 0]
    torch.testing.assert_close(found, fine[within], atol=2e-5, rtol=0)
    assert torch.equal(rows(positions, positions.grid_n2[None])[0, 0], coarse), "exact at the places of the image"


def test_between_places_of_dinov3() -> None:
    """Of each three places of a grid three times as fine, the middle one is a place of the coarse grid."""
    coarse = RotaryEmbeddingDinoV3(32, feat_shape=[4, 6]).get_embed()
    fine = RotaryEmbeddingDinoV3(32, feat_shape=[12, 18]).get_embed()
    positions = Rotary(coarse, 4, 6, between=True)
    place_n2 = (Rotary(fine, 12, 18, between=True).grid_n2 - 1) / 3
    within = (place_n2 >= 0).all(dim=1) & (place_n2[:, 0] <= 3) & (place_n2[:, 1] <= 5)
    torch.testing.assert_close(rows(positions, place_n2[within][None])[0, 0], fine[within], atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(3, 3), (4, 4), (2, 5), (1, 4), (4, 1), (7, 1), (8, 8)])
@pytest.mark.parametrize("table", ["dinov3", "cat", "cat of 32", "cat of 32 x 24"])
def test_between_places_of_few_patches(table: str, size: tuple[int, int]) -> None:
    """An angle grows by more than half a turn from one patch to the next, which the model's own table does not tell."""
    height, width = size
    if table == "dinov3":
        model = small_model("eva_dinov3", img_size=(4 * height, 4 * width))
        model.rope = RotaryEmbeddingDinoV3(8, feat_shape=[height, width], rotate_half=True)
    else:
        model = small_model("eva_rotary_rope", img_size=(4 * height, 4 * width), dynamic_img_size=True)
        reference = {"cat": [16, 16], "cat of 32": [32, 32]}.get(table, [32, 24])
        model.rope = RotaryEmbeddingCat(8, in_pixels=False, ref_feat_shape=reference)
    apply_schedule(model, Schedule((Stage(1, score="key_norm", keep=0.5, reduce="fuse"),)))
    positions = model.positions()
    fine = model.rope.get_embed(shape=(3 * height, 3 * width))
    place_n2 = (grid_places(3 * height, 3 * width, torch.device("cpu")) - int(table == "dinov3")) / 3
    within = (place_n2 >= 0).all(dim=1) & (place_n2[:, 0] <= height - 1) & (place_n2[:, 1] <= width - 1)
    torch.testing.assert_close(rows(positions, place_n2[within][None])[0, 0], fine[within], atol=1e-4, rtol=0)


def test_between_few_patches_a_table_of_one_size_is_refused() -> None:
    for size, known in ((5, False), (6, True)):
        model = small_model("eva_rotary_rope", img_size=4 * size)
        model.rope = RotaryEmbeddingCat(8, in_pixels=False, feat_shape=[size, size], ref_feat_shape=[16, 16])
        x = images(size=4 * size)
        assert apply_schedule(model, Schedule((Stage(1, score="key_norm", keep=0.5),)))(x).isfinite().all()
        apply_schedule(model, Schedule((Stage(1, score="key_norm", keep=0.5, reduce="fuse"),)))
        if known:
            assert model(x).isfinite().all()
            continue
        with pytest.raises(ModelError, match="5 x 5 patches the rotary angles from one to the next are too far apart"):
            model(x)


@pytest.mark.parametrize("position", ["host", "mean"])
def test_where_joined_tokens_are(position: str) -> None:
    """Merging with sizes: the mean of all places that a token stands for, or the place of its host."""
    shape = shape_of(small_model("eva_mixed"))
    stage = Stage(1, score="none", keep=0.5, reduce="merge", options=(("position", position),))
    steps = resolve(Schedule((stage, Stage(2, score="none", keep=0.5, reduce="merge", options=stage.options))), shape)
    generator = torch.Generator().manual_seed(0)
    x_BNC = torch.randn(2, 36, 36, generator=generator)
    # features: a one for each original token, so that a merged token's features say of which it is the mean
    x_BNC[:] = torch.eye(36)
    state = TokenState(x_BNC, place_Bn2=Rotary(torch.zeros(36, 8), 6, 6, between=True).grid_n2.expand(2, -1, -1))
    grid_n2 = state.place_Bn2[0].clone()
    for step in steps:
        keys_BnD = torch.randn(2, state.tokens_BNC.shape[1], 4, generator=generator)
        state, _ = take_step(step, state, 0, Evidence(None, keys_BnD), ())
    mean_Bn2 = state.tokens_BNC @ grid_n2
    assert state.size_Bn.max() >= 3
    if position == "mean":
        torch.testing.assert_close(state.place_Bn2, mean_Bn2)
    else:
        assert torch.equal(state.place_Bn2, state.place_Bn2.round())
        assert not torch.allclose(state.place_Bn2, mean_Bn2)
        taken = state.tokens_BNC.gather(2, (state.place_Bn2 @ torch.tensor([6.0, 1.0])).long()[..., None])
        assert (taken > 0).all(), "a host's place is that of a token that it stands for"


def test_pooled_tokens_are_at_the_centre() -> None:
    place_Bn2 = torch.tensor([[[0.0, 0.0], [2.0, 4.0], [4.0, 2.0]]])
    assert centre(place_Bn2, 2).tolist() == [[[2.0, 2.0]] * 2]
    assert centre(place_Bn2, 1, torch.tensor([[1.0, 1.0, 0.0]])).tolist() == [[[1.0, 2.0]]]


@pytest.mark.parametrize("verb", JOINING)
@pytest.mark.parametrize("layout", READ_PLACES)
def test_both_positions_are_carried_in_every_pass(layout: str, verb: str) -> None:
    """They differ, and an image alone, in a batch, and with its tokens in their slots gives the same."""
    model, x, logits = small_model(layout), images(), []
    with_class = shape_of(model).has_class_token
    score = "none" if verb == "merge" else "class_attention" if with_class else "key_norm"
    for options in (HOST, MEAN):
        options = (*options, ("variance", 1.0)) if verb == "drop_or_merge" else options  # all images merge
        stages = (
            Stage(1, score=score, keep=0.6, reduce=verb, options=options),  # type: ignore[arg-type]
            Stage(2, at="pre", score="predictor", keep=0.8, reduce="fuse"),
        )
        stages = stages[: 1 if verb == "drop_or_merge" else 2]
        apply_schedule(model, Schedule(stages))
        with torch.no_grad():
            together = model(x)
            alone = torch.cat([model(image[None]) for image in x])
            torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
            masked = trace(model, x, masked=True).logits
            torch.testing.assert_close(together, masked, atol=1e-4, rtol=1e-4)
        logits.append(together)
    assert not torch.allclose(*logits)


@pytest.mark.parametrize("verb", ["absorb", "merge"])
@pytest.mark.parametrize("layout", ["beit_both", "relpos_swin_mlp"])
def test_halfway_between_places_the_last_bits_do_not_decide(layout: str, verb: str) -> None:
    """A pass with tokens in their slots adds means up in another order, and has to find the same nearest place."""
    score = "none" if verb == "merge" else "key_norm"
    first = Stage(0, score="predictor", keep=0.95)
    stages = tuple(Stage(block, score=score, keep=0.5, reduce=verb, options=MEAN) for block in (1, 2))
    model = apply_schedule(small_model(layout), Schedule((first, *stages)))
    for seed in range(4):
        x = torch.randn(32, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            torch.testing.assert_close(model(x), trace(model, x, masked=True).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("verb", ["fuse", "squeeze"])
@pytest.mark.parametrize("layout", READ_PLACES)
def test_an_image_that_is_nan_gives_nan_and_no_place_outside_the_image(layout: str, verb: str) -> None:
    options = MEAN if verb == "squeeze" else ()
    stages = (Stage(1, score="key_norm", keep=0.6, reduce=verb, options=options), Stage(2, score="predictor", keep=0.5))
    model, x = apply_schedule(small_model(layout), Schedule(stages)), images()
    x[1] = torch.nan
    for training in (False, True):
        logits = model.train(training)(x)
        assert logits.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("layout", ["eva_dinov3", "eva_mixed", "beit_both", "naflex_rotary"])
def test_thresholds_pickle_copies_and_checkpointing(layout: str) -> None:
    model, x = small_model(layout), images(5)
    stages = (
        Stage(1, score="class_attention", threshold=0.02, reduce="squeeze", options=MEAN),
        Stage(2, at="pre", score="key_norm", threshold=0.02, reduce="fuse"),
    )
    apply_schedule(model, Schedule(stages))
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(expected, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trace(model, x, masked=True).logits, expected, atol=1e-4, rtol=1e-4)
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        model(x).sum().backward()
        gradients.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
    assert all(gradient.isfinite().all() for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layout", KINDS)
def test_a_run_from_a_block_is_bit_equal(layout: str) -> None:
    model, x = small_model(layout), images()
    score = "key_norm" if not shape_of(model).has_class_token else "class_attention"
    schedule = Schedule(
        (Stage(2, score=score, keep=0.6, reduce="squeeze", options=MEAN), Stage(3, score=score, keep=0.5))
    )
    with torch.no_grad():
        _, inputs = block_inputs(model, x, [2])
        apply_schedule(model, schedule)
        assert torch.equal(run_from(model, inputs[2], 2), model(x))


OF_ANY_SIZE = [*EVA_LAYOUTS, *NAFLEX_LAYOUTS]
"""Layouts whose model takes images of any size in a pass."""


def of_any_size(layout: str) -> torch.nn.Module:
    return small_model(layout, **({"dynamic_img_size": True} if layout in EVA_LAYOUTS else {}))


def resized(model: torch.nn.Module, size: tuple[int, int]) -> torch.nn.Module:
    """The model set to images of another size."""
    if isinstance(model, NaFlexVit):
        model.pretrained_cfg = {"input_size": (3, *size)}
    else:
        model.set_input_size(img_size=size)
    return model.eval()


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (40, 40)])
@pytest.mark.parametrize("layout", OF_ANY_SIZE)
def test_images_of_another_size(layout: str, size: tuple[int, int]) -> None:
    """As a model that was built for that size, with the same weights."""
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    for options in (HOST, MEAN):
        stages = (
            Stage(1, score="key_norm", keep=0.6, reduce="squeeze", options=options),
            Stage(2, at="pre", score="random", keep=0.7),
        )
        models = of_any_size(layout), resized(of_any_size(layout), size)
        logits = [apply_schedule(model, Schedule(stages))(x) for model in models]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings(
    r"ignore:torch.searchsorted\(\)", "ignore:Using a non-tuple sequence"
)  # of timm, as it resizes
@pytest.mark.parametrize("layout", KINDS)
def test_a_size_that_is_set_after_the_schedule_is_the_models_own(layout: str) -> None:
    """An image of that size gives what it gives when the schedule is applied after the size is set; alone too."""
    size = (24, 40)
    x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    first = Stage(1, score="key_norm", keep=0.6, reduce="squeeze", options=MEAN)
    schedule = Schedule((first, Stage(2, at="pre", score="random", keep=0.7)))
    model = resized(apply_schedule(small_model(layout), schedule), size)
    expected = apply_schedule(resized(small_model(layout), size), schedule)
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(logits, expected(x))
        torch.testing.assert_close(model(x[1:2]), logits[1:2], atol=1e-5, rtol=1e-5)
    assert shape_of(model) == shape_of(expected) and shape_of(model).patch_tokens == 60
    assert steps_of(model) == steps_of(expected)


def test_patch_dropout_in_training_is_refused() -> None:
    model = apply_schedule(small_model("eva_mixed", patch_drop_rate=0.5), Schedule((Stage(1, keep=0.5),)))
    assert model(images()).isfinite().all()
    with pytest.raises(Exception, match="patch_drop_rate drops patch tokens at random"):
        model.train()(images())
