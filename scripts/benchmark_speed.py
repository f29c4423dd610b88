#!/usr/bin/env python
"""How much of a cut in MACs becomes speed: presets and searched schedules by runtime and batch, with the authors' code.

    git clone https://github.com/facebookresearch/ToMe          # wherever you like
    git clone https://github.com/youweiliang/evit
    python scripts/benchmark_speed.py --tome ToMe --evit evit --schedules best.yaml --out benchmarks/speed.md

A cell is a model in a runtime at a batch size. All its schedules, the dense model and the authors' code are timed in
turns. What was measured is kept in a file (--cells) after each cell: an interrupted run goes on where it was, and the
page is written anew. A schedule that cannot be exported, or that fails in a runtime, is named in the page.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from official import official_evit, official_tome
from torch import Tensor, nn

from prunesearch.config import ModelConfig
from prunesearch.cost import estimate_cost
from prunesearch.device.profiles import processor
from prunesearch.device.runtimes import DTYPES, RUNTIMES, Run, Settings, prepare, runtime_of, threads_set
from prunesearch.device.timing import in_turns
from prunesearch.errors import ScheduleError, UserError
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.machine import find_device, versions
from prunesearch.evaluate.shapes import model_shape
from prunesearch.evaluate.speed import synchronise
from prunesearch.export.sources import model_and_data
from prunesearch.files import load_schedule_file, write_atomically
from prunesearch.models import apply_schedule, input_size
from prunesearch.models.parts import Part, example, sharing_copy
from prunesearch.presets import find_schedule
from prunesearch.printable import counted
from prunesearch.schedule import Schedule, Stage
from prunesearch.shape import ModelShape
from prunesearch.strict import from_mapping, to_mapping

PRESETS = (
    *("evit-0.7", "evit-fuse-0.7", "evit-fuse-0.5", "topk-0.7", "etps-0.7", "dynamicvit-0.7", "dtps-0.7"),
    *("tome-r13", "tome-r16", "patchmerger-8", "diffrate-s-2.9", "diffrate-s-2.3"),
)
THEIRS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "evit-0.7": ("evit", partial(official_evit, keep=0.7, fuse=False)),
    "evit-fuse-0.7": ("evit", partial(official_evit, keep=0.7, fuse=True)),
    "evit-fuse-0.5": ("evit", partial(official_evit, keep=0.5, fuse=True)),
    "tome-r13": ("tome", partial(official_tome, rate=13)),
    "tome-r16": ("tome", partial(official_tome, rate=16)),
}
"""By preset: whose checkout, and the model that it makes of a checkout and a dense model."""
DENSE, EAGER, FLOOR = "dense", "dense, eager", "one patch token"
FLOOR_SCHEDULE = Schedule((Stage(0, at="pre", reduce="pool", score="none", tokens=1),))
"""What a model takes with it hardly depends on tokens: stem, head, and what a block needs for any number of tokens."""
LEAST_EFFICIENCY, LARGE_BATCH = 0.9, 16


@dataclass(frozen=True)
class Time:
    """What one model of a cell takes. gmacs: of an image. error: standard error, a share of ms."""

    name: str
    gmacs: float
    ms: float
    error: float
    theirs: bool = False


@dataclass(frozen=True)
class Failure:
    """What could not be measured, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Setting:
    """Where and how a cell is measured."""

    model: str
    runtime: str
    batch: int
    device: str
    threads: int
    precision: str
    seconds: float
    versions: tuple[tuple[str, str], ...]
    asked: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A measured cell. Times of the dense model come first."""

    setting: Setting
    times: tuple[Time, ...]
    failures: tuple[Failure, ...] = ()

    def find(self, name: str, theirs: bool = False) -> Time | None:
        """The time of this name, if it was measured."""
        return next((time for time in self.times if time.name == name and time.theirs == theirs), None)

    @property
    def schedules(self) -> list[Time]:
        """What has a schedule: ours, and the authors'."""
        return [time for time in self.times if time.name not in (DENSE, EAGER, FLOOR)]


