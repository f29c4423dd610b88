"""Device profiles of a model by its name: what `prunesearch profile` and a study with a `device` section measure."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from prunesearch.config import IN_ANY_PRECISION, ModelConfig
from prunesearch.device.measure import fitting_scores, fitting_verbs, measure_profile
from prunesearch.device.runtimes import DTYPES, Runtime, Settings, runtime_of
from prunesearch.errors import DeviceError
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.machine import find_device, versions
from prunesearch.evaluate.shapes import model_shape
from prunesearch.profile import Profile
from prunesearch.schedule import verb_in
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS, SCORERS


def measure_profiles(
    model: ModelConfig,
    *,
    batches: Sequence[int] = (1, 16),
    runtime: str = "torch",
    device: str = "auto",
    threads: int | None = None,
    precision: str = "float32",
    seconds: float = 60.0,
    verbs: Sequence[str] | None = None,
    scores: Sequence[str] | None = None,
    returning: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Profile]:
    """Measure what the parts of a model take on this machine; yields a profile for each batch size.

    Weights are not loaded: time does not depend on them. verbs, scores: only these; all that fit the
    model when None. returning: the verbs with `until`; all of verbs when None. seconds: of measuring, for all batches
    together. threads: of the CPU; all cores when None.
    Raises DeviceError, MissingLibraryError, ModelError, UnknownNameError, ResourceError.
    """
    engine, settings = engine_and_settings(runtime, device, threads, precision)
    for registry, names in ((REDUCERS, verbs), (SCORERS, scores)):
        for name in names or ():
            registry[name]  # raises for an unknown name
    _check_fit(model_shape(model), verbs or (), scores or ())
    built = build_model(replace(model, pretrained=False, checkpoint=None))
    built = built.to(settings.device, DTYPES[precision]).eval()
    for batch in batches:
        yield measure_profile(
            built,
            model.name,
            batch,
            engine,
            settings,
            seconds / len(batches),
            verbs=verbs,
            scores=scores,
            returning=returning,
            versions=(*versions(), (runtime, engine.version)) if runtime != "torch" else versions(),
            device=processor(settings.device),
            say=say,
        )


def engine_and_settings(
    runtime: str, device: str = "auto", threads: int | None = None, precision: str = "float32"
) -> tuple[Runtime, Settings]:
    """The runtime, and how models run in it on this machine; arguments as of `measure_profiles`.

    Raises DeviceError for what this machine or the runtime cannot do, ResourceError for an unknown device.
    """
    engine, target = runtime_of(runtime), find_device(device)
    if precision not in DTYPES:
        raise DeviceError(f"precision: {precision!r}. Possible: {', '.join(DTYPES)}. Write one of them.")
    if target.type != "cpu" and not engine.on_gpu:
        if device != "auto":
            raise DeviceError(f"runtime {runtime}: it runs on the CPU here, not on {target}. Write --device cpu.")
        target = torch.device("cpu")
    if precision != "float32" and runtime not in IN_ANY_PRECISION:
        raise DeviceError(f"runtime {runtime}: {precision} is not measured. Possible: float32. Leave --precision out.")
    if threads is not None and threads > cores():
        raise DeviceError(f"threads: {threads}. Possible: 1 to {cores()}, the cores of this process. Lower it.")
    return engine, Settings(target, (threads or cores()) if target.type == "cpu" else 0, precision)


def _check_fit(shape: ModelShape, verbs: Sequence[str], scores: Sequence[str]) -> None:
    """Raise DeviceError for a verb or a score that models of this kind do not take."""
    fitting = fitting_scores(shape)
    for name in scores:
        if name not in fitting:
            lacks = SCORERS[name].needs_class_token and not shape.has_class_token
            why = "has no class token, whose attention it reads" if lacks else "mixes tokens in windows or convolutions"
            raise DeviceError(f"score {name}: this model {why}. Possible: {', '.join(fitting)}. Name those.")
    possible = fitting_verbs(shape)
    for name in verbs:
        if name not in possible:
            meant = f" In this model it is {verb_in(shape, name)}." if verb_in(shape, name) != name else ""
            raise DeviceError(
                f"verb {name}: this model does not take it.{meant} Possible: {', '.join(possible)}. Name those."
            )


def processor(device: torch.device) -> str:
    """The name of a processor, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or device.type


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
