"""Schedules in timm's Swin, Swin-V2 and ConvNeXt: positions skip the MLP in the third stage, and the map stays whole.

The classes of the model, of its sequence of stages, of the third stage and of its blocks are swapped for subclasses.
In the third stage, from the first step of the schedule on, token mixing (window attention, depth-wise convolution) sees
all positions. The MLP sees those that stay, and a linear fast path the others. Each module is called with a map and
returns a map, as in timm. Whatever else a step needs is passed in a `call`, as in transformer.py. Without a call
timm's own code runs. Checked against timm 1.0.31. Letters in tensor names as in `tokens/inputs.py`; n are positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from timm.models._features import feature_take_indices
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, SwinTransformerStage
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block, SwinTransformerV2Stage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunesearch.errors import ModelError
from prunesearch.models.map_shape import STAGE, is_swin, place_of, stages_of
from prunesearch.models.map_shape import input_size as input_size
from prunesearch.models.map_shape import shape_of as shape_of
from prunesearch.models.masked_step import take_masked_step
from prunesearch.models.plan import PARTS, Plan, PlannedStep, block_key, make_plan, plan_for
from prunesearch.models.step import TokenState, gather_evidence
from prunesearch.models.swap import (
    Place,
    Swapped,
    check_methods,
    check_takes_call,
    check_was_called,
    ours,
    refuse_pruning,
    timm_class,
)
from prunesearch.models.trace import ModelCall, Trace
from prunesearch.schedule import Schedule, Step
from prunesearch.tokens.inputs import Grouping, ReduceInput
from prunesearch.tokens.select import ascending, gather

SUPPORTS = "timm SwinTransformer, SwinTransformerV2 and ConvNeXt with plain blocks"


class Choice(NamedTuple):
    """Which positions go through the MLP.

    Either stays_Bn is a mask (1: through the MLP; with gradients). Or order_Bn lists the `kept` positions that go
    through it and then the others, and back_Bn is the inverse of that order.
    """

    stays_Bn: Tensor | None
    order_Bn: Tensor | None
    back_Bn: Tensor | None
    kept: int


CALL = "_next_call"
"""Attribute of the third stage with the call of its next pass, where timm's code calls it."""


class StageCall:
    """Passed through the stages, the third stage and its `blocks` in one pass, besides the map.

    counts: set by the blocks: for each masked step, the number of positions of each image that stay, (B,).
    Neither this nor `BlockCall` is a dataclass, because FSDP would copy it and look for tensors in it.
    """

    def __init__(self, plan: Plan, parts: nn.ModuleDict | None, is_swin: bool, masked: bool, training: bool) -> None:
        self.plan, self.parts, self.is_swin, self.masked, self.training = plan, parts, is_swin, masked, training
        self.counts: tuple[Tensor, ...] | None = None


class BlockCall:
    """Passed to a block in which positions skip the MLP. done: set by the block when its forward has run."""

    def __init__(self, choice: Choice, fast_path: nn.Module) -> None:
        self.choice, self.fast_path = choice, fast_path
        self.done: bool | None = None


class _HoldingBlock(Swapped):
    def slow(self: Any, x_BKC: Tensor) -> Tensor:
        """What the MLP adds at positions that go through it. Also takes a block of timm's class in place of `self`."""
        raise NotImplementedError

    def forward(self: Any, x: Tensor, call: BlockCall | None = None) -> Tensor:
        """Map to map, as timm's."""
        if call is None:
            return timm_class(self).forward(self, x)
        call.done = True
        return self._hold(x, call.choice, call.fast_path)


class HoldingSwinTransformerBlock(_HoldingBlock, SwinTransformerBlock):
    """timm's block. With a call, only some positions go through its MLP."""

    stands_for = SwinTransformerBlock

    def slow(self: Any, x_BKC: Tensor) -> Tensor:
        """Norm and MLP."""
        return self.mlp(self.norm2(x_BKC))

    def _hold(self, x: Tensor, choice: Choice, fast_path: nn.Module) -> Tensor:
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        added_BnC = add_by_choice(x.flatten(1, 2), choice, self.slow, fast_path)
        return x + self.drop_path2(added_BnC.reshape(x.shape))


class HoldingSwinTransformerV2Block(_HoldingBlock, SwinTransformerV2Block):
    """timm's block, which normalises what its MLP returns. With a call, only some positions go through its MLP."""

    stands_for = SwinTransformerV2Block

    def slow(self: Any, x_BKC: Tensor) -> Tensor:
        """MLP and norm."""
        return self.norm2(self.mlp(x_BKC))

    def _hold(self, x: Tensor, choice: Choice, fast_path: nn.Module) -> Tensor:
        x = x + self.drop_path1(self.norm1(self._attn(x)))
        added_BnC = add_by_choice(x.flatten(1, 2), choice, self.slow, fast_path)
        return x + self.drop_path2(added_BnC.reshape(x.shape))


