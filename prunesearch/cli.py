"""The `prunesearch` command line. Each verb is a function that reads its arguments, calls the library and prints.

Heavy modules (PyTorch, timm, Ray, Optuna, rich, NumPy) are imported inside the verbs that need them.

Exit codes: 0 done, 1 the run failed, 2 a mistake of the user, 130 interrupted (everything is saved).
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO

from prunesearch import __version__
from prunesearch.config import SHARE, DataConfig, Limit, MeasureConfig, ModelConfig, StudyConfig
from prunesearch.confirmation import speed_row
from prunesearch.cost import Cost, doubts, estimate_cost, total_cost
from prunesearch.errors import FileError, PruneSearchError, StudyError, UserError
from prunesearch.evaluate import METRICS, is_remote, model_problems, model_shape
from prunesearch.evaluate.limits import (
    WrittenLimits,
    bound_in_words,
    budget_of,
    computed_dense,
    computed_limits,
    goal_of,
    in_words,
    is_within,
)
from prunesearch.evaluate.sensitivity import IMAGES, save_sensitivities, stages_of
from prunesearch.evaluate.siblings import find_siblings
from prunesearch.export.runtimes import RUNTIMES, Runtime, check_target
from prunesearch.export.schedules import SPEED_SECONDS, TIMED, compared, export, measure_again, time_again
from prunesearch.export.sources import Given, guessed_normalisation, model_and_data, needed
from prunesearch.files import (
    ScheduleFile,
    is_schedule_file,
    load_profiles,
    load_schedule_file,
    load_study,
    override_study,
    places_in_file,
    plugins_named_in,
    refuse_no_file,
    save_profiles,
    save_schedule,
)
from prunesearch.json_schema import json_schema
from prunesearch.plugins import all_plugins, import_plugins
from prunesearch.presets.diffrate import load_diffrate
from prunesearch.printable import counted, printable
from prunesearch.profile import refuse_other_shape
from prunesearch.report.profile_words import profile_lines, summary
from prunesearch.schedule import Schedule, refuse_everywhere
from prunesearch.space.choices import combinations, dimensions
from prunesearch.strict import to_mapping

if TYPE_CHECKING:
    from rich.console import Console

    from prunesearch.profile import Profile
    from prunesearch.record import Record
    from prunesearch.shape import ModelShape
    from prunesearch.study.reader import StudyReader

EXAMPLES = """\
examples:
  prunesearch run search_spaces/digits.yaml                         start or continue a search
  prunesearch front outputs/digits --plot front.png                 the Pareto front so far
  prunesearch export outputs/digits --at-most gmacs=0.009 -o best.yaml

then, in your own script:
  apply_schedule(model, "best.yaml")                                from prunesearch import apply_schedule
