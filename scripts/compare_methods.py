#!/usr/bin/env python
"""Compare methods at equal cost: dense, random, and each published method at about 0.5 and 0.7 of the dense MACs.

    python scripts/compare_methods.py --out benchmarks/methods_digits.md
    python scripts/compare_methods.py --study search_spaces/cifar10_vit.yaml --set data.root=train.tar ... --out FILE.md
    python scripts/compare_methods.py --only DynamicViT,dTPS --shares 0.5 --seeds 5 --into benchmarks/methods_digits.md

Each method is measured without training and after the same short fine-tune, with several seeds. Model, data and
fine-tune come from a study file (the digits by default). The results are written as a table and as a plot. With --into,
some rows of an existing page are measured again and marked, and the text derived from the table is updated. Without a
page, rows are printed.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

from prunesearch.config import Budget, StudyConfig
from prunesearch.cost import estimate_cost
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import Evaluation, Task, build_model, evaluate, model_shape
from prunesearch.evaluate.data import open_data
from prunesearch.files import load_study
from prunesearch.models.transformer import attend
from prunesearch.schedule import Schedule, Stage
from prunesearch.shape import ModelShape
from prunesearch.tokens.class_attention import class_rows_BHRN

SHARES = (0.7, 0.5)
DENSE = "dense"


@dataclass(frozen=True)
class Method:
    """A published method.

    schedule: `schedule(shape, x)` gets cheaper as x falls from 1 to 0. trained: its score or queries are learned, so it
    cannot be measured without training.
    """

    name: str
    schedule: Callable[[ModelShape, float], Schedule]
    trained: bool = False


def three_stages(shape: ModelShape, keep: float, score: str, reduce: str, at: str = "mid") -> Schedule:
    """The same keep ratio at 1/4, 1/2 and 3/4 of the depth, as in the papers."""
    blocks = [shape.depth * quarter // 4 for quarter in (1, 2, 3)]
    return Schedule(tuple(Stage(b, at=at, score=score, keep=round(keep, 3), reduce=reduce) for b in blocks))  # type: ignore[arg-type]


def tome(shape: ModelShape, keep: float) -> Schedule:
    """Merge the same number of pairs in every block."""
    pairs = round((1 - keep) * shape.patch_tokens / 2)
    stages, present = [], shape.patch_tokens
    for block in range(shape.depth):
        present -= min(pairs, present // 2)
        stages.append(Stage(block, tokens=present, reduce="merge", options={"parity": "all"}))
    return Schedule(tuple(stages))


def ppt(shape: ModelShape, keep: float) -> Schedule:
    """Drop or merge at three blocks, every second token counted as in the released code."""
    schedule = three_stages(shape, keep, "value_weighted", "drop_or_merge")
    return Schedule(tuple(replace(stage, options={"parity": "all"}) for stage in schedule.stages))  # type: ignore[arg-type]


def diffrate(shape: ModelShape, keep: float) -> Schedule:
    """Like the schedules found by DiffRate: every block but the first drops some tokens and absorbs twice as many."""
    stages, present = [], float(shape.patch_tokens)
    for block in range(1, shape.depth):
        step = (1 - keep) * present * 0.6
        for reduce, part in (("drop", step / 3), ("absorb", 2 * step / 3)):
            present = max(1.0, present - part)
            stages.append(Stage(block, score="class_attention", tokens=round(present), reduce=reduce))
    return Schedule(tuple(stages))


def patch_merger(shape: ModelShape, keep: float) -> Schedule:
    """Pool to eight tokens at one block."""
    return Schedule((Stage(max(1, round(keep * shape.depth)), at="pre", tokens=8, reduce="pool"),))


def as_vit(shape: ModelShape, share: float) -> Schedule:
    """Thresholds that start from keeping everything; stages one block later than others, as in the paper."""
    blocks = [shape.depth * quarter // 4 + (shape.depth > 8) for quarter in (1, 2, 3)]
    stages = tuple(Stage(b, at="pre", score="head_weighted_class_attention", threshold=0.0) for b in blocks)
    return Schedule(stages, target_gmacs=share * estimate_cost(shape).gmacs)


def ltmp(shape: ModelShape, share: float) -> Schedule:
    """Merging and then pruning by thresholds in every block."""
    stages = []
    for block in range(shape.depth):
        stages.append(Stage(block, threshold=0.9, reduce="merge", options={"parity": "all"}))
        stages.append(Stage(block, score="attention_received", threshold=0.0, options={"merged": "max"}))
    return Schedule(tuple(stages), target_gmacs=share * estimate_cost(shape).gmacs)


def evo_vit(shape: ModelShape, keep: float) -> Schedule:
    """Choose among all tokens at a third and two thirds of the depth; the others wait until the next choice."""
    blocks = [round(shape.depth * third / 3) for third in (1, 2)]
    mean = {"momentum": 0.5}
    stages = (Stage(b, "pre", keep=round(keep, 3), until="next", options=mean) for b in blocks)  # type: ignore[arg-type]
    return Schedule(tuple(stages))


def svit(shape: ModelShape, share: float) -> Schedule:
    """Predictors choose in each block from a quarter of the depth on; thresholds start from the larger logit."""
    blocks = range(shape.depth // 4, shape.depth)
    stages = (Stage(b, "pre", score="predictor", threshold=0.5, until="next") for b in blocks)
    return Schedule(tuple(stages), target_gmacs=share * estimate_cost(shape).gmacs)


def tosa(shape: ModelShape, keep: float) -> Schedule:
    """In every second block the tokens that the attention before it ranks last skip the block."""
    blocks = range(1, shape.depth, 2)
    ends = (block + 1 if block + 1 < shape.depth else "end" for block in blocks)
    stages = (Stage(b, "pre", keep=round(keep, 3), until=end) for b, end in zip(blocks, ends, strict=True))
    return Schedule(tuple(stages))


METHODS = (
    Method("random drop", lambda shape, x: three_stages(shape, x, "random", "drop")),
    Method("EViT, drop", lambda shape, x: three_stages(shape, x, "class_attention", "drop")),
    Method("EViT, fuse", lambda shape, x: three_stages(shape, x, "class_attention", "fuse")),
    Method("eTPS", lambda shape, x: three_stages(shape, x, "class_attention", "squeeze")),
    Method("PPT", ppt),
    Method("ToMe", tome),
    Method("DiffRate's verbs", diffrate),
    Method("PatchMerger", patch_merger, trained=True),
    Method("DynamicViT", lambda shape, x: three_stages(shape, x, "predictor", "drop", "pre"), trained=True),
    Method("dTPS", lambda shape, x: three_stages(shape, x, "predictor", "squeeze", "pre"), trained=True),
    Method("AS-ViT", as_vit),
    Method("LTMP", ltmp),
    Method("Evo-ViT", evo_vit),
    Method("SViT", svit, trained=True),
    Method("ToSA", tosa),
)


def at_share(method: Method, shape: ModelShape, share: float) -> Schedule | None:
    """The method's schedule with MACs nearest to a share of the dense ones; None if it cannot get within 7 %."""
    if method.schedule(shape, share).is_adaptive:
        return method.schedule(shape, share)
    dense = estimate_cost(shape).macs
    found: list[tuple[float, Schedule]] = []
    for step in range(5, 100):
        try:
            schedule = method.schedule(shape, step / 100)
            found.append((abs(estimate_cost(shape, schedule).macs / dense - share), schedule))
        except ScheduleError:
            continue
    distance, best = min(found, key=lambda pair: pair[0])
    return best if distance < 0.07 else None


