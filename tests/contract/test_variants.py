"""Every ViT of timm that is supported: an empty schedule changes no bit, a real one gives the resolved counts."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from small_models import images, randomise

from prunesearch.errors import ModelError
from prunesearch.models import apply_schedule, input_size, remove_schedule, shape_of
from prunesearch.schedule import Schedule, Stage, resolve

PLAIN = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin")
MODULES = (*PLAIN, "eva", "beit", "naflexvit", "vision_transformer_relpos")
NAMES = [name for module in MODULES for name in timm.list_models(module=module)]


@functools.cache
def refused(name: str) -> str:
    """Why prunesearch refuses this model; "" if it takes it. It is built on the meta device with its own depth."""
    with torch.device("meta"):
        model = timm.create_model(name)
    try:
        shape_of(model)
    except ModelError as error:
        return str(error)
    return ""


def small(name: str) -> torch.nn.Module:
    """The variant with two blocks, four heads of 24, and the smallest image that its stem accepts."""
    # Sapiens 2 lists the key heads of each of its own blocks; a number holds for all blocks.
    shallow = {"depth": 2, "num_kv_heads": 4} if name.endswith("sapiens2") else {"depth": 2}
    with torch.device("meta"):
        built = timm.create_model(name, **shallow)
    patch = getattr(built, "patch_embed", None)
    if hasattr(patch, "backbone"):  # keep its weights: random ones overflow in the deep ReLU stack of this small CNN
        model = timm.create_model(name, **shallow, num_classes=5, img_size=64)
        randomise(model.blocks)
        return model.eval()
    width = dict(**shallow, embed_dim=96, num_heads=4, num_classes=5)
    if patch is None:
        size = 4 * built.embeds.patch_size[0]
        model = timm.create_model(name, pretrained_cfg_overlay={"input_size": (3, size, size)}, **width)
    else:
        model = timm.create_model(name, img_size=4 * patch.patch_size[0], **width)
    return randomise(model).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_variant(name: str) -> None:
    if refused(name):
        pytest.skip(refused(name))
    model = small(name)
    patch = getattr(model, "patch_embed", None)
    x = images(2, 4 * model.embeds.patch_size[0] if patch is None else patch.img_size[0])
    assert input_size(model) == tuple(x.shape[1:])
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(x)
        assert torch.isfinite(before).all()
        assert torch.equal(apply_schedule(model, Schedule())(x), before)
        verb = "squeeze" if shape_of(model).has_class_token else "merge"
        schedule = Schedule((Stage(0, keep=0.6, reduce=verb), Stage(1, at="pre", score="random", keep=0.7)))
        apply_schedule(model, schedule)
        left = resolve(schedule, shape_of(model))[-1].after
        assert model.forward_features(x).shape[1] == left + model.num_prefix_tokens
        assert torch.isfinite(model(x)).all()
        assert list(model.state_dict()) == keys
        assert torch.equal(remove_schedule(model)(x), before)


@pytest.mark.slow
def test_at_least_the_known_number_of_names_with_the_plain_block_is_supported() -> None:
    """timm 1.0.31 has 183 names with the plain block outside vitamin, and 13 in it."""
    assert sum(not refused(name) for module in PLAIN for name in timm.list_models(module=module)) >= 183


@pytest.mark.slow
@pytest.mark.skipif(timm.__version__ < "1.0.31", reason="earlier versions of timm have fewer names")
@pytest.mark.parametrize(
    ("module", "supported", "why"),
    [
        ("vision_transformer", 153, "is not supported. Possible: timm's "),
        ("eva", 61, "its layers have other sizes than the arithmetic takes all blocks to have"),
        ("beit", 7, ""),
        ("naflexvit", 14, ""),
        ("vision_transformer_relpos", 14, ""),
    ],
)
def test_at_least_the_known_number_of_names_is_supported(module: str, supported: int, why: str) -> None:
    """In timm 1.0.31. The others have blocks that are refused by name."""
    reasons = [refused(name) for name in timm.list_models(module=module)]
    assert sum(not reason for reason in reasons) >= supported
    assert all(why in reason for reason in reasons if reason)
