"""Find mistakes in the model and data sections of a study without building, opening or downloading anything."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prunesearch.config import DataConfig, ModelConfig, Scalar
from prunesearch.errors import ModelError
from prunesearch.evaluate.shape_cache import knows
from prunesearch.registry import did_you_mean

SOURCES = ("hf-hub", "local-dir")
"""Prefixes of model names whose architecture is not part of timm ("hf-hub:...")."""


class Bounds(NamedTuple):
    """The numbers that an option may have, both ends included."""

    kind: type[int] | type[float]
    low: float
    high: float


_YES_OR_NO = (True, False)
_RATE = Bounds(float, 0, 0.99)
OPTIONS: dict[str, Bounds | tuple[Scalar, ...]] = {
    "depth": Bounds(int, 1, 100),
    "embed_dim": Bounds(int, 1, 16_384),
    "num_heads": Bounds(int, 1, 1024),
    "attn_pool_num_heads": Bounds(int, 1, 1024),
    "attn_pool_mlp_ratio": Bounds(float, 0.01, 64),
    "head_dim": Bounds(int, 1, 1024),
    "mlp_ratio": Bounds(float, 0.01, 64),
    "patch_size": Bounds(int, 1, 256),
    "in_chans": Bounds(int, 1, 64),
    "img_size": Bounds(int, 1, 4096),
    "window_size": Bounds(int, 1, 256),
    "reg_tokens": Bounds(int, 0, 256),
    "num_reg_tokens": Bounds(int, 0, 256),
    "ref_feat_shape": Bounds(int, 1, 4096),
    "rope_temperature": Bounds(float, 1, 99_999),
    "rope_grid_offset": Bounds(float, 0, 4096),
    "rel_pos_dim": Bounds(int, 1, 16_384),
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
    "pos_embed": ("", "none", "learn", "learned", "factorized"),
    "attn_type": ("eva", "rope"),
    "rope_type": ("", "none", "cat", "axial", "mixed", "dinov3", "mrope"),
    "rope_grid_indexing": ("ij", "xy"),
    "rel_pos_type": ("mlp", "mlp_swin", "bias"),
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
            "qkv_fused",
            "swiglu_mlp",
            "scale_mlp",
            "scale_attn_inner",
            "scale_attn_inner_norm",
            "attn_only_layer_scale",
            "attn_gated",
            "use_post_norm",
            "use_pre_transformer_norm",
            "use_post_transformer_norm",
            "use_fc_norm",
            "use_abs_pos_emb",
            "use_rot_pos_emb",
            "rope_rotate_half",
            "use_rel_pos_bias",
            "use_shared_rel_pos_bias",
            "shared_rel_pos",
        ),
        _YES_OR_NO,
    ),
}
"""Allowed `model.options`: keywords of the constructors of the supported classes of timm that change the architecture
and are one number or word. Not every model takes every one; timm then raises an error. All others are refused, because
some keywords of create_model read files, even pickles, which may hold code."""


def is_remote(config: ModelConfig) -> bool:
    """Whether the architecture is described outside of timm: in the Hugging Face hub, or in a local folder."""
    return ":" in config.name


def model_problems(config: ModelConfig) -> list[str]:
    """Mistakes in a model section. Nothing is built, opened or downloaded."""
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
    elif source == "local-dir":
        problems += _pickle_problems(config.name)
    elif not is_remote(config):
        problems += _name_problems(config.name)
    if config.head is not None and (config.num_classes or 0) < 2:
        problems.append(
            f"model.num_classes: {config.num_classes or 'absent'}, but a {config.head} head gives classes to each "
            f"patch. Possible: from 2 on, background included. Write how many the masks have."
        )
    if config.pretrained and config.checkpoint is not None:
        problems.append(
            f"model: both pretrained: true and checkpoint {config.checkpoint!r} were given. "
            f"Possible: one source of weights. Leave one of them out."
        )
    return problems + [
        f"model.options.{name}: {text}" for name, value in config.options for text in _option(name, value)
    ]


def _pickle_problems(name: str) -> list[str]:
    import timm

    reader = inspect.signature(timm.models._hub.load_state_dict_from_path)
    if reader.parameters["weights_only"].default is True:
        return []
    return [
        f"model.name: {name!r}, but timm {timm.__version__} runs code that weights in a folder may hold. "
        f"Possible: model.checkpoint with a timm name, or a newer timm. Change one of them."
    ]


def _name_problems(name: str) -> list[str]:
    """Mistakes in a model name of timm.

    timm is imported only when the caches do not know the name. When it is already imported it is always asked, because
    plug-ins may have added names to it.
    """
    if sys.modules.get("timm") is None and knows(name):
        return []
    import timm

    from prunesearch.models import digits_vit, scenes_vit  # noqa: F401  (they register their models with timm)

    if timm.is_model(name):
        return []
    known = timm.list_models("*vit*") + timm.list_models("*deit*")
    return [
        f"model.name: timm {timm.__version__} does not know {name!r}. Possible: {len(timm.list_models())} "
        f"names, those that can be pruned in `prunesearch list models`.{did_you_mean(name, known)} Correct "
        f"the name."
    ]


def _option(name: str, value: Scalar) -> Iterator[str]:
    """Mistakes in one keyword of timm.create_model."""
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


def check_checkpoint(path: str) -> None:
    """Raise ModelError when the file of a checkpoint is missing."""
    if not Path(path).is_file():
        raise ModelError(
            f"model.checkpoint {path!r}: there is no such file. Possible: .safetensors, or .pth of tensors. "
            f"Check the path."
        )


def source_problems(config: DataConfig) -> list[str]:
    """Mistakes in where a data section says that its pictures are."""
    if config.name not in ("digits", "scenes"):
        return []
    return [
        f"data.{field}: is {path!r}, but the digits are in scikit-learn, and no folder is read. Possible: name: folder "
        f"to read that one. Correct data.name, or leave {field} out."
        for field in ("root", "val_root", "test_root")
        if (path := getattr(config, field)) is not None
    ]


def channel_problems(config: DataConfig, channels: int) -> list[str]:
    """Mistakes in a data section for a model with this many input channels."""
    if channels not in (1, 3):
        return [
            f"data: the pictures have 1 or 3 channels, the model wants {channels}. Possible: in_chans 1 (grey) or 3 "
            f"(RGB). Change model.options, or choose another checkpoint."
        ]
    return [
        f"data.{name}: {len(values)} values were given, but the model has {channels} input channels. Possible: one "
        f"value per channel. Write {channels} of them."
        for name, values in (("mean", config.mean), ("std", config.std))
        if values is not None and len(values) != channels
    ]
