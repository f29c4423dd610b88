#!/usr/bin/env python
"""What each score and each reduce verb costs and does: one table, on the digits, as it comes and after a short fine-tune.

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
from prunesearch.errors import ScheduleError
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
    """MACs a scorer or reducer adds to DeiT-S by itself, for one stage that keeps 0.7 of 196 tokens."""
    with torch.device("meta"):
        shape = shape_of(timm.create_model("deit_small_patch16_224"))
    candidate = Schedule((Stage(3, score=score, keep=0.7, reduce=reduce),))
    free = Schedule((Stage(3, score="random", tokens=138 + (reduce == "fuse"), reduce="drop"),))
    return f"{(estimate_cost(shape, candidate).macs - estimate_cost(shape, free).macs) / 1e6:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2396, help="training images of the short fine-tune (2 epochs)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape = model_shape(MODEL)
    rows = []
    pairs = [(score, "drop") for score in SCORERS]
    pairs += [("none" if not REDUCERS[verb].ranks else "class_attention", verb) for verb in REDUCERS if verb != "drop"]
    for score, verb in pairs:
        candidate = schedule(score, verb, arguments.keep)
        try:
            share = estimate_cost(shape, candidate).macs / estimate_cost(shape).macs
        except ScheduleError as error:
            raise SystemExit(str(error)) from None
        as_it_comes = top1(candidate, 0, 1)
        tuned = top1(candidate, arguments.images, arguments.seeds)
        rows.append(f"| `{score}` | `{verb}` | {extra_macs(score, verb)} | {share:.0%} | {as_it_comes} | {tuned} |")
        print(rows[-1], flush=True)
    dense = f"| dense | | | 100% | {top1(Schedule(), 0, 1)} | {top1(Schedule(), arguments.images, arguments.seeds)} |"
    print(dense)
    table = [
        "# What each score and each reduce verb costs and does",
        "",
        f"The shipped digits ViT, keep {arguments.keep:g} at blocks 2, 4 and 6; top-1 in % on the held-out third, as it comes and",
        f"after {arguments.images} training images with distillation (mean ± standard deviation over {arguments.seeds} seeds).",
        "Extra MACs: what the score and the verb cost by themselves on DeiT-S (4,599 M), one stage of keep 0.7 at block 3.",
        "",
        "| score | reduce | extra MACs on DeiT-S, M | MACs of dense | top-1 as it comes | top-1 after the fine-tune |",
        "|---|---|---|---|---|---|",
        dense,
        *rows,
        "",
        f"Made with `python scripts/compare_scores.py --images {arguments.images} --seeds {arguments.seeds} --keep {arguments.keep:g}`.",
        "",
    ]
    if arguments.out:
        arguments.out.write_text("\n".join(table))


if __name__ == "__main__":
    main()
