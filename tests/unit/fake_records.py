"""Made-up records of a search on the digits ViT: real schedules and costs, invented accuracies."""

from __future__ import annotations

import random

from fake_search import SHAPE

from prunesearch.cost import estimate_cost
from prunesearch.evaluate.task import Evaluation
from prunesearch.presets import find_schedule
from prunesearch.record import Record
from prunesearch.schedule import Schedule, Stage


def record(number: int, schedule: Schedule, origin: str = "sampler") -> Record:
    """A complete candidate; later and gentler stages hurt less, squeezing hurts less than dropping."""
    cost = estimate_cost(SHAPE, schedule)
    hurt = {"drop": 1.0, "fuse": 0.8, "squeeze": 0.55, "merge": 0.6}
    damage = sum(hurt[s.reduce] * (1 - (s.keep or 1)) ** 1.5 * 9 / (1 + s.block) for s in schedule.stages)
    noise = 0.0 if origin == "dense" else random.Random(number).gauss(0, 0.25)
    top1 = 97.5 - damage + noise
    evaluation = Evaluation(
        f"u{number:02d}",
        "complete",
        metrics=(("top1", top1), ("gmacs", cost.gmacs), ("latency_ms", 0.4 + 300 * cost.gmacs**1.2 + 0.05 * noise)),
        spread=(("latency_ms", 0.02),),
        tokens=cost.tokens,
        images=1198,
        seconds=(("load", 0.1), ("train", 3.0), ("measure", 0.4)),
    )
    return Record(number, evaluation.uid, schedule, "complete", origin, number, (evaluation,))


def failed(number: int, cause: str = "oom") -> Record:
    evaluation = Evaluation(f"u{number:02d}", "failed", cause=cause, error="out of memory\non device 0")  # type: ignore[arg-type]
    return Record(number, evaluation.uid, Schedule((Stage(2, keep=0.5),)), "failed", "sampler", number, (evaluation,))


def study_records(count: int = 30) -> list[Record]:
    """Records of the dense model, two published schedules, `count` candidates and a failed one."""
    draw = random.Random(1)
    found = [record(0, Schedule(), "dense")]
    for number, name in enumerate(("evit-0.7", "etps-0.7"), start=1):
        found.append(record(number, find_schedule(name, SHAPE), f"start: {name}"))
    for number in range(3, count + 3):
        blocks = sorted(draw.sample(range(1, 7), draw.randint(1, 4)))
        stages = [
            Stage(
                block,
                keep=draw.choice((0.5, 0.6, 0.7, 0.8, 0.9)),
                reduce=draw.choice(("drop", "fuse", "squeeze", "merge")),
            )
            for block in blocks
        ]
        found.append(record(number, Schedule(tuple(stages))))
    return [*found, failed(count + 3)]