def run(config: StudyConfig, schedule: Schedule, images: int, seed: int) -> Evaluation:
    """Run one evaluation on one thread."""
    torch.set_num_threads(1)
    task = Task(
        uid="compare",
        model=config.model,
        data=config.data,
        schedule=schedule,
        budget=Budget(images=images),
        metrics=("top1", "gmacs"),
        finetune=config.finetune,
        measure=config.measure,
        seed=seed,
        device=config.workers.device,
        threads=1,
    )
    return evaluate(task)


@dataclass
class Row:
    """Results of a method at one share: top-1 in %, and the measured shares of the dense MACs."""

    name: str
    share: float
    as_it_comes: list[float]
    finetuned: list[float]
    shares: list[float]


class Line(NamedTuple):
    """A row of the table in a page.

    Numbers are (mean, standard deviation or None). as_it_comes: None if the method needs training. mark: asterisks that
    tell in which later run the row was measured.
    """

    name: str
    macs: float
    as_it_comes: tuple[float, float | None] | None
    finetuned: tuple[float, float | None]
    mark: str = ""

    @property
    def share(self) -> float:
        """The target share of the schedule."""
        return min((1.0, *SHARES), key=lambda share: abs(share - self.macs))

    def __str__(self) -> str:
        def written(value: tuple[float, float | None] | None) -> str:
            if value is None:
                return "-"
            return f"{value[0]:.2f}" + ("" if value[1] is None else f" ± {value[1]:.2f}")

        numbers = f"{self.macs:.1%} | {written(self.as_it_comes)} | {written(self.finetuned)}"
        return f"| {self.name}{self.mark} | {numbers} |"


