"""ONNX files: write one with PyTorch's exporter, open it in ONNX Runtime, read its metadata."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prunesearch.device.runtimes import quiet
from prunesearch.errors import FileError, RunError, UserError
from prunesearch.export.runtimes import INPUT, OUTPUT, Run
from prunesearch.models import PARTS

OPSET = 18
"""PyTorch's exporter writes this opset itself, and converts to any other one. ONNX Runtime, OpenVINO and TensorRT 10
read it."""
MOST_BYTES = 2**31 - 2**24
"""A file with its weights inside is one protobuf message, which holds less than 2 GiB. Some of it is for the graph."""


class _HalfInside(nn.Module):
    """A model that computes in fp16, with float32 images and logits.

    Learned parts of a schedule, and scores, compute in float32 as they do in any half-precision model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if value.is_floating_point() and not name.startswith(f"{PARTS}."):
                value.data = value.data.half()

    def forward(self, images: Tensor) -> Tensor:
        """images: float32 (B, C, H, W)."""
        logits: Tensor = self.model(images.half())
        return logits.float()


def write_onnx(
    model: nn.Module, path: Path, size: tuple[int, int, int], *, half: bool, metadata: Mapping[str, str]
) -> None:
    """Write a model as an ONNX file with any batch size and its weights inside.

    model: on the CPU, in eval mode, without gradients. size: channels, height and width of its images. half: weights
    and activations are fp16. Raises UserError for a model that is too large, RunError when the exporter fails.
    """
    exported = _HalfInside(model).eval() if half else model
    state = exported.state_dict().values()
    count = sum(value.nbytes for value in state)
    if count > MOST_BYTES:
        raise UserError(
            f"export: the weights take {count / 1e9:.3g} GB, and an ONNX file that holds its weights holds "
            f"{MOST_BYTES / 1e9:.3g} GB. Possible: a smaller model{'' if half else ', or fp16 weights'}. Use one"
            f"{'' if half else ', or give half=True (--half)'}."
        )
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                exported,
                (torch.zeros(2, *size),),  # not 1: the exporter would take a batch of 1 for a constant
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises anything
        raise RunError(
            f"export: PyTorch's exporter cannot write this model: {_reason(error)}. Possible: models of timm with the "
            f"scores and verbs of prunesearch, whose counts are fixed. If a plug-in is used, change its functions."
        ) from error
    assert program is not None
    proto = program.model_proto
    for thing in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del thing.metadata_props[:]  # stack traces with the paths of this machine
        thing.ClearField("doc_string")
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def copy_onnx(source: Path, path: Path, metadata: Mapping[str, str], half: bool) -> None:
    """`Runtime.write` for ONNX Runtime: the source is already its file."""
    shutil.copyfile(source, path)


def open_onnx(path: Path, half: bool) -> Run:
    """`Runtime.open`. Raises RunError when ONNX Runtime does not take the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # by default the threads of a session stay busy for a while after a run, and would slow down the session timed next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no public base class
        raise RunError(f"{path.name}: ONNX Runtime cannot open it: {error}") from error

    def run(images_BCHW: np.ndarray) -> np.ndarray:
        logits: np.ndarray = session.run([OUTPUT], {INPUT: images_BCHW})[0]
        return logits

    return run


def read_onnx(path: Path) -> dict[str, str]:
    """`Runtime.read`. Raises FileError for a file that is not there, or no ONNX."""
    import onnx

    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's exceptions have no public base class
        raise FileError(str(path), [f"cannot be read as ONNX: {error}. Give a file that export_onnx wrote."]) from error
    return {entry.key: entry.value for entry in proto.metadata_props}


def _reason(error: BaseException) -> str:
    """The first line of the error that was raised first. The exporter's own message fills a screen."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
