"""Schedules in timm's SwinTransformer and ConvNeXt: positions are held in the third stage, and the map stays whole.

The model's class is swapped for a subclass whose `forward_features` runs timm's stages, but for the third: there,
from the first schedule stage on, token mixing (window attention, depth-wise convolution) sees all positions, the MLP
those that stay, and a linear fast path the others. The blocks before that are timm's own code.
Checked against timm 1.0.31. Letters in tensor names as in `tokens/registry.py`; n are positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunesearch.errors import ModelError
from prunesearch.models.map_shape import STAGE, stages_of
from prunesearch.models.map_shape import input_size as input_size
from prunesearch.models.map_shape import shape_of as shape_of_dense
from prunesearch.models.plan import PARTS, Plan, PlannedStep, attach, attached, block_key, detach, make_plan, plan_for
from prunesearch.models.trace import Trace
from prunesearch.schedule import ModelShape, Schedule
from prunesearch.tokens import REDUCERS
from prunesearch.tokens.masked import take_masked_step
from prunesearch.tokens.registry import Grouping, ReduceInput
from prunesearch.tokens.regroup import TokenState, gather_evidence

SUPPORTS = "timm SwinTransformer and ConvNeXt with plain blocks"


class Choice(NamedTuple):
    """Who goes through the MLP. Either `stays_Bn` is a mask (1: through it, with gradients), or `order_Bn` lists the
    `kept` positions that do and then the others, and `back_Bn` is its inverse."""

    stays_Bn: Tensor | None
    order_Bn: Tensor | None
    back_Bn: Tensor | None
    kept: int


class _Holding:
    """The forward pass with a schedule, for either class."""

    _plan: Plan

    def forward_features(self: Any, x: Tensor) -> Tensor:
        """Image to the final map, as timm's."""
        return self._features(x, self.training)[0]

    def forward_intermediates(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused: timm's code would run the stages without the schedule."""
        raise ModelError(
            "forward_intermediates: the model carries a token schedule, which this function of timm's does not follow. "
            "Possible: model(images), forward_features, or a model without one. Call remove_schedule(model) first."
        )

    def _features(self: Any, x: Tensor, masked: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        is_swin = isinstance(self, SwinTransformer)
        x = self.patch_embed(x) if is_swin else self.stem(x)
        counts: tuple[Tensor, ...] = ()
        for index, stage in enumerate(stages_of(self)):
            if index == STAGE:
                x, counts = _run_stage(stage, self._plan, getattr(self, PARTS, None), x, is_swin, masked)
            else:
                x = stage(x)
        return (self.norm(x) if is_swin else self.norm_pre(x)), counts


class HoldingSwinTransformer(_Holding, SwinTransformer):
    """A SwinTransformer with a token schedule; made by `apply_schedule`, never constructed."""


class HoldingConvNeXt(_Holding, ConvNeXt):
    """A ConvNeXt with a token schedule; made by `apply_schedule`, never constructed."""


HOLDING: dict[type, type] = {SwinTransformer: HoldingSwinTransformer, ConvNeXt: HoldingConvNeXt}


def is_family(model: nn.Module) -> bool:
    """Exactly one of the classes here, with or without a schedule."""
    return type(model) in HOLDING or type(model) in HOLDING.values()


def apply(model: Any, schedule: Schedule, seed: int) -> None:
    """Swap the class of a model without a schedule. Raises ModelError or ScheduleError, and then changes nothing."""
    attach(model, make_plan(schedule, shape_of(model)), seed, HOLDING)


def remove(model: nn.Module) -> None:
    """Swap the class back."""
    detach(model, HOLDING)


def schedule_of(model: nn.Module) -> Schedule | None:
    """The applied schedule, or None."""
    return attached(model, HOLDING)


def shape_of(model: Any) -> ModelShape:
    """See `map_shape.shape_of`; with a schedule, the shape it was resolved for."""
    return model._plan.shape if type(model) in HOLDING.values() else shape_of_dense(model)


def trace(model: Any, images: Tensor, masked: bool) -> Trace:
    """See `prunesearch.models.trace`."""
    features, counts = model._features(images, masked)
    return Trace(model.forward_head(features), patches_of(model, features), None, counts)


def patches_of(model: Any, features: Tensor) -> Tensor:
    """See `prunesearch.models.patches_of`. timm's ConvNeXt pools before its last norm; here that norm is applied to
    each position."""
    is_swin = isinstance(model, SwinTransformer)
    normalise = nn.Identity() if is_swin else getattr(model.head, "norm", nn.Identity())
    return _positions(normalise(features), is_swin)


def _run_stage(
    stage: Any, plan: Plan, parts: nn.ModuleDict | None, x: Tensor, is_swin: bool, masked: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """timm's stage with the schedule. Also returns the positions of each image that stay, of each masked step."""
    x = stage.downsample(x)
    plan = plan_for(plan, x[0].numel() // plan.shape.dim)
    choice: Choice | None = None
    counts: tuple[Tensor, ...] = ()
    fast_paths: dict[str, nn.Module] = {}
    for part in () if parts is None else parts.values():
        fast_paths |= dict(part.reducer.items())  # type: ignore[operator, union-attr]
    for index, (block, block_plan) in enumerate(zip(stage.blocks, plan.blocks, strict=True)):
        for planned in block_plan.pre:
            assert parts is not None, "a verb that holds learns"
            own: Any = parts[planned.key]
            choice = _choose(planned, _positions(x, is_swin), own.scorer, masked, stage.training)
            counts += () if choice.stays_Bn is None else (choice.stays_Bn.sum(dim=1),)
        fast_path = None if choice is None else fast_paths[block_key(index)]
        if stage.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint(_run_block, block, x, choice, fast_path, use_reentrant=False)
        else:
            x = _run_block(block, x, choice, fast_path)
    return x, counts


def _choose(planned: PlannedStep, x_BnC: Tensor, scorer: nn.Module | None, masked: bool, training: bool) -> Choice:
    stage, step = planned.stage, planned.step
    evidence = gather_evidence(stage, x_BnC, None, training, part=scorer)
    if masked and planned.decisions_learn:
        state, _ = take_masked_step(
            step, TokenState(x_BnC), 0, evidence, (), None, None, planned.softness, sample=training
        )
        return Choice(state.present_Bn, None, None, step.kept)
    grouping = REDUCERS[stage.reduce].function(ReduceInput(x_BnC, evidence.scores_Bn, None, None, step.kept))
    assert isinstance(grouping, Grouping) and grouping.guests_BG is not None
    order_Bn = torch.cat([grouping.kept_BK, grouping.guests_BG], dim=1)
    return Choice(None, order_Bn, order_Bn.argsort(dim=1), step.kept)


def _run_block(block: Any, x: Tensor, choice: Choice | None, fast_path: nn.Module | None) -> Tensor:
    """timm's block, with its MLP for some positions only."""
    if choice is None or fast_path is None:
        return block(x)
    if isinstance(block, SwinTransformerBlock):
        x = x + block.drop_path1(block._attn(block.norm1(x)))
        added_BnC = _add(x.flatten(1, 2), choice, lambda x_BKC: block.mlp(block.norm2(x_BKC)), fast_path)
        return x + block.drop_path2(added_BnC.reshape(x.shape))

    def mlp(mixed_BKC: Tensor) -> Tensor:
        added_BKC = block.mlp(block.norm(mixed_BKC))
        return added_BKC if block.gamma is None else added_BKC * block.gamma

    mixed = block.conv_dw(x).permute(0, 2, 3, 1)
    added_BnC = _add(mixed.flatten(1, 2), choice, mlp, fast_path)
    return block.drop_path(added_BnC.reshape(mixed.shape).permute(0, 3, 1, 2)) + block.shortcut(x)


def _add(x_BnC: Tensor, choice: Choice, mlp: Callable[[Tensor], Tensor], fast_path: nn.Module) -> Tensor:
    """What the block adds at each position, (B, n, C): of the MLP where it stays, else of the fast path."""
    if choice.stays_Bn is not None:
        slow_BnC, stays_Bn1 = mlp(x_BnC), choice.stays_Bn[..., None]
        return (slow_BnC * stays_Bn1 + fast_path(x_BnC) * (1 - stays_Bn1)).to(slow_BnC.dtype)
    assert choice.order_Bn is not None and choice.back_Bn is not None
    ordered_BnC = _gather(x_BnC, choice.order_Bn)
    slow_BKC, fast_BGC = mlp(ordered_BnC[:, : choice.kept]), fast_path(ordered_BnC[:, choice.kept :])
    return _gather(torch.cat([slow_BKC, fast_BGC.to(slow_BKC.dtype)], dim=1), choice.back_Bn)


def _positions(x: Tensor, is_swin: bool) -> Tensor:
    """A map, (B, H, W, C) of Swin or (B, C, H, W) of ConvNeXt, as tokens (B, n, C)."""
    return x.flatten(1, 2) if is_swin else x.flatten(2).transpose(1, 2)


def _gather(values_BnC: Tensor, order_Bn: Tensor) -> Tensor:
    return values_BnC.gather(1, order_Bn[..., None].expand(-1, -1, values_BnC.shape[-1]))
