"""Which layers the cost arithmetic knows: a matrix costs its size, a list of others nothing, the rest is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.vitamin import GeGluMlp
from torch import nn

from prunesearch.errors import ModelError
from prunesearch.models.swap import timm_class

CONTAINERS = (nn.Sequential, nn.ModuleList, Mlp, GluMlp, SwiGLU, GeGluMlp)
"""Modules that run each of their children once on every token, and nothing else that costs MACs."""
FREE_FILES = frozenset(
    {
        *(f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "dropout", "normalization")),
        *(f"timm.layers.{name}" for name in ("activations", "activations_me", "drop", "fast_norm", "layer_scale")),
        *(f"timm.layers.{name}" for name in ("norm", "norm_act", "patch_dropout")),
    }
)
"""Where normalisations, activations, dropouts and layer scales are defined. As in papers they are not counted."""


def macs_per_token(root: nn.Module | None, place: str) -> int:
    """MACs per token of a module that is made of known layers; 0 for None. Raises ModelError naming any other layer."""
    if root is None:
        return 0
    return sum(_matrix_macs(layer, path) for path, layer in _parts(root, place) if not _is_free_or_container(layer))


def check_countable(root: nn.Module, place: str) -> None:
    """Raise ModelError for a layer that PyTorch's counter of one pass would not see: one whose class is neither
    PyTorch's nor timm's, as its arithmetic may be no operator that is counted (a quantised one)."""
    for path, layer in _parts(root, place):
        if not _kind(layer).__module__.startswith(("torch.nn.modules.", "timm.")):
            _refuse(layer, path)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy without values, to count a pass with, and without what was attached: hooks, replaced forwards, compiled
    calls. What others attached must not run in it, and its owners must not see it."""
    copied = module.__class__.__new__(module.__class__)
    # a new module's own attributes are its empty dicts of parameters, children and hooks
    copied.__dict__ = {**vars(module), **vars(nn.Module()), "training": False}
    for name in ("forward", "_compiled_call_impl"):
        copied.__dict__.pop(name, None)
    for name, parameter in module._parameters.items():
        empty = None if parameter is None else torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        copied.register_parameter(name, None if empty is None else nn.Parameter(empty, requires_grad=False))
    for name, buffer in module._buffers.items():
        copied.register_buffer(name, None if buffer is None else torch.empty_like(buffer, device="meta"))
    for name, child in module.named_children():
        copied.add_module(name, on_meta(child))
    return copied


def _parts(root: nn.Module, place: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path; not what computes a layer's weight (torch.nn.utils.parametrize), once a pass."""
    for name, module in root.named_modules(prefix=place):
        if f"{name}.".find(".parametrizations.") < 0:
            yield name, module


def _kind(layer: nn.Module) -> type:
    """The class of a layer, without a schedule, parametrizations and sharding, whose classes PyTorch makes of it."""
    made = ("torch.nn.utils.parametrize", "torch.distributed.")
    return next(kind for kind in timm_class(layer).__mro__ if not kind.__module__.startswith(made))


def _is_free_or_container(layer: nn.Module) -> bool:
    kind = _kind(layer)
    own = [parameter for parameter in layer.parameters(recurse=False) if parameter.ndim > 1]
    if kind in (*CONTAINERS, nn.Identity):
        return not own
    return not own and any(base.__module__ in FREE_FILES for base in kind.__mro__)


def _matrix_macs(layer: nn.Module, place: str) -> int:
    """Of nn.Linear or a subclass that is one matrix: its weight, perhaps made of a parameter of the same shape."""
    if not isinstance(layer, nn.Linear):
        _refuse(layer, place)
    matrices = [layer.weight, *(parameter for parameter in layer.parameters(recurse=False) if parameter.ndim > 1)]
    if any(tuple(matrix.shape) != (layer.out_features, layer.in_features) for matrix in matrices):
        _refuse(layer, place)
    return layer.out_features * layer.in_features


def _refuse(layer: nn.Module, place: str) -> NoReturn:
    raise ModelError(
        f"{place}: the cost of a {type(layer).__module__}.{type(layer).__qualname__} is not known, so the MACs of this "
        f"model would be wrong. Possible: nn.Linear, and normalisations, activations and dropouts of PyTorch and timm. "
        f"Apply the schedule and estimate its cost before such a layer is put in (quantisation, LoRA), or take it out."
    )
