"""Time schedules in eager PyTorch, compiled, and compiled ahead of time (AOTInductor), beside the dense model.

    python scripts/benchmark_compile.py --models deit_tiny_patch16_224 deit_small_patch16_224 --batches 1 8

Every schedule has one verb in three blocks and about SHARE of the dense model's MACs. For each model and batch size,
all schedules in all ways are timed in turns. Weights are random, because time does not depend on them. Compiling needs
a C++ compiler, and takes seconds to a minute for each schedule and way.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from prunesearch.config import ModelConfig
from prunesearch.cost import estimate_cost
from prunesearch.device.profiles import processor
from prunesearch.device.runtimes import Run, Settings, prepare, runtime_of, threads_set
from prunesearch.device.timing import in_turns
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.machine import versions
from prunesearch.models import apply_schedule, input_size, shape_of
from prunesearch.models.parts import Part, example, sharing_copy
from prunesearch.printable import counted
from prunesearch.schedule import Schedule, Stage
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS

SHARE = 0.6
VERBS = ("drop", "fuse", "squeeze", "merge", "absorb")
DENSE = "dense"
TOLERANCE = 1e-3
"""How far logits may be from those of eager PyTorch, as a share of the largest one, before anything is timed."""


class AnyBatch(nn.Module):
    """A model below code of its own. PyTorch would else take the graph that it has for one batch size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        return self.model(images)


def eager(model: nn.Module, images: Tensor, settings: Settings, folder: Path) -> Run:
    """Operator by operator."""
    return prepare([Part((model,), (images,))], runtime_of("torch"), settings)[0]


def compiled(model: nn.Module, images: Tensor, settings: Settings, folder: Path) -> Run:
    """`torch.compile` for one batch size."""
    return prepare([Part((model,), (images,))], runtime_of("compile"), settings)[0]


def compiled_for_any_batch(model: nn.Module, images: Tensor, settings: Settings, folder: Path) -> Run:
    """`torch.compile` with a dynamic batch."""
    part = Part((AnyBatch(model),), (images,), tokens_axis=((0, 0),))  # the axis that varies is the batch
    return prepare([part], runtime_of("compile"), settings)[0]