TABLE = "| method | MACs | as it comes | fine-tuned |\n|---|---|---|---|\n"
LINE = re.compile(r"\| ([^|*]+)(\**) \| ([\d.]+)% \| (-|[\d. ±]+) \| ([\d. ±]+) \|")


def line_of(row: Row, mark: str = "") -> Line:
    """Format results as a row of the table."""

    def number(values: Sequence[float]) -> tuple[float, float | None]:
        return mean(values), stdev(values) if len(values) > 1 else None

    as_it_comes = number(row.as_it_comes) if row.as_it_comes else None
    return Line(row.name, mean(row.shares), as_it_comes, number(row.finetuned), mark)


def read_line(text: str) -> Line:
    """Parse a row of a table: the inverse of str(Line)."""
    found = LINE.fullmatch(text)
    if found is None:
        raise SystemExit(f"not a row of the table: {text!r}; expected one such as | dTPS | 70.0% | - | 97.30 ± 0.10 |")
    name, mark, macs, before, after = found.groups()

    def number(text: str) -> tuple[float, float | None]:
        parts = [float(part) for part in text.split(" ± ")]
        return parts[0], parts[1] if len(parts) > 1 else None

    return Line(name, float(macs) / 100, None if before == "-" else number(before), number(after), mark)


def sweep(config: StudyConfig, images: int, seeds: int, wanted: Sequence[tuple[str, float]]) -> list[Row]:
    """Measure the wanted (name, share) pairs in parallel on all cores; returns rows in the same order.

    Methods that cannot reach a share are left out.
    """
    shape = model_shape(config.model)
    dense = estimate_cost(shape).gmacs
    methods = {method.name: method for method in METHODS}
    rows: list[Row] = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = {}
        for name, share in wanted:
            method = methods.get(name)
            schedule = Schedule() if method is None else at_share(method, shape, share)
            if schedule is None:
                continue
            row = Row(name, share, [], [], [])
            rows.append(row)
            for seed in range(seeds):
                jobs[pool.submit(run, config, schedule, images, seed)] = (row, row.finetuned)
                if seed == 0 and not (method and method.trained):  # without training one seed is enough
                    jobs[pool.submit(run, config, schedule, 0, seed)] = (row, row.as_it_comes)
        for done, job in enumerate(as_completed(jobs), 1):
            row, values = jobs[job]
            result = job.result()
            if result.status != "complete":
                raise SystemExit(f"{row.name} at {row.share}: {result.error}\n{result.traceback}")
            values.append(result.value("top1"))
            if values is row.finetuned:
                row.shares.append(result.value("gmacs") / dense)
            print(f"{done}/{len(jobs)} {row.name} {row.share}: {values[-1]:.2f}", flush=True)
    return rows


@torch.inference_mode()
def why(config: StudyConfig) -> list[str]:
    """Class attention of the dense model by block: its entropy, and the cells covered by the best 30 % of tokens."""
    model = build_model(config.model)
    images, _ = next(iter(open_data(config.data, model)[1].batches([torch.arange(200)], torch.device("cpu"))))
    shape, lines = model_shape(config.model), []
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))  # type: ignore[operator]
    for index, block in enumerate(model.blocks):  # type: ignore[arg-type]
        _, attended = attend(block.attn, block.norm1(x), None, shape)
        score_Bn = class_rows_BHRN(attended).mean(dim=(1, 2))[:, shape.prefix_tokens :]
        share_Bn = score_Bn / score_Bn.sum(dim=1, keepdim=True)
        entropy = (share_Bn * -share_Bn.clamp_min(1e-12).log()).sum(dim=1).exp().mean().item()
        kept = round(0.3 * shape.patch_tokens)
        coverage = [_cells(order, kept) for order in (score_Bn, torch.rand_like(score_Bn))]
        lines.append(f"| {index} | {entropy:.0f} of {shape.patch_tokens} | {coverage[0]:.0%} | {coverage[1]:.0%} |")
        x = block(x)
    return [
        "| block | tokens that get attention | cells covered by the top 30 % | by a random 30 % |",
        "|---|---|---|---|",
        *lines,
    ]


