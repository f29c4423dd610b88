"""Every timm model with a plain block: an empty schedule changes no bit, a real one gives the resolved counts."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from small_models import images, randomise

from prunesearch.errors import ModelError
from prunesearch.models import apply_schedule, input_size, remove_schedule, shape_of
from prunesearch.schedule import Schedule, Stage, resolve

MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin")
NAMES = [name for module in MODULES for name in timm.list_models(module=module)]


@functools.cache
def refused(name: str) -> bool:
    """Whether prunesearch refuses this model. It is built on the meta device with two blocks."""
    with torch.device("meta"):
        model = timm.create_model(name, depth=2)
    try:
        shape_of(model)
    except ModelError:
        return True
    return False


def small(name: str) -> torch.nn.Module:
    """The variant with two blocks, four heads of 24, and the smallest image that its stem accepts."""
    with torch.device("meta"):
        patch = timm.create_model(name, depth=2).patch_embed
    if hasattr(patch, "backbone"):  # keep its weights: random ones overflow in the deep ReLU stack of this small CNN
        model = timm.create_model(name, depth=2, num_classes=5, img_size=64)
        randomise(model.blocks)
    else:
        width = dict(embed_dim=96, num_heads=4)
        model = timm.create_model(name, depth=2, num_classes=5, img_size=4 * patch.patch_size[0], **width)
        randomise(model)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_variant(name: str) -> None:
    if refused(name):
        pytest.skip("timm builds this name from another block")
    model = small(name)
    x = images(2, model.patch_embed.img_size[0])
    assert input_size(model) == tuple(x.shape[1:])
    keys = list(model.state_dict())
    with torch.no_grad():
        before = model(x)
        assert torch.isfinite(before).all()
        assert torch.equal(apply_schedule(model, Schedule())(x), before)
        verb = "squeeze" if model.has_class_token else "merge"
        schedule = Schedule((Stage(0, keep=0.6, reduce=verb), Stage(1, at="pre", score="random", keep=0.7)))
        apply_schedule(model, schedule)
        left = resolve(schedule, shape_of(model))[-1].after
        assert model.forward_features(x).shape[1] == left + model.num_prefix_tokens
        assert torch.isfinite(model(x)).all()
        assert list(model.state_dict()) == keys
        assert torch.equal(remove_schedule(model)(x), before)


@pytest.mark.slow
def test_at_least_the_known_number_of_names_is_supported() -> None:
    """timm 1.0.31 has 183 names with the plain block outside vitamin, and 13 in it."""
    assert sum(not refused(name) for name in NAMES) >= 183
