#!/usr/bin/env python
"""AS-ViT on the digits: train thresholds towards 0.8, 0.65 and 0.5 of the dense MACs, starting from keeping all tokens.

    python scripts/asvit_digits.py --out benchmarks/asvit_digits.md

Reports the cost after training and after calibration, how many tokens each image keeps (with a histogram next to the
table), and whether the accuracy is the same for single images as in batches of 64.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prunesearch.config import Budget, DataConfig, FinetuneConfig, ModelConfig
from prunesearch.cost import estimate_cost
from prunesearch.evaluate import Evaluation, Task, build_model, evaluate, model_shape
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.predict import Predictions, predict
from prunesearch.models import apply_schedule
from prunesearch.schedule import Schedule, Stage

MODEL, DATA = ModelConfig("vit_digits_patch1_8", pretrained=True), DataConfig()
TARGETS = (0.8, 0.65, 0.5)
BLOCKS = (2, 4, 6)
TRAINING = FinetuneConfig(learning_rate=1e-3, batch_size=64, warmup=0.1)


def train(target_gmacs: float, images: int, calibration_images: int, save_to: str) -> Evaluation:
    stages = tuple(Stage(b, at="pre", score="head_weighted_class_attention", threshold=0.0) for b in BLOCKS)
    task = Task(
        uid="asvit",
        model=MODEL,
        data=DATA,
        schedule=Schedule(stages, target_gmacs),
        budget=Budget(images=images),
        metrics=("top1", "gmacs", "gmacs_p95"),
        finetune=replace(TRAINING, calibration_images=calibration_images),
        save_to=save_to,
    )
    result = evaluate(task)
    if result.status != "complete":
        raise SystemExit(result.traceback)
    return result


def predict_with(result: Evaluation, batch_size: int) -> Predictions:
    assert result.schedule is not None
    model = apply_schedule(build_model(MODEL), result.schedule, weights=f"{result.checkpoint}.safetensors")
    return predict(model, open_data(DATA, model)[1], batch_size, torch.device("cpu"), amp=False)


def accuracy(predictions: Predictions) -> float:
    return 100 * (predictions.logits.argmax(dim=1) == predictions.labels).double().mean().item()


def draw(counts: dict[float, tuple[Tensor, ...]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(counts), len(BLOCKS), figsize=(9, 6), sharex=True, layout="constrained")
    for row, (target, stages) in zip(rows, counts.items(), strict=True):
        for axes, block, count in zip(row, BLOCKS, stages, strict=True):
            axes.hist(count.numpy(), bins=range(66), color="tab:blue")
            axes.set_title(f"target {target:g}, after block {block}'s stage", fontsize=9)
    for axes in rows[-1]:
        axes.set_xlabel("patch tokens that stay, of 64")
    rows[1][0].set_ylabel("validation images")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4792, help="of one fine-tune (default: four epochs)")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    dense = estimate_cost(model_shape(MODEL)).gmacs
    lines = [
        "# AS-ViT on the digits: budgets that thresholds learn",
        "",
        f"`python scripts/asvit_digits.py --images {given.images}`. Thresholds of 0 (all stays) at blocks 2, 4, 6,",
        f"trained with the weights for {given.images} images towards a share of the dense MACs, then calibrated on",
        "1024 training images.",
        "MACs and accuracy on the 599 held-out images; MACs are the mean of each image's own.",
        "",
        "| target | by training alone | after calibration | misses by | 95 % of images below | top-1 | one by one |",
        "|---|---|---|---|---|---|---|",
    ]
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            alone = train(target * dense, given.images, 0, f"{folder}/alone")
            result = train(target * dense, given.images, 1024, f"{folder}/calibrated")
            batched, single = predict_with(result, 64), predict_with(result, 1)
            assert torch.equal(batched.logits.argmax(1), single.logits.argmax(1)), "the batch changed a prediction"
            assert all(torch.equal(a, b) for a, b in zip(batched.counts, single.counts, strict=True))
            counts[target] = batched.counts
            lines.append(
                f"| {target:g} | {alone.value('gmacs') / dense:.3f} | {result.value('gmacs') / dense:.3f} "
                f"| {result.value('target_miss'):.1f} % | {result.value('gmacs_p95') / dense:.2f} "
                f"| {accuracy(batched):.2f} | {accuracy(single):.2f} |"
            )
            print(lines[-1], flush=True)
    picture = given.out.with_suffix(".png")
    draw(counts, picture)
    lines += [
        "",
        "Predictions and token counts of every image are the same in batches of 64 and one by one (checked).",
        "",
        f"![how many tokens images keep]({picture.name})",
    ]
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
