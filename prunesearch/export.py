"""From a finished candidate to what the user takes home: schedule.yaml, and weights.safetensors if asked for."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from prunesearch.config import Budget, DataConfig, MeasureConfig, ModelConfig, StudyConfig, WorkersConfig
from prunesearch.errors import RunError, StudyError, UserError
from prunesearch.evaluate import Evaluation, Task, check_inputs, evaluate
from prunesearch.files import ScheduleFile, from_mapping, save_schedule, to_mapping
from prunesearch.schedule import Schedule
from prunesearch.search.again import again_row
from prunesearch.search.record import Record
from prunesearch.search.serial_workers import SerialWorkers
from prunesearch.search.supernet import SupernetTrained, prepare_supernet

COMPARED = ("top1", "gmacs", "throughput")


def export(
    record: Record,
    config: StudyConfig,
    path: Path,
    *,
    weights: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write a candidate's schedule to `path`, with what was measured and how it was made; returns the files written.

    weights: also copy its fine-tuned weights to the same name with .safetensors; always done for a schedule that
    learned a score or queries, which is of no use without them. When the study's copy is gone, the task is run again to
    make them anew, which `say` announces. Raises StudyError for a candidate without a result, or without weights of its
    own; RunError when the weights cannot be made again.
    """
    evaluation = record.evaluation
    if evaluation is None or evaluation.status != "complete":
        raise StudyError(
            f"trial {record.number}: it is {record.state} and has no result. Possible: a complete trial. "
            f"See `prunesearch front` for those worth having."
        )
    written = [path]
    if record.schedule.needs_weights and not weights:
        say("this schedule learned its decisions, so its weights come along")
        weights = True
    if weights:
        written.append(_export_weights(record, evaluation, config, path.with_suffix(".safetensors"), say))
    save_schedule(
        record.outcome,
        path,
        model=to_mapping(config.model),
        data=to_mapping(config.data) or {"name": config.data.name},
        weights=written[1].name if weights else None,
        measured={
            **dict(evaluation.metrics),
            "tokens": list(evaluation.tokens),
            "finetuned_images": evaluation.images,
            **({"supernet_images": config.supernet.images} if evaluation.start and config.supernet else {}),
            "device": evaluation.device,
            **({"data_notes": list(evaluation.data_notes)} if evaluation.data_notes else {}),
            **({"again": again_row(record)} if record.confirmations else {}),
        },
        made_by={
            "study": config.name,
            "trial": record.number,
            "uid": record.uid,
            "seed": record.seed,
            **dict(evaluation.versions),
        },
    )
    return written