"""

INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
CONFIRM_SEEDS = 2
WIDE = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, parsed = "--debug" in arguments, None
    if logging.lastResort is not None:  # it prints warnings of the library
        logging.lastResort.setFormatter(_PrintableFormatter())
    try:
        parsed = _parser().parse_args(arguments)
        code = int(parsed.verb(parsed) or 0)
        sys.stdout.flush()  # raises here on a full disk or a closed pipe
        return code
    except PruneSearchError as error:
        if debug:
            raise
        _complain(str(error))
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `prunesearch list models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if parsed is None or parsed.verb not in (_run, _resume, _confirm):
            return 0
        _complain("the reader of its output is gone, so the search stopped. What it finished is saved; run it again.")
        return 1
    except OSError as error:  # a path that cannot be written, a full disk
        if debug or (error.filename is None and error.errno not in _FULL):
            raise
        where = "output" if error.filename is None else error.filename
        _complain(
            f"{where}: {error.strerror}. Possible: a file in a folder that can be written, on a disk with space. Check "
            f"the path; what a study has finished is safe."
        )
        return 1 if error.errno in _FULL else 2


# --- verbs -------------------------------------------------------------------------------------------------------


def _run(parsed: argparse.Namespace) -> int:
    config = load_study(parsed.file, _overrides(parsed))
    _check_folder(parsed.output)
    with _naming_lines(parsed.file, _overrides(parsed), config.name):
        return _search(config, parsed.output / config.name, parsed)


@contextmanager
def _naming_lines(file: Path, overrides: Sequence[str], name: str) -> Iterator[None]:
    """Say at which lines of a study file the mistakes are that `check_study` found in the study of this name."""
    try:
        yield
    except FileError as error:
        if error.place != f"study {name}":
            raise
        raise FileError(str(file), places_in_file(file, overrides, error.problems)) from None


def _resume(parsed: argparse.Namespace) -> int:
    reader = _open(parsed)
    reader.close()
    config = _with_plugins(parsed, reader.config.plugins, override_study(reader.config, _overrides(parsed)))
    return _search(config, parsed.folder or parsed.output / config.name, parsed)


def _confirm(parsed: argparse.Namespace) -> int:
    reader = _open(parsed)
    reader.close()
    config = override_study(reader.config, parsed.set)
    seeds = parsed.seeds or config.confirm.seeds or CONFIRM_SEEDS
    config = replace(config, confirm=replace(config.confirm, seeds=seeds))
    config = _with_plugins(parsed, reader.config.plugins, config)
    return _search(config, parsed.folder or parsed.output / config.name, parsed, search=False)


def _overrides(parsed: argparse.Namespace) -> list[str]:
    return parsed.set + ([] if parsed.trials is None else [f"stop.trials={parsed.trials}"])


def _search(config: StudyConfig, folder: Path, parsed: argparse.Namespace, search: bool = True) -> int:
    from prunesearch.report.live import LiveReport
    from prunesearch.search.driver import run_study
    from prunesearch.study.storage import shown

    where = shown(parsed.storage) if parsed.storage else str(folder)
    with LiveReport(config, where, console=_console(), plain=parsed.no_progress) as report:
        done = run_study(config, folder, storage=parsed.storage, on_event=report, search=search)
    if config.confirm.seeds:
        _show_speeds(folder, parsed.storage, config.name)
    if done.complete:
        _print(f"Next: prunesearch front {_again(parsed, folder, config.name)}")
    return INTERRUPTED if done.reason in ("interrupted", "cancelled") else 0


def _show_speeds(folder: Path, storage: str | None, name: str) -> None:
    """Print how fast the schedules of a study are that were timed at its end, if any were."""
    from prunesearch.report.tables import speeds_table
    from prunesearch.study.reader import open_study_readonly

    reader = open_study_readonly(folder, storage=storage, name=name)
    table = speeds_table(reader.records())
    reader.close()
    if table is not None:
        _console().print(table)


def _check(parsed: argparse.Namespace) -> int:
    if is_schedule_file(parsed.file):
        if parsed.deep:
            raise UserError(f"{parsed.file}: --deep opens weights and data, which a study names. Leave --deep out.")
        return _check_schedule(parsed)
    config = load_study(parsed.file, parsed.set)
    with _naming_lines(parsed.file, parsed.set, config.name):
        return _check_study(config, parsed.deep) or (_check_inputs(config) if parsed.deep else 0)


def _check_study(config: StudyConfig, deep: bool) -> int:
    from prunesearch.search.problems import check_study, start_schedules
    from prunesearch.search.sensitivity_start import MOST_STARTS, WORD
    from prunesearch.search.target_device import timing_notes, without_predictions

    remote = is_remote(config.model)  # check does not use the network; the run looks it up
    check_study(config, without_model=remote)
    if remote:
        print(
            f"{config.name}: fine as far as it can be checked here. What {config.model.name} is, and so whether the "
            f"space and the start schedules fit it, is looked up when the study is run."
        )
        return 0
    shape = model_shape(config.model)
    total = combinations(config.space)
    size = "continuous" if total is None else f"{total:,} combinations"
    if total is not None and total > 10**15:
        size = f"about 10^{math.log10(total):.0f} combinations"
    _print(f"{config.name}: fine. {len(dimensions(config.space))} parameters, {size}.")
    for note in timing_notes(config):
        _say(note)
    if config.device is not None and config.device.table is None:
        print(f"  {'device':<20} measured when the search starts; limits on what it predicts are checked then")
        config = without_predictions(config)
    elif config.device is not None and config.device.table is not None:
        _print(f"  {'device':<20} {', '.join(profile_lines(config.device.table)[:2])}")
    dense = computed_dense(config.limits, config.target)
    for name, limit in config.limits:
        words = in_words(name, limit, dense.get(name), goal_of(name, config.objectives), "dense is measured first")
        _print(f"  {'limit':<20} {words}")
        value = dense.get(name)
        if isinstance(limit.at_most, (int, float)) and value is not None and limit.at_most >= value:
            _say(
                f"limits.{name}.at_most: {limit.at_most:g} lets everything pass, as the dense model has {value:.5g}; a "
                f'share of that is written with %, as in "{min(limit.at_most, 80):g}%"'
            )
    budget = budget_of(config)
    if budget is not None:
        print(f"  {'budget':<20} {budget.metric} {bound_in_words(budget.written, budget.amount)}")
    limits = computed_limits(config)
    for origin, schedule in start_schedules(config, shape):
        words = _cost_in_words(schedule, estimate_cost(shape, schedule))
        if config.target.profile is not None and not schedule.is_adaptive:
            words += f", {total_cost(shape, schedule, config.target.profile):.4g} ms"
        if schedule.stages and not is_within(limits, config.target, schedule):
            words += "; beyond the limits, and evaluated all the same"
        _print(f"  {origin.removeprefix('start: '):<20} {words}")
    if WORD in config.space.start_from:
        stages, _ = stages_of(config.space, shape)
        measured = f"{len(stages)} stages that the run measures first"
        print(f"  {WORD:<20} up to {MOST_STARTS} schedules, predicted from {measured}")
    if config.siblings:
        siblings = find_siblings(config, offline=True)
        for sibling in siblings.models:
            known = "looked up by the run" if is_remote(sibling) else f"{_dense_gmacs(sibling):.5g} GMACs"
            _print(f"  dense sibling {sibling.name}: {known}")
        _print(*(f"  {note}" for note in siblings.notes))
    if not deep:
        print("  Weights and data were not opened; check --deep does that, and run always.")
    return 0


def _check_inputs(config: StudyConfig) -> int:
    from prunesearch.evaluate.inputs import check_inputs

    def progress(split: str, done: int, total: int | None) -> None:
        _say(f"{split}: {done:,}{'' if total is None else f' of {total:,}'} pictures looked at")

    here = config.workers.address is None
    inputs = check_inputs(config.model, config.data, config.workers.device, here=here, report=progress)
    classes = "" if inputs.classes is None else f", {len(inputs.classes)} classes"
    counts = [f"{split} {'a stream' if count is None else f'{count:,} pictures'}" for split, count in inputs.counts]
    print(f"Weights and data: fine{''.join(f', {text}' for text in counts)}{classes}.")
    for note in inputs.notes:
        print(f"  {note}")
    if inputs.unseen:
        print(f"  not looked at, as workers are on a cluster: {', '.join(inputs.unseen)}")
    return 0


def _sensitivity(parsed: argparse.Namespace) -> int:
    from prunesearch.evaluate.measure_sensitivity import measure_sensitivities
    from prunesearch.report.plot import check_plot
    from prunesearch.report.plot_sensitivity import plot_sensitivity
    from prunesearch.report.sensitivity_tables import predicted_table, sensitivity_table
    from prunesearch.search.problems import check_study
    from prunesearch.search.sensitivity_start import cost_table, predicted_starts

    config = load_study(parsed.file, parsed.set)
    for path in (parsed.output, parsed.plot):
        _check_output(path)
    if parsed.plot is not None:
        check_plot(parsed.plot)
    with _naming_lines(parsed.file, parsed.set, config.name):
        check_study(config)
    found = measure_sensitivities(config, parsed.images or IMAGES)
    shape = model_shape(config.model)
    starts = predicted_starts(config, shape, found)
    if parsed.json:
        print(json.dumps({**to_mapping(found), "predicted": to_mapping(starts)}, indent=2))
    else:
        _console().print(sensitivity_table(found))
        costs = cost_table(config)
        _console().print(predicted_table(starts, total_cost(shape, Schedule(), costs), costs.metric))
    if parsed.output is not None:
        save_sensitivities(found, parsed.output)
        _print(f"Table: {parsed.output}", file=sys.stderr)
    if parsed.plot is not None:
        plot_sensitivity(found, parsed.plot)
        _print(f"Plot: {parsed.plot}", file=sys.stderr)
    return 0


def _profile(parsed: argparse.Namespace) -> int:
    from prunesearch.device.profiles import measure_profiles
    from prunesearch.report.plot import check_plot
    from prunesearch.report.plot_profile import plot_profile
    from prunesearch.search.target_device import measured_as, verbs_that_return, words_of

    for path in (parsed.output, parsed.plot):
        _check_output(path)
    if parsed.plot is not None:
        check_plot(parsed.plot)
    is_study = Path(parsed.model).suffix in (".yaml", ".yml")
    study = load_study(parsed.model, parsed.set, read_profile=False) if is_study else None
    model = ModelConfig(parsed.model) if study is None else study.model
    device = None if study is None else study.device
    flags = {
        "batches": parsed.batch,
        "runtime": parsed.runtime,
        "threads": parsed.threads,
        "precision": parsed.precision,
        "seconds": parsed.seconds,
    }
    settings = {} if device is None else measured_as(device)
    settings |= {name: value for name, value in flags.items() if value is not None}
    verbs = scores = returning = None
    if study is not None:
        verbs, scores = words_of(study, model_shape(model))
        returning = verbs_that_return(study, model_shape(model))
    profiles = []
    for profile in measure_profiles(
        model,
        device=parsed.device,
        verbs=parsed.verb_name or verbs,
        scores=parsed.score or scores,
        returning=None if parsed.verb_name else returning,
        say=_say,
        **settings,
    ):
        profiles.append(profile)
        if not parsed.json:
            if parsed.brief:
                _print(summary(profile) + (" (Rough: measure longer to rely on it.)" if doubts(profile) else ""))
            else:
                _print(*profile_lines(profile), *doubts(profile), "")
        if parsed.output is not None:
            save_profiles(profiles, parsed.output)  # after each batch, so that an interrupt loses one at most
    if parsed.json:
        print(json.dumps([to_mapping(profile) for profile in profiles], indent=2))
    if parsed.output is not None:
        _print(f"Profile: {parsed.output}", file=sys.stderr)
    elif device is not None and device.profile is not None:
        _say(f"the study reads its profile from {device.profile}; -o {shlex.quote(device.profile)} writes one there")
    if parsed.plot is not None:
        plot_profile(profiles, parsed.plot)
        _print(f"Plot: {parsed.plot}", file=sys.stderr)
    return 0


def _train_head(parsed: argparse.Namespace) -> int:
    from prunesearch.evaluate.train_head import train_head
    from prunesearch.models.weights import weights_of, write_weights

    config = load_study(parsed.file, parsed.set, read_profile=False)
    _check_output(parsed.output)
    if parsed.output.exists():  # weights that took long, and that a study may name
        raise UserError(
            f"{parsed.output} is there already. Possible: a file that is not there. Choose another one with -o, or "
            f"remove it first."
        )
    import_plugins(config.plugins)
    settings = {name: getattr(parsed, name) for name in ("images", "learning_rate", "batch_size")}
    last = time.monotonic()

    def report(done: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            _say(f"{done:,} of {parsed.images:,} pictures, loss {loss:.4f}")

    trained = train_head(config.model, config.data, device=config.workers.device, report=report, **settings)
    write_weights(parsed.output, weights_of(trained.model))
    _print(
        f"{config.model.name} with a {config.model.head} head, {config.model.num_classes} classes, trained on "
        f"{parsed.images:,} pictures -> {parsed.output}",
        f"  miou {trained.miou:.4g} %, pixel_accuracy {trained.pixel_accuracy:.4g} % on "
        f"{trained.validation_images:,} validation pictures",
        f"Next: under model, write checkpoint: {parsed.output} and leave out pretrained; then prunesearch run "
        f"{parsed.file}",
    )
    return 0


def _check_schedule(parsed: argparse.Namespace) -> int:
    plugins = [*parsed.plugin, *(plugins_named_in(parsed.file) if parsed.trust_plugins else ())]
    file = load_schedule_file(parsed.file, plugins)
    schedule = file.schedule
    model, _ = model_and_data(file, given=Given(model=parsed.model, overrides=tuple(parsed.set)))
    if model is None:
        refuse_everywhere(schedule)
        _print(f"{parsed.file}: fine in itself ({schedule}). Give --model NAME to check it against a model.")
        return 0
    if is_remote(model) and not model_problems(model):  # looking it up needs the network
        _print(f"{parsed.file}: fine in itself ({schedule}). What {model.name} is, is looked up when it is evaluated.")
        return 0
    cost, dense = estimate_cost(model_shape(model), schedule), estimate_cost(model_shape(model))
    _print(f"{parsed.file}: fine for {model.name}. {schedule}")
    print(f"  {_cost_in_words(schedule, cost)}; the dense model costs {dense.gmacs:.5g}")
    if not schedule.is_adaptive:
        print(f"  tokens after each block: {', '.join(map(str, cost.tokens))}")
    for profile in () if parsed.profile is None else load_profiles(parsed.profile):
        _print(f"  {_predicted(profile, model_shape(model), schedule)}", *(f"  {text}" for text in doubts(profile)))
    return 0


def _predicted(profile: Profile, shape: ModelShape, schedule: Schedule) -> str:
    """What a profile predicts for a schedule, as text. Raises DeviceError for a profile of another model."""
    refuse_other_shape(profile, shape)
    dense, ms = total_cost(shape, Schedule(), profile), total_cost(shape, schedule, profile)
    most = "at most " if schedule.is_adaptive else ""
    where = f"batch {profile.batch} in {profile.runtime} on {profile.device}"
    return f"{where}: {most}{ms:.4g} ms predicted, dense {dense:.4g}, {dense / ms:.2f} x as fast"


def _dense_gmacs(model: ModelConfig) -> float:
    return estimate_cost(model_shape(model)).gmacs


def _cost_in_words(schedule: Schedule, cost: Cost) -> str:
    if not schedule.is_adaptive:
        return f"{cost.gmacs:.5g} GMACs, {cost.tokens[-1]} tokens in the last block"
    if schedule.target_gmacs is not None:
        return f"{schedule.target} on average, which its thresholds are trained for"
    most = f"at most {cost.gmacs:.5g} GMACs"
    if schedule.target is not None:
        return f"{most}; its thresholds are trained for {schedule.target} on average"
    return f"{most}; with thresholds it depends on the images"


def _status(parsed: argparse.Namespace) -> int:
    from prunesearch.report.tables import status_view

    reader = _open(parsed)
    records = _records(reader)
    if parsed.json:
        states = [record.state for record in records]
        counts: dict[str, int] = {state: states.count(state) for state in sorted(set(states))}
        if reader.unreadable:
            counts["unreadable"] = len(reader.unreadable)
        print(json.dumps({"study": reader.config.name, **counts}))
    else:
        _console().print(status_view(records, reader.config, reader.siblings()))
    return 0


def _front(parsed: argparse.Namespace) -> int:
    from prunesearch.front import comparable, comparable_siblings, front, front_rows, nothing_within, sibling_rows
    from prunesearch.relative_limits import asked_limits, limit_lines, limits_of
    from prunesearch.report.plot import check_plot, plot_front
    from prunesearch.report.tables import front_csv, front_table, metrics_table, siblings_table, speeds_table

    _check_output(parsed.plot)
    if parsed.plot is not None:
        check_plot(parsed.plot)
    reader = _open(parsed)
    config, records, objectives = reader.config, _records(reader), reader.config.objectives
    asked = asked_limits(_drops(parsed.within), config, records)
    limits = (*limits_of(config, records), *asked)
    siblings = comparable_siblings(reader.siblings(), objectives)
    found = front(records, objectives, limits)
    if parsed.json:
        print(json.dumps(front_rows(found, objectives) + sibling_rows(siblings, found, objectives), indent=2))
    elif parsed.csv:
        print(printable(front_csv(found, objectives, siblings), lines=True), end="")
    elif not found:
        measured = comparable(records, objectives)
        if measured and limits:
            _print(f"{config.name}: {nothing_within(limits, measured)}")
        else:
            _print(f"{config.name}: nothing on the front yet ({len(records)} candidates so far). Look again later.")
    else:
        _console().print(front_table(found, objectives, records))
        others = metrics_table(found, objectives, records)
        if others is not None:
            _console().print(others)
        _print(*(f"limit: {line}" for line in limit_lines(config, records)))
        _print(*(f"within: {name} {limit}" for name, limit in asked))
        speeds = speeds_table(records)
        if speeds is not None:
            _console().print(speeds)
    if siblings and not (parsed.json or parsed.csv):
        _console().print(siblings_table(siblings, found, objectives, records))
    if not (found or parsed.json or parsed.csv):
        return 0
    if parsed.plot is not None:
        plot_front(records, objectives, parsed.plot, limits=limits, title=config.name, siblings=siblings)
        _print(f"Plot: {parsed.plot}", file=sys.stderr)
    return 0


def _export(parsed: argparse.Namespace) -> int:
    targets = [
        (runtime, path)
        for runtime, path in zip(RUNTIMES, (parsed.onnx, parsed.openvino), strict=True)
        if path is not None
    ]
    for path in (parsed.output, *(path for _, path in targets)):
        _check_output(path)
    for runtime, path in targets:
        check_target(runtime, path)
    if parsed.storage is None and parsed.folder is not None and parsed.folder.is_file():
        _refuse_flags(parsed, _STUDY_FLAGS, f"{parsed.folder}: it is a schedule file", "a study folder")
        if not targets:
            raise UserError(
                f"{parsed.folder}: it is a schedule file already. Possible: --onnx FILE.onnx and --openvino FILE.xml. "
                f"Give one of them, or a study folder."
            )
        study = _study_in(Path(parsed.study) if parsed.study is not None else None)
        file, _ = _load_trusted(parsed, parsed.folder, study)
        return _deploy(parsed, targets, file, parsed.folder.parent, study)
    if not targets:
        _refuse_flags(parsed, _RUNTIME_FLAGS, "a schedule file is written", "--onnx FILE.onnx or --openvino FILE.xml")
    elif parsed.output is None:
        _refuse_flags(parsed, ("weights",), "the files have their weights inside", "-o FILE.yaml")
    reader = _open(parsed)
    record = _choose(parsed, reader.config, _records(reader))
    if parsed.output is not None or not targets:
        _export_schedule(parsed, reader, record, parsed.output or Path("best.yaml"))
    if not targets:
        return 0
    if parsed.output is None:
        from prunesearch.report.tables import short

        _print(f"Trial {record.number}: {short(record.outcome)}")
    plugins = _trusted(parsed, reader.config.plugins, f"study {reader.config.name}")
    import_plugins(plugins)
    with TemporaryDirectory() as folder:
        path = parsed.output
        if not parsed.weights:
            path = Path(folder) / "best.yaml"
            evaluation = record.evaluation
            fine_tuned = evaluation is not None and (evaluation.images > 0 or evaluation.start is not None)
            export(record, reader.config, path, weights=fine_tuned, vocabulary=reader.vocabulary, say=_say)
        return _deploy(parsed, targets, load_schedule_file(path, plugins), path.parent, reader.config)


def _export_schedule(parsed: argparse.Namespace, reader: StudyReader, record: Record, path: Path) -> None:
    from prunesearch.report.tables import short

    written = export(record, reader.config, path, weights=parsed.weights, vocabulary=reader.vocabulary, say=_say)
    evaluation = record.evaluation
    assert evaluation is not None  # export raises without one
    values = ", ".join(f"{name} {value:.5g}" for name, value in evaluation.metrics)
    _print(f"Trial {record.number}: {short(record.outcome)}", f"  {values}", f"  -> {', '.join(map(str, written))}")
    if evaluation.images and not parsed.weights:
        _say(f"measured after a fine-tune of {evaluation.images} images; --weights takes those weights along")


_STUDY_FLAGS = ("trial", "knee", "at_most", "at_least", "weights", "output")
_RUNTIME_FLAGS = ("half", "model", "data", "root", "val_root", "set", "trust_plugins", "plugin")


def _refuse_flags(parsed: argparse.Namespace, names: Sequence[str], why: str, possible: str) -> None:
    """Raise UserError when one of these arguments was given, which would have no effect."""
    values = {name: getattr(parsed, name) for name in names}
    given = [
        f"--{name.replace('_', '-')}"
        for name, value in values.items()
        if value not in (None, []) and value is not False
    ]
    if given:
        raise UserError(
            f"{', '.join(given)}: {why}, where {'this means' if len(given) == 1 else 'these mean'} nothing. Possible: "
            f"with {possible}. Leave {'it' if len(given) == 1 else 'them'} out, or give that."
        )


def _deploy(
    parsed: argparse.Namespace,
    targets: Sequence[tuple[Runtime, Path]],
    file: ScheduleFile,
    folder: Path,
    study: StudyConfig | None,
) -> int:
    """Write files for runtimes from a schedule file in `folder`, and print what was measured."""
    from prunesearch.export.deploy import deploy
    from prunesearch.export.example import example_code

    given = Given(parsed.model, parsed.data, parsed.root, parsed.val_root, tuple(parsed.set))
    model, data = model_and_data(file, study, given)
    if model is None or data is not None:
        model, data = needed(model, data)
        for text in guessed_normalisation(model_and_data(file, study), (model, data)):
            _say(text)
    measure = study.measure if study else MeasureConfig()
    if study is not None and study.target.profile is not None:  # the batches that the study is about
        measure = replace(measure, speed_batch_size=study.target.profile.batch)
    exported = deploy(file, folder, targets, model=model, data=data, half=parsed.half, measure=measure, say=_say)
    before = file.measured or {}
    for (runtime, path), one in zip(targets, exported, strict=True):
        facts, check, speed = one.facts, one.check, one.speed
        images = f"{check.images} {'images of random numbers' if one.on_noise else 'validation images'}"
        outputs = "features" if facts.features else f"the same class for {check.same}; logits"
        _print(
            f"{path}: {facts.gmacs:.5g} GMACs, dense {facts.dense_gmacs:.5g}; {facts.tokens[-1]} tokens in the last "
            "block",
            f"  {one.runtime} against PyTorch on {images}: {outputs}, up to {check.scale:.3g}, differ by at most "
            f"{check.largest:.2g} ({check.usual:.2g} for three images in four)",
        )
        if speed is not None:
            _print(
                f"  {speed.median:.2f} times as fast as the dense model in {one.runtime} on this CPU, in batches of "
                f"{speed.batch_size} (quartiles {speed.low:.2f} to {speed.high:.2f})"
            )
        for name, value in (("top1", one.top1), ("pixel_accuracy", one.pixel_accuracy)):
            if value is not None:
                known = before.get(name)
                said = f"; measured before: {known:.5g}" if isinstance(known, (int, float)) else ""
                _print(f"  {name} {value:.5g} on {one.images} validation images{said}")
        if facts.half:
            _say(runtime.half_note)
        _print("", f"How to run {path} (python example.py PICTURE):", "")
        print(printable(example_code(path), lines=True))
    return 0


def _choose(parsed: argparse.Namespace, config: StudyConfig, records: list[Record]) -> Record:
    from prunesearch.front import best, cheapest, front, knee
    from prunesearch.relative_limits import asked_limits, limits_of

    if parsed.trial is not None:
        for record in records:
            if record.number == parsed.trial:
                return record
        last = max((record.number for record in records), default=None)
        possible = "none yet" if last is None else f"0 to {last}"
        raise StudyError(f"--trial {parsed.trial}: there is no such trial. Possible: {possible}. Choose one of them.")
    asked = [(name, Limit(at_most=bound)) for name, bound in parsed.at_most]
    asked += [(name, Limit(at_least=bound)) for name, bound in parsed.at_least]
    bounds, limits = asked_limits(asked, config, records), limits_of(config, records)
    if parsed.fastest_within:
        kept = asked_limits(_drops(parsed.fastest_within), config, records)
        record, cost = cheapest(records, config.objectives, kept, bounds, limits)
        _say(f"the best {cost.metric} with {' and '.join(f'{name} {limit}' for name, limit in (*kept, *bounds))}")
        if record.origin == "dense":
            _say("this is the dense model itself: no candidate that is cheaper is within")
        return record
    if bounds:
        return best(records, config.objectives, bounds, limits)
    record = knee(front(records, config.objectives, limits), config.objectives)
    if record.origin == "dense":
        _say("the bend of the front is the dense model itself; --at-most gmacs=70% or --trial N takes another")
    return record


def _drops(pairs: Sequence[tuple[str, float]]) -> WrittenLimits:
    return [(name, Limit(drop_at_most=drop)) for name, drop in pairs]


def _study_in(folder: Path | None) -> StudyConfig | None:
    """The study given by --study FOLDER, for its model and data."""
    if folder is None:
        return None
    from prunesearch.study.reader import open_study_readonly

    reader = open_study_readonly(folder)
    reader.close()
    return reader.config


def _load_trusted(
    parsed: argparse.Namespace, path: Path, study: StudyConfig | None
) -> tuple[ScheduleFile, tuple[str, ...]]:
    """Load a schedule file. Imports the plug-ins of the file and the study, and returns their names too."""
    named = all_plugins(plugins_named_in(path), study.plugins if study else ())
    plugins = _trusted(parsed, named, str(path))
    return load_schedule_file(path, plugins), plugins


def _sources(
    parsed: argparse.Namespace, file: ScheduleFile, study: StudyConfig | None
) -> tuple[ModelConfig, DataConfig]:
    """Model and data of the file or the study, overridden by the arguments. Prints a note for guessed values."""
    given = Given(parsed.model, parsed.data, parsed.root, parsed.val_root, tuple(parsed.set))
    model, data = needed(*model_and_data(file, study, given))
    for text in guessed_normalisation(model_and_data(file, study), (model, data)):
        _say(text)
    return model, data


def _freeze(parsed: argparse.Namespace) -> int:
    from prunesearch.export.freeze import freeze

    _check_output(parsed.output)
    study = _study_in(parsed.study_folder)
    file, _ = _load_trusted(parsed, parsed.file, study)
    model, data = _sources(parsed, file, study)
    frozen = freeze(
        file,
        parsed.file.parent,
        parsed.output,
        model=model,
        data=data,
        images=parsed.images,
        device=parsed.device,
    )
    _print(f"{', '.join(map(str, frozen.files))}: {frozen.schedule}")
    print(f"  {frozen.gmacs:.5g} GMACs for every image; with thresholds {frozen.adaptive_gmacs:.5g} on average")
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    from prunesearch.report.speed_tables import speed_table
    from prunesearch.report.tables import comparison_table, short

    study = _study_in(parsed.study_folder)
    file, plugins = _load_trusted(parsed, parsed.file, study)
    profiles = load_profiles(parsed.profile) if parsed.profile is not None else ()
    if not parsed.speed:
        _refuse_flags(parsed, ("seconds",), "nothing is timed in turns", "--speed")
    given = profiles[0] if len(profiles) == 1 else None  # with several, only --speed says which one is meant
    for name in parsed.metric:
        METRICS[name]  # raises for an unknown name before anything is loaded
    model, data = _sources(parsed, file, study)
    metrics = tuple(parsed.metric)
    if not metrics:
        metrics = tuple(name for name in compared(model, data) if not (parsed.speed and name in TIMED))
        metrics += ("predicted_latency_ms",) if given is not None else ()
    dense, pruned = measure_again(
        file,
        parsed.file.parent,
        study=study,
        model=model,
        data=data,
        metrics=metrics,
        profile=given,
        device=parsed.device,
        plugins=plugins,
    )
    speeds = []
    if parsed.speed and not profiles and study is None and "predicted_latency_ms" in (file.measured or {}):
        _say(
            "the study predicted this schedule's time by a profile; --study FOLDER or --profile FILE.json times it in "
            "the batches and the runtime of that"
        )
    if parsed.speed:
        for profile in profiles or (None,):
            speeds += time_again(
                file,
                parsed.file.parent,
                study=study,
                model=model,
                data=data,
                profile=profile,
                seconds=parsed.seconds or SPEED_SECONDS,
                device=parsed.device,
                plugins=plugins,
            )
    if parsed.json:
        rows = {"speed": [speed_row(speed) for speed in speeds if speed.name]} if parsed.speed else {}
        print(json.dumps({"dense": dict(dense.metrics), "pruned": dict(pruned.metrics), **rows}, indent=2))
        return 0
    _console().print(comparison_table(dense, pruned))
    for dense_speed, speed in zip(speeds[::2], speeds[1::2], strict=True):
        named = [("", "dense", "dense", dense_speed), ("", "pruned", short(file.schedule), speed)]
        _console().print(speed_table(named))
    return 0


def _import_diffrate(parsed: argparse.Namespace) -> int:
    schedule = load_diffrate(parsed.file, parsed.model, parsed.target)
    output = parsed.output or Path(f"diffrate-{parsed.model}-{parsed.target}.yaml".lower().replace("/", "-"))
    _check_output(output)
    origin = {"diffrate": parsed.file.name, "model": parsed.model, "target": parsed.target}
    save_schedule(schedule, output, made_by=origin)
    next_ = f"Next: prunesearch check {shlex.quote(str(output))} --model NAME"
    _print(f"{len(schedule.stages)} stages -> {output}", next_)
    return 0


def _import_tune(parsed: argparse.Namespace) -> int:
    from prunesearch.tune.results import import_results

    config = load_study(parsed.file, parsed.set)
    _check_folder(parsed.output)
    folder = parsed.output / config.name
    imported = import_results(parsed.results, config, folder, storage=parsed.storage)
    where = _again(parsed, folder, config.name)
    _print(f"{counted(imported, 'new candidate')} -> {where}", f"Next: prunesearch front {where}")
    return 0


def _list(parsed: argparse.Namespace) -> int:
    from prunesearch.report import catalogue

    import_plugins(parsed.plugin)
    console = _console()
    if not console.is_terminal:
        console.width = WIDE  # a row for each name, for grep
    console.print(catalogue.table(parsed.what, parsed.pattern))
    return 0


def _schema(parsed: argparse.Namespace) -> int:
    print(json.dumps(json_schema(StudyConfig if parsed.what == "study" else ScheduleFile), indent=2))
    return 0


# --- what verbs share --------------------------------------------------------------------------------------------


def _open(parsed: argparse.Namespace) -> StudyReader:
    from prunesearch.study.reader import open_study_readonly

    if parsed.storage is None and parsed.folder is None:
        raise UserError("no study given. Possible: a study folder, or --storage URL --study NAME. Name one.")
    return open_study_readonly(parsed.folder, storage=parsed.storage, name=parsed.study)


def _records(reader: StudyReader) -> list[Record]:
    """The candidates of a study. Prints a note if some could not be read."""
    records = reader.records()
    if reader.unreadable:
        count = len(reader.unreadable)
        numbers = ", ".join(map(str, sorted(reader.unreadable)))
        _say(f"{counted(count, 'trial')} could not be read and {'are' if count > 1 else 'is'} left out: {numbers}")
    return records


def _again(parsed: argparse.Namespace, folder: Path, name: str) -> str:
    """The arguments that name a study, quoted for a shell, with *** for a password."""
    from prunesearch.study.storage import shown

    if not parsed.storage:
        return shlex.quote(str(_short_path(folder)))
    url = shown(parsed.storage)
    hint = "" if url == parsed.storage else "   (*** is your password)"
    return f"--storage {shlex.quote(url)} --study {shlex.quote(name)}{hint}"


def _short_path(path: Path) -> Path:
    """The path relative to the working directory if it is inside; absolute if it would look like an option."""
    short = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return Path.cwd() / short if str(short).startswith("-") else short


def _trusted(parsed: argparse.Namespace, named: Sequence[str], where: str) -> tuple[str, ...]:
    """The plug-ins to import: those that a file or study names, and those of --plugin.

    Raises StudyError for a named plug-in that the user did not allow with --plugin or --trust-plugins. where: the file
    or study, for the message.
    """
    unknown = [name for name in named if name not in parsed.plugin]
    if unknown and not parsed.trust_plugins:
        flags = " ".join(f"--plugin {name}" for name in unknown)
        raise StudyError(
            f"{where}: it names plug-ins, whose code would run here: {', '.join(unknown)}. Possible, if it comes from "
            f"somebody you trust: --trust-plugins, or {flags}. Give one of them."
        )
    return all_plugins(named, parsed.plugin)


def _with_plugins(parsed: argparse.Namespace, stored: Sequence[str], config: StudyConfig) -> StudyConfig:
    """Add the plug-ins of the command line to a study that was read from a storage.

    Raises StudyError when the user does not trust the plug-ins of the study.
    """
    own = [name for name in config.plugins if name in stored]  # the rest come from --set and are trusted
    return replace(config, plugins=all_plugins(config.plugins, _trusted(parsed, own, f"study {config.name}")))


def _check_output(path: Path | None) -> None:
    """Raise UserError early, before the work, for an output file that cannot be written."""
    if path is not None:
        refuse_no_file(path)
        _check_folder(path.absolute().parent)


def _check_folder(folder: Path) -> None:
    """Raise UserError for a folder that cannot be created or written to."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is a file. Possible: a folder, which is made if needed. Change the path.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: nothing can be written to {there}. Possible: a folder of yours. Change the path.")