class HoldingConvNeXtBlock(_HoldingBlock, ConvNeXtBlock):
    """timm's block. With a call, only some positions go through its MLP."""

    stands_for = ConvNeXtBlock

    def slow(self: Any, x_BKC: Tensor) -> Tensor:
        """Norm, MLP and layer scale."""
        added_BKC = self.mlp(self.norm(x_BKC))
        return added_BKC if self.gamma is None else added_BKC * self.gamma

    def _hold(self, x: Tensor, choice: Choice, fast_path: nn.Module) -> Tensor:
        mixed = self.conv_dw(x).permute(0, 2, 3, 1)
        added_BnC = add_by_choice(mixed.flatten(1, 2), choice, self.slow, fast_path)
        return self.drop_path(added_BnC.reshape(mixed.shape).permute(0, 3, 1, 2)) + self.shortcut(x)


class HoldingBlocks(Swapped, nn.Sequential):
    """The third stage's `blocks`. With a call, they run the schedule."""

    stands_for = nn.Sequential

    def forward(self, input: Tensor, call: StageCall | None = None, checkpointed: bool = False) -> Tensor:
        """Map to map."""
        return nn.Sequential.forward(self, input) if call is None else _run_blocks(self, input, call, checkpointed)


class _HoldingStage(Swapped):
    def forward(self: Any, x: Tensor, call: StageCall | None = None) -> Tensor:
        """Map to map, as timm's."""
        if call is None:
            call = vars(self).pop(CALL, None)  # timm's own loop over the stages passes nothing on
        if call is None:
            return timm_class(self).forward(self, x)
        checkpointed = self.grad_checkpointing and not torch.jit.is_scripting()
        x = self._run(self.downsample(x), call, checkpointed)
        check_was_called(call.counts, f"{_stage_path(call)}.blocks")
        return x

    def _run(self: Any, x: Tensor, call: StageCall, checkpointed: bool) -> Tensor:
        check_takes_call(self.blocks, f"{_stage_path(call)}.blocks")
        return self.blocks(x, call=call, checkpointed=checkpointed)


class HoldingSwinTransformerStage(_HoldingStage, SwinTransformerStage):
    """timm's stage. With a call, it runs the schedule."""

    stands_for = SwinTransformerStage


class HoldingSwinTransformerV2Stage(_HoldingStage, SwinTransformerV2Stage):
    """timm's stage, which calls its blocks one by one. With a call, it runs the schedule."""

    stands_for = SwinTransformerV2Stage

    def _run(self, x: Tensor, call: StageCall, checkpointed: bool) -> Tensor:
        return _run_blocks(self.blocks, x, call, checkpointed)


class HoldingConvNeXtStage(_HoldingStage, ConvNeXtStage):
    """timm's stage. With a call, it runs the schedule."""

    stands_for = ConvNeXtStage


class HoldingStages(Swapped, nn.Sequential):
    """A model's sequence of stages. A call is passed on to the third."""

    stands_for = nn.Sequential

    def forward(self, input: Tensor, call: StageCall | None = None) -> Tensor:
        """Map to map."""
        if call is None:
            return nn.Sequential.forward(self, input)
        for index, stage in enumerate(self):
            if index == STAGE:
                check_takes_call(stage, _stage_path(call))
                input = stage(input, call=call)
                check_was_called(call.counts, _stage_path(call))
            else:
                input = stage(input)
        return input


