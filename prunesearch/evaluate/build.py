"""Build the model of a `ModelConfig`: timm's create_model, with pretrained weights or a local checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from prunesearch.config import MOST_TOKENS, ModelConfig
from prunesearch.errors import ModelError
from prunesearch.evaluate.sections import check_checkpoint, is_remote, model_problems
from prunesearch.evaluate.shape_cache import Facts
from prunesearch.models import adapted, class_of, input_size, shape_of, size_keywords
from prunesearch.models.dense_head import kind_in, segments, with_dense_head
from prunesearch.models.weights import load_weights, misfits, read_weights

FRESH_SEED = 0
"""Seed of weights that neither timm nor a checkpoint gives, so that every worker starts from the same ones."""


def build_model(config: ModelConfig, device: torch.device | str = "cpu", start: str | None = None) -> nn.Module:
    """The dense model in evaluation mode. Weights are loaded once; each call returns a copy, which may be changed.

    start: safetensors file with other weights for it. Raises ModelError for a name that timm does not know, for wrong
    options, and for weights that are missing or do not fit.
    """
    model = copy.deepcopy(_dense_model(config))
    if start is not None:
        load_weights(model, _weights(start, Path(start).stat().st_mtime_ns if Path(start).is_file() else 0))
    return model.to(device)


@lru_cache(maxsize=1)
def _weights(path: str, modified: int) -> dict[str, Tensor]:
    """Weights of a file, cached until the file's modification time changes."""
    return read_weights(path)


@lru_cache(maxsize=16)
def facts_of(config: ModelConfig) -> Facts:
    """Shape and input channels of the model, which is built without weights.

    Raises ModelError, also for models to which no schedule can be applied.
    """
    model = skeleton(config)
    try:
        shape = shape_of(model)
        _run_one_block(model)
    except ModelError:
        raise
    except Exception as error:  # a pass over the skeleton fails when its sizes do not go together
        raise ModelError(
            f"model: {config.name} cannot take images of its own size: {type(error).__name__}: {error}. Possible: a "
            f"larger image_size, a smaller patch or window, or an embed_dim that num_heads divides (with rotary "
            f"positions, that 4 x num_heads divides). Check image_size and options."
        ) from error
    if not 1 <= shape.patch_tokens <= MOST_TOKENS:
        raise ModelError(
            f"model: {config.name} makes {shape.patch_tokens:,} patch tokens of an image. Possible: from 1 up to "
            f"{MOST_TOKENS:,}. Check image_size and options.patch_size."
        )
    return Facts(shape, input_size(model)[0], class_of(model))


def _run_one_block(model: nn.Module) -> None:
    """Run a skeleton with its first block only: some sizes that do not go together can be built, but not run.

    Models with a feature map have been run for their shape.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        return
    model.blocks = blocks[:1]
    try:
        with torch.device("meta"), torch.no_grad():
            model.eval()(torch.empty(1, *input_size(model)))
    finally:
        model.blocks = blocks


def is_timms_own(config: ModelConfig) -> bool:
    """Whether timm or this package defines the model (no plug-in or remote source), so that it is always the same."""
    if is_remote(config):
        return False
    module = timm.model_entrypoint(config.name).__module__
    return module.startswith(("timm.", "prunesearch."))


@lru_cache(maxsize=16)
def parameter_count(config: ModelConfig) -> int:
    """How many parameters the model has, counted on the meta device."""
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


def skeleton(config: ModelConfig) -> nn.Module:
    """The model without weights, on the meta device. Raises ModelError."""
    with torch.device("meta"):
        return _create(config, pretrained=False)


@lru_cache(maxsize=2)
def _dense_model(config: ModelConfig) -> nn.Module:
    model = _seeded(config)
    if config.checkpoint is not None:
        _load_checkpoint(model, config.checkpoint)
    return model.eval()


def _seeded(config: ModelConfig) -> nn.Module:
    """The model with timm's weights, or those of the fixed seed; without a checkpoint's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FRESH_SEED)
        return _create(config, pretrained=config.pretrained)


