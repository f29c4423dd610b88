#!/usr/bin/env python
"""Report which verbs and scores are on the front of a study, and how far the others are behind.

    prunesearch run search_spaces/digits_everything.yaml
    python scripts/verbs_on_front.py outputs/digits_everything --out benchmarks/everything_digits.md

"Behind" is the loss of normalised hypervolume when only candidates with this verb (or score) are counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from prunesearch.front import comparable, dense_of, front, normalised_hypervolume
from prunesearch.record import Record
from prunesearch.relative_limits import limits_of
from prunesearch.report.plot import plot_front
from prunesearch.report.tables import short
from prunesearch.schedule import Schedule
from prunesearch.study.reader import open_study_readonly


def amount(schedule: Schedule) -> set[str]:
    return {"threshold" if stage.is_adaptive else "count" for stage in schedule.stages}


KINDS: dict[str, Callable[[Schedule], set[str]]] = {
    "verb": lambda schedule: {stage.reduce for stage in schedule.stages},
    "score": lambda schedule: {stage.score for stage in schedule.stages if stage.score != "none"},
    "how many stay": amount,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the study")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    study = open_study_readonly(given.folder)
    config, records = study.config, study.records()
    limits, objectives = limits_of(config, records), config.objectives
    best, dense = front(records, objectives, limits), dense_of(records)
    assert dense is not None, "the study has no dense model yet"
    whole = normalised_hypervolume(records, objectives, dense, limits) or 0.0
    lines = [
        f"# {config.name}: what is on the front",
        "",
        f"`prunesearch run search_spaces/{config.name}.yaml`, then `python scripts/verbs_on_front.py`: "
        f"{len(comparable(records, objectives, limits))} candidates, normalised hypervolume {whole:.4f}.",
    ]
    for title, of in KINDS.items():
        lines += ["", f"| {title} | candidates | on the front | hypervolume with these alone |", "|---|---|---|---|"]
        names = sorted({name for record in records for name in of(record.schedule)})

        def using(some: list[Record], name: str, of: Callable[[Schedule], set[str]] = of) -> list[Record]:
            return [record for record in some if name in of(record.schedule)]

        for name in names:
            volume = normalised_hypervolume([dense, *using(records, name)], objectives, dense, limits) or 0.0
            mine = len(using(comparable(records, objectives, limits), name))
            lines.append(f"| `{name}` | {mine} | {len(using(best, name))} | {volume:.4f} ({volume - whole:+.4f}) |")
    metrics = " | ".join(objective.metric for objective in objectives)
    lines += ["", f"| trial | {metrics} | origin | schedule |", "|---|" + "---|" * (len(objectives) + 2)]
    for record in best:
        assert record.evaluation is not None
        values = " | ".join(f"{record.evaluation.value(o.metric):.5g}" for o in objectives)
        lines.append(f"| {record.number} | {values} | {record.origin} | {short(record.schedule)} |")
    picture = given.out.with_suffix(".png")
    plot_front(records, objectives, picture, limits=limits, title=f"{config.name}: {config.model.name}")
    given.out.write_text("\n".join([*lines, "", f"![the front]({picture.name})"]) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
