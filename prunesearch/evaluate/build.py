"""A `ModelConfig` as a model: timm's create_model, with pretrained weights or a local checkpoint."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from prunesearch.config import MOST_TOKENS, ModelConfig, Scalar
from prunesearch.errors import ModelError
from prunesearch.models import digits_vit, input_size, shape_of  # noqa: F401  (digits_vit registers its model with timm)
from prunesearch.models.weights import load_weights, misfits, read_weights
from prunesearch.registry import did_you_mean
from prunesearch.shape import ModelShape

FRESH_SEED = 0
"""Of weights that neither timm nor a checkpoint gives, so that every worker starts from the same ones."""


SOURCES = ("hf-hub", "local-dir")
"""Of model names that timm does not know by itself."""


class Bounds(NamedTuple):
    """The numbers that an option takes, both ends included."""

    kind: type[int] | type[float]
    low: float
    high: float


_YES_OR_NO = (True, False)
_RATE = Bounds(float, 0, 0.99)
OPTIONS: dict[str, Bounds | tuple[Scalar, ...]] = {
    "depth": Bounds(int, 1, 100),
    "embed_dim": Bounds(int, 1, 16_384),
    "num_heads": Bounds(int, 1, 1024),
    "head_dim": Bounds(int, 1, 1024),
    "mlp_ratio": Bounds(float, 0.01, 64),
    "patch_size": Bounds(int, 1, 256),
    "in_chans": Bounds(int, 1, 64),
    "img_size": Bounds(int, 1, 4096),
    "window_size": Bounds(int, 1, 256),
    "reg_tokens": Bounds(int, 0, 256),
    "output_stride": (8, 16, 32),
    "kernel_sizes": Bounds(int, 1, 63),
    "head_hidden_size": Bounds(int, 1, 16_384),
    "init_values": Bounds(float, 0, 10),
    "ls_init_value": Bounds(float, 0, 10),
    "head_init_scale": Bounds(float, 0, 10),
    "norm_eps": Bounds(float, 1e-12, 0.1),
    "drop_rate": _RATE,
    "pos_drop_rate": _RATE,
    "patch_drop_rate": _RATE,
    "proj_drop_rate": _RATE,
    "attn_drop_rate": _RATE,
    "drop_path_rate": _RATE,
    "global_pool": ("avg", "avgmax", "max", "token", "map"),
    "pos_embed": ("", "none", "learn"),
    "stem_type": ("patch", "overlap", "overlap_tiered", "overlap_act"),
    "act_layer": ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu"),
    "norm_layer": ("layernorm", "rmsnorm"),
    **dict.fromkeys(
        (
            "qkv_bias",
            "qk_norm",
            "scale_attn_norm",
            "scale_mlp_norm",
            "proj_bias",
            "class_token",
            "no_embed_class",
            "pre_norm",
            "final_norm",
            "fc_norm",
            "pool_include_prefix",
            "dynamic_img_size",
            "dynamic_img_pad",
            "strict_img_size",
            "always_partition",
            "head_norm_first",
            "conv_mlp",
            "conv_bias",
            "use_grn",
        ),
        _YES_OR_NO,
    ),
}
"""Keywords of the constructors of timm's VisionTransformer, VisionTransformerDistilled, SwinTransformer and ConvNeXt
that change an architecture and are one number or word. Not every model takes every one, which timm says. Others are
refused: some of create_model's read files, among them pickles, which may hold code."""


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


def model_shape(config: ModelConfig) -> ModelShape:
    """The shape of the model, without weights. Raises ModelError also for models prunesearch cannot change."""
    return _shape_and_channels(config)[0]


def input_channels(config: ModelConfig) -> int:
    """How many channels its images have. Raises ModelError as `model_shape`."""
    return _shape_and_channels(config)[1]


@lru_cache(maxsize=16)
def _shape_and_channels(config: ModelConfig) -> tuple[ModelShape, int]:
    model = skeleton(config)
    try:
        shape = shape_of(model)
    except ModelError:
        raise
    except Exception as error:  # a pass over the skeleton, which finds that its sizes do not go together
        raise ModelError(
            f"model: {config.name} cannot take images of its own size: {type(error).__name__}: {error}. Possible: a "
            f"larger image_size, or a smaller patch or window. Check image_size and options."
        ) from error
    if not 1 <= shape.patch_tokens <= MOST_TOKENS:
        raise ModelError(
            f"model: {config.name} makes {shape.patch_tokens:,} patch tokens of an image. Possible: from 1 up to "
            f"{MOST_TOKENS:,}. Check image_size and options.patch_size."
        )
    return shape, input_size(model)[0]


