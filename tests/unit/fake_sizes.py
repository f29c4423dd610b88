"""Two tiny models of one family, `vit_small_toy_8` and `vit_tiny_toy_8`, whose weights tests write to WEIGHTS."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model

WEIGHTS = Path(tempfile.gettempdir(), f"toy-weights-{os.getpid()}")
NAMES = {"vit_small_toy_8": 48, "vit_tiny_toy_8": 24}
"""Name -> width."""
TAGS = {"v2_digits": 10, "v1_digits": 10, "digits": 10, "v1_more": 12}
"""Tag of weights -> number of classes. vit_tiny_toy_8 has no v2_digits."""


def _cfg(name: str, tag: str, classes: int) -> dict[str, Any]:
    return {
        "file": str(WEIGHTS / f"{name}.{tag}.safetensors"),
        "num_classes": classes,
        "input_size": (1, 8, 8),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.305,),
        "std": (0.376,),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {
        f"{name}.{tag}": _cfg(name, tag, classes)
        for name in NAMES
        for tag, classes in TAGS.items()
        if (name, tag) != ("vit_tiny_toy_8", "v2_digits")
    }
)


def _toy(name: str, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    own = {"patch_size": 2, "embed_dim": NAMES[name], "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    return build_model_with_cfg(VisionTransformer, name, pretrained, **{**own, **kwargs})


@register_model
def vit_small_toy_8(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    return _toy("vit_small_toy_8", pretrained, **kwargs)


@register_model
def vit_tiny_toy_8(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    return _toy("vit_tiny_toy_8", pretrained, **kwargs)


def save(name: str, path: Path, seed: int) -> Path:
    """Write random weights of a toy with one channel and 10 classes to a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, in_chans=1, img_size=8, num_classes=10)
    safetensors.torch.save_file(model.state_dict(), path)
    return path