@dataclass(frozen=True)
class Cells:
    """The file of what was measured."""

    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Work:
    """A model with the schedules that it is measured with. has_theirs: the authors' code is measured with it too."""

    config: ModelConfig
    schedules: Mapping[str, Schedule]
    failures: tuple[Failure, ...]
    has_theirs: bool


# --- arithmetic --------------------------------------------------------------------------------------------------


def speed_up(dense: Time, time: Time) -> float:
    """How many times as fast as the dense model."""
    return dense.ms / time.ms


def reduction(dense: Time, time: Time) -> float:
    """How many times fewer MACs than the dense model's."""
    return dense.gmacs / time.gmacs


def efficiency(dense: Time, time: Time) -> float:
    """The share of the cut in MACs that became speed."""
    return speed_up(dense, time) / reduction(dense, time)


def allowed(dense: Time, floor: Time, time: Time) -> float:
    """The efficiency if all that depends on tokens took time as it takes MACs, and a stage took nothing beyond them."""
    share = (time.gmacs - floor.gmacs) / (dense.gmacs - floor.gmacs)
    best = replace(time, ms=floor.ms + share * (dense.ms - floor.ms))
    return efficiency(dense, best)


def ratio(mine: Time, theirs: Time) -> tuple[float, float]:
    """Speed of ours over theirs, and its standard error."""
    value = theirs.ms / mine.ms
    return value, value * math.hypot(mine.error, theirs.error)


def best_runtime(cells: Sequence[Cell], name: str) -> tuple[Cell, Time, Time] | None:
    """The cell where a schedule (or the dense model) gains most over the dense model in eager mode, and both times.

    The two are of one run, so that a drift of the machine's speed between runs does not choose.
    """
    found = []
    for cell in cells:
        eager, time = cell.find(EAGER) or cell.find(DENSE), cell.find(name)
        if eager is not None and time is not None:
            found.append((cell, eager, time))
    return max(found, key=lambda one: speed_up(one[1], one[2]), default=None)


