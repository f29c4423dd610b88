"""Read and write the weights of a model (its own and a schedule's learned parts), and check that they fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from prunesearch.errors import ModelError
from prunesearch.files import write_atomically
from prunesearch.models.dense_head import kind_in


def load_weights(model: nn.Module, weights: str | Path | Mapping[str, Tensor]) -> None:
    """Load weights into a model. Raises ModelError, which names what does not fit, and then loads nothing."""
    model.load_state_dict(fitting_weights(weights, model.state_dict()))


def fitting_weights(weights: str | Path | Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights to the names, shapes, dtypes and devices of `wanted`, so that loading them cannot fail.

    Raises ModelError for a file that cannot be read, and for weights that are missing or do not fit.
    """
    if isinstance(weights, (str, Path)):
        place, state = f"weights {str(weights)!r}", read_weights(weights)
    else:
        place, state = "weights", dict(weights)
    problems = misfits(state, wanted)
    kind = kind_in(state)
    if problems and kind is not None and kind_in(wanted) != kind:
        raise ModelError(
            f"{place}: they have a {kind} head that gives classes to each patch, which the model has not. Possible: "
            f'with_dense_head(model, "{kind}", {len(state["head.classify.weight"])}) of prunesearch, on a model built '
            f"with num_classes=0. Call that before apply_schedule."
        )
    if problems:
        raise ModelError(
            f"{place}: does not fit the model with this schedule: {'; '.join(problems)}. Possible: the weights that "
            f"were exported with exactly this schedule. Check that the files belong together."
        )
    return {name: state[name].to(value).reshape(value.shape) for name, value in wanted.items()}


def misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """How weights differ from those of a model: missing names, unknown names, other shapes, no values.

    Empty when they fit.
    """

    def listed(text: str, names: list[str]) -> list[str]:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return [f"{text} {', '.join(names[:4])}{more}"] if names else []

    there = {name: value for name, value in state.items() if isinstance(value, Tensor) and name in wanted}
    shapes = [
        f"{name} ({tuple(value.shape)}, not {tuple(wanted[name].shape)})"
        for name, value in there.items()
        if value.shape != wanted[name].shape and not value.numel() == wanted[name].numel() == 1
    ]
    return (
        listed("it lacks", [name for name in wanted if name not in state])
        + listed("the model has no", [name for name in state if name not in wanted])
        + listed("other shapes:", shapes)
        + listed("no tensors:", [name for name in state if name in wanted and name not in there])
        + listed("tensors without values:", [n for n, v in there.items() if v.is_meta and not wanted[n].is_meta])
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model as a file holds them: on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def write_weights(path: str | Path, weights: Mapping[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file, atomically."""
    write_atomically(path, safetensors.torch.save(dict(weights), metadata={"format": "pt", **metadata}))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ModelError when it cannot be read."""
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would block
        raise ModelError(f"weights {str(path)!r}: is no file. Possible: a .safetensors file. Check the path.")
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # a missing, damaged or foreign file raises anything
        raise ModelError(
            f"weights {str(path)!r}: cannot be read: {type(error).__name__}: {error}. "
            f"Possible: the .safetensors file that was exported with the schedule. Check the path."
        ) from error
