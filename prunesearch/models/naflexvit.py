"""Schedules in timm's NaFlexVit (SigLIP 2 NaFlex, C-RADIO), for images of one size and for patches of many sizes.

Checked against timm 1.0.31.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from prunesearch.errors import ModelError
from prunesearch.models.masked_step import Group, compact, join_groups
from prunesearch.models.plan import PARTS, Plan, PlannedStep, make_plan, plan_for
from prunesearch.models.rotary import Rotary, rotary_of
from prunesearch.models.step import TokenState
from prunesearch.models.swap import Place, check_methods, timm_class
from prunesearch.models.trace import ModelCall, Trace
from prunesearch.models.transformer import (
    Reduced,
    Run,
    Taps,
    block_places,
    check_plan,
    is_distributed,
    refuse_patch_dropout,
    refuse_to_be_recorded,
)
from prunesearch.models.transformer import block_inputs as block_inputs
from prunesearch.models.transformer import patches_of as patches_of
from prunesearch.models.transformer import run_from as run_from
from prunesearch.models.vit_shape import block_shape, check_blocks, shape_from
from prunesearch.schedule import Schedule, Step
from prunesearch.shape import ModelShape

SUPPORTS = "timm NaFlexVit"
MODULES = ("timm.models.naflexvit",)
"""Python modules with functions that build models of this class."""


class Patches(NamedTuple):
    """Patches of images of different sizes, padded to one length, as timm's `NaFlexCollator` gives them.

    patches: (B, N, values) or (B, N, height, width, channels). patch_coord: row and column of each, (B, N, 2).
    patch_valid: False for padding, (B, N).
    """

    patches: Tensor
    patch_coord: Tensor
    patch_valid: Tensor


class ReducedNaFlexVit(Reduced, NaFlexVit):
    """A NaFlexVit with a token schedule; made by `apply_schedule`, never constructed.

    It takes what timm's takes: images of one size, or `Patches` as a dict or as keywords. Of patches, the schedule
    counts those that are valid: each image keeps as many tokens as it keeps alone, without padding. Images of the same
    number of patches (with rotary positions, of the same height and width) run together, so that nothing is padded
    inside. A batch costs one pass through the blocks for each of those numbers, and waits for the device before the
    first. Absolute position embeddings are those that timm's own model adds.
    """

    stands_for = NaFlexVit

    def forward(  # type: ignore[override]
        self: Any,
        x: Tensor | Mapping[str, Any],
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
        call: ModelCall | None = None,
    ) -> Tensor:
        """Images or patches to logits. Raises ModelError for what cannot be combined with patches.

        Raises ScheduleError when the schedule does not fit the number of patches of an image.
        """
        given, attn_mask = _given(x, patch_coord, patch_valid, attn_mask)
        if isinstance(given, Patches) and self._plan.schedule.stages and not self.global_pool:
            raise ModelError(
                "model: global_pool='' returns tokens, of which images of patches have different numbers. Possible: "
                "model.forward_features, whose patch_valid says which are there, or a model that pools. Use one of "
                "those."
            )
        if isinstance(given, Tensor) or self._plan.schedule.stages:
            return super().forward(given, attn_mask, call=call)  # type: ignore[arg-type]  # to `_state`, which takes both
        check_methods(self, "model", type(self))
        features: Any = NaFlexVit.forward_features(self, **given._asdict(), attn_mask=attn_mask)
        logits: Tensor = NaFlexVit.forward_head(self, **features)
        if call is not None:
            patches_BnC, valid_Bn = patches_of(self, features["patches"]), features["patch_valid"]
            call.trace = Trace(logits, patches_BnC, valid_Bn.float(), ())
        return logits

    def forward_features(  # type: ignore[override]
        self: Any,
        patches: Tensor | Mapping[str, Any],
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Images to normalised tokens (B, N at the end, C). Patches to a dict, as timm does: `patches`, those tokens,
        and `patch_valid`, (B, patch tokens at the end).

        Raises ModelError when images, not patches, end with different counts, and in training with masked tokens.
        """
        given, attn_mask = _given(patches, patch_coord, patch_valid, attn_mask)
        if isinstance(given, Tensor):
            return super().forward_features(given, attn_mask)
        if not self._plan.schedule.stages:
            return NaFlexVit.forward_features(self, **given._asdict(), attn_mask=attn_mask)
        if self.training and self._plan.decisions_learn:
            raise ModelError(
                "forward_features: this schedule trains with tokens masked, and patch_valid would not carry its "
                "gradients. Possible: model(batch), prunesearch.models.trace, or eval mode. Use one of those."
            )
        state = self._features(given, attn_mask, False)
        present_Bn = state.present_Bn
        if present_Bn is None:
            present_Bn = torch.ones_like(state.tokens_BNC[:, self.num_prefix_tokens :, 0])
        return {"patches": state.tokens_BNC, "patch_valid": present_Bn > 0}

    def forward_head(  # type: ignore[override]
        self: Any,
        patches: Tensor,
        pre_logits: bool = False,
        patch_valid: Tensor | None = None,
    ) -> Tensor:
        """Tokens to logits. Raises ModelError when pooling would need the sizes of merged tokens, or the mask."""
        return super().forward_head(patches, pre_logits, patch_valid=patch_valid)

    def stem(self: Any, x: Tensor) -> tuple[Tensor, Rotary | None]:
        """Image to the tokens that the first block gets, and their rotary positions."""
        if x.ndim != 4:
            raise ModelError(
                f"model: a tensor of {x.ndim} dimensions is no batch of images, and patches need their coordinates. "
                f"Possible: images of one size, (B, channels, height, width), or patches with patch_coord and "
                f"patch_valid, in a dict or as keywords. Give one of those."
            )
        refuse_patch_dropout(self)
        tokens_BNC, grid = self.embeds(x)
        return self.norm_pre(tokens_BNC), _rotary(self, *grid)

    def positions(self: Any) -> Rotary | None:
        """The rotary positions of images of the model's own size."""
        return _rotary(self, *_grid(self))

    def grid(self: Any, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patches of an image of this size in pixels."""
        rows, columns = self.embeds.dynamic_feat_size((height, width))
        return rows, columns

    def forward_intermediates(self: Any, x: Tensor, *args: Any, **given: Any) -> Any:  # type: ignore[override]
        """As for other models, for images of one size. Raises ModelError for patches: their images are no grids."""
        if not isinstance(x, Tensor) or given.get("patch_coord") is not None:
            raise ModelError(
                "forward_intermediates: images of patches have grids of different sizes. Possible with a schedule: "
                "images of one size, (B, channels, height, width), or forward_features. Use one of those."
            )
        for name in ("patch_coord", "patch_valid"):  # None, as for timm's
            given.pop(name, None)
        return super().forward_intermediates(x, *args, **given)

    def _state(self: Any, x: Tensor | Patches, masked: bool, taps: Taps | None = None) -> TokenState:
        """The state after the last block. Images of patches run in groups, see the class."""
        if isinstance(x, Tensor):
            return super()._state(x, masked, taps)
        _refuse_what_groups_cannot(self)
        groups, counted = [], []
        for places_B, state, positions in _alike(self, x):
            present = state.tokens_BNC.shape[1] - self.num_prefix_tokens
            plan = plan_for(self._plan, present)
            run = Run(plan, getattr(self, PARTS, None), self.training, masked, positions)
            state = self.run_blocks(run, state)
            groups.append(Group(places_B, state))
            counted.append((present, plan.steps))
        return join_groups(_with_equal_steps(groups, counted), self.num_prefix_tokens)


def _given(
    x: Tensor | Mapping[str, Any], coord: Tensor | None, valid: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor | Patches, Tensor | None]:
    """The images or patches of a call, and its attn_mask. As in timm, what is in a dict goes before keywords."""
    patches: Any = x
    if isinstance(x, Mapping):
        patches, coord, valid = x.get("patches"), x.get("patch_coord", coord), x.get("patch_valid", valid)
        attn_mask = x.get("attn_mask", attn_mask)
    elif coord is None and valid is None:
        return x, attn_mask
    named = {"patches": patches, "patch_coord": coord, "patch_valid": valid}
    missing = [name for name, value in named.items() if value is None]
    if missing:
        raise ModelError(
            f"model: patches without {', '.join(missing)}. Possible: a dict of patches (B, N, values), patch_coord "
            f"(B, N, 2) and patch_valid (B, N); patches with the other two as keywords; or a tensor of images alone. "
            f"Give all three."
        )
    return Patches(**named), attn_mask


def _refuse_what_groups_cannot(model: Any) -> None:
    """Raise ModelError where a batch of patches cannot be split into groups of images."""
    refuse_patch_dropout(model)
    refuse_to_be_recorded(
        "model: images of patches run in groups of images of one number of patches, and a traced, compiled or exported "
        "graph would hold the groups of the batch that it was made with. Possible: images of one size, as a tensor (B, "
        "channels, height, width). Record the graph with those, or run patches uncompiled."
    )
    if is_distributed(model.blocks):
        raise ModelError(
            "model: images of patches run in groups of images of one number of patches, a pass through the blocks "
            "each, and blocks that are sharded (FSDP) must be called equally often in every process. Possible: "
            "DistributedDataParallel, or images of one size, as a tensor. Use one of those."
        )


def _alike(model: Any, given: Patches) -> list[tuple[Tensor | None, TokenState, Rotary | None]]:
    """The images in groups of equal numbers of valid patches: their places in the batch (None for all), the tokens
    that the first block gets, without padding, and their rotary positions.

    timm embeds the whole batch, with its padding, so that the tokens are timm's. Waits for the device.
    """
    _check_sizes(given)
    tokens_BNC, _ = model.embeds(given.patches, patch_coord=given.patch_coord, patch_valid=given.patch_valid)
    tokens_BNC, prefix = model.norm_pre(tokens_BNC), model.num_prefix_tokens
    if not len(tokens_BNC):  # no images, so there is no number of patches
        own = model._plan.shape.patch_tokens
        return [(None, TokenState(tokens_BNC[:, :1].expand(-1, prefix + own, -1)), model.positions())]
    coord_Bn2, valid_Bn = given.patch_coord.long(), given.patch_valid.bool()
    height_B, width_B = (coord_Bn2.amax(dim=1) + 1).unbind(dim=1)
    place_Bn = coord_Bn2[..., 0] * width_B[:, None] + coord_Bn2[..., 1]
    astray_B = (valid_Bn & (place_Bn != torch.arange(place_Bn.shape[1], device=place_Bn.device))).any(dim=1)
    facts = torch.stack([valid_Bn.sum(dim=1), height_B, width_B, astray_B.long()], dim=1).tolist()
    alike: dict[tuple[int, ...], list[int]] = {}
    for image, (count, height, width, astray) in enumerate(facts):
        _check_image(image, count, bool(astray) and model.rope is not None)
        alike.setdefault((count,) if model.rope is None else (count, height, width), []).append(image)
    groups = []
    for (count, *grid), images in alike.items():
        places_B = None if len(alike) == 1 else torch.tensor(images, device=tokens_BNC.device)
        take = slice(None) if places_B is None else places_B
        state = TokenState(tokens_BNC[take], present_Bn=valid_Bn[take].float())
        if grid and count < math.prod(grid):  # some of the image is missing; else each token is at its own place
            state = state._replace(place_Bn2=coord_Bn2[take].float())
        state, _ = compact(state, prefix, ())
        groups.append((places_B, state, _rotary(model, *grid) if grid else None))
    return groups


def _check_sizes(given: Patches) -> None:
    """Raise ModelError for tensors that do not belong together, or without any patches."""
    sizes = [tuple(value.shape) for value in given]
    count = sizes[0][:2]
    if sizes[1:] != [(*count, 2), count] or 0 in count[1:]:
        raise ModelError(
            f"model: patches of {sizes[0]}, patch_coord of {sizes[1]} and patch_valid of {sizes[2]} do not go "
            f"together. Possible: (B, N, values), (B, N, 2) and (B, N), with at least one patch. Check the batch."
        )


def _check_image(image: int, count: int, astray: bool) -> None:
    """Raise ModelError for an image without patches, or whose patches are not where its rotary positions are."""
    if count == 0:
        raise ModelError(
            f"model: image {image} of the batch has no valid patch. Possible: at least one, True in patch_valid. "
            f"Leave that image out."
        )
    if astray:
        raise ModelError(
            f"model: the patches of image {image} of the batch are not in the order of their coordinates. timm gives "
            f"the i-th patch the rotary position of row i // width and column i % width, whatever patch_coord says. "
            f"Possible: patches row by row from the first on, with patch_valid False where one is missing. Order them."
        )


def _with_equal_steps(
    groups: Sequence[Group], counted: Sequence[tuple[int, tuple[PlannedStep, ...]]]
) -> Sequence[Group]:
    """The groups with counts after the same steps, those that any of them counted. counted: for each group, its number
    of patches and its steps, of which the last ones have counts.

    A step that removes nothing at some number of patches (`keep: 0.9` of 9) does not run there, and the count stays.
    Steps before the first that has counts are known to leave `after`.
    """
    uncounted = [len(ran) - len(group.state.counts) for group, (_, ran) in zip(groups, counted, strict=True)]
    wanted = {step.key for (_, ran), first in zip(counted, uncounted, strict=True) for step in ran[first:]}
    steps = {step.key: step.stage for _, ran in counted for step in ran}
    order = sorted(steps, key=lambda key: (steps[key].block, steps[key].at == "mid", len(key), key))
    equal = []
    for (places_B, state), (present, ran), first in zip(groups, counted, uncounted, strict=True):
        all_B = torch.ones_like(state.tokens_BNC[:, 0, 0], dtype=torch.float32)
        own = {step.key: step.step.after * all_B for step in ran[:first]}
        own |= {step.key: count_B for step, count_B in zip(ran[first:], state.counts, strict=True)}
        counts, last_B = [], present * all_B
        here, away = {step.key: step.step for step in ran}, list[tuple[Step, Tensor]]()
        for key in order:
            while away and away[-1][0].returns_by(steps[key].block):
                last_B = away.pop()[1]
            if key in here and here[key].until is not None:
                away.append((here[key], last_B))
            last_B = own.get(key, last_B)
            if key in wanted:
                counts.append(last_B)
        equal.append(Group(places_B, state._replace(counts=tuple(counts))))
    return equal


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