def _console() -> Console:
    from prunesearch.report.terminal import PlainConsole

    return PlainConsole()


def _print(*lines: str, file: TextIO | None = None) -> None:
    """Print lines that contain names or paths, with line breaks and control characters escaped."""
    for text in lines:
        print(printable(text), file=file)


def _say(text: str) -> None:
    _print(f"note: {text}", file=sys.stderr)


def _complain(text: str) -> None:
    """Print an error message. Its further lines are indented, so that they cannot be taken for new messages."""
    indented = re.sub(r"\n(?=\S)", "\n  ", printable(f"prunesearch: {text}", lines=True))
    print(indented, file=sys.stderr)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


# --- parsing -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prunesearch",
        description="Search token-pruning schedules for Vision Transformers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prunesearch {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of expected errors too")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(verb=function)
        return added

    run = verb("run", _run, "start a search, or continue it where it was")
    run.add_argument("file", type=Path, help="study file")
    run.add_argument(
        "--storage",
        metavar="URL",
        help="any Optuna database, which several drivers may join, or journal:FILE; default OUTPUT/NAME/study.db",
    )
    _search_arguments(run)

    resume = verb("resume", _resume, "continue a study without its file: what it stores of itself is enough")
    _study_arguments(resume)
    _search_arguments(resume)
    _plugin_arguments(resume)

    confirm = verb("confirm", _confirm, "measure the final front again, with fresh seeds and on test images if given")
    _study_arguments(confirm)
    _plugin_arguments(confirm)
    confirm.add_argument(
        "--seeds", type=_whole("--seeds", 1), metavar="N", help=f"default the study's own, else {CONFIRM_SEEDS}"
    )
    confirm.add_argument("--set", action="append", default=[], metavar="a.b=c", help="such as data.test_root=FOLDER")
    confirm.add_argument("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where study folders go")
    confirm.add_argument("--no-progress", action="store_true", help="plain lines instead of the live view")

    check = verb("check", _check, "check a study or schedule file and report its mistakes")
    check.add_argument("file", type=Path)
    check.add_argument("--set", action="append", default=[], metavar="a.b=c", help="replace a value of the file")
    _plugin_arguments(check)
    check.add_argument("--deep", action="store_true", help="of a study: open weights and data too, as run does")
    check.add_argument("--model", metavar="NAME", help="check a schedule against this timm model")
    check.add_argument("--profile", type=Path, metavar="FILE.json", help="of a schedule: what it takes by this profile")

    sensitivity = verb("sensitivity", _sensitivity, "what each stage alone does to the model's outputs, untrained")
    sensitivity.add_argument("file", type=Path, help="study file")
    sensitivity.add_argument(
        "--images", type=_whole("--images", 1), metavar="N", help="training images to measure on; default 256"
    )
    sensitivity.add_argument("--set", action="append", default=[], metavar="a.b=c", help="replace a value of the file")
    sensitivity.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it")
    sensitivity.add_argument("--json", action="store_true", help="as JSON, with the predicted schedules")
    sensitivity.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="also write the table to a file")

    the_studys = "default that of the study's device"
    profile = verb("profile", _profile, "what the parts of a model take on this device, and what can be gained here")
    profile.add_argument("model", metavar="MODEL|STUDY.yaml", help="timm model name, or a study file")
    profile.add_argument("--runtime", help=f"torch, compile, onnxruntime or openvino; {the_studys}, or torch")
    profile.add_argument("--batch", type=_batches, metavar="N,N", help=f"images in a batch; {the_studys}, or 1,16")
    profile.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    profile.add_argument(
        "--threads", type=_whole("--threads", 1), metavar="N", help=f"CPU threads; {the_studys}, or all cores"
    )
    profile.add_argument("--precision", help=f"float32, bfloat16 or float16; {the_studys}, or float32")
    profile.add_argument(
        "--seconds",
        type=_above_zero("--seconds", 86_400),
        metavar="S",
        help=f"of measuring, for all batches; {the_studys}, or 60",
    )
    profile.add_argument(
        "--verb", dest="verb_name", action="append", default=[], metavar="NAME", help="this verb only; may be repeated"
    )
    profile.add_argument(
        "--score", action="append", default=[], metavar="NAME", help="this score only; may be repeated"
    )
    profile.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="replace a value of the study file"
    )
    profile.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it")
    form = profile.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON instead of words")
    form.add_argument("--brief", action="store_true", help="one line for each batch size")
    profile.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="also write the profile to a file")

    head = verb(
        "train-head", _train_head, "train the head of a study's model for segmentation, once, before its search"
    )
    head.add_argument("file", type=Path, help="study file, with head and num_classes under model")
    head.add_argument(
        "--images", type=_whole("--images", 1), default=20_000, metavar="N", help="pictures; default 20000"
    )
    head.add_argument(
        "--learning-rate",
        type=_above_zero("--learning-rate", 10),
        default=1e-3,
        metavar="X",
        help="peak; default 0.001",
    )
    head.add_argument("--batch-size", type=_whole("--batch-size", 1), default=32, metavar="N", help="default 32")
    head.add_argument("--set", action="append", default=[], metavar="a.b=c", help="replace a value of the study file")
    head.add_argument(
        "-o", "--output", type=Path, default=Path("dense.safetensors"), metavar="FILE", help="default dense.safetensors"
    )

    status = verb("status", _status, "how far a study is; works while it runs")
    _study_arguments(status)
    status.add_argument("--json", action="store_true", help="counts as JSON")

    show = verb("front", _front, "the Pareto front so far; works while a search runs")
    _study_arguments(show)
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON, schedules included")
    form.add_argument("--csv", action="store_true", help="as CSV")
    show.add_argument("--within", **_drop_options("--within", "only what loses at most v of metric m against dense"))
    show.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it")

    export = verb("export", _export, "write one schedule of a study for apply_schedule, ONNX Runtime or OpenVINO")
    _study_arguments(
        export,
        "study folder, for example outputs/digits; with --onnx or --openvino a schedule file too",
        "name of the study in the storage; with a schedule file, a study folder: with its model and data",
    )
    text = "schedule file for apply_schedule; default best.yaml, none with --onnx or --openvino"
    export.add_argument("-o", "--output", type=Path, metavar="FILE.yaml", help=text)
    which = export.add_mutually_exclusive_group()
    which.add_argument("--trial", type=_whole("--trial", 0), metavar="N", help="this trial")
    which.add_argument("--knee", action="store_true", help="the bend of the front (the default)")
    text = "the cheapest that loses at most v of metric m against dense"
    which.add_argument("--fastest-within", **_drop_options("--fastest-within", text))
    for flag, words in (("--at-most", "at most"), ("--at-least", "at least")):
        text = f"best with metric m {words} v, a number or a share of dense such as 70%%"
        export.add_argument(flag, type=_bound(flag), action="append", default=[], metavar="m=v", help=text)
    export.add_argument("--weights", action="store_true", help="the fine-tuned weights too, as safetensors")
    files = export.add_argument_group("files for production, checked against PyTorch and timed beside the dense model")
    files.add_argument("--onnx", type=Path, metavar="FILE.onnx", help="model and schedule for ONNX Runtime")
    files.add_argument("--openvino", type=Path, metavar="FILE.xml", help="the same for OpenVINO, with a .bin beside it")
    files.add_argument("--half", action="store_true", help="fp16 weights and activations; input and output are float32")
    _override_arguments(files, "instead of the study's or file's, pretrained")
    _plugin_arguments(files)

    again = verb("evaluate", _evaluate, "measure a schedule file again, beside the dense model")
    _source_arguments(again)
    default = "default top1 (feature_similarity, miou, agreement), gmacs, throughput"
    again.add_argument("--metric", action="append", default=[], metavar="NAME", help=default)
    again.add_argument("--speed", action="store_true", help="time it in turns with the dense model, as a ratio")
    text = "say what it predicts; with --speed: time it as this was measured; default the study's profile"
    again.add_argument("--profile", type=Path, metavar="FILE.json", help=text)
    text = f"with --speed: of timing, for each profile; default {SPEED_SECONDS:g}"
    again.add_argument("--seconds", type=_above_zero("--seconds", 86_400), metavar="S", help=text)
    again.add_argument("--json", action="store_true", help="as JSON")

    fix = verb("freeze", _freeze, "turn the thresholds of a schedule file into fixed counts")
    _source_arguments(fix)
    fix.add_argument(
        "--images", type=_whole("--images", 1), default=1024, metavar="N", help="training images to count on"
    )
    fix.add_argument(
        "-o", "--output", type=Path, default=Path("frozen.yaml"), metavar="FILE", help="default frozen.yaml"
    )

    diffrate = verb("import-diffrate", _import_diffrate, "make a schedule file from DiffRate's compression_rate.json")
    diffrate.add_argument("file", type=Path, help="DiffRate's compression_rate.json")
    diffrate.add_argument("--model", required=True, metavar="NAME", help="as in the file, for example ViT-S-DeiT")
    diffrate.add_argument("--target", required=True, metavar="GMACS", help="as in the file, for example 2.9")
    diffrate.add_argument("-o", "--output", type=Path, metavar="FILE", help="default diffrate-MODEL-TARGET.yaml")

    from_tune = verb("import-tune", _import_tune, "put the trials of a Ray Tune experiment into a study")
    from_tune.add_argument("results", type=Path, help="folder of the experiment (storage_path/name)")
    from_tune.add_argument("file", type=Path, help="study file")
    from_tune.add_argument("--set", action="append", default=[], metavar="a.b=c", help="replace a value of the file")
    from_tune.add_argument("--storage", metavar="URL", help="of the study; default OUTPUT/NAME/study.db")
    from_tune.add_argument("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where study folders go")

    listing = verb("list", _list, "what there is to choose from")
    kinds = ["scores", "reduces", "presets", "recipes", "models", "metrics", "samplers", "spaces"]
    listing.add_argument("what", choices=kinds)
    listing.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="with what this one registers")
    listing.add_argument("pattern", nargs="?", default="*", help="only names like this, for example 'deit*'")

    schema = verb("schema", _schema, "JSON schema of a file, for editors")
    schema.add_argument("what", choices=["study", "schedule"], nargs="?", default="study")
    return parser


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trials", type=_whole("--trials", 1), metavar="N", help="candidates in the whole study (stop.trials)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="replace a value of the study file")
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where study folders go")
    parser.add_argument("--no-progress", action="store_true", help="plain lines instead of the live view")


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="schedule file")
    parser.add_argument(
        "--study", dest="study_folder", type=Path, metavar="FOLDER", help="with this study's model and data"
    )
    _override_arguments(parser, "with this timm model, pretrained, if the file has another")
    _plugin_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")