def _create(config: ModelConfig, pretrained: bool) -> nn.Module:
    problems = model_problems(config)
    if problems:
        raise ModelError("; ".join(problems))
    keywords: dict[str, Any] = dict(config.options)
    if config.image_size is not None:
        keywords |= size_keywords(config.name, config.image_size, int(keywords.get("in_chans", 3)))
    if config.num_classes is not None:
        keywords["num_classes"] = 0 if config.head is not None else config.num_classes
    try:
        model = timm.create_model(config.name, pretrained=pretrained, **keywords)
    except Exception as error:  # timm, the hub and the model's own constructor raise anything
        options = ", ".join(f"{name}={value!r}" for name, value in keywords.items()) or "none"
        weights = "with its pretrained weights" if pretrained else "without pretrained weights"
        random = ", or pretrained: false for random weights" if pretrained else ""
        raise ModelError(
            f"model: timm cannot build {config.name} {weights} and these options: {options}. It says: "
            f"{type(error).__name__}: {error}. Possible: options of timm.create_model, and pretrained: true where the "
            f"weights can be downloaded. Check options and image_size, or give a local checkpoint{random}."
        ) from error
    if config.head is None:
        return model
    return with_dense_head(model, config.head, config.num_classes or 0)


def _without_pooling(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint without those of a pooling and a classifier that a dense head replaces."""
    own = model.state_dict()
    return {
        name: value
        for name, value in state.items()
        if name in own or not name.startswith(("head.", "head_dist.", "attn_pool."))
    }


def _without_classifier(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint without those of a classifier, which the model has not."""
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


def _refuse_other_head(model: Any, state: dict[str, Tensor], place: str) -> None:
    kind = kind_in(state)
    if kind is None:
        raise ModelError(
            f"{place}: it has no head that gives classes to each patch. Possible: a checkpoint of `prunesearch "
            f"train-head`, which trains one on this model. Run that, and write its file as checkpoint."
        )
    if kind != model.head.kind:
        raise ModelError(
            f"{place}: it has a {kind} head, but the model has a {model.head.kind} one. Possible: model.head: {kind}. "
            f"Write that, or train the other one: `prunesearch train-head`."
        )


def build_with_fresh_head(config: ModelConfig) -> nn.Module:
    """The dense model with random weights in its head, also from a checkpoint that has none. Raises ModelError."""
    model: Any = _seeded(config)
    fresh = {f"head.{name}": value.clone() for name, value in model.head.state_dict().items()}
    if config.checkpoint is not None:
        _load_checkpoint(model, config.checkpoint, fresh)
    return model.eval()


def _load_checkpoint(model: nn.Module, path: str, head: Mapping[str, Tensor] | None = None) -> None:
    """Load the weights of a file. head: instead of the file's own, for a model that gives classes to each patch."""
    check_checkpoint(path)
    place = f"model.checkpoint {path!r}"
    try:
        state = load_state_dict(path, weights_only=True)
        other = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
        if other:
            raise TypeError(f"no tensors: {', '.join(other[:4])}")
    except Exception as error:  # a damaged or foreign file raises anything
        raise ModelError(
            f"{place}: cannot be read as weights of the model: {type(error).__name__}: {error}. Possible: "
            f".safetensors, or a .pth file that holds tensors only. Save the weights as safetensors."
        ) from error
    try:
        if head is not None:
            state = {name: value for name, value in state.items() if not name.startswith("head.")} | dict(head)
        if model.num_classes == 0:
            state = _without_classifier(model, state)
        state = adapted(model, state)
        if segments(model):
            _refuse_other_head(model, state, place)
            state = _without_pooling(model, state)
        problems = misfits(state, model.state_dict())
    except ModelError:
        raise
    except Exception as error:  # timm's conversion of its own weights meets those of another architecture
        problems = [f"{type(error).__name__}: {error}"]
    if problems:
        raise ModelError(
            f"{place}: does not fit the model: {'; '.join(problems)}. Possible: the weights of exactly this "
            f"architecture. Check name, options, image_size and num_classes under model."
        )
    model.load_state_dict(state)
