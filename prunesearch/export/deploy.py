"""Export a model for a runtime: write the file, check it against PyTorch, and only then give it its name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from prunesearch.config import UNLABELLED, DataConfig, MeasureConfig, ModelConfig
from prunesearch.errors import ModelError, ScheduleError, UserError
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.data import classes_of, open_validation
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.measures import SPEED_BATCHES
from prunesearch.export.file_checks import (
    Check,
    SpeedRatio,
    compare,
    pixel_accuracy,
    refuse_difference,
    time_side_by_side,
    top1,
)
from prunesearch.export.file_facts import FileFacts, facts_of, written
from prunesearch.export.freeze import freeze
from prunesearch.export.onnx_file import write_onnx
from prunesearch.export.runtimes import ONNX_RUNTIME, OPENVINO, Runtime, check_target, written_beside
from prunesearch.files import ScheduleFile, load_schedule_file
from prunesearch.models import apply_schedule, learned_parts, remove_schedule, schedule_of

CHECK_IMAGES = 128
NOISE_IMAGES = 8

Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    runtime: title and version. check: against PyTorch; on_noise: with random numbers in place of pictures.
    speed: beside the dense model in the same runtime, on the CPU; None without a schedule. top1, pixel_accuracy:
    percent, on `images` validation images. They are None where they were not measured.
    """

    path: Path
    runtime: str
    facts: FileFacts
    check: Check
    on_noise: bool
    speed: SpeedRatio | None = None
    top1: float | None = None
    images: int = 0
    pixel_accuracy: float | None = None


@dataclass(frozen=True)
class _Source:
    """What is exported: a copy of the model (CPU, float32, eval mode, no gradients) and images to check it on."""

    model: nn.Module
    facts: FileFacts
    images_BCHW: Tensor
    on_noise: bool

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        write_onnx(self.model, path, self.facts.preprocessing.size, half=self.facts.half, metadata=metadata)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    batch_example: Tensor | None = None,
    half: bool = False,
    name: str | None = None,
    data: DataConfig | None = None,
    classes: Sequence[str] = (),
) -> Exported:
    """Write a timm model, with or without a schedule, as an ONNX file, and check it in ONNX Runtime.

    The file has one input, `images` (float32, (batch, C, H, W), normalised, any batch), and one output, `logits`
    (float32, (batch, classes), or (batch, classes, rows, columns) with a head for each patch). Its token counts are
    fixed, its weights are inside, its opset is 18. `read_facts` and `example_code` of prunesearch.export say what it
    expects. The model stays as it was.

    batch_example: normalised images (N, C, H, W) on which logits are compared with those of PyTorch; random numbers
    when None. half: weights and activations are fp16. name: of the model; timm's when None. data: its mean, std,
    interpolation and crop_pct replace the model's own in what the file says. classes: names of the outputs.

    Raises ModelError for a model that is not supported, ScheduleError for a schedule with thresholds, UserError for a
    path or images that cannot be used and for missing libraries, RunError when the exporter fails or when logits differ
    too much. After an error there is no new file.
    """
    return _export(ONNX_RUNTIME, model, path, batch_example, half, name, data, classes)


def export_openvino(
    model: nn.Module,
    path: str | Path,
    *,
    batch_example: Tensor | None = None,
    half: bool = False,
    name: str | None = None,
    data: DataConfig | None = None,
    classes: Sequence[str] = (),
) -> Exported:
    """Write a model for OpenVINO (an .xml file, and a .bin file beside it), and check it there.

    Arguments and errors are those of `export_onnx`.
    """
    return _export(OPENVINO, model, path, batch_example, half, name, data, classes)


def _export(
    runtime: Runtime,
    model: nn.Module,
    path: str | Path,
    batch_example: Tensor | None,
    half: bool,
    name: str | None,
    data: DataConfig | None,
    classes: Sequence[str],
) -> Exported:
    path = Path(path)
    check_target(runtime, path)
    facts = facts_of(model, name=name, data=data, classes=tuple(classes), half=half)
    source = _source(model, facts, batch_example)
    with TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        source.write(onnx, written(facts))
        return _written(runtime, source, onnx, path)


