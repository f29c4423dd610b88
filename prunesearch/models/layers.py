"""MACs of layers: a matrix costs its size per token, a list of known layers nothing, and any other is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

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
"""Modules of normalisations, activations, dropouts and layer scales, which are not counted, as in papers."""


def macs_per_token(root: nn.Module | None, place: str) -> int:
    """MACs per token of a module made of known layers; 0 for None. Raises ModelError, which names an unknown layer."""
    if root is None:
        return 0
    return sum(_matrix_macs(layer, path) for path, layer in _parts(root, place) if not _is_free_or_container(layer))


def check_countable(root: nn.Module, place: str) -> None:
    """Raise ModelError for a layer whose class is neither PyTorch's nor timm's.

    PyTorch's FLOP counter may not see its operators, for example those of a quantised layer.
    """
    for path, layer in _parts(root, place):
        if not _kind(layer).__module__.startswith(("torch.nn.modules.", "timm.")):
            _refuse(layer, path)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy on the meta device, to count the MACs of a pass.

    It has no hooks, replaced forwards or compiled calls, because attached code must not run when a pass is counted.
    """
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
    """Every module with its path. Parametrizations are left out: they compute a weight once per pass, not per token."""
    for name, module in root.named_modules(prefix=place):
        if f"{name}.".find(".parametrizations.") < 0:
            yield name, module


def _kind(layer: nn.Module) -> type:
    """The class of a layer before a schedule, a parametrization or sharding changed it."""
    made = ("torch.nn.utils.parametrize", "torch.distributed.")
    return next(kind for kind in timm_class(layer).__mro__ if not kind.__module__.startswith(made))


def _is_free_or_container(layer: nn.Module) -> bool:
    kind = _kind(layer)
    own = [parameter for parameter in layer.parameters(recurse=False) if parameter.ndim > 1]
    if kind in (*CONTAINERS, nn.Identity):
        return not own
    return not own and any(base.__module__ in FREE_FILES for base in kind.__mro__)


def _matrix_macs(layer: nn.Module, place: str) -> int:
    """MACs per token of an nn.Linear, or of a subclass that is still one matrix. Raises ModelError for other layers.

    With a parametrization the matrix may be computed from a parameter of the same shape.
    """
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


def own_grid(patch_embed: Any) -> tuple[int, int]:
    """Rows and columns of an image of the model's own size. `grid_size` lacks what `dynamic_img_pad` adds."""
    rows, columns = patch_embed.dynamic_feat_size(patch_embed.img_size)
    return int(rows), int(columns)