@lru_cache(maxsize=16)
def parameter_count(config: ModelConfig) -> int:
    """How many parameters the model has, without making them."""
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


def skeleton(config: ModelConfig) -> nn.Module:
    """The model without weights, on the meta device. Raises ModelError."""
    with torch.device("meta"):
        return _create(config, pretrained=False)


@lru_cache(maxsize=2)
def _dense_model(config: ModelConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FRESH_SEED)
        model = _create(config, pretrained=config.pretrained)
    if config.checkpoint is not None:
        _load_checkpoint(model, config.checkpoint)
    return model.eval()


def is_remote(config: ModelConfig) -> bool:
    """Whether timm has to look a model's architecture up: in the Hugging Face hub, or in a folder of its own."""
    return ":" in config.name


def model_problems(config: ModelConfig) -> list[str]:
    """What is wrong with a model section in itself; nothing is built, opened or downloaded."""
    problems = []
    source = config.name.partition(":")[0]
    if is_remote(config) and source not in SOURCES:
        problems.append(
            f"model.name: {config.name!r} has the source {source!r}. Possible: a timm name, {' or '.join(SOURCES)} and "
            f"a name.{did_you_mean(source, SOURCES)} Correct it."
        )
    elif is_remote(config) and not config.pretrained:
        problems.append(
            f"model.name: {config.name!r} is described where its weights are. Possible: with pretrained: true. Write "
            f"that, or give a timm name."
        )
    elif source == "local-dir" and not _reads_weights_only():
        problems.append(
            f"model.name: {config.name!r}, but timm {timm.__version__} runs code that weights in a folder may hold. "
            f"Possible: model.checkpoint with a timm name, or a newer timm. Change one of them."
        )
    elif not is_remote(config) and not timm.is_model(config.name):
        known = timm.list_models("*vit*") + timm.list_models("*deit*")
        problems.append(
            f"model.name: timm {timm.__version__} does not know {config.name!r}. Possible: {len(timm.list_models())} "
            f"names, those that can be pruned in `prunesearch list models`.{did_you_mean(config.name, known)} Correct "
            f"the name."
        )
    if config.pretrained and config.checkpoint is not None:
        problems.append(
            f"model: both pretrained: true and checkpoint {config.checkpoint!r} were given. "
            f"Possible: one source of weights. Leave one of them out."
        )
    return problems + [
        f"model.options.{name}: {text}" for name, value in config.options for text in _option(name, value)
    ]


def _reads_weights_only() -> bool:
    reader = inspect.signature(timm.models._hub.load_state_dict_from_path)
    return reader.parameters["weights_only"].default is True


def _option(name: str, value: Scalar) -> Iterator[str]:
    """What is wrong with one keyword of timm.create_model."""
    if name not in OPTIONS:
        yield (
            f"unknown, or not a matter of the architecture. Possible: {', '.join(OPTIONS)}."
            f"{did_you_mean(name, OPTIONS)} Take it out; weights are named by model.checkpoint, sizes by "
            f"model.image_size and model.num_classes."
        )
        return
    possible = OPTIONS[name]
    if isinstance(possible, Bounds):
        fits = isinstance(value, possible.kind if possible.kind is int else (int, float)) and not isinstance(
            value, bool
        )
        if not (fits and possible.low <= value <= possible.high):  # type: ignore[operator]  # fits says that it is a number
            kind = "a whole number" if possible.kind is int else "a number"
            yield f"is {value!r}; possible: {kind} from {possible.low:g} up to {possible.high:g}. Correct it."
    elif not any(value == one and type(value) is type(one) for one in possible):
        words = ", ".join(map(repr, possible))
        yield f"is {value!r}; possible: {words}.{did_you_mean(value, map(str, possible))} Correct it."


def _create(config: ModelConfig, pretrained: bool) -> nn.Module:
    problems = model_problems(config)
    if problems:
        raise ModelError("; ".join(problems))
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
