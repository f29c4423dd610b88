"""Export a candidate to a schedule file, with its weights if asked for, and evaluate an exported schedule again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from prunesearch.config import (
    UNLABELLED,
    Budget,
    DataConfig,
    MeasureConfig,
    ModelConfig,
    StudyConfig,
    WorkersConfig,
)
from prunesearch.confirmation import confirmation_row, speed_row
from prunesearch.errors import DeviceError, RunError, StudyError, UserError
from prunesearch.evaluate import Evaluation, Task, model_shape
from prunesearch.evaluate.task import Speed, ToTime, timing_work
from prunesearch.export.sources import model_and_data, needed
from prunesearch.files import ScheduleFile, save_schedule, to_mapping
from prunesearch.plugins import all_plugins, import_plugins, missing_plugins
from prunesearch.profile import Profile, refuse_other_shape
from prunesearch.record import Record
from prunesearch.schedule import Schedule
from prunesearch.search.shared_weights import SupernetTrained, prepare_supernet
from prunesearch.search.tasks import candidate_task
from prunesearch.space.vocabulary import Vocabulary, learns, written_out
from prunesearch.workers.serial import SerialWorkers

TIMED = ("throughput",)
"""Those of `compared` that `time_again` measures better."""
SPEED_SECONDS = 10.0
NO_VOCABULARY = Vocabulary()


def compared(model: ModelConfig, data: DataConfig) -> tuple[str, ...]:
    """The metrics that are measured again unless others are asked for."""
    if model_shape(model).gives_features:
        return ("feature_similarity", "gmacs", "throughput")
    if model_shape(model).segments:
        return ("miou", "gmacs", "throughput")
    return ("agreement" if data.name == UNLABELLED else "top1", "gmacs", "throughput")


def export(
    record: Record,
    config: StudyConfig,
    path: Path,
    *,
    weights: bool = False,
    vocabulary: Vocabulary = NO_VOCABULARY,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write a candidate's schedule to `path`, with its metrics and origin; returns the files written.

    Plug-ins are never imported here. Raises StudyError for a candidate without a result, without weights of its own, or
    whose missing weights can only be trained again with plug-ins. Raises RunError when training them again fails.

    weights: also copy its fine-tuned weights to `path` with the suffix .safetensors. Always done for a schedule with
    learned parts, which is useless without them. If the study's copy is gone, the weights are trained again.
    vocabulary: of the study. It has the options of scores and verbs, and which of them learn, without the plug-ins.
    say: called with notes for the user.
    """
    evaluation = record.evaluation
    if evaluation is None or evaluation.status != "complete":
        raise StudyError(
            f"trial {record.number}: it is {record.state} and has no result. Possible: a complete trial. "
            f"See `prunesearch front` for those worth having."
        )
    written = [path]
    needs_weights = learns(record.schedule, vocabulary)
    if needs_weights and not weights:
        say("this schedule learned its decisions, so its weights come along")
        weights = True
    if weights and not path.name.isprintable():
        raise UserError(
            f"{path.name!r}: the file would have to name its weights, but YAML holds printable characters only. "
            f"Possible: a name in UTF-8 without control characters. Choose another one."
        )
    if weights:
        written.append(_export_weights(record, evaluation, config, path, needs_weights, say))
    save_schedule(
        written_out(record.outcome, vocabulary),
        path,
        model=to_mapping(config.model),
        data={"name": config.data.name, **to_mapping(config.data)},
        weights=written[1].name if weights else None,
        measured={
            **dict(evaluation.metrics),
            "tokens": list(evaluation.tokens),
            "finetuned_images": evaluation.images,
            **({"supernet_images": config.supernet.images} if evaluation.start and config.supernet else {}),
            "device": evaluation.device,
            **({"data_notes": list(evaluation.data_notes)} if evaluation.data_notes else {}),
            **({"again": confirmation_row(record)} if record.confirmations else {}),
            **({"speed": speed_row(record.speed)} if record.speed else {}),
        },
        made_by={
            "study": config.name,
            "trial": record.number,
            "uid": record.uid,
            "seed": record.seed,
            **dict(evaluation.versions),
        },
        plugins=config.plugins,
    )
    return written


def _export_weights(
    record: Record,
    evaluation: Evaluation,
    config: StudyConfig,
    path: Path,
    needs_weights: bool,
    say: Callable[[str], None],
) -> Path:
    target = path.with_suffix(".safetensors")
    if target == path:
        raise UserError(f"{path}: the weights go to this name. Possible: another suffix. Write for example best.yaml.")
    if evaluation.images == 0 and needs_weights:
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
    _refuse_to_import(config.name, config.plugins, f"the weights of trial {record.number}")
    from prunesearch.evaluate.run import evaluate

    say(f"the weights of trial {record.number} are not in the study any more; fine-tuning again with the same seed")
    again, stem = evaluation, str(target.with_suffix(""))
    trained = [one.images for one in record.evaluations if one.images > 0]
    with _start_of(evaluation, config, target.parent, say) as start:
        for index, images in enumerate(trained):  # each rung has its own learning rate schedule
            task = replace(candidate_task(record, config, budget=Budget(images=images)), start=start, save_to=stem)
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
    """Path of the shared weights from which an evaluation started; None if there were none.

    If the file is gone, the shared weights are trained again into a temporary folder near `near`.
    """
    if evaluation.start is None or Path(evaluation.start).is_file():
        yield evaluation.start
        return
    _refuse_to_import(config.name, config.plugins, "the shared weights")
    say("the shared weights are not in the study any more; training them again with the same seed")
    with TemporaryDirectory(dir=near) as name:
        folder = Path(name).absolute()
        workers = SerialWorkers(WorkersConfig(kind="serial"), folder)

        def told(event: SupernetTrained) -> None:
            say(f"shared weights: {event.images:,} of {event.total:,} images")

        yield prepare_supernet(config, folder, folder, workers, told)


