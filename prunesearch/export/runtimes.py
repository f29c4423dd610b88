"""The runtimes that a model can be exported for: the facts of each, and how its files are written, opened and read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeAlias

from prunesearch.errors import UserError
from prunesearch.extras import need, version_of
from prunesearch.files import refuse_no_file
from prunesearch.registry import Named

if TYPE_CHECKING:
    import numpy as np

INPUT = "images"
OUTPUT = "logits"

Run: TypeAlias = "Callable[[np.ndarray], np.ndarray]"
"""From normalised float32 images (B, C, H, W) to float32 logits (B, classes)."""


@dataclass(frozen=True)
class Runtime:
    """What there is to know of a runtime.

    extra: of pyproject.toml, which brings `libraries`, all that an export needs. The last one is the runtime itself.
    reads_with: the libraries that reading the metadata needs.
    suffix, other_suffixes: of the file that is opened, and of files beside it.
    write: makes its file (second argument) from an ONNX file (first) with the given metadata. The last argument says
    whether weights are fp16. open: opens a file to run it on the CPU. read: the metadata of a file.
    half_note: how it computes an fp16 file on a CPU.
    example: lines of Python that set `logits`, from `pixels` and the path of the file (as a literal, {path}), with the
    imports that they need. {in_float32} becomes in_float32 for files that are not fp16.
    metadata: a Python expression for an entry of the metadata, {key}.
    """

    title: str
    extra: str
    libraries: tuple[str, ...]
    reads_with: tuple[str, ...]
    suffix: str
    write: Callable[[Path, Path, Mapping[str, str], bool], None]
    open: Callable[[Path, bool], Run]
    read: Callable[[Path], dict[str, str]]
    half_note: str
    imports: str
    example: tuple[str, ...]
    metadata: str
    in_float32: str = ""
    other_suffixes: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The title with the installed version."""
        return f"{self.title} {version_of(self.libraries[-1])}"


ONNX_RUNTIME = Runtime(
    title="ONNX Runtime",
    extra="onnx",
    libraries=("onnx", "onnxscript", "onnxruntime"),
    reads_with=("onnx",),
    suffix=".onnx",
    write=Named("prunesearch.export.onnx_file:copy_onnx"),
    open=Named("prunesearch.export.onnx_file:open_onnx"),
    read=Named("prunesearch.export.onnx_file:read_onnx"),
    half_note="on a CPU, ONNX Runtime computes most of an fp16 file in float32 and converts, which takes longer",
    imports="import onnxruntime",
    example=(
        "session = onnxruntime.InferenceSession({path})",
        f'logits = session.run(["{OUTPUT}"], {{{{"{INPUT}": pixels}}}})[0][0]',
    ),
    metadata="session.get_modelmeta().custom_metadata_map[{key}]",
)
OPENVINO = Runtime(
    title="OpenVINO",
    extra="openvino",
    libraries=("onnx", "onnxscript", "openvino"),
    reads_with=("openvino",),
    suffix=".xml",
    write=Named("prunesearch.export.openvino_file:write_openvino"),
    open=Named("prunesearch.export.openvino_file:open_openvino"),
    read=Named("prunesearch.export.openvino_file:read_openvino"),
    half_note="on a CPU, OpenVINO computes an fp16 file in the precision it prefers there (float32, fp16 or bfloat16)",
    imports="import openvino",
    example=(
        "model = openvino.Core().read_model({path})",
        'compiled = openvino.compile_model(model, "CPU"{in_float32})',
        f'logits = compiled({{{{"{INPUT}": pixels}}}})["{OUTPUT}"][0]',
    ),
    in_float32=', {"INFERENCE_PRECISION_HINT": "f32"}',
    metadata="model.get_rt_info([{key}]).astype(str)",
    other_suffixes=(".bin",),
)
RUNTIMES = (ONNX_RUNTIME, OPENVINO)


def runtime_of(path: Path) -> Runtime:
    """The runtime whose files have the suffix of `path`. Raises UserError."""
    for runtime in RUNTIMES:
        if path.suffix == runtime.suffix:
            return runtime
    possible = " and ".join(f"{runtime.suffix} ({runtime.title})" for runtime in RUNTIMES)
    raise UserError(f"{path}: its suffix is {path.suffix!r}. Possible: {possible}. Give such a file.")


def check_target(runtime: Runtime, path: Path) -> None:
    """Raise UserError, before any work, when a file of this name cannot be written for the runtime."""
    if path.suffix != runtime.suffix:
        better = path.with_suffix(runtime.suffix) if path.name else Path(f"best{runtime.suffix}")
        raise UserError(
            f"{path}: its suffix is {path.suffix!r}. Possible: {runtime.suffix}, for {runtime.title}. Write for "
            f"example {better}."
        )
    for suffix in (runtime.suffix, *runtime.other_suffixes):
        refuse_no_file(path.with_suffix(suffix))
    need(str(path), runtime.extra, *runtime.libraries)


def check_readable(runtime: Runtime, path: Path) -> None:
    """Raise MissingLibraryError when the libraries that read a file of the runtime are not installed."""
    need(str(path), runtime.extra, *runtime.reads_with)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a path of the same name in a new folder beside `path`, for the caller to write to.

    When the block ends, all files in that folder take their places beside each other, the one with this name last.
    When it raises, none does. A symbolic link stays a link; the file that it points to is written.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".prunesearch-") as name:
        yield Path(name) / path.name
        for file in sorted(Path(name).iterdir(), key=lambda file: file.name == path.name):
            with file.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(file, path.parent / file.name)


def as_metadata(mapping: Mapping[str, object]) -> dict[str, str]:
    """The values as texts, under names that are ours: text as it is, anything else as JSON."""
    return {
        f"prunesearch.{name}": value if isinstance(value, str) else json.dumps(value) for name, value in mapping.items()
    }