def _export_weights(
    record: Record, evaluation: Evaluation, config: StudyConfig, target: Path, say: Callable[[str], None]
) -> Path:
    if evaluation.images == 0 and record.schedule.needs_weights:
        raise StudyError(
            f"trial {record.number}: its schedule learns scores or queries, but it was measured without training. "
            f"Possible: a study whose rungs train. Give the last rung some images."
        )
    if evaluation.images == 0 and evaluation.start is None:
        raise StudyError(
            f"trial {record.number}: it was measured as it comes, so its weights are the model's own. "
            f"Possible: exporting the schedule alone. Leave --weights out."
        )
    source = Path(f"{evaluation.checkpoint}.safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    if evaluation.images == 0:
        with _start_of(evaluation, config, target.parent, say) as start:
            shutil.copyfile(str(start), target)
        return target
    if evaluation.checkpoint is not None and source.is_file():
        shutil.copyfile(source, target)
        return target
    say(f"the weights of trial {record.number} are not in the study any more; fine-tuning again with the same seed")
    again, stem = evaluation, str(target.with_suffix(""))
    trained = [one.images for one in record.evaluations if one.images > 0]
    with _start_of(evaluation, config, target.parent, say) as start:
        for index, images in enumerate(trained):  # rung by rung, as each has a learning rate schedule of its own
            task = replace(task_of(record, config, budget=Budget(images=images)), start=start, save_to=stem)
            again = evaluate(replace(task, resume_from=stem if index else None))
            if again.status != "complete":
                raise RunError(
                    f"trial {record.number}: its weights could not be made again ({again.cause}): {again.error}"
                )
    target.with_suffix(".state").unlink(missing_ok=True)
    for name, before in evaluation.metrics:
        now = dict(again.metrics).get(name)
        if name in ("top1", "loss") and now != before:
            say(f"{name} of the new weights is {now}, it was {before}: other versions or another machine")
    return target


@contextmanager
def _start_of(
    evaluation: Evaluation, config: StudyConfig, near: Path, say: Callable[[str], None]
) -> Iterator[str | None]:
    """The file of shared weights that an evaluation began with, None when there were none; when it is gone, they are
    trained again."""
    if evaluation.start is None or Path(evaluation.start).is_file():
        yield evaluation.start
        return
    say("the shared weights are not in the study any more; training them again with the same seed")
    with TemporaryDirectory(dir=near) as name:
        folder = Path(name).absolute()
        workers = SerialWorkers(WorkersConfig(kind="serial"), folder)

        def told(event: SupernetTrained) -> None:
            say(f"shared weights: {event.images:,} of {event.total:,} images")

        yield prepare_supernet(config, folder, folder, workers, told)


def task_of(record: Record, config: StudyConfig, budget: Budget) -> Task:
    """The task of a study's candidate, for another run of it here."""
    return Task(
        uid=record.uid,
        model=config.model,
        data=config.data,
        schedule=record.schedule,
        budget=budget,
        metrics=config.metric_names,
        finetune=config.finetune,
        measure=config.measure,
        seed=record.seed,
        device=config.workers.device,
        threads=max(1, int(config.workers.cpus_each)),
        plugins=config.plugins,
    )


def model_and_data(
    file: ScheduleFile, study: StudyConfig | None, model: ModelConfig | None, data: DataConfig | None
) -> tuple[ModelConfig, DataConfig]:
    """Those given, else the study's, else those the file names. Raises UserError when they are known from nowhere."""
    place = "schedule file"
    if model is None:
        model = study.model if study else from_mapping(ModelConfig, file.model, place) if file.model else None
    if data is None:
        data = study.data if study else from_mapping(DataConfig, file.data, place) if file.data else None
    if model is None or data is None:
        missing = "model" if model is None else "data"
        raise UserError(
            f"{place}: it names no {missing}. Possible: --study FOLDER, or --{missing} NAME. Give one of them."
        )
    return model, data


def measure_again(
    file: ScheduleFile,
    folder: Path,
    *,
    study: StudyConfig | None = None,
    model: ModelConfig | None = None,
    data: DataConfig | None = None,
    metrics: tuple[str, ...] = COMPARED,
    measure: MeasureConfig | None = None,
    device: str = "auto",
) -> tuple[Evaluation, Evaluation]:
    """Evaluate the dense model and an exported schedule, as they come: (dense, pruned).

    Model and data are those given, else the study's, else those the file names. Weights beside the file (relative to
    `folder`) are used for the pruned model. Raises UserError when model or data are known from nowhere or
    are not as they must be, RunError when an evaluation fails.
    """
    model, data = model_and_data(file, study, model, data)
    weights = None if file.weights is None else str(folder / file.weights)
    for plugin in study.plugins if study else ():
        importlib.import_module(plugin)
    check_inputs(model, data, device, keep=True)
    results = []
    for schedule, with_weights in ((Schedule(), None), (file.schedule, weights)):
        task = Task(
            uid="evaluate",
            model=model,
            data=data,
            schedule=schedule,
            budget=Budget(images=0),
            metrics=metrics,
            measure=measure or (study.measure if study else MeasureConfig()),
            device=device,
            weights=with_weights,
            plugins=study.plugins if study else (),
        )
        result = evaluate(task)
        if result.status != "complete":
            raise RunError(f"the evaluation failed ({result.cause}): {result.error}\n{result.traceback}".rstrip())
        results.append(result)
    return results[0], results[1]