def _refuse_to_import(study: str, plugins: Sequence[str], what: str) -> None:
    """Raise StudyError when training weights again would import plug-ins that are not imported yet."""
    missing = missing_plugins(plugins)
    if missing:
        raise StudyError(
            f"study {study!r}: {what} are not in the study any more, and making them again would import the "
            f"plug-ins {', '.join(missing)}, which an export never does. Possible: the study's weights folder; or, in "
            f"Python, `import {missing[0]}` before prunesearch.export.schedules.export. Bring the files back, or do "
            f"that."
        )


def measure_again(
    file: ScheduleFile,
    folder: Path,
    *,
    study: StudyConfig | None = None,
    model: ModelConfig | None = None,
    data: DataConfig | None = None,
    metrics: tuple[str, ...] = (),
    measure: MeasureConfig | None = None,
    profile: Profile | None = None,
    device: str = "auto",
    plugins: Sequence[str] = (),
) -> tuple[Evaluation, Evaluation]:
    """Evaluate the dense model and an exported schedule without training; returns (dense, pruned).

    Model and data are those given, else the study's, else the file's. metrics: those of `compared` when empty. The
    pruned model uses the weights of the file, whose path is relative to `folder`. Without weights, thresholds with a
    target are calibrated. profile: predicts latency; that of the study, if the model is the study's, when None.
    plugins: modules to import besides those of the study. Raises UserErrors when model or data are given nowhere or do
    not fit, or when a profile is needed and there is none; RunError when an evaluation fails.
    """
    from prunesearch.evaluate.inputs import check_inputs
    from prunesearch.evaluate.run import evaluate

    known_model, known_data = model_and_data(file, study)
    model, data = needed(model or known_model, data or known_data)
    weights = None if file.weights is None else str(folder / file.weights)
    import_plugins(all_plugins(study.plugins if study else (), plugins))
    check_inputs(model, data, device, keep=True)
    results = []
    profile = _profile_for(model, profile, study)
    for schedule, with_weights in ((Schedule(), None), (file.schedule, weights)):
        task = Task(
            uid="evaluate",
            model=model,
            data=data,
            schedule=schedule,
            budget=Budget(images=0),
            metrics=metrics or compared(model, data),
            measure=measure or (study.measure if study else MeasureConfig()),
            device=device,
            weights=with_weights,
            plugins=all_plugins(study.plugins if study else (), plugins),
            profile=profile,
        )
        result = evaluate(task, raise_user_errors=True)
        if result.status != "complete":
            raise RunError(f"the evaluation failed ({result.cause}): {result.error}\n{result.traceback}".rstrip())
        results.append(result)
    return results[0], results[1]


def time_again(
    file: ScheduleFile,
    folder: Path,
    *,
    study: StudyConfig | None = None,
    model: ModelConfig,
    data: DataConfig,
    profile: Profile | None = None,
    seconds: float = SPEED_SECONDS,
    device: str = "auto",
    plugins: Sequence[str] = (),
) -> list[Speed]:
    """Time the schedule of a file in turns with its dense model; returns the speed of the dense model, then its own.

    profile: as of `measure_again`. The schedule is timed as this was measured; without one in eager PyTorch, as
    throughput is. seconds: of measuring. Other arguments, and errors, as of `measure_again`. Raises DeviceError for a
    profile of another model, and for a machine, runtime or schedule that cannot be timed so.
    """
    from prunesearch.device.whole_models import evaluate

    profile = _profile_for(model, profile, study)
    weights = None if file.weights is None else str(folder / file.weights)
    measure = study.measure if study else MeasureConfig()
    task = Task(
        uid="speed",
        model=model,
        data=data,
        schedule=Schedule(),
        budget=Budget(images=0),
        device=device,
        threads=None if profile is None else profile.threads or None,
        plugins=all_plugins(study.plugins if study else (), plugins),
        profile=profile,
        timing=timing_work((ToTime("pruned", file.schedule, weights),), seconds, measure, profile),
    )
    found = evaluate(task, raise_user_errors=True)
    if found.status != "complete":
        raise RunError(f"the timing failed ({found.cause}): {found.error}\n{found.traceback}".rstrip())
    dense, pruned = found.speeds
    if pruned.problem:
        raise DeviceError(f"{pruned.problem}. Possible: another runtime or profile. Choose one.")
    return [dense, pruned]


def _profile_for(model: ModelConfig, given: Profile | None, study: StudyConfig | None) -> Profile | None:
    """The given profile, which must be of this model, or that of the study if the model is the study's."""
    if given is not None:
        refuse_other_shape(given, model_shape(model))
        return given
    return study.target.profile if study is not None and study.model == model else None
