"""Swap the classes of a model's modules for ours and back, and check that their forwards can run steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, NoReturn

from torch import nn

from prunesearch.errors import ModelError

OURS: dict[type[nn.Module], type[Swapped]] = {}
"""timm's classes and those that replace them."""


def refuse_pruning() -> NoReturn:
    """Raise ModelError for timm's `prune_intermediate_layers`."""
    raise ModelError(
        "model: prune_intermediate_layers takes blocks away, and the schedule counts them. Possible: the other order. "
        "Call remove_schedule(model), prune it or build it with features_only=True, and then call apply_schedule (with "
        "its .model, if it is wrapped)."
    )


class Swapped(nn.Module):
    """Base of the classes that replace timm's. Without a `call` they do what timm's class does.

    They are importable, so that modules pickle.
    """

    stands_for: ClassVar[type[nn.Module]]
    """timm's class that this one replaces."""
    methods: ClassVar[tuple[str, ...]] = ()
    """Methods of timm's class, besides forward, that this class overrides."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "stands_for" in vars(cls):
            ours = [kind for kind in cls.__mro__ if kind not in (*cls.stands_for.__mro__, Swapped)]
            names = {name for kind in ours for name, value in vars(kind).items() if callable(value)}
            OURS[cls.stands_for] = cls
            cls.methods = tuple(sorted(name for name in names - {"forward"} if hasattr(cls.stands_for, name)))

    def __prepare_scriptable__(self) -> nn.Module:
        """PyTorch calls this before it scripts a module. Raises ModelError: a script cannot express the steps."""
        raise ModelError(
            "torch.jit.script: the model carries a token schedule, which TorchScript cannot compile. Possible: "
            "torch.jit.trace, torch.export or torch.compile, for a schedule with fixed counts. Use one of those."
        )


class Place(NamedTuple):
    """A module inside a model, its path, and the class that it gets. calls: whether its forward gets a `call`."""

    path: str
    module: nn.Module
    swapped: type[Swapped]
    calls: bool


def timm_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has without a schedule."""
    return module.stands_for if isinstance(module, Swapped) else type(module)


def ours(module: nn.Module) -> Any:
    """The class that replaces a module's class. Its functions also take the module while it has timm's class."""
    return OURS[timm_class(module)]


def check_forwards(places: Iterable[Place]) -> None:
    """Raise ModelError for a module whose forward, or another method that ours overrides, was replaced on the instance.

    The replacement would call timm's method, which runs no step.
    """
    for place in places:
        if not place.calls:
            continue
        if "forward" in vars(place.module):
            raise ModelError(
                f"{place.path}: its forward was replaced on the instance, but a step of the schedule has to run in it. "
                f"Possible: forward hooks, or a replacement made after apply_schedule that passes its arguments on. "
                f"Undo the replacement (del {place.path}.forward), or move the stage to another block."
            )
        check_methods(place.module, place.path, place.swapped)


def check_methods(module: nn.Module, path: str, swapped: type[Swapped]) -> None:
    """Raise ModelError when one of `swapped.methods` was replaced on the instance.

    swapped: the class that the module has or gets.
    """
    for name in swapped.methods:
        if name in module.__dict__:
            raise ModelError(
                f"{path}: its {name} was replaced on the instance, but with a schedule the forward pass does not go "
                f"through it. Possible: forward hooks on the modules inside, or another module in the place of a "
                f"layer. Undo the replacement (del {path}.{name})."
            )


def check_unwrapped(places: Iterable[Place]) -> None:
    """Raise ModelError when a module's class was changed after the schedule was applied.

    Swapping the class back would undo that change too.
    """
    for place in places:
        if type(place.module) is not place.swapped:
            raise ModelError(
                f"{place.path}: is a {type(place.module).__qualname__} by now, which something made of it after the "
                f"schedule was applied (fully_shard, parametrize). Possible: to change the schedule before that. "
                f"Build the model anew, or undo it first."
            )


def swap(places: Iterable[Place]) -> None:
    """Give each module its class."""
    for place in places:
        place.module.__class__ = place.swapped


def swap_back(places: Iterable[Place]) -> None:
    """Give each module the class it had."""
    for place in places:
        place.module.__class__ = place.swapped.stands_for


def check_takes_call(module: nn.Module, path: str) -> None:
    """Raise ModelError when a forward that was replaced on the instance does not accept a `call`."""
    if "forward" in module.__dict__:
        try:
            inspect.signature(module.forward).bind(None, call=None)
        except TypeError:
            refuse_replacement(path)


def check_was_called(done: Any, path: str) -> None:
    """Raise ModelError when `done` is None. Our forward sets it, so another forward ran instead."""
    if done is None:
        refuse_replacement(path)


def refuse_replacement(path: str) -> NoReturn:
    """Raise ModelError: another forward ran instead of ours."""
    raise ModelError(
        f"{path}: its forward was replaced by one that does not run the step of the schedule inside it. Possible: "
        f"forward hooks, or a replacement that calls the one it replaces with all arguments (*args, **kwargs). "
        f"Undo the replacement (del {path}.forward), or move the stage to another block."
    )
