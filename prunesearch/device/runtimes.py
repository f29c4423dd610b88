"""Where a model runs in production: PyTorch eager or compiled, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunesearch.errors import DeviceError
from prunesearch.extras import missing, need, version_of
from prunesearch.models.parts import Part

Run = Callable[[], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_GRAPHS = 10_000
"""Graphs of the same code, such as the forward pass of a verb, in one process; PyTorch's own limits are 8 and 256."""


@dataclass(frozen=True)
class Settings:
    """How parts run. threads: CPU threads. precision: a name of `DTYPES`."""

    device: torch.device
    threads: int
    precision: str = "float32"


@dataclass(frozen=True)
class Runtime:
    """A registered runtime.

    prepare: (modules, inputs, tokens_axis, settings) -> for each set of inputs a call that runs the modules in turn.
    libraries: what must be installed, the one that runs the model first. extra: of pyproject.toml, which brings them.
    on_gpu: it can run on a GPU here. counts_may_differ: it can run a model in which images have different numbers of
    tokens; files and graphs have fixed ones. readying: what making one part ready takes, in words, where it takes long.
    """

    name: str
    summary: str
    prepare: Callable[[Sequence[nn.Module], Sequence[tuple[Tensor, ...]], Any, Settings], list[Run]]
    libraries: tuple[str, ...] = ("torch",)
    extra: str = ""
    on_gpu: bool = False
    counts_may_differ: bool = False
    readying: str = ""

    @property
    def version(self) -> str:
        """Of the library that runs the model."""
        return version_of(self.libraries[0])

    @property
    def is_there(self) -> bool:
        """Whether its libraries are installed."""
        return not missing(self.libraries)


def runtime_of(name: str) -> Runtime:
    """The runtime of this name. DeviceError for an unknown one, MissingLibraryError for one not installed."""
    if name not in RUNTIMES:
        raise DeviceError(f"runtime: {name!r} is unknown. Possible: {', '.join(RUNTIMES)}. Write one of them.")
    need(f"runtime {name}", RUNTIMES[name].extra, *RUNTIMES[name].libraries)
    return RUNTIMES[name]


def prepare(parts: Sequence[Part], runtime: Runtime, settings: Settings) -> list[Run]:
    """A call for each part. Parts that share their modules and say which axes vary are made ready once."""
    together: dict[object, list[int]] = {}
    for place, part in enumerate(parts):
        together.setdefault(part.modules if part.tokens_axis else place, []).append(place)
    runs: dict[int, Run] = {}
    for places in together.values():
        first, inputs = parts[places[0]], [parts[place].inputs for place in places]
        made = runtime.prepare(first.modules, inputs, first.tokens_axis, settings)
        runs |= dict(zip(places, made, strict=True))
    return [runs[place] for place in range(len(parts))]


@contextmanager
def threads_set(settings: Settings) -> Iterator[None]:
    """PyTorch's CPU threads as in the settings, and no gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or before)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def _eager(
    modules: Sequence[nn.Module], inputs: Sequence[tuple[Tensor, ...]], tokens_axis: Any, settings: Settings
) -> list[Run]:
    return [_in_turn([_bound(module, given) for module in modules]) for given in inputs]


def _compiled(
    modules: Sequence[nn.Module], inputs: Sequence[tuple[Tensor, ...]], tokens_axis: Any, settings: Settings
) -> list[Run]:
    # One block is like another: the first chain alone is compiled, once for all numbers of tokens. All other sizes are
    # fixed, or PyTorch would make them variable at the second part that runs the same code.
    # fullgraph and the high limits: PyTorch would otherwise run a part uncompiled after a break in its graph, or when
    # several parts have compiled the same code.
    compiled = torch.compile(modules[0], dynamic=False, fullgraph=True)
    runs = []
    limits: dict[str, Any] = {"cache_size_limit": MOST_GRAPHS, "accumulated_cache_size_limit": MOST_GRAPHS}
    with quiet(), torch._dynamo.config.patch(**limits):
        for given in inputs:
            for place, axis in tokens_axis:
                torch._dynamo.maybe_mark_dynamic(given[place], axis)
            compiled(*given)
            runs.append(_bound(compiled, given))
    return runs


def _onnxruntime(
    modules: Sequence[nn.Module], inputs: Sequence[tuple[Tensor, ...]], tokens_axis: Any, settings: Settings
) -> list[Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.log_severity_level = 3
    # by default the threads of a session stay busy for a while after a run, and take CPU time from the next session
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with _exported(modules[0], inputs[0], tokens_axis) as path:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return [_session_run(session, dict(zip(names, _arrays(given, names), strict=True))) for given in inputs]


def _openvino(
    modules: Sequence[nn.Module], inputs: Sequence[tuple[Tensor, ...]], tokens_axis: Any, settings: Settings
) -> list[Run]:
    import openvino

    core, runs = openvino.Core(), []
    config = {
        "INFERENCE_NUM_THREADS": settings.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with _exported(modules[0], inputs[0], tokens_axis) as path:
        for given in inputs:
            model = core.read_model(str(path))
            names = [node.get_any_name() for node in model.inputs]
            arrays = dict(zip(names, _arrays(given, names), strict=True))
            if tokens_axis:
                model.reshape({name: list(array.shape) for name, array in arrays.items()})
            request = core.compile_model(model, "CPU", config).create_infer_request()
            runs.append(_request_run(request, arrays))
    return runs


@contextmanager
def _exported(module: nn.Module, given: tuple[Tensor, ...], tokens_axis: Any) -> Iterator[Path]:
    """An ONNX file of a module, which is deleted afterwards."""
    axes: dict[int, dict[int, Any]] = {place: {axis: torch.export.Dim("tokens")} for place, axis in tokens_axis}
    shapes = tuple(axes.get(place) for place in range(len(given))) if axes else None
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "part.onnx"
        torch.onnx.export(module, given, str(path), dynamo=True, dynamic_shapes=shapes, external_data=False)
        yield path


@contextmanager
def quiet() -> Iterator[None]:
    """Exporter and compiler report their steps, and deprecations inside PyTorch, which do not concern the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _arrays(given: tuple[Tensor, ...], names: Sequence[str]) -> list[Any]:
    """Inputs as arrays. Inputs that a module does not use are not in its file; those that are keep their order."""
    arrays = [tensor.numpy() for tensor in given]
    return arrays if len(arrays) == len(names) else [arrays[int(name.rpartition("_")[2])] for name in names]


def _bound(module: Callable[..., object], given: tuple[Tensor, ...]) -> Run:
    return lambda: module(*given)


def _session_run(session: Any, arrays: Mapping[str, Any]) -> Run:
    return lambda: session.run(None, arrays)


def _request_run(request: Any, arrays: Mapping[str, Any]) -> Run:
    return lambda: request.infer(arrays)


def _in_turn(runs: Sequence[Run]) -> Run:
    turn = cycle(runs)
    return lambda: next(turn)()


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("torch", "PyTorch, operator by operator", _eager, on_gpu=True, counts_may_differ=True),
        Runtime(
            "compile", "PyTorch, torch.compile", _compiled, on_gpu=True, readying="compiling takes seconds to a minute"
        ),
        Runtime(
            "onnxruntime", "ONNX Runtime", _onnxruntime, libraries=("onnxruntime", "onnx", "onnxscript"), extra="onnx"
        ),
        Runtime("openvino", "OpenVINO", _openvino, libraries=("openvino", "onnx", "onnxscript"), extra="openvino"),
    )
}
