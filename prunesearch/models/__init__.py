"""Put a schedule into a model: `apply_schedule`, `remove_schedule`, `schedule_of`, `shape_of`, `trace`.

One file per timm family. A family swaps the classes of the model, and of the modules inside it that run steps, for
importable subclasses with another `forward`. Parameters and their names do not change. The learned parts of a schedule
are attached as one module, `token_stages`.

**With a schedule, each module that timm's forward calls is still called as a module, with tensors.** So forward and
backward hooks, parametrizations, replaced layers, `block.compile()`, DistributedDataParallel and `fully_shard` (of
blocks and of the model, after `apply_schedule`) work as without a schedule. A hook sees the tokens that are present.
Four things differ:

- A `forward` that was replaced on the instance is used. On a module that runs a step (the model, `blocks`, the block,
  an attention that a score reads) it must have been replaced after `apply_schedule`. Otherwise a ModelError names it.
- With thresholds, in evaluation mode, a block is called once for each group of images with similar counts (only once
  when it is sharded).
- With patches of images of different sizes (NaFlexVit), a block is called once for each number of patches in the batch,
  or with rotary positions for each height and width.
- A graph that PyTorch records cannot hold thresholds, nor patches of images of different sizes. Tracing, compiling
  (fullgraph=True) and exporting refuse them.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunesearch.errors import ModelError, ScheduleError, UntrainedWarning
from prunesearch.files import load_schedule_file, preset_names
from prunesearch.models import (  # digits_vit and scenes_vit register their models with timm
    beit,
    digits_vit,
    eva,
    feature_map,
    map_parts,
    naflexvit,
    scenes_vit,
    vision_transformer,
    vision_transformer_relpos,
    vit_parts,
)
from prunesearch.models.dense_head import with_dense_head
from prunesearch.models.plan import (
    PARTS,
    Plan,
    PlannedStep,
    attach,
    attached,
    detach,
    make_parts,
    make_plan,
    plan_for,
    threshold_unit,
)
from prunesearch.models.swap import (
    Swapped,
    check_forwards,
    check_takes_call,
    check_unwrapped,
    check_was_called,
    timm_class,
)
from prunesearch.models.trace import ModelCall, Trace
from prunesearch.models.weights import fitting_weights
from prunesearch.presets import load_preset
from prunesearch.schedule import Schedule
from prunesearch.shape import ModelShape

Model = TypeVar("Model", bound=nn.Module)

__all__ = [
    "PARTS",
    "PlannedStep",
    "Trace",
    "adapted",
    "apply_schedule",
    "block_inputs",
    "class_of",
    "digits_vit",
    "input_size",
    "learned_parameters",
    "learned_parts",
    "may_be_supported",
    "parts_of",
    "patches_of",
    "remove_schedule",
    "run_from",
    "scenes_vit",
    "schedule_of",
    "shape_of",
    "size_keywords",
    "steps_of",
    "threshold_of",
    "threshold_unit",
    "trace",
    "with_dense_head",
]

FAMILIES = (vision_transformer, eva, beit, naflexvit, vision_transformer_relpos, feature_map)
PARTS_OF = {feature_map: map_parts}

WHY_NOT = {
    "Hiera": "its blocks pool over groups of neighbouring tokens, so every token must be in its place",
    "HieraDet": "its blocks pool over groups of neighbouring tokens, so every token must be in its place",
    "MultiScaleVit": "its blocks pool keys and values with convolutions over the grid, so every token must be there",
    "VisionTransformerSAM": "most of its blocks attend within windows of the grid, so every token must be in its place",
    "DaVit": "its blocks attend within windows and have convolutions, so every token must be in its place",
    "Cait": "the logits of its heads are mixed, so that scores would rank by another attention than it computes",
    "DeepseekVitEncoder": "its features are a map, and it has no classifier",
    "DeepseekVitClassifier": "its blocks are inside an encoder of its own, whose pass it does not run itself",
    "ConvNeXtV2": "it normalises over all positions, so that an MLP on some of them computes something else",
}
"""Why classes that users ask for take no schedule."""


def apply_schedule(
    model: Model,
    schedule: Schedule | str | Path,
    *,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    seed: int = 0,
    untrained: bool = False,
) -> Model:
    """Make `model` reduce its tokens as the schedule says, in place, and return it.

    schedule: a Schedule, the path of a schedule file, or the name of a preset (`prunesearch list presets`), which is
    fitted to the model. The weights that a file names (in the same folder) are loaded too. weights: safetensors file or
    state_dict of the pruned model, as exported. seed: for learned parts without weights. untrained: training follows,
    so do not warn that learned parts have no weights.

    An earlier schedule is replaced. Parameters, buffers and `state_dict` keys of the model do not change. Learned parts
    of the schedule (predictors, queries, thresholds) are added under `token_stages.`. An empty schedule leaves the
    output bit-equal.

    Warns (UntrainedWarning) when scores or queries are random. Raises ModelError for a model that is not supported or
    weights that do not fit, ScheduleError for a schedule that does not fit the model, FileError for a file that cannot
    be read. After an error the model is unchanged and still has its earlier schedule.
    """
    if isinstance(schedule, str) and schedule in preset_names() and not Path(schedule).is_file():
        schedule = load_preset(schedule, shape_of(model))
    elif not isinstance(schedule, Schedule):
        path = Path(schedule)
        file = load_schedule_file(path)
        schedule = file.schedule
        if weights is None and file.weights is not None:
            weights = path.parent / file.weights
    family = _family(model)
    plan = family.plan_of(model, schedule)
    places = family.places_of(model, plan)
    check_forwards(places)
    if isinstance(model, Swapped):
        check_unwrapped(places)
    parts = make_parts(plan, seed)
    if parts is not None:
        # no dtype: learned parts stay in fp32 also in a half-precision model
        parts = parts.to(next(model.parameters()).device)
    state = None if weights is None else fitting_weights(weights, _state_with(model, parts))
    names = _learned_names(parts)
    if state is None and names and not untrained:
        warnings.warn(
            f"apply_schedule: {', '.join(names)} of this schedule learn, and no weights were given, so they are "
            f"random. Give weights=..., the file that was exported with the schedule, or train the model.",
            UntrainedWarning,
            stacklevel=2,
        )
    # nothing below can fail, so the model never has half of a schedule
    remove_schedule(model)
    attach(model, plan, parts, places)
    if state is not None:
        model.load_state_dict(state)
    return model


def _state_with(model: nn.Module, parts: nn.ModuleDict | None) -> dict[str, Tensor]:
    """The state_dict that the model will have with these learned parts instead of its own."""
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{PARTS}.")}
    learned = {} if parts is None else {f"{PARTS}.{name}": value for name, value in parts.state_dict().items()}
    return own | learned


def learned_parts(model: nn.Module) -> tuple[str, ...]:
    """Names of a schedule's modules that need training, for example token_stages.block3_pre.scorer.

    Thresholds are not among them, because the schedule holds their values.
    """
    return _learned_names(getattr(model, PARTS, None))


def _learned_names(parts: object) -> tuple[str, ...]:
    if not isinstance(parts, nn.ModuleDict):
        return ()
    return tuple(f"{PARTS}.{key}.{name}" for key, stage in parts.items() for name, _ in stage.named_children())


def learned_parameters(schedule: Schedule, shape: ModelShape) -> int:
    """How many parameters a schedule adds to a model of this shape. Raises ScheduleError when it does not fit."""
    with torch.device("meta"):
        parts = make_parts(make_plan(schedule, shape), seed=0)
    return 0 if parts is None else sum(parameter.numel() for parameter in parts.parameters())


def steps_of(model: nn.Module) -> tuple[PlannedStep, ...]:
    """The steps of a model's schedule on images of its own size, in their order; empty without a schedule."""
    plan = getattr(model, "_plan", None)
    return plan_for(plan, _family(model).patch_tokens_of(model)).steps if isinstance(plan, Plan) else ()


