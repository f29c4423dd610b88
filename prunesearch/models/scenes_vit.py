"""The small ViT for segmentation that comes with prunesearch: the class of each patch of scenes of digits.

Importing this module registers `vit_scenes_patch4_rope_64` with timm, so that

    timm.create_model("vit_scenes_patch4_rope_64", pretrained=True)

works like any other name. The weights are a file of this package, made by scripts/train_scenes_vit.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from torch import nn

from prunesearch.models.dense_head import with_dense_head

WEIGHTS = Path(__file__).parent / "weights" / "vit_scenes_patch4_rope_64.safetensors"

default_cfgs = generate_default_cfgs(
    {
        "vit_scenes_patch4_rope_64.sklearn": {
            "file": str(WEIGHTS),
            "num_classes": 11,
            "input_size": (1, 64, 64),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.25,),
            "std": (0.26,),
            "first_conv": "patch_embed.proj",
            "classifier": "head.classify",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_scenes_patch4_rope_64(pretrained: bool = False, num_classes: int = 11, **kwargs: Any) -> Eva:
    """6 blocks, width 64, 4 heads, 256 patch tokens, rotary positions, no class token; 11 classes for each patch."""
    architecture = {
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "in_chans": 1,
        "class_token": False,
        "global_pool": "",
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    model: Eva = build_model_with_cfg(
        Eva, "vit_scenes_patch4_rope_64", False, **{**architecture, **kwargs, "num_classes": 0}
    )
    if num_classes:
        with_dense_head(model, "linear", num_classes)
    if pretrained:
        model.load_state_dict(safetensors.torch.load_file(WEIGHTS), strict=bool(num_classes))
    return model
