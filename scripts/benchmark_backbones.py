#!/usr/bin/env python
"""One model of each family: what dropping, squeezing and merging to about 0.6 of the MACs gains, and what it costs that
positions follow their tokens.

    python scripts/benchmark_backbones.py --threads 1 --out benchmarks/backbones.md     # about 25 minutes on one core

Random weights: speed does not depend on them. Within a cell, the dense model and the pruned ones are timed in turns.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

from prunesearch.cost import estimate_cost
from prunesearch.device.profiles import processor
from prunesearch.device.runtimes import RUNTIMES, Settings
from prunesearch.device.whole_models import DENSE, models_in_turns
from prunesearch.files import write_atomically
from prunesearch.models import apply_schedule, class_of, input_size, shape_of
from prunesearch.models.pair_bias import BiasedAttention
from prunesearch.models.parts import example, sharing_copy
from prunesearch.models.rotary import Rotary
from prunesearch.schedule import Schedule, Stage
from prunesearch.shape import ModelShape

MODELS: dict[str, dict[str, Any]] = {
    "deit_small_patch16_224": {},
    "vit_small_patch16_dinov3": {"num_classes": 1000, "img_size": 224},
    "vit_small_patch16_rope_mixed_224": {},
    "beit_base_patch16_224": {"embed_dim": 384, "num_heads": 6},
    "vit_relpos_small_patch16_224": {},
    "naflexvit_base_patch16_gap": {
        "embed_dim": 384,
        "num_heads": 6,
        "pretrained_cfg_overlay": {"input_size": (3, 224, 224)},
    },
    "swinv2_tiny_window8_256": {},
}
"""Of every family one, and two of rotary positions; those that timm has in large sizes only at the width of a small."""
VERBS = ("drop", "squeeze", "merge")
SHARE, MAP_SHARE = 0.6, 0.8
"""Of the dense model's MACs; for maps, which keep their positions, as `hold` hardly comes lower."""
FROZEN = "drop, not followed"


@dataclass(frozen=True)
class Row:
    """A pruned model: by how much its MACs fall, and how many times as fast it is, with quartiles."""

    model: str
    kind: str
    runtime: str
    batch: int
    verb: str
    reduction: float
    speed: float
    low: float
    high: float
    ms: float


