#!/usr/bin/env python
"""Compare all scores and all verbs on the digits: cost, and accuracy without training and after a short fine-tune.

    python scripts/compare_scores.py --out benchmarks/scores_and_verbs.md

Every row keeps 0.5 of the patch tokens at blocks 2, 4 and 6 of the shipped ViT (64 -> 32 -> 16 -> 8), means over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import timm
import torch

from prunesearch import Schedule, Stage, Task, estimate_cost, shape_of
from prunesearch.config import Budget, DataConfig, FinetuneConfig, ModelConfig
from prunesearch.evaluate import evaluate, model_shape
from prunesearch.tokens import REDUCERS, SCORERS

MODEL = ModelConfig("vit_digits_patch1_8", pretrained=True)
FINETUNE = FinetuneConfig(learning_rate=1e-3, batch_size=64, distill_weight=0.5)


def schedule(score: str, reduce: str, keep: float) -> Schedule:
    return Schedule(tuple(Stage(block, score=score, keep=keep, reduce=reduce) for block in (2, 4, 6)))


def top1(candidate: Schedule, images: int, seeds: int) -> str:
    values = []
    for seed in range(seeds if images else 1):
        task = Task(
            uid="compare", model=MODEL, data=DataConfig("digits"), schedule=candidate, budget=Budget(images=images),
            metrics=("top1",), finetune=FINETUNE, seed=seed,
        )  # fmt: skip
        result = evaluate(task)
        if result.status != "complete":
            raise SystemExit(result.traceback)
        values.append(result.value("top1"))
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def extra_macs(score: str, reduce: str) -> str:
    """MACs that a scorer or reducer itself adds to DeiT-S, for one stage that keeps 0.7 of 196 tokens."""
    with torch.device("meta"):
        shape = shape_of(timm.create_model("deit_small_patch16_224"))
    candidate = Schedule((Stage(3, score=score, keep=0.7, reduce=reduce),))
    free = Schedule((Stage(3, score="random", tokens=138 + (reduce == "fuse"), reduce="drop"),))
    return f"{(estimate_cost(shape, candidate).macs - estimate_cost(shape, free).macs) / 1e6:.2f}"


PAGE = """\
# What each score and each reduce verb costs and does

The shipped digits ViT, keep {keep:g} at blocks 2, 4 and 6; top-1 in % on the held-out third, as it comes and after
{images} training images with distillation (mean ± standard deviation over {seeds} seeds). Extra MACs: what the score
and the verb cost by themselves on DeiT-S (4,599 M), one stage of keep 0.7 at block 3.

| score | reduce | extra MACs on DeiT-S, M | MACs of dense | top-1 as it comes | top-1 after the fine-tune |
|---|---|---|---|---|---|
{rows}

Made with `python scripts/compare_scores.py --images {images} --seeds {seeds} --keep {keep:g}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2396, help="training images of the short fine-tune (2 epochs)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape, rows = model_shape(MODEL), []

    def row(start: str, candidate: Schedule) -> None:
        share = estimate_cost(shape, candidate).macs / estimate_cost(shape).macs
        tuned = top1(candidate, arguments.images, arguments.seeds)
        rows.append(f"| {start} | {share:.0%} | {top1(candidate, 0, 1)} | {tuned} |")
        print(rows[-1], flush=True)

    row("dense | | ", Schedule())
    pairs = [(score, "drop") for score in SCORERS]
    pairs += [
        ("class_attention" if entry.ranks else "none", verb) for verb, entry in REDUCERS.items() if verb != "drop"
    ]
    for score, verb in pairs:
        row(f"`{score}` | `{verb}` | {extra_macs(score, verb)}", schedule(score, verb, arguments.keep))
    if arguments.out:
        about = dict(images=arguments.images, seeds=arguments.seeds, keep=arguments.keep)
        arguments.out.write_text(PAGE.format(rows="\n".join(rows), **about))


if __name__ == "__main__":
    main()
