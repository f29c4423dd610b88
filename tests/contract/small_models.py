"""Small models of every supported layout, and schedules for them."""

from __future__ import annotations

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos

from prunesearch.schedule import Schedule, Stage
from prunesearch.tokens import REDUCERS, SCORERS

LAYOUTS: dict[str, dict] = {
    "class": {},
    "distilled": {},
    "registers": dict(reg_tokens=4, no_embed_class=True),
    "layer_scale": dict(init_values=0.1),
    "qk_norm": dict(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "gate": {},
    "avg": dict(global_pool="avg"),
    "avg_no_class": dict(global_pool="avg", class_token=False),
    "avg_with_prefix": dict(global_pool="avg", pool_include_prefix=True),
    "avgmax": dict(global_pool="avgmax"),
    "max": dict(global_pool="max", class_token=False),
    "map": dict(global_pool="map", class_token=False),
    "map_after_class": dict(global_pool="map"),
    "prr": dict(global_pool="prr"),
    "no_pool": dict(global_pool="", num_classes=0),
    "drop_path": dict(drop_path_rate=0.2, proj_drop_rate=0.1),
}

ROTARY = dict(use_rot_pos_emb=True)
EVA_LAYOUTS: dict[str, dict] = {
    "eva": dict(init_values=0.1, class_token=False),
    "eva_post_norm": dict(use_post_norm=True, global_pool="token"),
    "eva_rotary": dict(
        **ROTARY, ref_feat_shape=4, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, qkv_fused=False
    ),
    "eva_rotary_rope": dict(**ROTARY, attn_type="rope", qkv_fused=False, qk_norm=True),
    "eva_mixed": dict(**ROTARY, rope_type="mixed", attn_type="rope", init_values=0.1, rope_grid_indexing="xy"),
    "eva_dinov3": dict(
        **ROTARY,
        rope_type="dinov3",
        attn_type="rope",
        rope_rotate_half=True,
        num_reg_tokens=4,
        use_abs_pos_emb=False,
        init_values=0.1,
        dynamic_img_size=True,
    ),
    "eva_mrope": dict(**ROTARY, rope_type="mrope", rope_mrope_section=(1, 1, 2), attn_type="rope"),
    "eva_map": dict(
        **ROTARY,
        attn_type="rope",
        use_pre_transformer_norm=True,
        global_pool="map",
        rope_grid_indexing="xy",
        rope_grid_offset=1.0,
        drop_path_rate=0.2,
    ),
}
"""timm's Eva: DINOv3, EVA-02, Perception Encoder and their relatives."""
BEIT_LAYOUTS: dict[str, dict] = {
    "beit": dict(use_rel_pos_bias=True, init_values=0.1),
    "beit_shared": dict(use_shared_rel_pos_bias=True, use_abs_pos_emb=False, global_pool="token", qkv_bias=False),
    "beit_both": dict(use_shared_rel_pos_bias=True, use_rel_pos_bias=True, swiglu_mlp=True, scale_mlp=True),
}
NAFLEX_LAYOUTS: dict[str, dict] = {
    "naflex": dict(class_token=True, global_pool="token", pos_embed="learned", pos_embed_grid_size=(4, 4)),
    "naflex_map": dict(class_token=False, global_pool="map", pos_embed="factorized", pos_embed_grid_size=(6, 6)),
    "naflex_rotary": dict(
        rope_type="axial", pos_embed="none", class_token=True, reg_tokens=2, global_pool="avg", pool_include_prefix=True
    ),
    "naflex_mixed": dict(rope_type="mixed", pos_embed="none", class_token=False, reg_tokens=1, swiglu_mlp=True),
}
RELPOS_LAYOUTS: dict[str, dict] = {
    "relpos": dict(rel_pos_type="bias", class_token=True, global_pool="token", qk_norm=True),
    "relpos_shared": dict(rel_pos_type="bias", shared_rel_pos=True, class_token=True, init_values=None),
    "relpos_shared_mlp": dict(shared_rel_pos=True, rel_pos_dim=24, class_token=False),
    "relpos_post_norm": dict(block_fn=ResPostRelPosBlock, class_token=False),
    "relpos_swin_mlp": dict(rel_pos_type="mlp_swin", class_token=True, fc_norm=True),
}
"""timm's VisionTransformerRelPos."""
FAMILY_LAYOUTS: dict[type, dict[str, dict]] = {
    Eva: EVA_LAYOUTS,
    Beit: BEIT_LAYOUTS,
    NaFlexVit: NAFLEX_LAYOUTS,
    VisionTransformerRelPos: RELPOS_LAYOUTS,
}
"""Layouts of other families than VisionTransformer, by class."""
KINDS = {layout: kind for kind, layouts in FAMILY_LAYOUTS.items() for layout in layouts}
LAYOUTS |= {layout: options for layouts in FAMILY_LAYOUTS.values() for layout, options in layouts.items()}

LARGEST = {"merged": "max"}
CASES: dict[str, tuple[str, tuple[Stage, ...]]] = {
    "squeeze, drop_or_merge at pre": (
        "class",
        (
            Stage(0, score="class_attention", keep=0.7, reduce="squeeze"),
            Stage(1, at="pre", score="value_weighted", keep=0.7, reduce="drop_or_merge"),
        ),
    ),
    "two that merge, sizes in the attention": (
        "registers",
        (
            Stage(0, score="attention_received", keep=0.7, reduce="absorb"),
            Stage(1, at="pre", score="none", keep=0.6, reduce="merge"),
        ),
    ),
    "scores follow the tokens": (
        "avg",
        (
            Stage(0, score="attention_received", keep=0.8, reduce="absorb", options=LARGEST),
            Stage(0, score="attention_received", keep=0.8, reduce="fuse", options=LARGEST),
            Stage(1, at="pre", score="head_weighted_class_attention", keep=0.8),
        ),
    ),
    "no class token, attention pooling": (
        "map",
        (
            Stage(0, score="none", keep=0.7, reduce="merge"),
            Stage(1, at="pre", score="key_norm", keep=0.7, reduce="drop"),
        ),
    ),
    "scores without attention": (
        "avg_no_class",
        (
            Stage(0, at="pre", score="random", keep=0.7, reduce="squeeze"),
            Stage(1, at="pre", score="predictor", keep=0.7, reduce="fuse"),
        ),
    ),
    "pool after merge": (
        "distilled",
        (Stage(0, score="none", keep=0.7, reduce="merge"), Stage(1, at="pre", score="none", tokens=8, reduce="pool")),
    ),
    "rotary positions of hosts": (
        "eva_dinov3",
        (
            Stage(0, score="class_attention", keep=0.7, reduce="squeeze", options=(("position", "host"),)),
            Stage(1, at="pre", score="key_norm", keep=0.7, reduce="drop"),
        ),
    ),
    "rotary positions between places": (
        "eva_mixed",
        (
            Stage(0, score="none", keep=0.7, reduce="merge", options=(("position", "mean"),)),
            Stage(1, at="pre", score="attention_received", keep=0.7, reduce="fuse"),
        ),
    ),
    "biases of pairs of places, and sizes": (
        "relpos_swin_mlp",
        (
            Stage(0, score="none", keep=0.7, reduce="merge", options=(("position", "mean"),)),
            Stage(1, at="pre", score="class_attention", keep=0.7, reduce="squeeze"),
        ),
    ),
}
"""Layout and stages. Together: every score and every verb, both places."""


def small_model(layout: str = "class", **options: object) -> torch.nn.Module:
    """A ViT of 4 blocks and 36 patch tokens with random parameters, in eval mode."""
    kind = VisionTransformerDistilled if layout == "distilled" else KINDS.get(layout, VisionTransformer)
    sizes = dict(img_size=24, patch_size=4, embed_dim=32, depth=4, num_heads=4, num_classes=10, mlp_ratio=2.0)
    model = kind(**{**sizes, **LAYOUTS[layout], **options})
    if kind is NaFlexVit:  # as timm.create_model does
        model.pretrained_cfg = {"input_size": (3, 24, 24)}
    if layout == "gate":  # an option of timm's Attention that VisionTransformer does not expose
        for block in model.blocks:
            block.attn.gate = torch.nn.Linear(32, block.attn.attn_dim)
    return randomise(model).eval()


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Randomise every parameter and buffer, because LayerScale, norms and biases start neutral."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.2 * noise + (value.ndim == 1))
    return model


def images(count: int = 3, size: int = 24, channels: int = 3) -> torch.Tensor:
    """Random images."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def pairs(has_class_token: bool = True) -> list[tuple[str, str]]:
    """Every possible (score, reduce) for a ViT, optionally without scores that need a class token."""
    scores = [name for name, entry in SCORERS.items() if has_class_token or not entry.needs_class_token]
    return [
        (score, verb)
        for verb, entry in REDUCERS.items()
        for score in (scores if entry.ranks else ["none"])
        if not entry.holds and (entry.masked is not None or score == "none" or SCORERS[score].part is None)
    ]


def some_pairs() -> list[tuple[str, str]]:
    """Some (score, reduce) pairs that cover every score and every verb; all pairs would take minutes."""
    return [pair for pair in pairs() if pair[1] == "drop" or pair[0] in ("class_attention", "none")]


def two_stages(score: str, verb: str, at: str = "mid") -> Schedule:
    """A stage at blocks 1 and 2."""
    return Schedule(tuple(Stage(block, at=at, score=score, keep=0.6, reduce=verb) for block in (1, 2)))  # type: ignore[arg-type]