def _source(model: nn.Module, facts: FileFacts, batch_example: Tensor | None) -> _Source:
    schedule = schedule_of(model)
    if schedule is not None and schedule.is_adaptive:
        raise ScheduleError(
            "schedule",
            [
                "it has thresholds, so counts differ between images, which a file for a runtime cannot express. "
                "Possible: fixed counts. Make them with `prunesearch freeze best.yaml`, and apply frozen.yaml."
            ],
        )
    if facts.classes and len(facts.classes) != model.num_classes:
        raise UserError(
            f"classes: {len(facts.classes)} names were given for a model with {model.num_classes} outputs. Possible: "
            f"one name for each output, in their order. Correct the list."
        )
    size = facts.preprocessing.size
    if batch_example is None:
        images = torch.randn(NOISE_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    elif batch_example.ndim == 4 and tuple(batch_example.shape[1:]) == size and len(batch_example) > 0:
        images = batch_example.detach().float().cpu()
    else:
        raise UserError(
            f"batch_example: its shape is {tuple(batch_example.shape)}. Possible: (N, {', '.join(map(str, size))}) "
            f"with one image or more. Give normalised images of the size of the model."
        )
    plain = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    return _Source(plain, facts, images, on_noise=batch_example is None)


def _written(runtime: Runtime, source: _Source, onnx: Path, path: Path) -> Exported:
    """Make the file of a runtime from an ONNX file, check it, and put it in its place."""
    facts = source.facts
    with written_beside(path) as place:
        runtime.write(onnx, place, written(facts), facts.half)
        check = compare(source.model, runtime.open(place, facts.half), source.images_BCHW)
        refuse_difference(check, facts.half, f"{path} ({runtime.title})")
    return Exported(path, runtime.version, facts, check, source.on_noise)


def deploy(
    file: ScheduleFile,
    folder: Path,
    targets: Sequence[tuple[Runtime, Path]],
    *,
    model: ModelConfig,
    data: DataConfig | None,
    half: bool = False,
    measure: MeasureConfig | None = None,
    say: Say = lambda text: None,
) -> list[Exported]:
    """Export the model of a schedule file for runtimes, and measure speed and accuracy of each file.

    Speed is measured beside the dense model, in the same runtime and in turns. Thresholds become fixed counts first.
    Without data, random numbers are in place of pictures, and accuracy is not measured.

    folder: of the schedule file, in which its weights are. targets: runtimes and the paths of their files.
    say: called with notes for the user. Raises as `export_onnx`, and ModelError and DataError for model and data.
    """
    measure = measure or MeasureConfig()
    for runtime, path in targets:
        check_target(runtime, path)
    with TemporaryDirectory() as name:
        temporary = Path(name)
        if file.schedule.is_adaptive:
            file, folder = _frozen(file, folder, temporary, model, data, say), temporary
        weights = None if file.weights is None else folder / file.weights
        pruned = apply_schedule(build_model(model), file.schedule, weights=weights, untrained=True)
        if weights is None and learned_parts(pruned):
            raise ModelError(
                f"schedule file: {learned_parts(pruned)[0]} of its schedule learns, but the file names no weights. "
                f"Possible: a file that came with its weights (export --weights). Export that one."
            )
        held_out = None if data is None else open_validation(data, pruned)
        facts = facts_of(
            pruned,
            name=model.name,
            data=data,
            classes=(classes_of(data)[0] or ()) if data is not None else (),
            half=half,
        )
        source = _source(pruned, facts, None if held_out is None else _first_images(held_out))
        if held_out is None:
            say("no data was given: the files are checked and timed on random numbers, and accuracy is not measured")
        onnx, dense = temporary / "pruned.onnx", None
        say(f"writing {model.name} with its schedule as ONNX")
        source.write(onnx, written(facts))
        if file.schedule.stages:
            dense = temporary / "dense.onnx"
            say("writing the dense model, to compare the speed")
            replace(source, model=remove_schedule(copy.deepcopy(source.model))).write(dense, {})
        labelled = data is not None and data.name != UNLABELLED
        return [_measured(one, source, onnx, dense, path, held_out, labelled, measure, say) for one, path in targets]


def _frozen(
    file: ScheduleFile, folder: Path, to: Path, model: ModelConfig, data: DataConfig | None, say: Say
) -> ScheduleFile:
    """The schedule file with fixed counts, written to the folder `to`."""
    if data is None:
        raise UserError(
            "schedule file: it has thresholds, which need images to become fixed counts, and no data was given. "
            "Possible: --data NAME with --root PATH, or a file of prunesearch freeze. Give one of them."
        )
    say("the schedule has thresholds; they become fixed counts on training images, as prunesearch freeze does")
    frozen = freeze(file, folder, to / "frozen.yaml", model=model, data=data)
    say(f"{frozen.gmacs:.5g} GMACs for every image; with thresholds {frozen.adaptive_gmacs:.5g} on average")
    return load_schedule_file(frozen.files[0])


def _measured(
    runtime: Runtime,
    source: _Source,
    onnx: Path,
    dense: Path | None,
    path: Path,
    held_out: ImageSet | None,
    labelled: bool,
    measure: MeasureConfig,
    say: Say,
) -> Exported:
    say(f"checking {path} in {runtime.title} on {len(source.images_BCHW)} images")
    exported, half = _written(runtime, source, onnx, path), source.facts.half
    run = runtime.open(path, half)
    if dense is not None:
        say(f"{path} is written; timing it beside the dense model")
        there = dense.with_name(f"dense-timed{runtime.suffix}")
        runtime.write(dense, there, {}, half)
        order = torch.arange(SPEED_BATCHES * measure.speed_batch_size) % len(source.images_BCHW)
        batches = [source.images_BCHW[chosen].numpy() for chosen in order.split(measure.speed_batch_size)]
        exported = replace(
            exported, speed=time_side_by_side(runtime.open(there, half), run, batches, measure.speed_seconds)
        )
    if held_out is None or source.facts.features or not labelled:
        return exported
    say(f"measuring the accuracy of {path} on {len(held_out)} validation images")
    if source.facts.segments:
        accuracy = pixel_accuracy(run, held_out, measure.batch_size)
        return replace(exported, pixel_accuracy=accuracy, images=len(held_out))
    return replace(exported, top1=top1(run, held_out, measure.batch_size), images=len(held_out))


def _first_images(held_out: ImageSet) -> Tensor:
    """Up to CHECK_IMAGES images from the whole set, evenly spread."""
    count = min(CHECK_IMAGES, len(held_out))
    chosen = torch.arange(count) * len(held_out) // count
    ((images, _),) = held_out.batches([chosen], torch.device("cpu"))
    return images