def _cells(score_Bn: torch.Tensor, kept: int) -> float:
    """Share of the 2 x 2 cells of the token grid in which at least one of the `kept` best lies."""
    side = round(score_Bn.shape[1] ** 0.5)
    chosen = torch.zeros_like(score_Bn).scatter(1, score_Bn.topk(kept, dim=1).indices, 1.0)
    cells = torch.nn.functional.max_pool2d(chosen.view(-1, 1, side, side), 2)
    return cells.mean().item()


def report(rows: Sequence[Row], config: StudyConfig, images: int, seeds: int, command: str) -> str:
    """The text of a new page."""
    head = [
        f"# Methods at the same cost: {config.name}",
        "",
        f"`{command}`. Model {config.model.name}; top-1 in %, as it comes (without any training; nothing to show for",
        f"methods that learn a score or queries), and after {images} images of fine-tuning with distillation,",
        f"{seeds} seeds, mean ± standard deviation. MACs as a share of the dense model's. Thresholds start from",
        "keeping everything, are trained towards the share and then calibrated on it.",
        "",
    ]
    lines = [line_of(row) for row in rows]
    tail = ["Why, in the dense model:", "", *why(config)]
    return "\n".join(head) + "\n" + _table(lines, []) + "\n".join(["", *tail]) + "\n"


