"""`Part`: a piece of a model whose time is measured alone."""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Part(NamedTuple):
    """Modules that do the same kind of work, to be run in turn on one input.

    They are several because the blocks of a model have weights of their own, which one block alone would keep in the
    processor's cache. blocks: how many blocks one call runs. tokens_axis: the axis of each input that may have another
    length in a later call, by the input's place; without it all sizes are fixed.
    """

    modules: tuple[nn.Module, ...]
    inputs: tuple[Tensor, ...]
    blocks: int = 1
    tokens_axis: tuple[tuple[int, int], ...] = ()


def example(*shape: int, like: Tensor) -> Tensor:
    """Random numbers of a shape, with the type and device of another tensor; the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like)


def sharing_copy(model: Model) -> Model:
    """A copy of a model that may get a schedule of its own. It shares the weights."""
    return copy.deepcopy(model, {id(value): value for value in (*model.parameters(), *model.buffers())})