def schedule_of(shape: ModelShape, verb: str) -> Schedule:
    """Stages at a quarter, half and three quarters of the depth, with the keep ratio that comes near the share."""
    blocks = [shape.depth * quarter // 4 for quarter in (1, 2, 3)]
    score = "none" if verb == "merge" else "class_attention" if shape.has_class_token else "key_norm"

    def made(keep: float) -> Schedule:
        if shape.holds:
            return Schedule(tuple(Stage(b, at="pre", score="random", keep=keep, reduce="hold") for b in blocks))
        if verb == "merge":  # at most half at once, so in every block
            return Schedule(tuple(Stage(b, score=score, keep=keep, reduce=verb) for b in range(1, shape.depth - 1)))
        return Schedule(tuple(Stage(b, score=score, keep=keep, reduce=verb) for b in blocks))

    dense, share = estimate_cost(shape).macs, MAP_SHARE if shape.holds else SHARE
    keeps = [keep / 1000 for keep in range(501 if verb == "merge" else 100, 1000)]
    return made(min(keeps, key=lambda keep: abs(estimate_cost(shape, made(keep)).macs / dense - share)))


@contextmanager
def not_followed() -> Iterator[None]:
    """Positions of the first tokens of the image for whatever tokens are left: wrong, but nothing is looked up."""

    def rows(self: Rotary, table_HnD: Tensor, place_Bn2: Tensor) -> Tensor:
        return table_HnD[None, :, : place_Bn2.shape[1]]

    def bias_of(self: Any, given: Any, found: Tensor | None) -> Tensor | None:
        bias, mask = self.pair_bias(given), given.get("attn_mask")
        bias = bias if bias is None or found is None else bias[..., : found.shape[1], : found.shape[1]].contiguous()
        return mask if bias is None else bias if mask is None else bias + mask

    with patch.object(Rotary, "_rows", rows), patch.object(BiasedAttention, "bias_of", bias_of):
        yield


def rows_of(name: str, batch: int, threads: int, seconds: float) -> Iterator[Row]:
    model = timm.create_model(name, **MODELS[name]).eval()
    settings = Settings(torch.device("cpu"), threads)
    shape = shape_of(model)
    images = [example(batch, *input_size(model), like=next(model.parameters()).detach())]
    schedules = {"hold": schedule_of(shape, "hold")} if shape.holds else {v: schedule_of(shape, v) for v in VERBS}
    dense = estimate_cost(shape).macs
    for runtime in ("torch", "onnxruntime"):
        models = {DENSE: model} | {
            verb: apply_schedule(sharing_copy(model), schedule, untrained=True).eval()
            for verb, schedule in schedules.items()
        }
        if runtime == "torch" and shape.has_positions:
            models[FROZEN] = _Frozen(models["drop"])
        ratios, problems = models_in_turns(models, images, RUNTIMES[runtime], settings, seconds)
        for verb, why in problems.items():
            print(f"{name}, {runtime}, {verb}: {why}", flush=True)
        for verb, ratio in ratios.items():
            schedule = schedules.get(verb.partition(",")[0], Schedule())
            row = Row(
                name, class_of(model), runtime, batch, verb, dense / estimate_cost(shape, schedule).macs,
                ratio.median, ratio.low, ratio.high, 1e3 * ratio.seconds,
            )  # fmt: skip
            print(row, flush=True)
            yield row


class _Frozen(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with not_followed():
            return self.model(images)


def page(rows: list[Row], arguments: argparse.Namespace) -> str:
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, timm))
    lines = [
        "# One model of each family",
        "",
        f"Dense against pruned to about {SHARE} of the MACs (Swin-V2, whose map stays whole, {MAP_SHARE}): stages",
        "of drop or squeeze at a quarter, half and three quarters of the depth, merge in every block but the first and",
        f"the last. Random weights. Timed in turns with the dense model, {arguments.seconds:g} s for each cell,",
        f"{arguments.threads} CPU thread(s), {processor(torch.device('cpu'))}, float32, {versions}. BEiT and NaFlexVit",
        "have the width of a small ViT (384, 6 heads); DINOv3 and NaFlexVit take 224 x 224.",
        "",
        "| model | class | batch | verb | MACs of dense / its own | eager, x dense (quartiles) | ms "
        "| ONNX Runtime, x dense | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cells = {(row.model, row.batch, row.verb, row.runtime): row for row in rows}
    for (model, batch, verb, runtime), row in cells.items():
        if runtime != "torch" or verb == FROZEN:
            continue
        other = cells.get((model, batch, verb, "onnxruntime"))
        theirs = "- | -" if other is None else f"{_speed(other)} | {other.ms:.1f}"
        own = f"{row.reduction:.2f} | {_speed(row)} | {row.ms:.1f}"
        lines.append(f"| {model} | {row.kind} | {batch} | {verb or 'dense'} | {own} | {theirs} |")
    lines += [
        "",
        "What following costs: the same dropping in eager PyTorch, but with the positions of the image's first tokens",
        "for whatever is left.",
        "",
        "| model | batch | drop, ms | not followed, ms | following takes |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row.verb == FROZEN:
            drop = cells[row.model, row.batch, "drop", "torch"]
            lines.append(
                f"| {row.model} | {row.batch} | {drop.ms:.1f} | {row.ms:.1f} | {row.speed / drop.speed - 1:.1%} |"
            )
    batches = " ".join(map(str, arguments.batches))
    command = (
        f"python scripts/benchmark_backbones.py --batches {batches} --threads {arguments.threads} "
        f"--seconds {arguments.seconds:g}"
    )
    return "\n".join([*lines, "", f"Made with `{command} --out benchmarks/backbones.md`.", ""])


def _speed(row: Row) -> str:
    return "1" if row.verb == DENSE else f"{row.speed:.2f} ({row.low:.2f} to {row.high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="of measuring for each model, batch and runtime")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [
        row
        for name in arguments.models
        for batch in arguments.batches
        for row in rows_of(name, batch, arguments.threads, arguments.seconds)
    ]
    text = page(rows, arguments)
    print(text)
    if arguments.out is not None:
        write_atomically(arguments.out, text.encode())


if __name__ == "__main__":
    main()
