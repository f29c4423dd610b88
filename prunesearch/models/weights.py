"""Weights of a pruned model: what it learned together with its schedule's own parts, as one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from prunesearch.errors import ModelError


def load_weights(model: nn.Module, weights: str | Path | Mapping[str, Tensor]) -> None:
    """Load into a model with a schedule. Raises ModelError, with what is missing or does not fit, and then loads
    nothing."""
    if isinstance(weights, (str, Path)):
        place, state = f"weights {str(weights)!r}", read_weights(weights)
    else:
        place, state = "weights", dict(weights)
    problems = misfits(state, model.state_dict())
    if problems:
        raise ModelError(
            f"{place}: does not fit the model with this schedule: {'; '.join(problems)}. Possible: the weights that "
            f"were exported with exactly this schedule. Check that the files belong together."
        )
    model.load_state_dict(state)


def misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """How weights differ from those a model has: names it lacks, names too many, other shapes. Empty when they fit."""

    def listed(text: str, names: list[str]) -> list[str]:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return [f"{text} {', '.join(names[:4])}{more}"] if names else []

    shapes = [
        f"{name} ({tuple(state[name].shape)}, not {tuple(value.shape)})"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    return (
        listed("it lacks", [name for name in wanted if name not in state])
        + listed("the model has no", [name for name in state if name not in wanted])
        + listed("other shapes:", shapes)
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ModelError when it cannot be read."""
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # a missing, damaged or foreign file raises anything
        raise ModelError(
            f"weights {str(path)!r}: cannot be read: {type(error).__name__}: {error}. "
            f"Possible: the .safetensors file that was exported with the schedule. Check the path."
        ) from error