# --- measuring ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse the arguments, measure every cell that is not there yet, and write the page after each."""
    parsed = _parser().parse_args()
    for name in parsed.runtimes:
        runtime_of(name)
    if parsed.precision != "float32" and set(parsed.runtimes) & {name for name, one in RUNTIMES.items() if one.extra}:
        sys.exit(f"--precision {parsed.precision}: the files of a runtime are float32. Name --runtimes torch compile.")
    works = list(works_of(parsed))
    cells = load_cells(parsed.cells)
    warnings.simplefilter("ignore")  # random weights of learned parts
    now: list[Cell] = []
    for work in works:
        for batch in parsed.batches:
            for runtime in parsed.runtimes:
                setting = setting_of(work, runtime, batch, parsed)
                same = (cell for cell in cells if replace(cell.setting, seconds=setting.seconds) == setting)
                cell = next(same, None)
                if cell is None:
                    cell = measure(work, setting, parsed)
                    cells = [*cells, cell]
                    save_cells(cells, parsed.cells)
                    gc.collect()
                now.append(cell)
                print(cell_lines(cell), flush=True)
                parsed.out.parent.mkdir(parents=True, exist_ok=True)
                parsed.out.write_text(page(now, parsed), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_small_patch16_224"], help="timm models")
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), help="measured with each of --models")
    parser.add_argument(
        "--schedules", nargs="*", default=[], help="schedule files; each with the model that it names, else all"
    )
    parser.add_argument("--runtimes", nargs="+", default=["torch", "onnxruntime", "openvino"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tome", type=Path, help="checkout of facebookresearch/ToMe")
    parser.add_argument("--evit", type=Path, help="checkout of youweiliang/evit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=list(DTYPES))
    parser.add_argument("--threads", type=int, help="CPU threads; all cores by default")
    parser.add_argument("--seconds", type=float, default=300.0, help="of measuring, for each cell")
    parser.add_argument("--notes", type=Path, help="Markdown that the page takes over: why goals are missed")
    parser.add_argument("--cells", type=Path, default=Path("outputs/speed.json"), help="what was measured so far")
    parser.add_argument("--out", type=Path, required=True, help="the page")
    return parser


def works_of(parsed: argparse.Namespace) -> Iterator[Work]:
    """The models with their schedules. A file goes to the models of the shape that it names, else to all."""
    files = {path: load_schedule_file(path) for path in parsed.schedules}
    own = {path: model_and_data(file)[0] for path, file in files.items()}
    shapes = {path: None if config is None else model_shape(_untrained(config)) for path, config in own.items()}
    known = [model_shape(ModelConfig(name)) for name in parsed.models]
    for name, shape in zip(parsed.models, known, strict=True):
        fitting = [path for path, of_file in shapes.items() if of_file in (None, shape)]
        yield _work(ModelConfig(name), shape, [*parsed.presets, *fitting], has_theirs=True)
    others = [shape for shape in dict.fromkeys(shapes.values()) if shape is not None and shape not in known]
    for shape in others:
        paths = [path for path, of_file in shapes.items() if of_file == shape]
        config = own[paths[0]]
        assert config is not None  # its shape is known
        yield _work(_untrained(config), shape, paths, has_theirs=False)


def _untrained(config: ModelConfig) -> ModelConfig:
    """The model without its weights: time does not depend on them."""
    return replace(config, pretrained=False, checkpoint=None)


def _work(config: ModelConfig, shape: ModelShape, names: Sequence[str], has_theirs: bool) -> Work:
    schedules, failures = {}, []
    for name in names:
        label = Path(name).stem if name.endswith((".yaml", ".yml")) else name
        try:
            schedule = find_schedule(name, shape)
            estimate_cost(shape, schedule)
        except UserError as error:
            failures.append(Failure(label, first_line(error)))
            continue
        if schedule.is_adaptive:
            failures.append(Failure(label, "it has thresholds. Make fixed counts of them with prunesearch freeze."))
        elif label in schedules:
            raise ScheduleError(name, [f"there is another schedule of the name {label!r}. Rename the file."])
        else:
            schedules[label] = schedule
    return Work(config, schedules, tuple(failures), has_theirs)


def setting_of(work: Work, runtime: str, batch: int, parsed: argparse.Namespace) -> Setting:
    """What a cell must agree in to be taken from the file."""
    device = find_device(parsed.device)
    threads = (parsed.threads or len(os.sched_getaffinity(0))) if device.type == "cpu" else 0
    engine = RUNTIMES[runtime]
    packages = tuple(sorted((*versions(), *(((runtime, engine.version),) if engine.extra else ()))))  # as they are read
    asked = [f"{name}: {schedule}" for name, schedule in work.schedules.items()]
    asked += [f"theirs: {name}" for name in theirs_of(work, runtime, parsed)]
    options = ", ".join(f"{name} {value}" for name, value in work.config.options)
    model = f"{work.config.name} ({options})" if options else work.config.name
    return Setting(
        model, runtime, batch, processor(device), threads, parsed.precision, parsed.seconds, packages, tuple(asked)
    )


def theirs_of(work: Work, runtime: str, parsed: argparse.Namespace) -> list[str]:
    """The presets whose authors' code is measured: in PyTorch's eager mode, for which it is written."""
    if not work.has_theirs or runtime != "torch":
        return []
    return [name for name, (whose, _) in THEIRS.items() if name in work.schedules and getattr(parsed, whose)]


def measure(work: Work, setting: Setting, parsed: argparse.Namespace) -> Cell:
    """Make all models of a cell ready, then time them in turns."""
    device = find_device(parsed.device)
    settings = Settings(device, setting.threads, setting.precision)
    model = build_model(work.config).to(device, DTYPES[setting.precision]).eval()
    shape = model_shape(work.config)
    images = example(setting.batch, *input_size(model), like=next(model.parameters()).detach())
    schedules = {DENSE: Schedule(), FLOOR: FLOOR_SCHEDULE, **work.schedules}

    def pruned(schedule: Schedule) -> nn.Module:
        return apply_schedule(sharing_copy(model), schedule, untrained=True).eval() if schedule.stages else model

    makers: dict[tuple[str, bool], tuple[str, Callable[[], nn.Module]]] = {
        (name, False): (setting.runtime, partial(pruned, schedule)) for name, schedule in schedules.items()
    }
    if setting.runtime != "torch":
        makers[(EAGER, False)] = ("torch", lambda: model)
    for name in theirs_of(work, setting.runtime, parsed):
        whose, make = THEIRS[name]
        makers[(name, True)] = ("torch", partial(make, getattr(parsed, whose), model))

    runs, failures = {}, list(work.failures)
    with threads_set(settings):
        for key, (runtime, maker) in makers.items():
            name = f"{key[0]}, the authors' code" if key[1] else key[0]
            print(f"  {setting.runtime}, batch {setting.batch}: making {name} ready", file=sys.stderr, flush=True)
            try:
                runs[key] = ready(maker(), images, runtime, settings)
            except Exception as error:  # exporters, compilers and others' code raise anything
                failures.append(Failure(name, first_line(error)))
        found = in_turns(runs, setting.seconds, partial(synchronise, device), long=math.inf) if runs else {}
    gmacs = {name: estimate_cost(shape, schedule).gmacs for name, schedule in schedules.items()}
    gmacs[EAGER] = gmacs[DENSE]
    times = [Time(key[0], gmacs[key[0]], 1e3 * one.seconds, one.error, key[1]) for key, one in found.items()]
    return Cell(setting, tuple(times), tuple(failures))


def ready(model: nn.Module, images: Tensor, runtime: str, settings: Settings) -> Run:
    """A call that runs a model in a runtime. It has run once, so that what fails in it fails here."""
    (run,) = prepare([Part((model,), (images,))], RUNTIMES[runtime], settings)
    run()
    return run


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else 'no reason given'}"


def load_cells(path: Path) -> list[Cell]:
    """What was measured so far."""
    if not path.is_file():
        return []
    return list(from_mapping(Cells, json.loads(path.read_text(encoding="utf-8")), str(path)).cells)


def save_cells(cells: Sequence[Cell], path: Path) -> None:
    """Keep what was measured."""
    write_atomically(path, json.dumps(to_mapping(Cells(tuple(cells))), indent=1).encode())


# --- the page ----------------------------------------------------------------------------------------------------


def cell_lines(cell: Cell) -> str:
    """The section of a cell: its table, what does not depend on tokens, and what failed."""
    setting, dense, floor = cell.setting, cell.find(DENSE), cell.find(FLOOR)
    lines = [f"### {setting.model}, {setting.runtime}, batch {setting.batch}", ""]
    if dense is None:
        lines += ["The dense model could not be measured."]
    else:
        rest = "" if floor is None else f", of which {floor.ms:.1f} ms ({floor.ms / dense.ms:.0%}) with one patch token"
        lines += [
            f"The dense model: {dense.gmacs:.3g} GMACs, {dense.ms:.1f} ms ± {dense.error:.1%}{rest}.",
            "",
            "| schedule | MACs reduction | ms | speed-up | efficiency | fixed parts allow |",
            "|---|---|---|---|---|---|",
        ]
        for time in cell.schedules:
            name = f"{time.name}, the authors' code" if time.theirs else time.name
            most = "" if floor is None else f"{allowed(dense, floor, time):.2f}"
            share = f"{efficiency(dense, time):.2f}"
            lines.append(
                f"| {name} | {reduction(dense, time):.2f} | {time.ms:.1f} ± {time.error:.1%} | "
                f"{speed_up(dense, time):.2f} | {mark(share) if misses(cell, time) else share} | {most} |"
            )
    if cell.failures:
        lines += ["", "Not measured:", "", *(f"- {failure.name}: {failure.why}" for failure in cell.failures)]
    return "\n".join(lines) + "\n"


def misses(cell: Cell, time: Time) -> bool:
    """Whether a schedule of ours is below the goal for large batches."""
    dense = cell.find(DENSE)
    large = cell.setting.batch >= LARGE_BATCH and not time.theirs
    return large and dense is not None and efficiency(dense, time) < LEAST_EFFICIENCY


def mark(text: str) -> str:
    """A number that misses a goal."""
    return f"**{text}**"


def goal_lines(cells: Sequence[Cell]) -> list[str]:
    """The goals, how many numbers reach them, and those that do not."""
    large = [
        (cell, time)
        for cell in cells
        for time in cell.schedules
        if cell.setting.batch >= LARGE_BATCH and not time.theirs and cell.find(DENSE) is not None
    ]
    missed = [(cell, time) for cell, time in large if misses(cell, time)]
    lines = [
        f"- Efficiency at least {LEAST_EFFICIENCY} from batch {LARGE_BATCH} on: "
        f"{_reached(len(large) - len(missed), len(large))}"
    ]
    for cell, time in missed:
        dense, floor = cell.find(DENSE), cell.find(FLOOR)
        assert dense is not None
        most = "" if floor is None else f"; fixed parts allow {allowed(dense, floor, time):.2f}"
        lines.append(f"  - missed: {_where(cell)}, {time.name}: {efficiency(dense, time):.2f}{most}")
    pairs = [(cell, mine, *ratio(mine, theirs)) for cell, mine, theirs in pairs_of(cells) if cell.setting.batch == 1]
    slower = [one for one in pairs if one[2] < 1]
    lines.append(f"- At batch 1 never slower than the authors' code: {_reached(len(pairs) - len(slower), len(pairs))}")
    for cell, mine, value, error in slower:
        doubt = ", which is within two standard errors of 1" if value + 2 * error >= 1 else ""
        lines.append(f"  - missed: {_where(cell)}, {mine.name}: {value:.3f} ± {error:.3f}{doubt}")
    return lines


def pairs_of(cells: Sequence[Cell]) -> list[tuple[Cell, Time, Time]]:
    """Ours and theirs, where both were measured in one cell."""
    pairs = []
    for cell in cells:
        for theirs in cell.times:
            mine = cell.find(theirs.name) if theirs.theirs else None
            if mine is not None:
                pairs.append((cell, mine, theirs))
    return pairs


def _reached(reached: int, of: int) -> str:
    return f"{reached} of {of}." if of else "nothing was measured."


def _where(cell: Cell) -> str:
    return f"{cell.setting.model}, {cell.setting.runtime}, batch {cell.setting.batch}"


def ratio_table(cells: Sequence[Cell]) -> list[str]:
    """Speed of ours over the authors', a column for each batch."""
    pairs = pairs_of(cells)
    if not pairs:
        return ["Not measured: name the checkouts with --tome and --evit."]
    batches = list(dict.fromkeys(cell.setting.batch for cell, _, _ in pairs))
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for cell, mine, theirs in pairs:
        value, error = ratio(mine, theirs)
        row = rows.setdefault((cell.setting.model, mine.name), {})
        row[cell.setting.batch] = f"{mark(f'{value:.2f}') if value < 1 else f'{value:.2f}'} ± {error:.2f}"
    return [
        f"| model | schedule | {' | '.join(f'batch {batch}' for batch in batches)} |",
        f"|---|---|{'---|' * len(batches)}",
        *(
            f"| {model} | {name} | {' | '.join(row.get(b, '') for b in batches)} |"
            for (model, name), row in rows.items()
        ),
    ]


def user_table(cells: Sequence[Cell]) -> list[str]:
    """Milliseconds of the dense model in eager mode, and of each schedule in its best runtime."""
    batches = list(dict.fromkeys(cell.setting.batch for cell in cells))
    lines = [
        f"| model | schedule | {' | '.join(f'batch {batch}: ms, dense eager → best runtime' for batch in batches)} |",
        f"|---|---|{'---|' * len(batches)}",
    ]
    for model in dict.fromkeys(cell.setting.model for cell in cells):
        here = [cell for cell in cells if cell.setting.model == model]
        names = dict.fromkeys(time.name for cell in here for time in cell.schedules if not time.theirs)
        for name in (DENSE, *names):
            texts = []
            for batch in batches:
                best = best_runtime([cell for cell in here if cell.setting.batch == batch], name)
                texts.append("" if best is None else _gain(*best))
            lines.append(f"| {model} | {name} | {' | '.join(texts)} |")
    return lines


def _gain(cell: Cell, eager: Time, time: Time) -> str:
    return f"{eager.ms:.1f} → {time.ms:.1f} in {cell.setting.runtime} ({speed_up(eager, time):.2f} x)"


def page(cells: Sequence[Cell], parsed: argparse.Namespace) -> str:
    """The page, in Markdown."""
    first = cells[0].setting
    packages = {name: text for cell in cells for name, text in cell.setting.versions}
    threads = f", {counted(first.threads, 'thread')}" if first.threads else ""
    seconds = " to ".join(f"{one:.0f}" for one in sorted({cell.setting.seconds for cell in cells}))
    notes = "" if parsed.notes is None else f"\n{parsed.notes.read_text(encoding='utf-8').strip()}\n"
    command = "python scripts/benchmark_speed.py " + " ".join(_said(parsed))
    sections = "\n".join(cell_lines(cell) for cell in cells)
    return f"""# How much of a cut in MACs becomes speed

{first.device}{threads}, {first.precision}, {", ".join(map(" ".join, packages.items()))}.
Random weights, on which time does not depend. All models of a table were timed in turns, {seconds} s for each table; ±
is a standard error.

- Speed-up: over the dense model in the same runtime. MACs reduction: over the dense model's, stem and head included.
- Efficiency: speed-up divided by MACs reduction.
- Fixed parts allow: the efficiency if what depends on tokens took time as it takes MACs, and stages took nothing beyond
  them. What remains is the time of the model with one patch token instead of all before the first block: stem, head,
  and what each block needs for any number of tokens. The rest of what is missing is the stages themselves (ranking and
  moving tokens has few MACs or none), norms and softmax, which MACs leave out, and matrix products that are less
  efficient with fewer rows.

## Goals

{chr(10).join(goal_lines(cells))}
{notes}
## What a user gets

Milliseconds of a batch: the dense model in PyTorch's eager mode, and each schedule in the runtime where it gains most.
The two numbers are of one run. Which schedule is accurate enough is another question.

{chr(10).join(user_table(cells))}

## Ours against the authors' code

Speed of ours / theirs in PyTorch's eager mode, ± a standard error.

{chr(10).join(ratio_table(cells))}

## All tables

{sections}
Made with `{command}`.
"""


def _said(parsed: argparse.Namespace) -> Iterator[str]:
    """The arguments that matter, without the places of files."""
    yield f"--models {' '.join(parsed.models)} --runtimes {' '.join(parsed.runtimes)}"
    yield f"--batches {' '.join(map(str, parsed.batches))} --seconds {parsed.seconds:g}"
    if parsed.presets != list(PRESETS):
        yield f"--presets {' '.join(parsed.presets)}"
    if parsed.schedules:
        yield f"--schedules {' '.join(Path(path).name for path in parsed.schedules)}"
    if parsed.device != "cpu" or parsed.precision != "float32":
        yield f"--device {parsed.device} --precision {parsed.precision}"
    for name in ("tome", "evit"):
        if getattr(parsed, name):
            yield f"--{name} ..."
    if parsed.threads is not None:
        yield f"--threads {parsed.threads}"
    yield "--out benchmarks/speed.md"


if __name__ == "__main__":
    main()
