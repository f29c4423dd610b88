#!/usr/bin/env python
"""Search schedules with Ray Tune, and import the results as a study. Takes two minutes on two cores.

python scripts/ray_tune_digits.py --out outputs/tune
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from prunesearch.files import load_study
from prunesearch.front import front
from prunesearch.study.reader import open_study_readonly
from prunesearch.tune.trainable import import_results, param_space, trainable

STUDY = Path(__file__).parents[1] / "search_spaces" / "digits.yaml"
RUNGS = "rungs=[{images: 0}, {images: 599}, {images: 1198}]"


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--out", type=Path, default=Path("outputs/tune"))
    parsed = arguments.parse_args()
    config = load_study(STUDY, [RUNGS])
    tuner = tune.Tuner(
        trainable(config),
        param_space=param_space(config),
        tune_config=tune.TuneConfig(
            metric="top1",
            mode="max",
            num_samples=parsed.samples,
            scheduler=ASHAScheduler(grace_period=1, max_t=len(config.rungs), reduction_factor=3),
            reuse_actors=True,  # keeps model and images loaded
        ),
        run_config=tune.RunConfig(name="experiment", storage_path=str(parsed.out.absolute()), verbose=1),
    )
    imported = import_results(tuner.fit(), config, parsed.out / config.name)
    print(f"\n{imported} candidates are now a study in {parsed.out / config.name}. At the largest budget:")
    reader = open_study_readonly(parsed.out / config.name)
    for record in front(reader.records(), config.objectives, config.limits):
        assert record.evaluation is not None
        values = dict(record.evaluation.metrics)
        print(f"  {values['gmacs']:.5f} GMACs  top1 {values['top1']:.2f}  {record.outcome}")
    reader.close()


if __name__ == "__main__":
    main()
