"""The `prunesearch` command: a verb parses, calls one function, prints.

Heavy imports are inside the verbs, so that `--help` is instant and a verb loads only what it needs.
Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted (everything is saved).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prunesearch import __version__
from prunesearch.errors import PruneSearchError, StudyError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from prunesearch.config import DataConfig, ModelConfig, StudyConfig
    from prunesearch.cost import Cost
    from prunesearch.schedule import Schedule
    from prunesearch.search.record import Record
    from prunesearch.search.study import StudyReader

EXAMPLES = """\
examples:
  prunesearch run search_spaces/digits.yaml                         start or continue a search
  prunesearch front outputs/digits --plot front.png                 the Pareto front so far
  prunesearch export outputs/digits --at-most gmacs=0.009 -o best.yaml

then, in your own script:
  apply_schedule(model, load_schedule("best.yaml"))                 from prunesearch import ...
"""

INTERRUPTED = 130
CONFIRM_SEEDS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.verb(parsed) or 0)
    except PruneSearchError as error:
        if parsed.debug:
            raise
        print(f"prunesearch: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("prunesearch: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `prunesearch list models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a path that cannot be written, a full disk
        if parsed.debug or error.filename is None:
            raise
        print(
            f"prunesearch: {error.filename}: {error.strerror}. Possible: a file in a folder that can be written, on a "
            f"disk with space. Check the path; what a study has finished is safe.",
            file=sys.stderr,
        )
        return 1


# --- verbs -------------------------------------------------------------------------------------------------------


def _run(parsed: argparse.Namespace) -> int:
    from prunesearch.files import load_study

    config = load_study(parsed.file, _overrides(parsed))
    return _search(config, parsed.output / config.name, parsed)


def _resume(parsed: argparse.Namespace) -> int:
    from prunesearch.files import override_study

    reader = _open(parsed)
    reader.close()
    config = override_study(reader.config, _overrides(parsed))
    return _search(config, parsed.folder or parsed.output / config.name, parsed)


def _confirm(parsed: argparse.Namespace) -> int:
    from prunesearch.files import override_study

    reader = _open(parsed)
    reader.close()
    seeds = parsed.seeds or reader.config.confirm.seeds or CONFIRM_SEEDS
    config = override_study(reader.config, [*parsed.set, f"confirm.seeds={seeds}"])
    return _search(config, parsed.folder or parsed.output / config.name, parsed, search=False)


def _overrides(parsed: argparse.Namespace) -> list[str]:
    return parsed.set + ([] if parsed.trials is None else [f"stop.trials={parsed.trials}"])


def _search(config: StudyConfig, folder: Path, parsed: argparse.Namespace, search: bool = True) -> int:
    from prunesearch.report import LiveReport
    from prunesearch.search.driver import run_study

    where = parsed.storage or folder
    with LiveReport(config, str(where), console=_console(), plain=parsed.no_progress) as report:
        done = run_study(config, folder, storage=parsed.storage, on_event=report, search=search)
    if done.complete:
        print(f"Next: prunesearch front {_again(parsed, folder, config.name)}")
    return INTERRUPTED if done.reason in ("interrupted", "cancelled") else 0


def _check(parsed: argparse.Namespace) -> int:
    from prunesearch.config import StudyConfig
    from prunesearch.files import load_any

    content = load_any(parsed.file, parsed.set)
    if isinstance(content, StudyConfig):
        return _check_study(content)
    return _check_schedule(parsed)


def _check_study(config: StudyConfig) -> int:
    import importlib

    from prunesearch.cost import estimate_cost
    from prunesearch.errors import FileError
    from prunesearch.evaluate import is_remote, model_shape
    from prunesearch.evaluate.sensitivity import stages_of
    from prunesearch.search.problems import anchors_of, model_free_problems, study_problems
    from prunesearch.search.sensitivity_start import STARTS, WORD
    from prunesearch.space import combinations, dimensions

    for plugin in config.plugins:
        importlib.import_module(plugin)
    remote = is_remote(config.model)  # looking it up needs the network, which is left to the run
    problems = model_free_problems(config) if remote else study_problems(config)
    if problems:
        raise FileError(f"study {config.name}", problems)
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
    print(f"{config.name}: fine. {len(dimensions(config.space))} parameters, {size}.")
    for origin, schedule in anchors_of(config, shape):
        cost = estimate_cost(shape, schedule)
        print(f"  {origin.removeprefix('start: '):<20} {_cost_in_words(schedule, cost)}")
    if WORD in config.space.start_from:
        stages, _ = stages_of(config.space, shape)
        print(f"  {WORD:<20} up to {STARTS} schedules, predicted from {len(stages)} stages that the run measures first")
    return 0


def _sensitivity(parsed: argparse.Namespace) -> int:
    import importlib

    from prunesearch.cost import estimate_cost
    from prunesearch.errors import FileError
    from prunesearch.evaluate import model_shape
    from prunesearch.evaluate.sensitivity import IMAGES, measure_sensitivities, save_sensitivities
    from prunesearch.files import load_study
    from prunesearch.plot_sensitivity import plot_sensitivity
    from prunesearch.report import predicted_table, sensitivity_table
    from prunesearch.search.problems import study_problems
    from prunesearch.search.sensitivity_start import predicted_starts
    from prunesearch.strict import to_mapping

    config = load_study(parsed.file, parsed.set)
    for plugin in config.plugins:
        importlib.import_module(plugin)
    problems = study_problems(config)
    if problems:
        raise FileError(f"study {config.name}", problems)
    if parsed.images is not None and parsed.images < 1:
        raise UserError(f"--images {parsed.images}: possible: from 1; {IMAGES} are the default. Correct it.")
    found = measure_sensitivities(config, parsed.images or IMAGES)
    shape = model_shape(config.model)
    starts = predicted_starts(config, shape, found)
    if parsed.json:
        print(json.dumps({**to_mapping(found), "predicted": to_mapping(starts)}, indent=2))
    else:
        _console().print(sensitivity_table(found))
        _console().print(predicted_table(starts, estimate_cost(shape).gmacs))
    if parsed.output is not None:
        save_sensitivities(found, parsed.output)
        print(f"Table: {parsed.output}", file=sys.stderr)
    if parsed.plot is not None:
        plot_sensitivity(found, parsed.plot)
        print(f"Plot: {parsed.plot}", file=sys.stderr)
    return 0


def _check_schedule(parsed: argparse.Namespace) -> int:
    from prunesearch.config import ModelConfig
    from prunesearch.cost import estimate_cost
    from prunesearch.evaluate import is_remote, model_problems, model_shape
    from prunesearch.files import load_schedule_file
    from prunesearch.strict import from_mapping

    file = load_schedule_file(parsed.file)
    schedule = file.schedule
    if parsed.model is not None:
        model = ModelConfig(parsed.model)
    elif file.model is not None:
        model = from_mapping(ModelConfig, file.model, f"{parsed.file}: model")
    else:
        print(f"{parsed.file}: fine in itself ({schedule}). Give --model NAME to check it against a model.")
        return 0
    if is_remote(model) and not model_problems(model):  # looking it up needs the network
        print(f"{parsed.file}: fine in itself ({schedule}). What {model.name} is, is looked up when it is evaluated.")
        return 0
    cost, dense = estimate_cost(model_shape(model), schedule), estimate_cost(model_shape(model))
    print(f"{parsed.file}: fine for {model.name}. {schedule}")
    print(f"  {_cost_in_words(schedule, cost)}; the dense model costs {dense.gmacs:.5g}")
    if not schedule.is_adaptive:
        print(f"  tokens after each block: {', '.join(map(str, cost.tokens))}")
    return 0


def _cost_in_words(schedule: Schedule, cost: Cost) -> str:
    if not schedule.is_adaptive:
        return f"{cost.gmacs:.5g} GMACs, {cost.tokens[-1]} tokens at the end"
    if schedule.target_gmacs is not None:
        return f"{schedule.target_gmacs:.5g} GMACs on average, which its thresholds are trained for"
    return f"at most {cost.gmacs:.5g} GMACs; with thresholds it depends on the images"


def _status(parsed: argparse.Namespace) -> int:
    from prunesearch.report import status_view

    reader = _open(parsed)
    records = reader.records()
    if parsed.json:
        states = [record.state for record in records]
        print(
            json.dumps({"study": reader.config.name, **{state: states.count(state) for state in sorted(set(states))}})
        )
    else:
        _console().print(status_view(records, reader.config))
    return 0


def _front(parsed: argparse.Namespace) -> int:
    from prunesearch.front import front, front_rows
    from prunesearch.plot import plot_front
    from prunesearch.report import front_csv, front_table

    reader = _open(parsed)
    config, records = reader.config, reader.records()
    found = front(records, config.objectives, config.limits)
    if parsed.json:
        print(json.dumps(front_rows(found, config.objectives), indent=2))
    elif parsed.csv:
        print(front_csv(found, config.objectives), end="")
    elif not found:
        print(f"{config.name}: nothing on the front yet ({len(records)} candidates so far). Look again later.")
        return 0
    else:
        _console().print(front_table(found, config.objectives, records))
    if parsed.plot is not None:
        plot_front(records, config.objectives, parsed.plot, limits=config.limits, title=config.name)
        print(f"Plot: {parsed.plot}", file=sys.stderr)
    return 0


def _export(parsed: argparse.Namespace) -> int:
    from prunesearch.export import export
    from prunesearch.report import short

    reader = _open(parsed)
    record = _choose(parsed, reader.config, reader.records())
    written = export(record, reader.config, parsed.output, weights=parsed.weights, say=_say)
    evaluation = record.evaluation
    assert evaluation is not None  # export refuses those without
    values = ", ".join(f"{name} {value:.5g}" for name, value in evaluation.metrics)
    print(f"Trial {record.number}: {short(record.outcome)}\n  {values}\n  -> {', '.join(map(str, written))}")
    if evaluation.images and not parsed.weights:
        _say(f"measured after a fine-tune of {evaluation.images} images; --weights takes those weights along")
    return 0


def _choose(parsed: argparse.Namespace, config: StudyConfig, records: list[Record]) -> Record:
    from prunesearch.front import best, front, knee

    if parsed.trial is not None:
        for record in records:
            if record.number == parsed.trial:
                return record
        last = max((record.number for record in records), default=None)
        possible = "none yet" if last is None else f"0 to {last}"
        raise StudyError(f"--trial {parsed.trial}: there is no such trial. Possible: {possible}. Choose one of them.")
    if parsed.at_most or parsed.at_least:
        return best(records, config.objectives, _bounds(parsed.at_most), _bounds(parsed.at_least), config.limits)
    return knee(front(records, config.objectives, config.limits), config.objectives)


def _bounds(texts: Sequence[str]) -> dict[str, float]:
    bounds = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            bounds[name] = float(number)
        except ValueError:
            raise UserError(f"{text!r} is not of the form metric=number. Write for example gmacs=3.0.") from None
    return bounds


def _sources(parsed: argparse.Namespace) -> tuple[StudyConfig | None, ModelConfig | None, DataConfig | None]:
    """Study, model and data that the arguments name."""
    from prunesearch.config import DataConfig, ModelConfig

    study = None
    if parsed.study_folder is not None:
        from prunesearch.search.study import open_study_readonly

        study = open_study_readonly(parsed.study_folder).config
    model = None if parsed.model is None else ModelConfig(parsed.model, pretrained=True)
    data = None if parsed.data is None else DataConfig(parsed.data, root=parsed.root, val_root=parsed.val_root)
    return study, model, data


def _freeze(parsed: argparse.Namespace) -> int:
    from prunesearch.export import model_and_data
    from prunesearch.files import load_schedule_file
    from prunesearch.freeze import freeze

    file = load_schedule_file(parsed.file)
    model, data = model_and_data(file, *_sources(parsed))
    frozen = freeze(
        file,
        parsed.file.parent,
        parsed.output,
        model=model,
        data=data,
        images=parsed.images,
        device=parsed.device,
    )
    print(f"{', '.join(map(str, frozen.files))}: {frozen.schedule}")
    print(f"  {frozen.gmacs:.5g} GMACs for every image; with thresholds {frozen.adaptive_gmacs:.5g} on average")
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    from prunesearch.evaluate import METRICS
    from prunesearch.export import COMPARED, measure_again
    from prunesearch.files import load_schedule_file
    from prunesearch.report import comparison_table

    study, model, data = _sources(parsed)
    metrics = tuple(parsed.metric) or COMPARED
    for name in metrics:
        METRICS[name]  # an unknown one is said before anything is loaded
    dense, pruned = measure_again(
        load_schedule_file(parsed.file),
        Path(parsed.file).parent,
        study=study,
        model=model,
        data=data,
        metrics=metrics,
        device=parsed.device,
    )
    if parsed.json:
        print(json.dumps({"dense": dict(dense.metrics), "pruned": dict(pruned.metrics)}, indent=2))
    else:
        _console().print(comparison_table(dense, pruned))
    return 0


def _import_diffrate(parsed: argparse.Namespace) -> int:
    from prunesearch.files import save_schedule
    from prunesearch.presets.diffrate import load_diffrate

    schedule = load_diffrate(parsed.file, parsed.model, parsed.target)
    output = parsed.output or Path(f"diffrate-{parsed.model}-{parsed.target}.yaml".lower().replace("/", "-"))
    origin = {"diffrate": parsed.file.name, "model": parsed.model, "target": parsed.target}
    save_schedule(schedule, output, made_by=origin)
    print(f"{len(schedule.stages)} stages -> {output}\nNext: prunesearch check {output} --model NAME")
    return 0


def _import_tune(parsed: argparse.Namespace) -> int:
    from prunesearch.files import load_study
    from prunesearch.search.tune_results import import_results

    config = load_study(parsed.file, parsed.set)
    folder = parsed.output / config.name
    imported = import_results(parsed.results, config, folder, storage=parsed.storage)
    where = _again(parsed, folder, config.name)
    print(f"{imported} new candidate{'s' * (imported != 1)} -> {where}\nNext: prunesearch front {where}")
    return 0


def _list(parsed: argparse.Namespace) -> int:
    from prunesearch import catalogue

    console = _console()
    console.print(catalogue.table(parsed.what, parsed.pattern))
    return 0


def _schema(parsed: argparse.Namespace) -> int:
    from prunesearch.config import StudyConfig
    from prunesearch.files import ScheduleFile
    from prunesearch.json_schema import json_schema

    print(json.dumps(json_schema(StudyConfig if parsed.what == "study" else ScheduleFile), indent=2))
    return 0


# --- what verbs share --------------------------------------------------------------------------------------------


def _open(parsed: argparse.Namespace) -> StudyReader:
    from prunesearch.search.study import open_study_readonly

    if parsed.storage is None and parsed.folder is None:
        raise UserError("no study given. Possible: a study folder, or --storage URL --study NAME. Name one.")
    return open_study_readonly(parsed.folder, storage=parsed.storage, name=parsed.study)


def _again(parsed: argparse.Namespace, folder: Path, name: str) -> str:
    return f"--storage {parsed.storage} --study {name}" if parsed.storage else str(_short_path(folder))


def _short_path(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


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

    confirm = verb("confirm", _confirm, "measure the final front again, with fresh seeds and on test images if given")
    _study_arguments(confirm)
    confirm.add_argument("--seeds", type=int, metavar="N", help=f"default the study's own, else {CONFIRM_SEEDS}")
    confirm.add_argument("--set", action="append", default=[], metavar="a.b=c", help="such as data.test_root=FOLDER")
    confirm.add_argument("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where study folders go")
    confirm.add_argument("--no-progress", action="store_true", help="plain lines instead of the live view")

    check = verb("check", _check, "check a study or schedule file and report every mistake at once")
    check.add_argument("file", type=Path)
    check.add_argument("--set", action="append", default=[], metavar="a.b=c", help="replace a value of a study file")
    check.add_argument("--model", metavar="NAME", help="check a schedule against this timm model")

    sensitivity = verb("sensitivity", _sensitivity, "what each stage alone does to the model's outputs, untrained")
    sensitivity.add_argument("file", type=Path, help="study file")
    sensitivity.add_argument("--images", type=int, metavar="N", help="training images to measure on; default 256")
    sensitivity.add_argument("--set", action="append", default=[], metavar="a.b=c", help="replace a value of the file")
    sensitivity.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it")
    sensitivity.add_argument("--json", action="store_true", help="as JSON, with the predicted schedules")
    sensitivity.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="also write the table to a file")

    status = verb("status", _status, "how far a study is; works while it runs")
    _study_arguments(status)
    status.add_argument("--json", action="store_true", help="counts as JSON")

    show = verb("front", _front, "the Pareto front so far; works while a search runs")
    _study_arguments(show)
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON, schedules included")
    form.add_argument("--csv", action="store_true", help="as CSV")
    show.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it")

    export = verb("export", _export, "write one schedule of a study to a file that apply_schedule takes")
    _study_arguments(export)
    export.add_argument(
        "-o", "--output", type=Path, default=Path("best.yaml"), metavar="FILE", help="default best.yaml"
    )
    export.add_argument("--trial", type=int, metavar="N", help="this trial")
    export.add_argument("--knee", action="store_true", help="the bend of the front (the default)")
    export.add_argument("--at-most", action="append", default=[], metavar="m=v", help="best with metric m at most v")
    export.add_argument("--at-least", action="append", default=[], metavar="m=v", help="best with metric m at least v")
    export.add_argument("--weights", action="store_true", help="the fine-tuned weights too, as safetensors")

    again = verb("evaluate", _evaluate, "measure a schedule file again, beside the dense model")
    _source_arguments(again)
    again.add_argument("--metric", action="append", default=[], metavar="NAME", help="default top1, gmacs, throughput")
    again.add_argument("--json", action="store_true", help="as JSON")

    fix = verb("freeze", _freeze, "turn the thresholds of a schedule file into fixed counts")
    _source_arguments(fix)
    fix.add_argument("--images", type=int, default=1024, metavar="N", help="training images to count on")
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
    kinds = ["scores", "reduces", "presets", "models", "metrics", "samplers", "spaces"]
    listing.add_argument("what", choices=kinds)
    listing.add_argument("pattern", nargs="?", default="*", help="only names like this, for example 'deit*'")

    schema = verb("schema", _schema, "JSON schema of a file, for editors")
    schema.add_argument("what", choices=["study", "schedule"], nargs="?", default="study")
    return parser


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, metavar="N", help="candidates in the whole study (stop.trials)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="replace a value of the study file")
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where study folders go")
    parser.add_argument("--no-progress", action="store_true", help="plain lines instead of the live view")


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="schedule file")
    parser.add_argument(
        "--study", dest="study_folder", type=Path, metavar="FOLDER", help="with this study's model and data"
    )
    parser.add_argument("--model", metavar="NAME", help="with this timm model, pretrained")
    parser.add_argument("--data", metavar="NAME", help='"digits", "folder", torch/..., hfds/..., wds/...')
    parser.add_argument("--root", metavar="PATH", help="root of the data")
    parser.add_argument("--val-root", metavar="PATH", help="root of the validation data, when it is elsewhere")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", help="study folder, for example outputs/digits")
    parser.add_argument("--storage", metavar="URL", help="the study is in this storage")
    parser.add_argument("--study", metavar="NAME", help="name of the study in the storage")
