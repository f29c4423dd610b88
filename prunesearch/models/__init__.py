"""How a schedule gets into a model: `apply_schedule`, `remove_schedule`, `schedule_of`, `shape_of`, `trace`.

One file per timm family. A family swaps the classes of the model, and of those modules inside it that a step works in,
for importable subclasses with another `forward`; parameters and their names stay as they are. What a schedule learns is
attached as one module, `token_stages`.

The rule for what others attach to a model: **what timm's forward calls as a module is called as that module, with
tensors, also where a step works**. So forward and backward hooks, parametrizations, replaced layers, `block.compile()`,
DistributedDataParallel and `fully_shard` (of blocks and of the model, after `apply_schedule`) work as they do without a
schedule; a hook sees the tokens that are there. Three things differ. A `forward` that was replaced on the instance is
used, but where a step works inside (the model, `blocks`, the block, an attention that a score reads) only if it was
replaced after `apply_schedule`; else a ModelError names it. With thresholds, in evaluation mode, a block is called once
for each group of images with similar counts (once, when it is sharded). And a graph that PyTorch records cannot hold
thresholds, so that tracing, compiling (fullgraph=True) and exporting refuse them.
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

from prunesearch.errors import ModelError, UntrainedWarning
from prunesearch.files import load_schedule_file
from prunesearch.models import digits_vit, feature_map, vision_transformer  # digits_vit registers its model with timm
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
from prunesearch.models.swap import Swapped, check_forwards, check_takes_call, check_unwrapped, check_was_called
from prunesearch.models.trace import ModelCall, Trace
from prunesearch.models.weights import fitting_weights
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
    "digits_vit",
    "input_size",
    "learned_parameters",
    "learned_parts",
    "may_be_supported",
    "patches_of",
    "remove_schedule",
    "run_from",
    "schedule_of",
    "shape_of",
    "size_keywords",
    "steps_of",
    "threshold_of",
    "threshold_unit",
    "trace",
]

FAMILIES = (vision_transformer, feature_map)


def apply_schedule(
    model: Model,
    schedule: Schedule | str | Path,
    *,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    seed: int = 0,
    untrained: bool = False,
) -> Model:
    """Make `model` reduce its tokens as the schedule says, in place, and return it.

    schedule: a Schedule, or the path of a schedule file, whose weights (the file it names, in the same folder) are
    then loaded too. weights: safetensors file or state_dict of the pruned model, as exported. A schedule that was
    applied before is replaced. Parameters, buffers and `state_dict` keys of the model do not change; what a schedule
    learns (a predictor, queries, thresholds) is added under `token_stages.`, drawn from `seed` when no weights are
    given. Scores and queries that nobody trained are of no use, so that is warned of (UntrainedWarning), unless
    `untrained` says that training follows. An empty schedule leaves the output bit-equal.

    Raises ModelError for a model that is not supported or weights that do not fit, ScheduleError for a schedule that
    does not fit it, FileError for a file that cannot be read. When it raises anything, the model is as it was before,
    with the schedule that it had.
    """
    if not isinstance(schedule, Schedule):
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
        # half precision is for the model's own layers; scores and thresholds are compared in fp32
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
    # from here on nothing can fail, so that a model never has half of a schedule
    remove_schedule(model)
    attach(model, plan, parts, places)
    if state is not None:
        model.load_state_dict(state)
    return model


def _state_with(model: nn.Module, parts: nn.ModuleDict | None) -> dict[str, Tensor]:
    """The state_dict that the model will have with these parts in the place of those it has."""
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{PARTS}.")}
    learned = {} if parts is None else {f"{PARTS}.{name}": value for name, value in parts.state_dict().items()}
    return own | learned


def learned_parts(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that a schedule brought and that need training, for example token_stages.block3_pre.scorer.

    A threshold is not among them: the schedule holds its value.
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
    """The steps that a model takes on images of its own size, in their order; none without a schedule."""
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
    """The schedule that was applied to this model, with thresholds as they are now; or None."""
    return attached(model)


def shape_of(model: nn.Module) -> ModelShape:
    """What the cost arithmetic needs to know of a model; also of one on the meta device. Raises ModelError."""
    return _family(model).shape_of(model)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model was built for. Raises ModelError."""
    return _family(model).input_size(model)


def patches_of(model: nn.Module, features: Tensor) -> Tensor:
    """The patch tokens (B, n, C) in what the dense model's `forward_features` returns, after the model's last norm; of
    a feature map, all positions."""
    return _family(model).patches_of(model, features)


def block_inputs(model: nn.Module, images: Tensor, blocks: Collection[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits of a dense model, and the tokens (B, N, C) that arrive at some of its blocks. Raises ModelError for a
    family that cannot be run from a block."""
    return _family(model).block_inputs(model, images, blocks)


def run_from(model: nn.Module, tokens_BNC: Tensor, first: int) -> Tensor:
    """Logits of a model that carries a schedule, from the tokens that arrive at block `first`.

    For fixed counts and scores that do not learn, with no stage before `first` and none at its `pre` that reads the
    attention of the block before: then the same as from the images, to the last bit.
    """
    return _family(model).run_from(model, tokens_BNC, first)


def may_be_supported(name: str) -> bool:
    """Whether the module of timm (or ours) that builds a model of this name builds models of a family."""
    return any(_module_of(name) in family.MODULES for family in FAMILIES)


def size_keywords(name: str, size: int, channels: int) -> dict[str, Any]:
    """Keywords of `timm.create_model` that build a model, by its name, for square images of a size."""
    module = _module_of(name)
    family = next((family for family in FAMILIES if module in family.MODULES), vision_transformer)
    return family.size_keywords(module, size, channels)


def adapted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names and in the sizes that a dense model has. Raises ModelError."""
    return _family(model).adapted(model, state)


def _module_of(name: str) -> str:
    return timm.model_entrypoint(name).__module__ if timm.is_model(name) else ""


def trace(model: nn.Module, images: Tensor, *, masked: bool | None = None) -> Trace:
    """Run a model that carries a schedule, and tell what became of the tokens beside the logits.

    masked: keep every token in its slot from the first learned decision on (as training does, so by default when the
    model is in training mode); else tokens that go are gone. The model may be wrapped in DistributedDataParallel, to
    train with its counts in the loss. Raises ModelError for a model without a schedule.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(inner, Swapped):
        raise ModelError("trace: the model carries no schedule. Possible: one after apply_schedule. Call that first.")
    call = ModelCall(inner.training if masked is None else masked)
    check_takes_call(inner, "model")
    logits = model(images, call=call)
    check_was_called(call.trace, "model")
    return call.trace._replace(logits=logits)  # type: ignore[union-attr]


def _family(model: nn.Module):  # type: ignore[no-untyped-def]  # returns a module of this package
    for family in FAMILIES:
        if family.is_family(model):
            return family
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    raise ModelError(
        f"model: {name} is not supported. Possible: {', '.join(family.SUPPORTS for family in FAMILIES)}. "
        f"Use a timm model of one of these classes (exactly: a subclass may compute something else), and apply the "
        f"schedule before the model is wrapped or sharded."
    )