def ahead_of_time(model: nn.Module, images: Tensor, settings: Settings, folder: Path) -> Run:
    """AOTInductor with a dynamic batch."""
    with torch.inference_mode(False), torch.no_grad():
        two = torch.cat([images, images])[:2].clone()  # not 1: the exporter would take a batch of 1 for a constant
        program = torch.export.export(model, (two,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{time.time_ns()}.pt2"))
    run = torch._inductor.aoti_load_package(file)
    return lambda: run(images)


WAYS: dict[str, Callable[[nn.Module, Tensor, Settings, Path], Run]] = {
    "eager": eager,
    "compile": compiled,
    "compile, any batch": compiled_for_any_batch,
    "AOTInductor": ahead_of_time,
}


@dataclass(frozen=True)
class Cell:
    """What was measured of one model and batch size.

    shares: MACs of each schedule, as a share of the dense model's. ms: of a batch, by schedule and way. seconds: of
    compiling, by schedule and way.
    """

    model: str
    batch: int
    shares: dict[str, float]
    ms: dict[tuple[str, str], float]
    seconds: dict[tuple[str, str], float]
    error: float


def main() -> None:
    """Parse the arguments, measure every cell, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--verbs", nargs="+", default=list(VERBS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring, for each model and batch size")
    parser.add_argument("--out", type=Path, help="page to write, such as benchmarks/compile.md")
    parsed = parser.parse_args()
    warnings.simplefilter("ignore")  # PyTorch's own, while it compiles
    cells = []
    for name in parsed.models:
        for batch in parsed.batches:
            cells.append(measure(name, batch, parsed.verbs, parsed.threads, parsed.seconds))
            print(table(cells[-1]), flush=True)
            if parsed.out is not None:
                parsed.out.write_text(page(cells, parsed))


def measure(name: str, batch: int, verbs: list[str], threads: int, seconds: float) -> Cell:
    """Compile the dense model and a schedule for each verb, then time all of them in turns."""
    model = build_model(ModelConfig(name)).eval()
    shape = shape_of(model)
    images = example(batch, *input_size(model), like=next(model.parameters()).detach())
    models, shares = {DENSE: model}, {DENSE: 1.0}
    for verb in verbs:
        schedule = schedule_of_cost(verb, shape)
        models[verb] = apply_schedule(sharing_copy(model), schedule, untrained=True).eval()
        shares[verb] = estimate_cost(shape, schedule).macs / estimate_cost(shape).macs
    runs: dict[tuple[str, str], Run] = {}
    took: dict[tuple[str, str], float] = {}
    settings = Settings(torch.device("cpu"), threads)
    with tempfile.TemporaryDirectory() as folder, threads_set(settings):
        for way, make in WAYS.items():
            if make is compiled_for_any_batch and batch == 1:
                continue  # PyTorch makes a graph of its own for a batch of 1
            for key, one in models.items():
                start = time.perf_counter()
                runs[key, way] = make(one, images.clone(), settings, Path(folder))
                took[key, way] = time.perf_counter() - start
                check(runs[key, way], runs[key, "eager"], f"{name}, {key}, {way}")
                print(f"  {name}, batch {batch}: {key}, {way}: ready after {took[key, way]:.1f} s", flush=True)
        found = in_turns(runs, seconds)
    return Cell(
        name,
        batch,
        shares,
        {key: 1e3 * one.seconds for key, one in found.items()},
        {key: value for key, value in took.items() if WAYS[key[1]] is not eager},
        max(one.error for one in found.values()),
    )


def schedule_of_cost(verb: str, shape: ModelShape) -> Schedule:
    """One verb at a quarter, a half and three quarters of the depth, whose keep ratio comes closest to SHARE."""
    dense = estimate_cost(shape).macs

    def with_keep(percent: int) -> Schedule:
        score = "class_attention" if REDUCERS[verb].ranks else "none"
        places = [shape.depth // 4, shape.depth // 2, 3 * shape.depth // 4]
        stages = [Stage(place, score=score, keep=percent / 100, reduce=verb) for place in places]
        return Schedule(tuple(stages))

    lowest = 50  # what merges pairs keeps half of the tokens at least
    return min(map(with_keep, range(lowest, 100)), key=lambda one: abs(estimate_cost(shape, one).macs / dense - SHARE))


def check(run: Run, reference: Run, what: str) -> None:
    """Raise RuntimeError when logits are not those of eager PyTorch."""
    logits, expected = run(), reference()
    assert isinstance(logits, Tensor) and isinstance(expected, Tensor)
    far = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not far <= TOLERANCE:
        raise RuntimeError(f"{what}: logits are {far:.2g} of the largest one away from those of eager PyTorch.")


def table(cell: Cell) -> str:
    """Milliseconds, and how many times as fast as the dense model in the same way and in eager PyTorch."""
    ways = [way for way in WAYS if (DENSE, way) in cell.ms]
    lines = [f"| | MACs | {' | '.join(ways)} |", f"|---|---|{'---|' * len(ways)}"]
    for key, share in cell.shares.items():
        texts = []
        for way in ways:
            ms, dense, slowest = cell.ms[key, way], cell.ms[DENSE, way], cell.ms[DENSE, "eager"]
            texts.append(f"{ms:.2f} · {dense / ms:.2f} · {slowest / ms:.2f}")
        lines.append(f"| {key} | {share:.0%} | {' | '.join(texts)} |")
    compiling = [way for way in ways if (DENSE, way) in cell.seconds]
    took = {way: [value for key, value in cell.seconds.items() if key[1] == way] for way in compiling}
    seconds = ", ".join(
        f"{way} {median(values):.0f} s ({min(values):.0f} to {max(values):.0f})" for way, values in took.items()
    )
    return (
        f"## {cell.model}, batch {cell.batch}\n\n{chr(10).join(lines)}\n\n"
        f"Compiling one of these: {seconds}. Largest standard error of a time: {cell.error:.1%}."
    )


def page(cells: list[Cell], parsed: argparse.Namespace) -> str:
    """The page, in Markdown."""
    command = (
        f"python scripts/benchmark_compile.py --models {' '.join(parsed.models)} --batches "
        f"{' '.join(map(str, parsed.batches))} --verbs {' '.join(parsed.verbs)} --threads {parsed.threads} "
        f"--seconds {parsed.seconds:g} --out {parsed.out}"
    )
    machine = f"{processor(torch.device('cpu'))}, {counted(parsed.threads, 'thread')}"
    return f"""# Schedules in eager PyTorch, compiled, and compiled ahead of time

Each schedule has one verb at a quarter, a half and three quarters of the depth (score: class_attention), and about
{SHARE:.0%} of the dense model's MACs. In each field: milliseconds of a batch · times as fast as the dense model in the
same way · times as fast as the dense model in eager PyTorch. All fields of a model and batch size are measured in
turns, for {parsed.seconds:g} s. Before, logits are compared with those of eager PyTorch.

compile: `torch.compile` for one batch size. compile, any batch: with a dynamic batch; PyTorch makes a graph of its own
for a batch of 1. AOTInductor: `torch.export` with a dynamic batch, then `aoti_compile_and_package`. How it is called is
in [docs/compile.md](../docs/compile.md). Seconds of compiling were measured once; PyTorch's cache of compiled code may
have known some of it.

{machine}, float32, {", ".join(map(" ".join, versions()))}. Random weights.

{(chr(10) * 2).join(map(table, cells))}

Made with `{command}`.
"""


if __name__ == "__main__":
    main()
