#!/usr/bin/env python
"""Compare our EViT and ToMe with the authors' released code: speed and agreement, in one process.

    git clone https://github.com/facebookresearch/ToMe          # wherever you like
    git clone https://github.com/youweiliang/evit
    python scripts/benchmark_official.py --tome ToMe --evit evit --out benchmarks/official.md

Both run the same randomly initialised DeiT-S. They are timed in turn (A B A B ...), and the ratio is the median over
the pairs, so a drift of the machine's speed favours neither. The checkouts are not modified.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from official import official_evit, official_tome

from prunesearch import Schedule, Stage, apply_schedule, shape_of
from prunesearch.presets import load_preset


def ours(dense: torch.nn.Module, schedule: Schedule) -> torch.nn.Module:
    model = timm.create_model("deit_small_patch16_224")
    model.load_state_dict(dense.state_dict())
    return apply_schedule(model, schedule).eval()


def paired_ratio(a: Callable[[], object], b: Callable[[], object], pairs: int) -> tuple[float, float, float, float]:
    """Run a and b in turn: median seconds of each, median and interquartile range of time(b) / time(a)."""

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    seconds(a), seconds(b)  # warm-up
    times = [(seconds(a), seconds(b)) for _ in range(pairs)]
    ratios = sorted(y / x for x, y in times)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return statistics.median(x for x, _ in times), statistics.median(y for _, y in times), middle, high - low


def compare(name: str, mine: torch.nn.Module, theirs: torch.nn.Module, images: torch.Tensor, pairs: int) -> str:
    """Make one row of the table."""
    first, second = mine(images), theirs(images)
    difference = float((first - second).abs().max() / second.abs().max())
    fast, slow, ratio, spread = paired_ratio(partial(mine, images), partial(theirs, images), pairs)
    speeds = f"{len(images) / fast:.1f} | {len(images) / slow:.1f}"
    return f"| {name} | {speeds} | **{ratio:.2f}** ± {spread / 2:.2f} | {difference:.1e} |"


PAGE = """\
# Against the authors' released code

DeiT-S, fp32, batch {batch}, {threads} CPU threads, torch {torch}, timm {timm}; both timed in turn, {pairs} pairs,
median ± half the interquartile range.

| schedule | ours, images/s | theirs, images/s | speed of ours / theirs | largest difference of logits, relative |
|---|---|---|---|---|
{rows}

On a CPU with 197 tokens the matrix products are nearly everything, and the two are equally fast. What differs is memory
and what a GPU may do: EViT's and ToMe's released code builds the whole attention matrix, ours keeps attention fused and
computes the one row (or the mean keys) that it needs. That has not been measured on a GPU yet.

Logits agree to rounding, but for ToMe with several merging blocks: its second merge pairs tokens by the order the first
one left them in, the authors put merged tokens behind the others, we keep image order, so the pairs differ by design.
With one merging block they agree, whatever the number of prefix tokens (`parity: all`, which the presets name). The
order has no effect on quality: a CIFAR-10 ViT with 2, 3, 4, 5 and 6 pairs merged in every block, without training, has
69.15, 69.55, 69.30, 68.75 and 68.45 % with ours and 69.75, 69.55, 69.05, 68.40 and 68.75 % with the authors' code
(2,000 images: a standard error of 1 point).

Made with `python scripts/benchmark_official.py --tome ... --evit ... --batch {batch} --pairs {pairs}`.
"""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tome", type=Path, required=True, help="checkout of facebookresearch/ToMe")
    parser.add_argument("--evit", type=Path, required=True, help="checkout of youweiliang/evit")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    dense = timm.create_model("deit_small_patch16_224").eval()
    for parameter in dense.parameters():  # a fresh model has flat attention, so all scores would be ties
        parameter.copy_(parameter + 0.05 * torch.randn_like(parameter))
    shape = shape_of(dense)
    images = torch.randn(arguments.batch, 3, 224, 224)
    rows = []

    def row(name: str, schedule: Schedule, theirs: torch.nn.Module) -> None:
        rows.append(compare(name, ours(dense, schedule), theirs, images, arguments.pairs))
        print(rows[-1], flush=True)

    for name, keep, fuse in (("evit-0.7", 0.7, False), ("evit-fuse-0.7", 0.7, True), ("evit-fuse-0.5", 0.5, True)):
        row(name, load_preset(name, shape), official_evit(arguments.evit, dense, keep, fuse))
    once = Schedule((Stage(5, tokens=146, reduce="merge", options={"parity": "all"}),))
    row("ToMe, 50 pairs at block 5", once, official_tome(arguments.tome, dense, [0] * 5 + [50]))
    for rate in (13, 16):
        row(f"tome-r{rate}", load_preset(f"tome-r{rate}", shape), official_tome(arguments.tome, dense, rate))
    if arguments.out:
        about = dict(batch=arguments.batch, pairs=arguments.pairs, threads=torch.get_num_threads())
        page = PAGE.format(rows="\n".join(rows), torch=torch.__version__, timm=timm.__version__, **about)
        arguments.out.write_text(page)


if __name__ == "__main__":
    main()
