"""OpenVINO files: convert an ONNX file, open the result, read its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from prunesearch.errors import FileError, RunError
from prunesearch.export.runtimes import INPUT, OUTPUT, Run


def write_openvino(source: Path, path: Path, metadata: Mapping[str, str], half: bool) -> None:
    """`Runtime.write`: an .xml file, and its weights in a .bin file beside it.

    `read_model` and `openvino.convert_model` read ONNX files with the same code. The second one also reports to a
    server that it was used, so it is not called here.
    """
    import openvino

    try:
        model = openvino.Core().read_model(source)
        for key, value in metadata.items():
            model.set_rt_info(value, key)
        openvino.save_model(model, path, compress_to_fp16=half)
    except RuntimeError as error:
        raise RunError(f"{path.name}: OpenVINO cannot convert the ONNX file: {error}") from error


def open_openvino(path: Path, half: bool) -> Run:
    """`Runtime.open`. Raises RunError when OpenVINO does not take the file.

    Without `half` it computes in float32, also on CPUs for which OpenVINO would choose bfloat16.
    """
    import openvino

    options = {} if half else {"INFERENCE_PRECISION_HINT": "f32"}
    try:
        compiled = openvino.Core().compile_model(path, "CPU", options)
    except RuntimeError as error:
        raise RunError(f"{path.name}: OpenVINO cannot open it: {error}") from error

    def run(images_BCHW: np.ndarray) -> np.ndarray:
        return np.asarray(compiled({INPUT: images_BCHW})[OUTPUT])

    return run


def read_openvino(path: Path) -> dict[str, str]:
    """`Runtime.read`. Raises FileError for a file that is not there, or no OpenVINO."""
    import openvino

    try:
        model = openvino.Core().read_model(path)
    except RuntimeError as error:
        why = f"cannot be read as OpenVINO: {error}. Give a file that export_openvino wrote."
        raise FileError(str(path), [why]) from error
    texts = {key: getattr(value, "value", None) for key, value in model.rt_info.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}