def threshold_of(model: nn.Module, step: PlannedStep) -> nn.Parameter | None:
    """The threshold of a step as a parameter, or None when its stage has none."""
    stages = getattr(model, PARTS, None)
    return None if stages is None or step.key not in stages else stages[step.key].threshold


def remove_schedule(model: Model) -> Model:
    """Undo `apply_schedule`, in place, and return the model. Does nothing to a model without a schedule.

    Raises ModelError, and changes nothing, when the class of a module was changed after the schedule was applied (by
    `fully_shard`, for example).
    """
    if isinstance(model, Swapped):
        places = _family(model).places_of(model, model._plan)
        check_unwrapped(places)
        detach(model, places)
    return model


def schedule_of(model: nn.Module) -> Schedule | None:
    """The schedule that was applied to a model, with its current thresholds; None without one."""
    return attached(model)


def shape_of(model: nn.Module) -> ModelShape:
    """The `ModelShape` of a model, which may be on the meta device. Raises ModelError."""
    return _family(model).shape_of(model)


def class_of(model: nn.Module) -> str:
    """Name of the timm class of a model, with or without a schedule. Raises ModelError."""
    _family(model)
    return timm_class(model).__name__


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model was built for. Raises ModelError."""
    return _family(model).input_size(model)


def patches_of(model: nn.Module, features: Tensor) -> Tensor:
    """Patch tokens (B, n, C) after the model's last norm. features: output of the dense model's `forward_features`.

    For a feature map these are all positions.
    """
    return _family(model).patches_of(model, features)


def keeps_places(model: nn.Module) -> bool:
    """Whether every patch token is in its place after the last block."""
    plan = getattr(model, "_plan", None)
    return not isinstance(plan, Plan) or plan.all_return


def refuse_missing_places(model: nn.Module) -> None:
    """Raise ScheduleError for a model that has not every patch token in its place after the last block."""
    if not keeps_places(model):
        raise ScheduleError(
            "schedule",
            [
                "its patch tokens are not all there at the end, so they cannot be compared with the dense model's. "
                "Possible: stages with until, or hold. Write until: end, or leave the comparison out."
            ],
        )


def block_inputs(model: nn.Module, images: Tensor, blocks: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits of a dense model, and the tokens (B, N, C) that arrive at the given blocks.

    Raises ModelError for a family that cannot be run from a block.
    """
    return _family(model).block_inputs(model, images, blocks)


