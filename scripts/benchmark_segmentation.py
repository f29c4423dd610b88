#!/usr/bin/env python
"""Segmentation at a share of the MACs: when should tokens be back, and does a search beat schedules made by hand?

    python scripts/benchmark_segmentation.py --out benchmarks/segmentation_digits.md

The study is search_spaces/segmentation_digits.yaml: scenes of digits and the small ViT that comes with prunesearch. All
schedules cost the same share of the dense model's MACs, and are trained with each of some seeds.

1. When are tokens back? One stage, the same score and verb, `until` each later block and the end. Where tokens return
   earlier, fewer are kept before, so that the cost is the same.
2. What does a token that joined another come back as: its host, or its host plus what it had of its own (`returns`)?
3. By hand and by search: schedules like ToMe's and AiluRus', whose tokens are back at the end, and the best of a
   search, which is trained again with the other seeds.

Every evaluation is kept in --cells, so that an interrupted run goes on where it was. The picture beside the page shows
masks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from prunesearch.config import Budget, IsoBudget, StopConfig, StudyConfig, as_options
from prunesearch.cost import estimate_cost
from prunesearch.device.profiles import processor
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import Task, build_model, evaluate, model_shape
from prunesearch.evaluate.data import open_validation
from prunesearch.evaluate.limits import budget_of
from prunesearch.evaluate.machine import versions
from prunesearch.evaluate.measures import pixel_classes
from prunesearch.evaluate.scenes import CLASSES
from prunesearch.files import load_study, schedule_text, write_atomically
from prunesearch.models import apply_schedule
from prunesearch.report.tables import short
from prunesearch.samplers.iso_budget import within_budget
from prunesearch.schedule import END, Schedule, Stage
from prunesearch.search.driver import run_study
from prunesearch.study.reader import open_study_readonly

HOME = Path(__file__).parents[1]
METRICS = ("miou", "pixel_accuracy", "gmacs")
VERBS = ("drop", "fuse", "squeeze", "merge")
SCORE = "attention_received"
SCENES_SHOWN = 6
COLOURS = [0, 0, 0, *(255, 60, 60), *(60, 200, 60), *(80, 120, 255), *(255, 200, 40), *(200, 80, 220)]
COLOURS += [*(60, 220, 220), *(255, 140, 60), *(150, 150, 150), *(150, 220, 100), *(255, 130, 190)]


def main() -> None:
    """Measure what is missing, write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.6, help="of the dense model's MACs")
    parser.add_argument("--images", type=int, default=1000, help="training scenes of each schedule")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=40, help="candidates of the search")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cells", type=Path, default=Path("outputs/segmentation.json"))
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    config = load_study(HOME / "search_spaces" / "segmentation_digits.yaml")
    config = replace(config, budget=IsoBudget(gmacs=f"{100 * parsed.share:g}%"), limits=())
    cells = Cells(config, parsed.images, parsed.cells, parsed.processes)
    seeds = range(parsed.seeds)
    returns = {name: schedule for verb in VERBS for name, schedule in when_back(config, verb).items()}
    copies = {
        name.replace(", back at the end", ", copies"): copying(schedule)
        for name, schedule in returns.items()
        if name.endswith("at the end") and not name.startswith("drop")
    }
    by_hand = made_by_hand(config)
    found = searched(config, parsed.images, parsed.trials, parsed.cells)
    everything = {"dense": Schedule(), **returns, **copies, **by_hand, **found}
    cells.measure(everything, seeds)
    picture = parsed.out.with_suffix(".png")
    shown = {"dense": Schedule(), "back before block 4": returns["drop, back before block 4"]}
    shown |= {"back at the end": returns["drop, back at the end"], **found}
    draw(config, shown, picture)
    write_atomically(parsed.out, page(config, parsed, cells, returns, copies, by_hand, found, picture.name).encode())


class Cells:
    """Evaluations, kept in a file: how well a schedule does with a seed."""

    def __init__(self, config: StudyConfig, images: int, path: Path, processes: int) -> None:
        self.config, self.images, self.path, self.processes = config, images, path, processes
        self.known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def measure(self, schedules: dict[str, Schedule], seeds: Iterable[int]) -> None:
        """Evaluate what is not known yet."""
        wanted = {self._key(one, seed): (one, seed) for one in schedules.values() for seed in seeds}
        missing = {key: value for key, value in wanted.items() if key not in self.known}
        with ProcessPoolExecutor(self.processes) as pool:
            tasks = [(self.config, one, seed, self.images) for one, seed in missing.values()]
            for key, values in zip(missing, pool.map(_evaluated, tasks), strict=True):
                self.known[key] = values
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.path, json.dumps(self.known, indent=1).encode())
                print(f"{len(self.known)}: {values['miou']:.2f} {missing[key][0]}", flush=True)

    def of(self, schedule: Schedule, seeds: Iterable[int], metric: str = "miou") -> list[float]:
        """The values of a schedule, one for each seed."""
        return [self.known[self._key(schedule, seed)][metric] for seed in seeds]

    def _key(self, schedule: Schedule, seed: int) -> str:
        return f"{self.images} {seed} {schedule_text(schedule, 'x')}"


