#!/usr/bin/env python
"""Where is a token that stands for several? Rotary positions of merged tokens: the host's, or the mean of them all.

    python scripts/benchmark_rotary.py --out benchmarks/rotary.md          # about six minutes on one core

For each kind of rotary table, small ViTs (timm's Eva) are trained on the digits, with two seeds. Then each is pruned as
it comes, with both values of the option `position` of every verb that has it. Compared is the KL divergence from the
dense model's predictions, on the same images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from timm.models.eva import Eva
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional as F
from train_digits_vit import shifted

from prunesearch.evaluate.digits import load_digits
from prunesearch.files import write_atomically
from prunesearch.models import apply_schedule, remove_schedule
from prunesearch.schedule import Schedule, Stage
from prunesearch.tokens import REDUCERS

TABLES: dict[str, dict[str, object]] = {
    "cat": dict(rope_type="cat"),
    "mixed": dict(rope_type="mixed"),
    "dinov3": dict(rope_type="dinov3", rope_rotate_half=True),
}
BLOCKS = {"early": (1, 2), "spread": (1, 3, 4)}
KEEPS = (0.8, 0.65, 0.5)


class Row(NamedTuple):
    """One schedule of one model: KL in nats by position, and how often the host's is the smaller one, over images."""

    table: str
    verb: str
    keep: float
    blocks: str
    host: float
    mean: float
    share: float


def normalised(images_BHW: torch.Tensor) -> torch.Tensor:
    return ((images_BHW.float() / 255 - 0.3) / 0.38).unsqueeze(1)


def trained(table: str, epochs: int, seed: int) -> tuple[nn.Module, float]:
    """A ViT of six blocks and 64 patch tokens, without absolute positions; and its top-1."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model = Eva(
        img_size=8, patch_size=1, in_chans=1, embed_dim=48, depth=6, num_heads=3, mlp_ratio=2.0, num_classes=10,
        use_abs_pos_emb=False, use_rot_pos_emb=True, attn_type="rope", head_init_scale=1.0, **TABLES[table],
    )  # fmt: skip
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    images, labels = load_digits("train")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    steps = epochs * -(-len(images) // 64)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 20, t_in_epochs=False)
    step = 0
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(len(images), generator=order).split(64):
            schedule.step_update(step)
            logits = model(normalised(shifted(images[chosen], order)))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[chosen], label_smoothing=0.05).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
    model.eval()
    images, labels = load_digits("validation")
    with torch.inference_mode():
        right = (model(normalised(images)).argmax(1) == labels).float().mean().item()
    return model, 100 * right


@torch.inference_mode()
def rows_of(model: nn.Module, table: str) -> Iterable[Row]:
    images = normalised(load_digits("validation")[0])
    dense = model(images).log_softmax(dim=1)
    verbs = [name for name, entry in REDUCERS.items() if "position" in entry.options]
    for verb in verbs:
        for keep in KEEPS:
            for name, blocks in BLOCKS.items():
                kl = {}
                for position in ("host", "mean"):
                    score = "class_attention" if REDUCERS[verb].ranks else "none"
                    options = {"position": position} | ({"variance": 1.0} if verb == "drop_or_merge" else {})
                    stages = tuple(
                        Stage(block, score=score, keep=keep, reduce=verb, options=options) for block in blocks
                    )
                    apply_schedule(model, Schedule(stages))
                    pruned = model(images).log_softmax(dim=1)
                    kl[position] = F.kl_div(pruned, dense, log_target=True, reduction="none").sum(dim=1)
                    remove_schedule(model)
                share = (kl["host"] < kl["mean"]).float().mean().item()
                yield Row(table, verb, keep, name, kl["host"].mean().item(), kl["mean"].mean().item(), share)


def page(rows: list[Row], accuracies: dict[str, list[float]], arguments: argparse.Namespace) -> str:
    verbs = list(dict.fromkeys(row.verb for row in rows))
    lines = [
        "# Rotary positions of merged tokens",
        "",
        "ViTs of six blocks with rotary positions (timm's Eva, no absolute positions), trained on the digits for",
        f"{arguments.epochs} epochs with {arguments.seeds} seeds, then pruned as they come. KL from the dense model",
        f"on 599 images, in nats, mean over seeds, keep ratios ({', '.join(map(str, KEEPS))} in each stage) and two",
        "choices of blocks. host: a token that stands for several has the position of its host. mean: it has the mean",
        "of all their positions, weighted as their features are. share: of the images, for how many the host's is the",
        "smaller KL. wins: of the schedules, for how many.",
        "",
        *(
            f"Top-1 of {table}: {', '.join(f'{value:.1f}' for value in values)} %."
            for table, values in accuracies.items()
        ),
        "",
        "| table | verb | KL, host | KL, mean | host / mean | share | wins of host |",
        "|---|---|---|---|---|---|---|",
    ]
    for table in [*accuracies, "all"]:
        for verb in [*verbs, "all"]:
            chosen = [row for row in rows if table in (row.table, "all") and verb in (row.verb, "all")]
            host, other = mean(row.host for row in chosen), mean(row.mean for row in chosen)
            wins = sum(row.host < row.mean for row in chosen)
            lines.append(
                f"| {table} | {verb} | {host:.4f} | {other:.4f} | {host / other:.2f} | "
                f"{mean(row.share for row in chosen):.0%} | {wins} of {len(chosen)} |"
            )
    command = f"python scripts/benchmark_rotary.py --epochs {arguments.epochs} --seeds {arguments.seeds}"
    return "\n".join([*lines, "", f"Made with `{command} --out benchmarks/rotary.md`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    accuracies: dict[str, list[float]] = {}
    for table in TABLES:
        for seed in range(arguments.seeds):
            model, accuracy = trained(table, arguments.epochs, seed)
            print(f"{table}, seed {seed}: top-1 {accuracy:.1f} %", flush=True)
            accuracies.setdefault(table, []).append(accuracy)
            rows += rows_of(model, table)
    text = page(rows, accuracies, arguments)
    print(text)
    if arguments.out is not None:
        write_atomically(arguments.out, text.encode())


if __name__ == "__main__":
    main()
