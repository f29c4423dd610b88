#!/usr/bin/env python
"""Apply an exported schedule to a model with timm and a few lines, and compare it with the dense model.

    python scripts/apply_exported.py best.yaml

Prints top-1 on the digits, GMACs and images per second of the dense and the pruned model.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

import prunesearch.models.digits_vit  # registers the shipped model with timm
from prunesearch import apply_schedule, estimate_cost, shape_of
from prunesearch.evaluate.digits import load_digits
from prunesearch.models import schedule_of


@torch.inference_mode()
def top1(model: torch.nn.Module) -> float:
    pixels, labels = load_digits("validation")
    config = prunesearch.models.digits_vit.default_cfgs["vit_digits_patch1_8"].default
    images = (pixels.float()[:, None] / 255 - config.mean[0]) / config.std[0]
    return 100 * (model(images).argmax(dim=1) == labels).float().mean().item()


@torch.inference_mode()
def images_per_second(models: list[torch.nn.Module], batch: int = 256, seconds: float = 4.0) -> list[float]:
    """Median throughput of each model. The models run in turn, so that drifts of the machine affect all of them."""
    images = torch.randn(batch, 1, 8, 8)
    times: list[list[float]] = [[] for _ in models]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            model(images)
            taken.append(time.perf_counter() - start)
    return [batch / sorted(taken)[len(taken) // 2] for taken in times]


def main() -> None:
    path = Path(sys.argv[1])
    dense = timm.create_model("vit_digits_patch1_8", pretrained=True).eval()
    pruned = timm.create_model("vit_digits_patch1_8", pretrained=True).eval()

    apply_schedule(pruned, path)  # with its weights, if the file names some
    schedule = schedule_of(pruned)
    assert schedule is not None

    gmacs = [estimate_cost(shape_of(dense)).gmacs, estimate_cost(shape_of(dense), schedule).gmacs]
    speed = images_per_second([dense, pruned])
    accuracy = [top1(dense), top1(pruned)]
    print(f"{path.name}: {schedule}")
    table = Table()
    for name in ("", "top-1, %", "GMACs", "images/s"):
        table.add_column(name, justify="right" if name else "left")
    for index, name in enumerate(("dense", "pruned")):
        table.add_row(name, f"{accuracy[index]:.2f}", f"{gmacs[index]:.5f}", f"{speed[index]:,.0f}")
    table.add_row(
        "change", f"{accuracy[1] - accuracy[0]:+.2f}", f"{gmacs[1] / gmacs[0] - 1:+.0%}", f"x {speed[1] / speed[0]:.2f}"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
