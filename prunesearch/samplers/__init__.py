"""Who proposes candidates: the samplers, one entry each with its facts.

To add one of Optuna's, add a line. To add another one, write its file, with a class that is a `Proposer`, and a line.
The libraries that samplers use are imported when a proposer is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from prunesearch.samplers.proposer import SAMPLERS, Handover, Proposer, ProposerSettings, Sampler

__all__ = ["SAMPLERS", "Handover", "Proposer", "ProposerSettings", "Sampler"]


def _optuna(class_name: str, startup: str | None = None, **options: Any) -> Callable[[ProposerSettings], Proposer]:
    """What makes proposers of a sampler of Optuna. startup: how its class calls what we call startup."""

    def make(settings: ProposerSettings) -> Proposer:
        import optuna

        from prunesearch.samplers.optuna_samplers import ModelStudy

        given = options if startup is None else {**options, startup: settings.startup}
        return ModelStudy(settings, partial(getattr(optuna.samplers, class_name), **given))

    return make


def _token_gp(settings: ProposerSettings) -> Proposer:
    from prunesearch.samplers.token_gp import TokenModel

    return TokenModel(settings)


for _sampler in (
    Sampler(
        "auto",
        "token_gp, and nsga2 for many candidates or workers; the default",
        _token_gp,
        quasi_random_startup=True,
        # the questions of a Gaussian process take longer with each candidate, too long for many workers
        handover=Handover("nsga2", candidates=1000, workers=16),
    ),
    Sampler(
        "token_gp",
        "fills the space evenly, then a Gaussian process over the tokens in each block, by hypervolume",
        _token_gp,
        draws=4,
        quasi_random_startup=True,
    ),
    Sampler(
        "tpe",
        "tree-structured Parzen estimator over all parameters at once",
        _optuna("TPESampler", startup="n_startup_trials", multivariate=True, constant_liar=True),
        draws=8,
        window=400,  # a question takes longer with each result that it looks at
    ),
    Sampler(
        "nsga2",
        "genetic algorithm, generations of 50 (or of sampler.startup)",
        _optuna("NSGAIISampler", startup="population_size"),
        draws=8,
        startup=50,
        least_startup=2,
        counts_generations=True,
    ),
    Sampler(
        "gp",
        "Gaussian process with expected hypervolume; for up to 200 costly candidates",
        _optuna("GPSampler", startup="n_startup_trials"),
        draws=2,
        least_startup=1,  # it cannot begin with no result
        most_trials=200,
    ),
    Sampler("random", "uniform, the baseline", _optuna("RandomSampler")),
):
    SAMPLERS.add(_sampler.name, _sampler)
