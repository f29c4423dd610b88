#!/usr/bin/env python
"""Every method at the same cost: dense, random, and each published method at about 0.5 and 0.7 of the dense MACs.

    python scripts/compare_methods.py --out benchmarks/methods_digits.md
    python scripts/compare_methods.py --study search_spaces/cifar10_vit.yaml --set data.root=train.tar ... --out FILE.md

Each is measured as it comes and after the same short fine-tune, with several seeds. Model, data and how to train come
from a study file (the digits by default). Draws the same as a picture beside the table.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch

from prunesearch.config import Budget, StudyConfig
from prunesearch.cost import estimate_cost
from prunesearch.errors import ScheduleError
from prunesearch.evaluate import Evaluation, Task, build_model, evaluate, model_shape
from prunesearch.evaluate.data import open_data
from prunesearch.files import load_study
from prunesearch.models.vision_transformer import attend
from prunesearch.schedule import ModelShape, Schedule, Stage
from prunesearch.tokens.class_attention import class_rows_BHRN

SHARES = (0.7, 0.5)


@dataclass(frozen=True)
class Method:
    """A published method: `schedule(shape, x)` gets cheaper as x, from 0 to 1, falls. trained: its score or queries
    learn, so that without training there is nothing to measure."""

    name: str
    schedule: Callable[[ModelShape, float], Schedule]
    trained: bool = False


def three_stages(shape: ModelShape, keep: float, score: str, reduce: str, at: str = "mid") -> Schedule:
    """The same keep ratio at a quarter, half and three quarters of the depth, as the papers have it."""
    blocks = [shape.depth * quarter // 4 for quarter in (1, 2, 3)]
    return Schedule(tuple(Stage(b, at=at, score=score, keep=round(keep, 3), reduce=reduce) for b in blocks))  # type: ignore[arg-type]


def tome(shape: ModelShape, keep: float) -> Schedule:
    """The same number of pairs in every block."""
    pairs = round((1 - keep) * shape.patch_tokens / 2)
    stages, present = [], shape.patch_tokens
    for block in range(shape.depth):
        present -= min(pairs, present // 2)
        stages.append(Stage(block, tokens=present, reduce="merge"))
    return Schedule(tuple(stages))


def diffrate(shape: ModelShape, keep: float) -> Schedule:
    """In every block but the first a few dropped and twice as many absorbed: the shape of what DiffRate found."""
    stages, present = [], float(shape.patch_tokens)
    for block in range(1, shape.depth):
        step = (1 - keep) * present * 0.6
        for reduce, part in (("drop", step / 3), ("absorb", 2 * step / 3)):
            present = max(1.0, present - part)
            stages.append(Stage(block, score="class_attention", tokens=round(present), reduce=reduce))
    return Schedule(tuple(stages))


def patch_merger(shape: ModelShape, keep: float) -> Schedule:
    """Eight tokens from a block on."""
    return Schedule((Stage(max(1, round(keep * shape.depth)), at="pre", tokens=8, reduce="pool"),))


def as_vit(shape: ModelShape, share: float) -> Schedule:
    """From thresholds that keep everything to the share; stages one block later than others, as in the paper."""
    blocks = [shape.depth * quarter // 4 + (shape.depth > 8) for quarter in (1, 2, 3)]
    stages = tuple(Stage(b, at="pre", score="head_weighted_class_attention", threshold=0.0) for b in blocks)
    return Schedule(stages, target_gmacs=share * estimate_cost(shape).gmacs)


def ltmp(shape: ModelShape, share: float) -> Schedule:
    """Merging, then pruning, by thresholds in every block."""
    stages = []
    for block in range(shape.depth):
        stages.append(Stage(block, threshold=0.9, reduce="merge"))
        stages.append(Stage(block, score="attention_received", threshold=0.0))
    return Schedule(tuple(stages), target_gmacs=share * estimate_cost(shape).gmacs)


METHODS = (
    Method("random drop", lambda shape, x: three_stages(shape, x, "random", "drop")),
    Method("EViT, drop", lambda shape, x: three_stages(shape, x, "class_attention", "drop")),
    Method("EViT, fuse", lambda shape, x: three_stages(shape, x, "class_attention", "fuse")),
    Method("eTPS", lambda shape, x: three_stages(shape, x, "class_attention", "squeeze")),
    Method("PPT", lambda shape, x: three_stages(shape, x, "value_weighted", "drop_or_merge")),
    Method("ToMe", tome),
    Method("DiffRate's verbs", diffrate),
    Method("PatchMerger", patch_merger, trained=True),
    Method("DynamicViT", lambda shape, x: three_stages(shape, x, "predictor", "drop", "pre"), trained=True),
    Method("dTPS", lambda shape, x: three_stages(shape, x, "predictor", "squeeze", "pre"), trained=True),
    Method("AS-ViT", as_vit),
    Method("LTMP", ltmp),
)


def at_share(method: Method, shape: ModelShape, share: float) -> Schedule | None:
    """The method's schedule whose MACs are nearest to a share of the dense ones; None when it cannot get within 7 %."""
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
    """One evaluation, on one thread."""
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
    """What one method gave at one share."""

    name: str
    share: float
    as_it_comes: list[float]
    finetuned: list[float]
    shares: list[float]


