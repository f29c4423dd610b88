#!/usr/bin/env python
"""Train the digits ViT that ships with prunesearch, and write its weights and model card.

    python scripts/train_digits_vit.py            # about seven minutes on one CPU core

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

from prunesearch.evaluate.digits import SPLIT_SEED, load_digits
from prunesearch.models.digits_vit import WEIGHTS

NAME = "vit_digits_patch1_8"


def normalise(images_BHW: torch.Tensor, model: nn.Module) -> torch.Tensor:
    mean, std = model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
    return ((images_BHW.float() / 255 - mean) / std).unsqueeze(1)


def shifted(images_BHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to one pixel in each direction. New pixels are black."""
    count, height, width = images_BHW.shape
    padded = F.pad(images_BHW, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, count, 1), generator=generator)
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def initialise(model: nn.Module) -> None:
    """Initialise with larger weights than timm.

    timm's standard deviation of 0.02 suits wide models with large patches. Here a patch is one pixel and the width is
    48. With small weights and position embeddings the loss would not fall for tens of epochs.
    """
    nn.init.normal_(model.pos_embed, std=1.0)
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)


@torch.inference_mode()
def predict(model: nn.Module, images_BHW: torch.Tensor) -> torch.Tensor:
    model.eval()
    return torch.cat([model(normalise(part, model)) for part in images_BHW.split(256)]).argmax(1)


def train(epochs: int, batch_size: int, learning_rate: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model = timm.create_model(NAME, drop_path_rate=0.05)
    initialise(model)
    images, labels = load_digits("train")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=learning_rate, weight_decay=0.05)
    steps = epochs * -(-len(images) // batch_size)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 20, t_in_epochs=False)
    step = 0
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(images), generator=order).split(batch_size):
            schedule.step_update(step)
            logits = model(normalise(shifted(images[chosen], order), model))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(chosen)
            step += 1
        print(f"epoch {epoch + 1:3}/{epochs}  loss {total / len(images):.4f}", flush=True)
    return model


def model_card(model: nn.Module, command: str, settings: argparse.Namespace) -> str:
    images, labels = load_digits("validation")
    right = predict(model, images) == labels
    train_images, train_labels = load_digits("train")
    train_top1 = 100 * (predict(model, train_images) == train_labels).double().mean()
    mean, std = model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
    top1 = 100 * right.double().mean()
    rows = "\n".join(
        f"| {digit} | {int((labels == digit).sum())} | {100 * right[labels == digit].double().mean():.1f} |"
        for digit in range(10)
    )
    return f"""# {NAME}

A small Vision Transformer for scikit-learn's handwritten digits. It is the model of the quickstart and of the
tests: large enough that token pruning has something to lose, small enough to fine-tune in seconds on a CPU.

**Model.** timm `VisionTransformer`: 8 x 8 grey input, one patch per pixel (64 patch tokens and a class token),
8 blocks, width 48, 3 heads, MLP ratio 2; {sum(p.numel() for p in model.parameters()):,} parameters in float32.

**Data.** `sklearn.datasets.load_digits` (1797 images, 10 classes; UCI "Optical Recognition of Handwritten Digits",
Alpaydin and Kaynak, 1998, CC BY 4.0). Stratified split with seed {SPLIT_SEED}: {len(train_images)} images to train,
{len(images)} held out. Input: grey in [0, 1], mean {mean}, standard deviation {std}.

**Training.** From scratch: AdamW (weight decay 0.05, learning rate {settings.learning_rate} with 5 % warm-up and
cosine decay), {settings.epochs} epochs, batch {settings.batch_size}, shifts by up to one pixel, label smoothing 0.1,
drop path 0.05, gradient norm at most 1, position embedding drawn with standard deviation 1, seed {settings.seed}.
The weights are those of the last epoch. Width, learning rate and initialisation were chosen by hand among a
few, looking at held-out accuracy; beyond that the held-out images had no part in training.

**Result.** Top-1 on the held-out third: **{top1:.2f} %** ({int(right.sum())} of {len(right)});
on the training images {train_top1:.2f} %.

| digit | held-out images | top-1 % |
|---|---|---|
{rows}

**Made by** `{command}` with Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}.
Other versions or machines give slightly different weights.

**Not for** anything but examples and tests: it knows centred, cleanly scanned 8 x 8 digits of 43 writers.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="the .safetensors file; the card goes beside it")
    settings = parser.parse_args()
    torch.set_num_threads(1)  # tiny matrices; one thread also makes sums reproducible
    model = train(settings.epochs, settings.batch_size, settings.learning_rate, settings.seed)
    defaults = parser.parse_args([])
    given = [
        f" --{name.replace('_', '-')} {value}"
        for name, value in vars(settings).items()
        if name != "output" and value != getattr(defaults, name)
    ]
    card = model_card(model, "python scripts/train_digits_vit.py" + "".join(given), settings)
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), settings.output, metadata={"format": "pt"})
    settings.output.with_suffix(".md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