def _override_arguments(parser: argparse._ActionsContainer, model: str) -> None:
    parser.add_argument("--model", metavar="NAME", help=model)
    parser.add_argument("--data", metavar="NAME", help='"digits", "folder", torch/..., hfds/..., wds/...')
    parser.add_argument("--root", metavar="PATH", help="root of the data")
    parser.add_argument("--val-root", metavar="PATH", help="root of the validation data, when it is elsewhere")
    text = "replace a value of its model or data, such as data.crop_pct=0.9"
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help=text)


def _plugin_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--trust-plugins", action="store_true", help="import the plug-ins that the study or file names")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="import this one; may be repeated"
    )


def _whole(flag: str, low: int) -> Callable[[str], int]:
    """An argparse type for whole numbers of at least `low`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII) or int(text) < low:
            raise UserError(f"{flag} {text}: possible: a whole number from {low}. Correct it.")
        return int(text)

    return parse


def _batches(text: str) -> tuple[int, ...]:
    """An argparse type for batch sizes."""
    parse = _whole("--batch", 1)
    return tuple(dict.fromkeys(parse(part) for part in text.split(",")))


def _above_zero(flag: str, most: int) -> Callable[[str], float]:
    """An argparse type for a number above 0, up to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            raise UserError(f"{flag} {text}: possible: above 0, up to {most}. Correct it.")
        return value

    return read


