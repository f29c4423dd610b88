#!/usr/bin/env python
"""Compare ways to run a batch whose images keep different numbers of tokens: padded, in groups, or one by one.

    python scripts/benchmark_adaptive.py --out benchmarks/adaptive.md

The images are noise with a different contrast in each patch and image. A scorer of this script scores a token by the
length of its features, so the contrast controls how much the counts differ. Thresholds keep 70 % of the tokens on
average at blocks 3, 6 and 9. All ways run in turn, in one process, on the same images. The script first checks that
they give the same logits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

from prunesearch.cost import cost_of_counts, estimate_cost
from prunesearch.models import apply_schedule, shape_of, steps_of, trace, vision_transformer
from prunesearch.schedule import Schedule, Stage
from prunesearch.tokens import ScoreInput, scorer

BLOCKS = (3, 6, 9)
KEEP = 0.7
SPREADS = {"alike": 0.1, "different": 0.5, "very different": 0.9}
SEEN: list[Tensor] = []


@scorer("token_length", source="this benchmark", needs_attention=False)
def token_length(scene: ScoreInput) -> Tensor:
    """Score: the length of a token's features."""
    score_Bn = scene.patches_BnC.float().norm(dim=-1)
    SEEN.append(score_Bn)
    return score_Bn


def make_images(count: int, spread: float, size: int = 224, patch: int = 16) -> Tensor:
    """Noise images. The contrast of a patch is u * s: u is random in [0, 1], s of the image in 1 +- spread."""
    torch.manual_seed(0)
    side = size // patch
    contrast = torch.rand(count, 1, side, side) * (1 + spread * torch.linspace(-1, 1, count)).view(-1, 1, 1, 1)
    return torch.randn(count, 3, size, size) * contrast.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


@torch.inference_mode()
def thresholds_for(model: nn.Module, images: Tensor) -> Schedule:
    """Thresholds that each keep 70 % of the tokens that arrive, found stage by stage."""
    stages: tuple[Stage, ...] = ()
    for block in BLOCKS:
        apply_schedule(model, Schedule((*stages, Stage(block, at="pre", score="token_length", threshold=0.0))))
        SEEN.clear()
        outcome = trace(model, images, masked=True)
        scores, present = SEEN[-1], outcome.present_Bn
        assert present is not None
        threshold = scores[present > 0].quantile(1 - KEEP).item()
        stages = (*stages, Stage(block, at="pre", score="token_length", threshold=threshold))
    return Schedule(stages)


def in_groups(model: nn.Module, images: Tensor, groups: int) -> Tensor:
    vision_transformer.MOST_GROUPS = groups
    return model(images)


def one_by_one(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(image[None]) for image in images])


def rows_for(name: str, spread: float, batch: int, rounds: int, device: torch.device) -> list[str]:
    images = make_images(batch, spread).to(device)
    torch.manual_seed(0)
    dense, adaptive, fixed = (timm.create_model("deit_tiny_patch16_224").eval().to(device) for _ in range(3))
    adaptive.load_state_dict(dense.state_dict())
    schedule = thresholds_for(adaptive, images)
    apply_schedule(adaptive, schedule)
    with torch.inference_mode():
        outcome = trace(adaptive, images)
    means = [round(count.mean().item()) for count in outcome.counts]
    apply_schedule(
        fixed,
        Schedule(tuple(Stage(b, at="pre", score="token_length", tokens=n) for b, n in zip(BLOCKS, means, strict=True))),
    )
    shape, steps = shape_of(dense), [step.step for step in steps_of(adaptive)]
    macs = cost_of_counts(shape, steps, [count.double() for count in outcome.counts])[0].mean().item()
    last = outcome.counts[-1]
    ways: dict[str, Callable[[], Tensor]] = {
        "dense model": lambda: dense(images),
        "fixed counts, the means": lambda: fixed(images),
        "all slots, masked": lambda: trace(adaptive, images, masked=True).logits,
        "padded to the largest": lambda: in_groups(adaptive, images, 1),
        **{f"up to {n} groups": partial(in_groups, adaptive, images, n) for n in (2, 4, 8)},
        "one by one": lambda: one_by_one(adaptive, images),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        expected = outcome.logits
        for way in list(ways)[2:]:
            torch.testing.assert_close(ways[way](), expected, atol=1e-4, rtol=1e-3)
        for turn in range(rounds + 1):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:  # turn 0 is the warm-up
                    times[way].append(time.perf_counter() - start)
    speed = {
        way: median(a / b for a, b in zip(times["dense model"], taken, strict=True)) for way, taken in times.items()
    }
    share = macs / estimate_cost(shape).macs
    header = (
        f"\n**{name}**: {share:.0%} of the dense MACs, {int(last.min())} to {int(last.max())} "
        f"patch tokens at the end, batch {batch}\n\n| way | speed, dense = 1 |\n|---|---|"
    )
    return [header, *(f"| {way} | {value:.2f} |" for way, value in speed.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        "# Images with different numbers of tokens in one batch",
        "",
        f"`python scripts/benchmark_adaptive.py --batch {given.batch} --rounds {given.rounds}` on {hardware}, torch "
        f"{torch.__version__}. DeiT-T with random weights; median of {given.rounds} rounds, all ways in turn. All "
        "but the first two compute the same logits (checked).",
    ]
    for name, spread in SPREADS.items():
        lines += rows_for(name, spread, given.batch, given.rounds, device)
        print("\n".join(lines[-9:]), flush=True)
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
