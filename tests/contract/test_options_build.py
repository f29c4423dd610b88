"""Promise: a model option within its bounds builds a model, or a sentence says why it cannot."""

from __future__ import annotations

import inspect

import pytest
import timm
from timm.models.naflexvit import NaFlexVitCfg

from prunesearch.config import ModelConfig, Scalar, as_options
from prunesearch.errors import ModelError
from prunesearch.evaluate import model_problems, model_shape
from prunesearch.evaluate.sections import OPTIONS, Bounds

# small models of every class that takes schedules
MODELS: dict[str, dict[str, Scalar]] = {
    "vit_digits_patch1_8": {"depth": 2},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "embed_dim": 48},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24},
    "convnext_tiny": {},
    "vit_small_patch16_dinov3": {"depth": 2, "embed_dim": 96},
    "eva02_tiny_patch14_224": {"depth": 2, "embed_dim": 48},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "vit_relpos_small_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "naflexvit_base_patch16_gap": {"depth": 2, "embed_dim": 48, "num_heads": 3},
}
VALUES = [
    (name, value)
    for name, possible in OPTIONS.items()
    for value in (possible[1:] if isinstance(possible, Bounds) else possible)
]
CLASSES = (
    timm.models.VisionTransformer,
    timm.models.SwinTransformer,
    timm.models.ConvNeXt,
    timm.models.Eva,
    timm.models.Beit,
    timm.models.VisionTransformerRelPos,
    NaFlexVitCfg,
)
KNOWN = {name for kind in CLASSES for name in inspect.signature(kind.__init__).parameters}
"""Options that this version of timm has; old versions lack some of ours."""
TAKEN: set[str] = set()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), VALUES, ids=[f"{name}={value!r}" for name, value in VALUES])
def test_an_option_builds_or_is_a_sentence(name: str, value: Scalar) -> None:
    built = [takes(model, name, value) for model in MODELS]
    if any(built):
        TAKEN.add(name)


def takes(model: str, name: str, value: Scalar) -> bool:
    """Whether a model builds with an option. If not, the error must say what is possible."""
    config = ModelConfig(model, options=as_options({**MODELS[model], name: value}))
    assert model_problems(config) == []
    try:
        return model_shape(config).depth >= 1
    except ModelError as error:
        assert "Possible: " in str(error)
        return False


def test_every_option_is_one_that_some_model_takes() -> None:
    for name in set(OPTIONS) & KNOWN - TAKEN:  # when another process has tried them
        values = [value for option, value in VALUES if option == name]
        assert any(takes(model, name, value) for model in MODELS for value in values), name
    assert set(OPTIONS) <= KNOWN or timm.__version__ != "1.0.31"