def run_from(model: nn.Module, tokens_BNC: Tensor, first: int) -> Tensor:
    """Logits of a model with a schedule, computed from the tokens that arrive at block `first`.

    The schedule must have fixed counts, scores that do not learn, no stage before block `first`, and no stage at its
    `pre` that reads the attention of the block before. Then the logits are bit-equal to those computed from the images.
    """
    return _family(model).run_from(model, tokens_BNC, first)


def may_be_supported(name: str) -> bool:
    """Whether a model of this name may belong to a family, judged by the Python module that builds it."""
    return any(_module_of(name) in family.MODULES for family in FAMILIES)


def size_keywords(name: str, size: int, channels: int) -> dict[str, Any]:
    """Keywords of `timm.create_model` that build the model of this name for square images of `size` pixels."""
    module = _module_of(name)
    family = next((family for family in FAMILIES if module in family.MODULES), vision_transformer)
    return family.size_keywords(module, size, channels)


def adapted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of a checkpoint to the names and sizes of a dense model. Raises ModelError."""
    return _family(model).adapted(model, state)


def _module_of(name: str) -> str:
    return timm.model_entrypoint(name).__module__ if timm.is_model(name) else ""


def trace(model: nn.Module, images: Tensor | Mapping[str, Any], *, masked: bool | None = None) -> Trace:
    """Run a model that has a schedule, and return a `Trace`: the logits, the final tokens and the counts.

    masked: from the first learned decision on, keep every token in its slot, as training does; otherwise tokens are
    removed. By default True in training mode. The model may be wrapped in DistributedDataParallel. images: for a
    NaFlexVit also a dict of patches.
    Raises ModelError for a model without a schedule.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(inner, Swapped):
        raise ModelError("trace: the model carries no schedule. Possible: one after apply_schedule. Call that first.")
    call = ModelCall(inner.training if masked is None else masked)
    check_takes_call(inner, "model")
    logits = model(images, call=call)
    check_was_called(call.trace, "model")
    return call.trace._replace(logits=logits)  # type: ignore[union-attr]


def parts_of(model: nn.Module):  # type: ignore[no-untyped-def]  # returns a module of this package
    """The functions that give the parts of a model whose time is measured alone."""
    return PARTS_OF.get(_family(model), vit_parts)


def _family(model: nn.Module):  # type: ignore[no-untyped-def]  # returns a module of this package
    for family in FAMILIES:
        if family.is_family(model):
            return family
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    reason = WHY_NOT.get(type(model).__qualname__)
    raise ModelError(
        f"model: {name} is not supported{'' if reason is None else f': {reason}'}. "
        f"Possible: {', '.join(family.SUPPORTS for family in FAMILIES)}. "
        f"Use a timm model of one of these classes (exactly: a subclass may compute something else), and apply the "
        f"schedule before the model is wrapped or sharded."
    )
