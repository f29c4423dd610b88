"""A `ModelConfig` as a model: timm's create_model, with pretrained weights or a local checkpoint."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from prunesearch.config import ModelConfig
from prunesearch.errors import ModelError
from prunesearch.models import digits_vit, shape_of  # noqa: F401  (digits_vit registers its model with timm)
from prunesearch.models.weights import load_weights, misfits, read_weights
from prunesearch.registry import did_you_mean
from prunesearch.schedule import ModelShape

FRESH_SEED = 0
"""Of weights that neither timm nor a checkpoint gives, so that every worker starts from the same ones."""


def build_model(config: ModelConfig, device: torch.device | str = "cpu", start: str | None = None) -> nn.Module:
    """The dense model in evaluation mode. Yours to change: each call returns a copy of weights loaded once.

    start: safetensors file of other weights for it. Raises ModelError for a name timm does not know, weights that are
    not there or do not fit, wrong options.
    """
    model = copy.deepcopy(_dense_model(config))
    if start is not None:
        load_weights(model, _weights(start, Path(start).stat().st_mtime_ns if Path(start).is_file() else 0))
    return model.to(device)


@lru_cache(maxsize=1)
def _weights(path: str, modified: int) -> dict[str, Tensor]:
    """Read once, and again when the file is another one."""
    return read_weights(path)


@lru_cache(maxsize=16)
def model_shape(config: ModelConfig) -> ModelShape:
    """The shape of the model, without weights. Raises ModelError also for models prunesearch cannot change."""
    return shape_of(_skeleton(config))


@lru_cache(maxsize=16)
def parameter_count(config: ModelConfig) -> int:
    """How many parameters the model has, without making them."""
    return sum(parameter.numel() for parameter in _skeleton(config).parameters())


def _skeleton(config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        return _create(config, pretrained=False)


@lru_cache(maxsize=2)
def _dense_model(config: ModelConfig) -> nn.Module:
    if config.pretrained and config.checkpoint is not None:
        raise ModelError(
            f"model: both pretrained: true and checkpoint {config.checkpoint!r} were given. "
            f"Possible: one source of weights. Leave one of them out."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FRESH_SEED)
        model = _create(config, pretrained=config.pretrained)
    if config.checkpoint is not None:
        _load_checkpoint(model, config.checkpoint)
    return model.eval()


def _create(config: ModelConfig, pretrained: bool) -> nn.Module:
    _check_name(config.name)
    keywords: dict[str, Any] = dict(config.options)
    if config.image_size is not None:
        keywords |= _size_keywords(config)
    if config.num_classes is not None:
        keywords["num_classes"] = config.num_classes
    try:
        return timm.create_model(config.name, pretrained=pretrained, **keywords)
    except Exception as error:  # timm, the hub and the model's own constructor raise anything
        options = ", ".join(f"{name}={value!r}" for name, value in keywords.items()) or "none"
        weights = "with its pretrained weights" if pretrained else "without pretrained weights"
        raise ModelError(
            f"model: timm cannot build {config.name} {weights} and these options: {options}. It says: "
            f"{type(error).__name__}: {error}. Possible: options of timm.create_model, and pretrained: true where the "
            f"weights can be downloaded. Check options and image_size, or give a local checkpoint."
        ) from error


def _size_keywords(config: ModelConfig) -> dict[str, Any]:
    """How a model is told its input size. A ConvNeXt takes any, so that only its settings name it; images of that size
    are then neither resized nor cropped."""
    size = config.image_size
    is_convnext = timm.is_model(config.name) and timm.model_entrypoint(config.name).__module__ == "timm.models.convnext"
    if not is_convnext:
        return {"img_size": size}
    channels = dict(config.options).get("in_chans", 3)
    return {"pretrained_cfg_overlay": {"input_size": (channels, size, size), "crop_pct": 1.0}}


def _check_name(name: str) -> None:
    if ":" in name or timm.is_model(name):  # hf-hub:..., local-dir:... are resolved by timm
        return
    known = timm.list_models("*vit*") + timm.list_models("*deit*")
    raise ModelError(
        f"model.name: timm {timm.__version__} does not know {name!r}. Possible: {len(timm.list_models())} names, those "
        f"that can be pruned in `prunesearch list models`.{did_you_mean(name, known)} Correct the name."
    )


def check_checkpoint(path: str) -> None:
    """Raises ModelError when there is no such file."""
    if not Path(path).is_file():
        raise ModelError(
            f"model.checkpoint {path!r}: there is no such file. Possible: .safetensors, or .pth of tensors. "
            f"Check the path."
        )


def _load_checkpoint(model: nn.Module, path: str) -> None:
    check_checkpoint(path)
    place = f"model.checkpoint {path!r}"
    try:
        state = load_state_dict(path, weights_only=True)
        other = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
        if other:
            raise TypeError(f"no tensors: {', '.join(other[:4])}")
        if isinstance(model, VisionTransformer):
            state = checkpoint_filter_fn(state, model)  # also resizes position embeddings, as timm does for its own
    except Exception as error:  # a damaged or foreign file raises anything
        raise ModelError(
            f"{place}: cannot be read as weights of the model: {type(error).__name__}: {error}. Possible: "
            f".safetensors, or a .pth file that holds tensors only. Save the weights as safetensors."
        ) from error
    problems = misfits(state, model.state_dict())
    if problems:
        raise ModelError(
            f"{place}: does not fit the model: {'; '.join(problems)}. Possible: the weights of exactly this "
            f"architecture. Check name, options, image_size and num_classes under model."
        )
    model.load_state_dict(state)