def _bound(flag: str) -> Callable[[str], tuple[str, float | str]]:
    """An argparse type for metric=number or metric=share, a share of the dense model's value."""

    def parse(text: str) -> tuple[str, float | str]:
        name, _, bound = text.partition("=")
        if name and re.fullmatch(SHARE, bound) and float(bound.rstrip("% ")) > 0:
            return name, bound
        return _metric_and_number(flag, text, "metric=number or metric=share", "gmacs=3.0 or gmacs=70%")

    return parse


def _drop_options(flag: str, text: str) -> dict[str, Any]:
    """What argparse needs for a flag that takes metric=drop, where a drop is a number from 0."""

    def parse(given: str) -> tuple[str, float]:
        name, drop = _metric_and_number(flag, given, "metric=number from 0", "top1=1.0")
        if drop < 0:
            raise UserError(f"{flag} {given}: possible: metric=number from 0. Write for example {flag} top1=1.0.")
        return name, drop

    return {"type": parse, "action": "append", "default": [], "metavar": "m=v", "help": text}


def _metric_and_number(flag: str, text: str, possible: str, example: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise UserError(f"{flag} {text}: possible: {possible}. Write for example {flag} {example}.")
    return name, value


def _study_arguments(
    parser: argparse.ArgumentParser,
    folder: str = "study folder, for example outputs/digits",
    study: str = "name of the study in the storage",
) -> None:
    parser.add_argument("folder", type=Path, nargs="?", help=folder)
    parser.add_argument("--storage", metavar="URL", help="the study is in this storage")
    parser.add_argument("--study", metavar="NAME", help=study)