def sweep(config: StudyConfig, images: int, seeds: int, names: Sequence[str]) -> list[Row]:
    """Everything, in parallel on all cores; rows in the order of METHODS, the dense model first."""
    shape = model_shape(config.model)
    dense = estimate_cost(shape).gmacs
    wanted: list[tuple[str, float, Schedule, bool]] = [("dense", 1.0, Schedule(), False)]
    for share in SHARES:
        for method in METHODS:
            schedule = at_share(method, shape, share) if not names or method.name in names else None
            if schedule is not None:
                wanted.append((method.name, share, schedule, method.trained))
    rows = [Row(name, share, [], [], []) for name, share, _, _ in wanted]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = {}
        for row, (_, _, schedule, trained) in zip(rows, wanted, strict=True):
            for seed in range(seeds):
                jobs[pool.submit(run, config, schedule, images, seed)] = (row, row.finetuned)
                if seed == 0 and not trained:  # without training the seed changes nothing
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
    """Where the dense model's class attention lies, block by block: its entropy, and what the best 30 % cover."""
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
    """The page."""

    def spread(values: Iterable[float]) -> str:
        numbers = list(values)
        return f"{mean(numbers):.2f}" + (f" ± {stdev(numbers):.2f}" if len(numbers) > 1 else "") if numbers else "-"

    lines = [
        f"# Methods at the same cost: {config.name}",
        "",
        f"`{command}`. Model {config.model.name}; top-1 in %, as it comes (without any training; nothing to show for",
        f"methods that learn a score or queries), and after {images} images of fine-tuning with distillation,",
        f"{seeds} seeds, mean ± standard deviation. MACs as a share of the dense model's. Thresholds start from",
        "keeping everything, are trained towards the share and then calibrated on it.",
        "",
        "| method | MACs | as it comes | fine-tuned |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {mean(row.shares):.1%} | {spread(row.as_it_comes)} | {spread(row.finetuned)} |" for row in rows
    ]
    return "\n".join([*lines, "", *expectations(rows), "", "Why, in the dense model:", "", *why(config)]) + "\n"


def expectations(rows: Sequence[Row]) -> list[str]:
    """What the papers lead one to expect, and whether it came out."""
    value = {(row.name, row.share): mean(row.finetuned) for row in rows}
    lines = ["Expected from the papers, after fine-tuning:", ""]
    low = min(SHARES)

    def line(text: str, holds: bool, numbers: str) -> None:
        lines.append(f"- {text}: {'holds' if holds else 'does not hold here'} ({numbers})")

    for share in SHARES:
        random = value.get(("random drop", share))
        for row in rows:
            if random is not None and row.share == share and row.name != "random drop":
                mine = mean(row.finetuned)
                line(f"{row.name} beats random drop at {share}", mine > random, f"{mine:.2f} against {random:.2f}")
    chain = [value.get((name, low)) for name in ("eTPS", "EViT, fuse", "EViT, drop")]
    if all(number is not None for number in chain):
        squeeze, fuse, drop = (float(number) for number in chain if number is not None)
        line(f"squeeze > fuse > drop at {low}", squeeze > fuse > drop, f"{squeeze:.2f}, {fuse:.2f}, {drop:.2f}")
    return lines


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Top-1 against MACs: hollow as it comes, filled after fine-tuning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for index, method in enumerate(METHODS):
        mine = sorted((row for row in rows if row.name == method.name), key=lambda row: row.share)
        if not mine:
            continue
        colour = colours[index % len(colours)]
        x, y = [mean(row.shares) for row in mine], [mean(row.finetuned) for row in mine]
        error = [stdev(row.finetuned) if len(row.finetuned) > 1 else 0.0 for row in mine]
        axes.errorbar(x, y, error, marker="o", color=colour, label=method.name, capsize=2)
        if mine[0].as_it_comes:
            axes.plot(x, [mean(row.as_it_comes) for row in mine], marker="o", mfc="none", ls=":", lw=0.8, color=colour)
    dense = mean(rows[0].finetuned)
    axes.axhline(dense, color="0.4", lw=0.8, ls="--")
    axes.annotate(f"dense, fine-tuned: {dense:.2f}", (0.01, dense), (0, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=8, color="0.3")  # fmt: skip
    axes.set(xlabel="MACs, share of the dense model's", ylabel="top-1, %", title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--study", type=Path, default=Path(__file__).parent.parent / "search_spaces/digits_predictor.yaml"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--images", type=int, default=4792, help="of one fine-tune (default: four epochs of digits)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", action="append", default=[], help="only these")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    config = load_study(given.study, given.set)
    study = os.path.relpath(given.study)
    command = f"python scripts/compare_methods.py --study {study} --images {given.images} --seeds {given.seeds}"
    rows = sweep(config, given.images, given.seeds, given.method)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    picture = given.out.with_suffix(".png")
    page = report(rows, config, given.images, given.seeds, command)
    given.out.write_text(f"{page}\n![the same as a picture]({picture.name})\n", encoding="utf-8")
    draw(rows, picture, f"{config.model.name}: methods at the same cost")
    print(page)


if __name__ == "__main__":
    main()