def _evaluated(given: tuple[StudyConfig, Schedule, int, int]) -> dict[str, float]:
    config, schedule, seed, images = given
    task = Task(
        "one",
        config.model,
        config.data,
        schedule,
        Budget(images=images),
        METRICS,
        config.finetune,
        config.measure,
        seed=seed,
        threads=1,
    )
    return dict(evaluate(task, raise_user_errors=True).metrics)


def when_back(config: StudyConfig, verb: str) -> dict[str, Schedule]:
    """One stage at the same block, whose tokens are back before each later block or at the end, at equal cost."""
    shape, budget = model_shape(config.model), budget_of(config)
    assert budget is not None
    found = {}
    for until in (*range(3, shape.depth), END):
        score = "none" if verb == "merge" else SCORE
        stages = [Stage(0, score=score, keep=0.6, reduce=verb, until=until)]
        if verb == "merge":  # at most half of the tokens go in one stage
            stages.append(Stage(1, score=score, keep=0.6, reduce=verb, until=until))
        where = "at the end" if until == END else f"before block {until}"
        try:
            found[f"{verb}, back {where}"] = within_budget(Schedule(tuple(stages)), shape, budget)
        except ScheduleError:  # so few blocks cannot save so much
            continue
    return found


def copying(schedule: Schedule) -> Schedule:
    """The schedule whose tokens come back as copies of those that they joined."""
    return Schedule(tuple(replace(stage, options=as_options({"returns": "copy"})) for stage in schedule.stages))


def made_by_hand(config: StudyConfig) -> dict[str, Schedule]:
    """What people do by hand: tokens merge in every block, or once, early, and are back at the end."""
    shape, budget = model_shape(config.model), budget_of(config)
    assert budget is not None
    plans = {
        "like ToMe: merge in each block": [
            Stage(block, score="none", keep=0.8, reduce="merge", until=END) for block in range(shape.depth - 1)
        ],
        "like AiluRus: absorb once, at block 1": [Stage(1, score=SCORE, keep=0.6, reduce="absorb", until=END)],
        "drop once, at block 1": [Stage(1, score=SCORE, keep=0.6, until=END)],
        "drop at blocks 1 and 3": [Stage(block, score=SCORE, keep=0.7, until=END) for block in (1, 3)],
        "at random, once, at block 1": [Stage(1, score="random", keep=0.6, until=END)],
    }
    return {name: within_budget(Schedule(tuple(stages)), shape, budget) for name, stages in plans.items()}


def searched(config: StudyConfig, images: int, trials: int, cells: Path) -> dict[str, Schedule]:
    """The best schedule of a search at this cost. It is kept beside the cells."""
    path = cells.with_suffix(".searched.json")
    known = json.loads(path.read_text()) if path.is_file() else {}
    with TemporaryDirectory() as name:
        folder = Path(name) / config.name
        study = replace(
            config,
            rungs=(Budget(images=0), Budget(images=images)),
            stop=StopConfig(trials=trials),
            confirm=replace(config.confirm, speed_seconds=0),
        )
        if "schedule" not in known:
            run_study(study, folder)
            reader = open_study_readonly(folder)
            whole = [
                record
                for record in reader.records()
                if record.evaluation is not None and record.evaluation.rung == 1 and record.schedule.stages
            ]
            best = max(whole, key=lambda record: record.evaluation.value("miou"))  # type: ignore[union-attr]
            reader.close()
            known = {"schedule": schedule_text(best.schedule, "x"), "trained": len(whole)}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(known).encode())
        text = Path(name) / "best.yaml"
        text.write_text(known["schedule"], encoding="utf-8")
        from prunesearch.files import load_schedule_file

        return {"the best of a search": load_schedule_file(text).schedule}


@torch.inference_mode()
def draw(config: StudyConfig, schedules: dict[str, Schedule], path: Path) -> None:
    """Scenes, their masks, and what models say of them as they come: one row each."""
    dense = build_model(config.model)
    held_out = open_validation(config.data, dense)
    chosen = torch.arange(SCENES_SHOWN)
    ((images, masks),) = held_out.batches([chosen], torch.device("cpu"))
    pixels = held_out.source[chosen][0][:, 0]
    rows = [_coloured(pixels, grey=True), _coloured(masks)]
    for schedule in schedules.values():
        model = apply_schedule(build_model(config.model), schedule, untrained=True)
        rows.append(_coloured(pixel_classes(model(images), masks)))
    whole = torch.cat(rows, dim=0).to(torch.uint8)
    picture = Image.fromarray(whole.numpy())
    picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    picture.save(path)