def _table(lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The table, the notes on its marks, and the text derived from it."""
    below = [*(f"{note}\n" for note in notes), *expectations(lines)]
    return TABLE + "\n".join([*map(str, lines), "", *below]) + "\n"


def put_into(page: str, rows: Sequence[Row], seeds: int, day: date, command: str) -> tuple[str, list[Line]]:
    """Put rows into an existing page, marked, and update the text derived from the table.

    New rows are added after those of the same share. A mark without rows goes, with its note, and the others move up.
    Returns the page and the rows of its table.
    """
    head, found, rest = page.partition(TABLE)
    body, why_found, tail = rest.partition("\nWhy, in the dense model:")
    if not found or not why_found:
        raise SystemExit(
            "--into: the page has no table of this script, or no text behind it. Write a new one with --out."
        )
    lines = [read_line(text) for text in body.splitlines() if text.startswith("| ")]
    notes = [text for text in body.splitlines() if text.startswith("Rows marked ")]
    mark = "*" * (len(notes) + 1)
    for line in (line_of(row, mark) for row in rows):
        same = [i for i, old in enumerate(lines) if (old.name, old.share) == (line.name, line.share)]
        place = same[0] if same else max(i for i, old in enumerate(lines) if old.share >= line.share) + 1
        lines[place : place + len(same)] = [line]
    notes.append(f"Rows marked {mark} were measured anew on {day} with {seeds} seeds: `{command}`.")
    lines, notes = _without_unused(lines, notes)
    return head + _table(lines, notes) + why_found + tail, lines


def _without_unused(lines: Sequence[Line], notes: Sequence[str]) -> tuple[list[Line], list[str]]:
    """The rows and the notes without the marks that no row has."""
    used = sorted({len(line.mark) for line in lines} - {0})
    now = {"*" * asterisks: "*" * number for number, asterisks in enumerate(used, start=1)}
    notes = [re.sub(r"\*+", mark, notes[len(old) - 1], count=1) for old, mark in now.items()]
    return [line._replace(mark=now.get(line.mark, "")) for line in lines], notes


def expectations(lines: Sequence[Line]) -> list[str]:
    """What the papers suggest, and whether the table confirms it."""
    value = {(line.name, line.share): line.finetuned[0] for line in lines}
    texts = ["Expected from the papers, after fine-tuning:", ""]
    low = min(SHARES)

    def say(text: str, holds: bool, numbers: str) -> None:
        texts.append(f"- {text}: {'holds' if holds else 'does not hold here'} ({numbers})")

    for share in SHARES:
        random = value.get(("random drop", share))
        for line in lines:
            if random is not None and line.share == share and line.name != "random drop":
                mine = line.finetuned[0]
                say(f"{line.name} beats random drop at {share}", mine > random, f"{mine:.2f} against {random:.2f}")
    chain = [value.get((name, low)) for name in ("eTPS", "EViT, fuse", "EViT, drop")]
    if all(number is not None for number in chain):
        squeeze, fuse, drop = (float(number) for number in chain if number is not None)
        say(f"squeeze > fuse > drop at {low}", squeeze > fuse > drop, f"{squeeze:.2f}, {fuse:.2f}, {drop:.2f}")
    return texts


def draw(lines: Sequence[Line], path: Path, title: str) -> None:
    """Plot top-1 against MACs: hollow markers without training, filled ones after fine-tuning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for index, method in enumerate(METHODS):
        mine = sorted((line for line in lines if line.name == method.name), key=lambda line: line.share)
        if not mine:
            continue
        colour = colours[index % len(colours)]
        x, y = [line.macs for line in mine], [line.finetuned[0] for line in mine]
        error = [line.finetuned[1] or 0.0 for line in mine]
        axes.errorbar(x, y, error, marker="o", color=colour, label=method.name, capsize=2)
        before = [line.as_it_comes[0] for line in mine if line.as_it_comes is not None]
        if len(before) == len(mine):
            axes.plot(x, before, marker="o", mfc="none", ls=":", lw=0.8, color=colour)
    for dense in (line.finetuned[0] for line in lines if line.name == DENSE):
        axes.axhline(dense, color="0.4", lw=0.8, ls="--")
        axes.annotate(f"dense, fine-tuned: {dense:.2f}", (0.01, dense), (0, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", fontsize=8, color="0.3")  # fmt: skip
    axes.set(xlabel="MACs, share of the dense model's", ylabel="top-1, %", title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _names(text: str) -> list[str]:
    """Parse the comma-separated names of --only. Some names contain a comma, so the longest match is taken."""
    known = sorted((DENSE, *(method.name for method in METHODS)), key=len, reverse=True)
    names, left = [], text.strip()
    while left:
        name = next((name for name in known if left == name or left.startswith(f"{name},")), None)
        if name is None:
            raise argparse.ArgumentTypeError(f"{left!r} begins with no method. Possible: {'; '.join(sorted(known))}")
        names.append(name)
        left = left[len(name) :].lstrip(", ")
    return names


def _shares(text: str) -> list[float]:
    shares = [float(part) for part in text.split(",")]
    if not set(shares) <= set(SHARES):
        raise argparse.ArgumentTypeError(f"{text!r}; possible: {', '.join(map(str, SHARES))}")
    return shares


def _portable(setting: str) -> str:
    """A setting as shown in a page: paths are reduced to the file name."""
    name, _, value = setting.partition("=")
    return f"{name}={Path(value).name if Path(value).exists() else value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--study", type=Path, default=Path(__file__).parent.parent / "search_spaces/digits_predictor.yaml"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--images", type=int, default=4792, help="of one fine-tune (default: four epochs of digits)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=_names, help="these methods, with commas between; the dense model is one")
    parser.add_argument("--shares", type=_shares, default=list(SHARES), help="of the dense MACs (default: 0.7,0.5)")
    page = parser.add_mutually_exclusive_group()
    page.add_argument("--out", type=Path, help="a new page, with a picture beside it")
    page.add_argument("--into", type=Path, help="an existing page, in which the rows are replaced and marked")
    given = parser.parse_args()
    names = given.only or [DENSE, *(method.name for method in METHODS)]
    wanted = [(DENSE, 1.0)] if DENSE in names else []
    wanted += [(name, share) for share in given.shares for name in names if name != DENSE]
    config = load_study(given.study, given.set)
    study = os.path.relpath(given.study)
    command = f"python scripts/compare_methods.py --study {study} --images {given.images} --seeds {given.seeds}"
    command += "".join(f" --set {_portable(setting)}" for setting in given.set)
    if given.only:
        command += f" --only '{','.join(names)}' --shares {','.join(map(str, given.shares))}"
    rows = sweep(config, given.images, given.seeds, wanted)
    lines = [line_of(row) for row in rows]
    print("", *lines, sep="\n")
    if not (path := given.out or given.into):
        return
    if given.into:
        text, lines = put_into(path.read_text(encoding="utf-8"), rows, given.seeds, date.today(), command)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = report(rows, config, given.images, given.seeds, command)
        text += f"\n![the same as a picture]({path.with_suffix('.png').name})\n"
    path.write_text(text, encoding="utf-8")
    draw(lines, path.with_suffix(".png"), f"{config.model.name}: methods at the same cost")


if __name__ == "__main__":
    main()