class _Holding(Swapped):
    """The forward pass with a schedule, for SwinTransformer and ConvNeXt."""

    _plan: Plan

    def forward(self: Any, x: Tensor, call: ModelCall | None = None) -> Tensor:
        """Image to logits."""
        if call is None:
            return timm_class(self).forward(self, x)
        check_methods(self, "model", type(self))
        features, counts = self._features(x, call.masked)
        logits = self.forward_head(features)
        call.trace = Trace(logits, patches_of(self, features), None, counts)
        return logits

    def forward_features(self: Any, x: Tensor) -> Tensor:
        """Image to the final map, as timm's."""
        return self._features(x, self.training)[0]

    def forward_intermediates(self: Any, x: Tensor, *args: Any, **given: Any) -> Any:
        """timm's, with the maps of the stages under the schedule: no position ever leaves them."""
        stage, call = stages_of(self)[STAGE], self._call(self.training)
        check_takes_call(stage, place_of(self))
        vars(stage)[CALL] = call
        try:
            found = timm_class(self).forward_intermediates(self, x, *args, **given)  # type: ignore[attr-defined]
        finally:
            waits = vars(stage).pop(CALL, None)
        if waits is None:  # the pass came so far
            check_was_called(call.counts, place_of(self))
        return found

    def prune_intermediate_layers(self: Any, indices: int | list[int] = 1, *args: Any, **given: Any) -> Any:
        """timm's. Raises ModelError when it would take the stage with the schedule away."""
        _, last = feature_take_indices(len(stages_of(self)), indices)
        if last < STAGE:
            refuse_pruning()
        return timm_class(self).prune_intermediate_layers(self, indices, *args, **given)  # type: ignore[attr-defined]

    def _call(self: Any, masked: bool) -> StageCall:
        parts, training = getattr(self, PARTS, None), stages_of(self)[STAGE].training
        return StageCall(self._plan, parts, is_swin(self), masked, training)

    def _features(self: Any, x: Tensor, masked: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        swin, stages, path = is_swin(self), stages_of(self), place_of(self).removesuffix(f"[{STAGE}]")
        x = self.patch_embed(x) if swin else self.stem(x)
        call = self._call(masked)
        check_takes_call(stages, path)
        x = stages(x, call=call)
        check_was_called(call.counts, path)
        return (self.norm(x) if swin else self.norm_pre(x)), call.counts or ()


class HoldingSwinTransformer(_Holding, SwinTransformer):
    """A SwinTransformer with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = SwinTransformer


class HoldingSwinTransformerV2(_Holding, SwinTransformerV2):
    """A SwinTransformerV2 with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = SwinTransformerV2


class HoldingConvNeXt(_Holding, ConvNeXt):
    """A ConvNeXt with a token schedule; made by `apply_schedule`, never constructed."""

    stands_for = ConvNeXt


CONVNEXT = "timm.models.convnext"
MODULES = ("timm.models.swin_transformer", "timm.models.swin_transformer_v2", CONVNEXT)
"""Python modules with functions that build models of these classes (among others)."""


def is_family(model: nn.Module) -> bool:
    """True for exactly SwinTransformer, SwinTransformerV2 and ConvNeXt, with or without a schedule."""
    return timm_class(model) in (SwinTransformer, SwinTransformerV2, ConvNeXt)


def plan_of(model: Any, schedule: Schedule) -> Plan:
    """The schedule resolved for a model, which is not changed. Raises ModelError or ScheduleError."""
    check_methods(model, "model", ours(model))  # first, because shape_of runs a pass
    return make_plan(schedule, shape_of(model))


def places_of(model: Any, plan: Plan) -> Sequence[Place]:
    """The modules whose class is swapped."""
    stages: Any = stages_of(model)
    stage, path = stages[STAGE], place_of(model)
    places = [
        Place("model", model, ours(model), calls=True),
        Place(path.removesuffix(f"[{STAGE}]"), stages, HoldingStages, calls=True),
        Place(path, stage, ours(stage), calls=True),
    ]
    if timm_class(stage.blocks) is nn.Sequential:
        places.append(Place(f"{path}.blocks", stage.blocks, HoldingBlocks, calls=True))
    first = min((planned.stage.block for planned in plan.steps), default=len(stage.blocks))
    places += [
        Place(f"{path}.blocks[{index}]", block, ours(block), calls=index >= first)
        for index, block in enumerate(stage.blocks)
    ]
    return places


def patch_tokens_of(model: Any) -> int:
    """Positions of the third stage's map, for an image of the model's current size."""
    if not is_swin(model):
        return model._plan.shape.patch_tokens
    stage: Any = stages_of(model)[STAGE]
    height, width = stage.output_resolution
    return height * width


def size_keywords(module: str, size: int, channels: int) -> dict[str, Any]:
    """See `prunesearch.models.size_keywords`. A ConvNeXt takes any size, so only its settings name one.

    crop_pct 1.0: images of that size are not cropped.
    """
    if module != CONVNEXT:
        return {"img_size": size}
    return {"pretrained_cfg_overlay": {"input_size": (channels, size, size), "crop_pct": 1.0}}


def adapted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """See `prunesearch.models.adapted`."""
    return state


def block_inputs(model: Any, images: Tensor, blocks: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Raises ModelError. All verbs of this family learn, so without training there is nothing to measure by block."""
    raise ModelError(
        "model: a feature map cannot be run from one of its blocks. Possible: the whole model. Use a VisionTransformer "
        "to measure stages one by one."
    )


def run_from(model: Any, tokens_BNC: Tensor, first: int) -> Tensor:
    """See `block_inputs`."""
    block_inputs(model, tokens_BNC, ())
    raise AssertionError("block_inputs raises")


def patches_of(model: Any, features: Tensor) -> Tensor:
    """See `prunesearch.models.patches_of`. timm's ConvNeXt pools before its last norm; here it is applied to each
    position."""
    normalise = nn.Identity() if is_swin(model) else getattr(model.head, "norm", nn.Identity())
    return _positions(normalise(features), is_swin(model))


def _stage_path(call: StageCall) -> str:
    return f"model.layers[{STAGE}]" if call.is_swin else f"model.stages[{STAGE}]"


def _run_blocks(blocks: Any, x: Tensor, call: StageCall, checkpointed: bool) -> Tensor:
    """The third stage's blocks with the schedule."""
    parts = call.parts
    plan = plan_for(call.plan, x.shape[1:].numel() // call.plan.shape.dim)
    choice: Choice | None = None
    counts: tuple[Tensor, ...] = ()
    fast_paths: dict[str, nn.Module] = {}
    for part in () if parts is None else parts.values():
        fast_paths |= dict(part.reducer.items())  # type: ignore[operator, union-attr]
    for index, (block, block_plan) in enumerate(zip(blocks, plan.blocks, strict=True)):
        for planned in block_plan.pre:
            assert parts is not None, "a verb that holds learns"
            own: Any = parts[planned.key]
            choice = _choose(planned, _positions(x, call.is_swin), own.scorer, call.masked, call.training)
            counts += () if choice.stays_Bn is None else (choice.stays_Bn.sum(dim=1),)
        fast_path = None if choice is None else fast_paths[block_key(index)]
        path = f"{_stage_path(call)}.blocks[{index}]"
        if checkpointed:
            x = checkpoint(_run_block, block, path, x, choice, fast_path, use_reentrant=False)
        else:
            x = _run_block(block, path, x, choice, fast_path)
    call.counts = counts
    return x


def _choose(planned: PlannedStep, x_BnC: Tensor, scorer: nn.Module | None, masked: bool, training: bool) -> Choice:
    stage, step = planned.stage, planned.step
    evidence = gather_evidence(stage, x_BnC, None, training, part=scorer)
    if masked and planned.decisions_learn:
        state, _ = take_masked_step(
            step, TokenState(x_BnC), 0, evidence, (), None, None, planned.softness, sample=training
        )
        return Choice(state.present_Bn, None, None, step.kept)
    return choice_of(step, x_BnC, evidence.scores_Bn)


def choice_of(step: Step, x_BnC: Tensor, scores_Bn: Tensor | None) -> Choice:
    """The positions that a step keeps, by their scores."""
    scene = ReduceInput(x_BnC, scores_Bn, None, None, step.kept)
    grouping = step.verb.function(scene, **step.options)
    assert isinstance(grouping, Grouping) and grouping.guests_BG is not None
    order_Bn = torch.cat([grouping.kept_BK, grouping.guests_BG], dim=1)
    return Choice(None, order_Bn, ascending(order_Bn)[1], step.kept)


def _run_block(block: nn.Module, path: str, x: Tensor, choice: Choice | None, fast_path: nn.Module | None) -> Tensor:
    if choice is None or fast_path is None:
        return block(x)
    call = BlockCall(choice, fast_path)
    check_takes_call(block, path)
    x = block(x, call=call)
    check_was_called(call.done, path)
    return x


def add_by_choice(x_BnC: Tensor, choice: Choice, mlp: Callable[[Tensor], Tensor], fast_path: nn.Module) -> Tensor:
    """What the block adds at each position, (B, n, C): from the MLP where it stays, else from the fast path."""
    if choice.stays_Bn is not None:
        slow_BnC, stays_Bn1 = mlp(x_BnC), choice.stays_Bn[..., None]
        return (slow_BnC * stays_Bn1 + fast_path(x_BnC) * (1 - stays_Bn1)).to(slow_BnC.dtype)
    assert choice.order_Bn is not None and choice.back_Bn is not None
    ordered_BnC = gather(x_BnC, choice.order_Bn)
    slow_BKC, fast_BGC = mlp(ordered_BnC[:, : choice.kept]), fast_path(ordered_BnC[:, choice.kept :])
    return gather(torch.cat([slow_BKC, fast_BGC.to(slow_BKC.dtype)], dim=1), choice.back_Bn)


def _positions(x: Tensor, swin: bool) -> Tensor:
    """A map (Swin: (B, H, W, C), ConvNeXt: (B, C, H, W)) as tokens (B, n, C)."""
    return x.flatten(1, 2) if swin else x.flatten(2).transpose(1, 2)
