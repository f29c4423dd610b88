#!/usr/bin/env python
"""Does a search without labels find features that are good with them? Similarity of features against k-NN accuracy.

    python scripts/benchmark_features.py --model model.checkpoint=mine.safetensors \\
        --train train.tar --val val.tar --out benchmarks/features.md

A study of search_spaces/cifar10_vit.yaml without its classifier and without the labels of its pictures: candidates are
trained towards the dense model's features and compared by `feature_similarity`. Afterwards every candidate's weights
are judged with the labels, by `knn_top1`. Cost alone makes the two agree, so agreement is also counted among pairs of
candidates whose costs are alike. The two archives have class/image files.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from prunesearch.config import Budget, DataConfig, Objective, StopConfig, StudyConfig, WorkersConfig
from prunesearch.device.profiles import processor
from prunesearch.evaluate import Task, evaluate
from prunesearch.evaluate.machine import find_device, versions
from prunesearch.files import load_study, write_atomically
from prunesearch.report.tables import short
from prunesearch.search.agreement import kendall_tau
from prunesearch.search.driver import run_study
from prunesearch.search.problems import check_study
from prunesearch.study.reader import open_study_readonly

HOME = Path(__file__).parents[1]
ALIKE = 0.05
"""Costs of a pair are alike when they differ by at most this share."""


@dataclass(frozen=True)
class Point:
    """A candidate: cost, what the search knew, and what the labels say."""

    schedule: str
    gmacs: float
    similarity: float
    knn: float


def main() -> None:
    """Search, judge, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the study's model")
    parser.add_argument("--train", required=True, help="folder or .tar of class/image files")
    parser.add_argument("--val", required=True)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--images", type=int, default=2000, help="training images of each candidate; 0: as it comes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    config = study(parsed.model, parsed.train, parsed.val, parsed.trials, parsed.images)
    with TemporaryDirectory() as name:
        folder = Path(name) / config.name
        run_study(config, folder)
        reader = open_study_readonly(folder)
        labelled = replace(config.data, name="folder")
        points = []
        for record in reader.records():
            found = record.evaluation
            if found is None or found.status != "complete":
                continue
            weights = None if found.checkpoint is None else f"{found.checkpoint}.safetensors"
            task = Task(
                "judged", config.model, labelled, record.schedule, Budget(images=0), ("knn_top1",), weights=weights
            )
            judged = evaluate(task, raise_user_errors=True)
            point = Point(
                short(record.schedule) or "dense",
                found.value("gmacs"),
                found.value("feature_similarity"),
                judged.value("knn_top1"),
            )
            points.append(point)
            print(point, flush=True)
    write_atomically(parsed.out, page(points, config, parsed.images).encode())


def study(model: Sequence[str], train: str, val: str, trials: int, images: int) -> StudyConfig:
    """The study. Raises when it has mistakes."""
    base = load_study(HOME / "search_spaces" / "cifar10_vit.yaml", list(model))
    config = replace(
        base,
        name="features",
        model=replace(base.model, num_classes=0),
        data=DataConfig("images", train, val, mean=base.data.mean, std=base.data.std),
        space=replace(base.space, keep=(0.3, 0.5, 0.7, 0.9, 1.0), max_stages=4, until=("never", "next", "end")),
        objectives=(Objective("feature_similarity", "maximize"), Objective("gmacs", "minimize")),
        finetune=replace(base.finetune, distill_weight=1.0),
        rungs=(Budget(images=images),),
        workers=WorkersConfig(kind="serial"),
        stop=StopConfig(trials=trials),
        confirm=replace(base.confirm, speed_seconds=0),
    )
    check_study(config)
    return config


def agreement(points: Sequence[Point], alike: float | None) -> tuple[float | None, int]:
    """Kendall's tau of similarity and k-NN accuracy, over pairs with costs alike (or all), and how many pairs."""
    pairs = [
        (one, two)
        for one, two in itertools.combinations(points, 2)
        if alike is None or abs(one.gmacs / two.gmacs - 1) <= alike
    ]
    if alike is None:
        return kendall_tau([(one.similarity, one.knn) for one in points]), len(pairs)
    signs = [(one.similarity - two.similarity) * (one.knn - two.knn) for one, two in pairs]
    decided = [sign for sign in signs if sign != 0]
    if not decided:
        return None, len(pairs)
    return sum(1 if sign > 0 else -1 for sign in decided) / len(decided), len(pairs)


def page(points: Sequence[Point], config: StudyConfig, images: int) -> str:
    """The page, in Markdown."""
    (overall, all_pairs), (within, pairs) = agreement(points, None), agreement(points, ALIKE)
    dense = max(points, key=lambda point: point.gmacs)
    rows = [
        f"| {point.gmacs / dense.gmacs:.0%} | {point.similarity:.2f} | {point.knn:.2f} | {point.schedule} |"
        for point in sorted(points, key=lambda point: point.gmacs)
    ]
    said = [f"{'none' if tau is None else f'{tau:.2f}'}" for tau in (overall, within)]
    trained = f"trained on {images} pictures towards the dense features" if images else "as they come"
    weights = Path(config.model.checkpoint).name if config.model.checkpoint else "timm's own"
    return f"""# Features without labels, judged with them

A search over {config.model.name} (weights: {weights}) without a classifier, on the pictures of
CIFAR-10 without their labels: {len(points)} candidates, {trained}.
They were compared by `feature_similarity`, the cosine of the pooled features with the dense model's. Afterwards
`knn_top1` says, with the labels, how many validation pictures their 20 nearest training pictures classify.

- Kendall's tau of the two over all {all_pairs} pairs of candidates: {said[0]}. Cost alone makes much of that.
- Among the {pairs} pairs whose costs differ by at most {ALIKE:.0%}: {said[1]}.
- The dense model: {dense.knn:.2f} %.

{processor(find_device("cpu"))}, {", ".join(map(" ".join, versions()))}, seed {config.sampler.seed}.

| MACs | feature_similarity, % | knn_top1, % | schedule |
|---|---|---|---|
{chr(10).join(rows)}

Made with `python scripts/benchmark_features.py --model model.checkpoint={weights} --train ... --val ... --trials
{config.stop.trials} --images {images}`.
"""


if __name__ == "__main__":
    main()
