"""The small ViT that comes with prunesearch: one token per pixel of scikit-learn's 8 x 8 digits.

Importing this module registers `vit_digits_patch1_8` with timm, so that

    timm.create_model("vit_digits_patch1_8", pretrained=True)

works like any other name. The weights are a file of this package, made by scripts/train_digits_vit.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

WEIGHTS = Path(__file__).parent / "weights" / "vit_digits_patch1_8.safetensors"

default_cfgs = generate_default_cfgs(
    {
        "vit_digits_patch1_8.sklearn": {
            "file": str(WEIGHTS),
            "num_classes": 10,
            "input_size": (1, 8, 8),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.305,),
            "std": (0.376,),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_digits_patch1_8(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """8 blocks, width 48, 3 heads, 64 patch tokens and a class token: 0.16 M parameters, 0.013 GMACs."""
    architecture = {"patch_size": 1, "embed_dim": 48, "depth": 8, "num_heads": 3, "mlp_ratio": 2.0}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_digits_patch1_8",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**architecture, **kwargs},
    )