def _coloured(values_BHW: Tensor, grey: bool = False) -> Tensor:
    """A row of pictures, (height, all widths, 3), with a line around each."""
    colours = torch.tensor(COLOURS).view(-1, 3)
    shown = values_BHW[..., None].expand(-1, -1, -1, 3) if grey else colours[values_BHW]
    framed = torch.nn.functional.pad(shown.float(), (0, 0, 1, 1, 1, 1), value=90)
    return torch.cat(list(framed), dim=1)


def page(
    config: StudyConfig,
    parsed: argparse.Namespace,
    cells: Cells,
    returns: dict[str, Schedule],
    copies: dict[str, Schedule],
    by_hand: dict[str, Schedule],
    found: dict[str, Schedule],
    picture: str,
) -> str:
    """The page, in Markdown."""
    shape, seeds = model_shape(config.model), range(parsed.seeds)
    dense = estimate_cost(shape).gmacs

    def row(name: str, schedule: Schedule) -> str:
        values, right = cells.of(schedule, seeds), cells.of(schedule, seeds, "pixel_accuracy")
        share = estimate_cost(shape, schedule).gmacs / dense
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        words = short(schedule) if schedule.stages else "no stage"
        return f"| {name} | {share:.0%} | {mean(values):.2f}{spread} | {mean(right):.2f} | {words} |"

    def table(schedules: dict[str, Schedule]) -> str:
        lines = [row(name, schedule) for name, schedule in {"dense": Schedule(), **schedules}.items()]
        return "\n".join(["| schedule | MACs | miou, % | pixels right, % | stages |", "|---|---|---|---|---|", *lines])

    def average(schedules: Sequence[Schedule]) -> str:
        return f"{mean(mean(cells.of(schedule, seeds)) for schedule in schedules):.2f}"

    blocks = [*(f"before block {block}" for block in range(3, shape.depth)), "at the end"]
    by_return = {where: [one for name, one in returns.items() if name.endswith(where)] for where in blocks}
    said = [f"{average(ones)} {where} ({len(ones)} verbs)" for where, ones in by_return.items() if ones]
    own = [one for name, one in returns.items() if name.endswith("at the end") and not name.startswith("drop")]
    best = mean(cells.of(next(iter(found.values())), seeds))
    hand = max((mean(cells.of(one, seeds)), name) for name, one in {**by_hand, **returns}.items())
    better = "better" if best > hand[0] else "no better"
    trained = json.loads(parsed.cells.with_suffix(".searched.json").read_text())["trained"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions())
    return f"""# Segmentation at {parsed.share:.0%} of the MACs

`{config.model.name}` on scenes of digits ({len(CLASSES)} classes, {config.data.val_images} validation scenes).
Every schedule is trained for {parsed.images:,} scenes with {parsed.seeds} seeds;
± is the standard deviation over seeds. All tokens are back after the last block, as each patch needs a class.
{processor(torch.device("cpu"))}, 1 thread, {libraries}.

## When should tokens be back?

The same stage at block 0 (merge: blocks 0 and 1), the same score ({SCORE}); only `until` differs, and how many tokens
are kept, so that all cost the same. Mean miou: {"; ".join(said)}.

{table(returns)}

## What does a token come back as?

The same stages, until the end. Tokens that joined another come back as that token is by then plus what they had of
their own when they joined it (`returns: residual`, the default), or as a copy of it (`returns: copy`). Mean miou:
{average(own)} and {average(list(copies.values()))}.

{table({**{name: returns[name] for name in returns if returns[name] in own}, **copies})}

## By hand and by search

The best of a search ({parsed.trials} candidates of {config.name}.yaml at this cost or less, {trained} of them
trained), trained again like the others: {best:.2f}, {better} than the best schedule made by hand
({hand[1]}, {hand[0]:.2f}).
Among {trained} the best was chosen with one training each; here it is trained anew with the seeds of all others.

{table({**by_hand, **found})}

## Masks

Top to bottom: scenes, their masks, and what the models say as they come, without training: dense; drop, back before
block 4; drop, back at the end; the best of the search.

![masks]({picture})

Made with `python scripts/benchmark_segmentation.py --share {parsed.share:g} --images {parsed.images}
--seeds {parsed.seeds} --trials {parsed.trials} --out {parsed.out}`.
"""


if __name__ == "__main__":
    main()
