"""How a schedule gets into a model: `apply_schedule`, `remove_schedule`, `schedule_of`, `shape_of`.

One file per timm family. A family swaps the class of the *model* for an importable subclass with another
`forward`; parameters, their names and the blocks themselves stay as they are.
"""

from __future__ import annotations

from typing import TypeVar

import torch.nn as nn

from prunesearch.errors import ModelError
from prunesearch.models import digits_vit, vision_transformer  # digits_vit registers the shipped model with timm
from prunesearch.schedule import ModelShape, Schedule

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["apply_schedule", "digits_vit", "remove_schedule", "schedule_of", "shape_of"]

FAMILIES = (vision_transformer,)


def apply_schedule(model: Model, schedule: Schedule) -> Model:
    """Make `model` reduce its tokens as the schedule says, in place, and return it.

    A schedule that was applied before is replaced. Parameters, buffers and `state_dict` keys do not change; an empty
    schedule leaves the output bit-equal. Raises ModelError for a model that is not supported, ScheduleError for a
    schedule that does not fit it.
    """
    remove_schedule(model)
    _family(model).apply(model, schedule)
    return model


def remove_schedule(model: Model) -> Model:
    """Undo `apply_schedule`, in place, and return the model. Does nothing to a model without a schedule."""
    for family in FAMILIES:
        family.remove(model)
    return model


def schedule_of(model: nn.Module) -> Schedule | None:
    """The schedule that was applied to this model, or None."""
    return next((found for family in FAMILIES if (found := family.schedule_of(model)) is not None), None)


def shape_of(model: nn.Module) -> ModelShape:
    """What the cost arithmetic needs to know of a model; also of one on the meta device. Raises ModelError."""
    return _family(model).shape_of(model)


def _family(model: nn.Module):  # type: ignore[no-untyped-def]  # returns a module of this package
    for family in FAMILIES:
        if family.is_family(model):
            return family
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    raise ModelError(
        f"model: {name} is not supported. Possible: {', '.join(family.SUPPORTS for family in FAMILIES)}. "
        f"Use a timm model of one of these classes (exactly: a subclass may compute something else)."
    )
