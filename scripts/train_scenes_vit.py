#!/usr/bin/env python
"""Train the segmentation ViT that ships with prunesearch on scenes of digits, and write its weights and model card.

    python scripts/train_scenes_vit.py            # about half an hour on one CPU core

The same command, versions and machine give the same weights.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional as F

from prunesearch.config import DataConfig
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.scenes import CLASSES, COUNTS, DIGITS_OF
from prunesearch.models.dense_head import resized
from prunesearch.models.scenes_vit import WEIGHTS

NAME = "vit_scenes_patch4_rope_64"


def initialise(model: nn.Module) -> None:
    """Initialise with larger weights than timm, whose standard deviation of 0.02 suits wide models."""
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)


def train(images: ImageSet, settings: argparse.Namespace) -> nn.Module:
    torch.manual_seed(settings.seed)
    order = torch.Generator().manual_seed(settings.seed)
    model = timm.create_model(NAME)
    initialise(model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=settings.learning_rate, weight_decay=0.05)
    steps = settings.epochs * -(-len(images) // settings.batch_size)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 20, t_in_epochs=False)
    step = 0
    model.train()
    for epoch in range(settings.epochs):
        total = 0.0
        batches = torch.randperm(len(images), generator=order).split(settings.batch_size)
        for pictures, masks in images.batches(batches, torch.device("cpu")):
            schedule.step_update(step)
            loss = F.cross_entropy(resized(model(pictures), masks.shape[1:]), masks)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(pictures)
            step += 1
            if step % 100 == 0:
                print(f"  step {step:,}/{steps:,}  loss {loss.item():.4f}", flush=True)
        print(f"epoch {epoch + 1:3}/{settings.epochs}  loss {total / len(images):.4f}", flush=True)
    return model.eval()


@torch.inference_mode()
def shares(model: nn.Module, images: ImageSet) -> tuple[list[float], float]:
    """Intersection over union of each class, and the share of pixels that are right, in percent."""
    found = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    for pictures, masks in images.batches(torch.arange(len(images)).split(100), torch.device("cpu")):
        guesses = resized(model(pictures), masks.shape[1:]).argmax(dim=1)
        pairs = len(CLASSES) * masks.flatten() + guesses.flatten()
        found += pairs.bincount(minlength=len(CLASSES) ** 2).view_as(found)
    right = found.diagonal()
    union = found.sum(dim=0) + found.sum(dim=1) - right
    return (100 * right / union).tolist(), (100 * right.sum() / found.sum()).item()


def model_card(model: nn.Module, held_out: ImageSet, command: str, settings: argparse.Namespace) -> str:
    each, accuracy = shares(model, held_out)
    rows = "\n".join(f"| {name} | {value:.1f} |" for name, value in zip(CLASSES, each, strict=True))
    return f"""# {NAME}

A small Vision Transformer that tells for each patch of a scene which digit it belongs to. It is the model of the
segmentation examples and tests.

**Model.** timm `Eva` with rotary positions and a linear head on each patch: 64 x 64 grey input, patches of 4 x 4 (256
patch tokens, no class token), 6 blocks, width 64, 4 heads, MLP ratio 2;
{sum(p.numel() for p in model.parameters()):,} parameters in float32. Logits of patches are resized to pixels by
bilinear interpolation.

**Data.** `data: {{name: scenes}}`: 1 to 4 digits of `sklearn.datasets.load_digits` (UCI "Optical Recognition of
Handwritten Digits", Alpaydin and Kaynak, 1998, CC BY 4.0) on a canvas of grey clouds, and a mask with the class of each
pixel. {COUNTS["train"]:,} scenes to train, of the digits that the digits ViT trains on; {COUNTS["validation"]} for
validation, of the {DIGITS_OF["validation"]} of the other digits.

**Training.** From scratch: AdamW (weight decay 0.05, learning rate {settings.learning_rate} with 5 % warm-up and
cosine decay), {settings.epochs} epochs, batch {settings.batch_size}, cross entropy of the pixels, gradient norm at most
1, seed {settings.seed}. The weights are those of the last epoch.

**Result** on the {len(held_out)} validation scenes: mean intersection over union **{sum(each) / len(each):.2f} %**,
pixel accuracy {accuracy:.2f} %.

| class | intersection over union, % |
|---|---|
{rows}

**Made by** `{command}` with Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}.
Other versions or machines give slightly different weights.

**Not for** anything but examples and tests.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="the .safetensors file; the card goes beside it")
    settings = parser.parse_args()
    torch.set_num_threads(1)  # small matrices; one thread also makes sums reproducible
    images, held_out = open_data(DataConfig(name="scenes", loaders=0), timm.create_model(NAME))
    model = train(images, settings)
    defaults = parser.parse_args([])
    given = [
        f" --{name.replace('_', '-')} {value}"
        for name, value in vars(settings).items()
        if name != "output" and value != getattr(defaults, name)
    ]
    card = model_card(model, held_out, "python scripts/train_scenes_vit.py" + "".join(given), settings)
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), settings.output, metadata={"format": "pt"})
    settings.output.with_suffix(".md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
