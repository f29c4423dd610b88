"""Schedules in timm's NaFlexVit (SigLIP 2 NaFlex, C-RADIO), for batches of images of one size.

Checked against timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from prunesearch.errors import ModelError
from prunesearch.models.plan import Plan, make_plan
from prunesearch.models.rotary import Rotary, rotary_of
from prunesearch.models.swap import Place, timm_class
from prunesearch.models.transformer import Reduced, block_places, check_plan, refuse_patch_dropout
from prunesearch.models.transformer import block_inputs as block_inputs
from prunesearch.models.transformer import patches_of as patches_of
from prunesearch.models.transformer import run_from as run_from
from prunesearch.models.vit_shape import block_shape, check_blocks, shape_from
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape

SUPPORTS = "timm NaFlexVit"
MODULES = ("timm.models.naflexvit",)
"""Python modules with functions that build models of this class."""


class ReducedNaFlexVit(Reduced, NaFlexVit):  # type: ignore[misc]  # ours takes images only
    """A NaFlexVit with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = NaFlexVit

    def stem(self: Any, x: Any) -> tuple[Tensor, Rotary | None]:
        """Image to the tokens that the first block gets, and their rotary positions."""
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ModelError(
                "model: patches with coordinates (NaFlex) are of images with different numbers of tokens, for which a "
                "schedule has no counts. Possible: a batch of images of one size, (B, channels, height, width). Resize "
                "them, or remove_schedule(model) first."
            )
        refuse_patch_dropout(self)
        tokens_BNC, grid = self.embeds(x)
        return self.norm_pre(tokens_BNC), _rotary(self, *grid)

    def positions(self: Any) -> Rotary | None:
        """The rotary positions of images of the model's own size."""
        return _rotary(self, *_grid(self))


def _rotary(model: Any, height: int, width: int) -> Rotary | None:
    if model.rope is None:
        return None
    return rotary_of(model, model.rope.get_embed(shape=(height, width)), height, width)


def _grid(model: Any) -> tuple[int, int]:
    height, width = model.embeds.dynamic_feat_size(input_size(model)[1:])
    return height, width


def is_family(model: nn.Module) -> bool:
    """True for exactly NaFlexVit, with or without a schedule."""
    return timm_class(model) is NaFlexVit


def shape_of(model: Any) -> ModelShape:
    """The shape for the images that the model is for. Raises ModelError for blocks that are not timm's own, and for
    layers whose cost is not known."""
    check_blocks(model, nn.Sequential, (Block, EvaBlock), (Attention, EvaAttention, AttentionRope))
    patches = patch_tokens_of(model)
    return shape_from(
        model,
        block_shape(model),
        class_tokens=int(model.has_class_token),
        has_positions=model.rope is not None,
        patches=patches,
        stem_macs=model.embeds.proj.weight.numel() * patches,
    )


def plan_of(model: Any, schedule: Schedule) -> Plan:
    """The schedule resolved for a model, which is not changed. Raises ModelError or ScheduleError."""
    return check_plan(make_plan(schedule, shape_of(model)), model)


def places_of(model: Any, plan: Plan) -> Sequence[Place]:
    """The modules whose class is swapped."""
    return [Place("model", model, ReducedNaFlexVit, calls=True), *block_places(model, plan)]


def patch_tokens_of(model: Any) -> int:
    """Patch tokens of an image of the model's size."""
    height, width = _grid(model)
    return height * width


def input_size(model: Any) -> tuple[int, int, int]:
    """See `prunesearch.models.input_size`. A NaFlexVit takes images of any size; its settings name one."""
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if size is None and model.embeds.default_img_size is None:
        raise ModelError(
            "model: a NaFlexVit takes images of any size, and this one does not say which it is for. Possible: a model "
            'of timm.create_model. Use that, or set model.pretrained_cfg = {"input_size": (3, 224, 224)}.'
        )
    height, width = model.embeds.default_img_size if size is None else size[1:]
    return model.embeds.in_chans, height, width


def size_keywords(module: str, size: int, channels: int) -> dict[str, Any]:
    """See `prunesearch.models.size_keywords`. Position embeddings are resized in the pass, so the model is the same."""
    return {"pretrained_cfg_overlay": {"input_size": (channels, size, size), "crop_pct": 1.0}}


def adapted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """See `prunesearch.models.adapted`."""
    return checkpoint_filter_fn(state, model)
