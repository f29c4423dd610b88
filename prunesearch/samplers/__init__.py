"""Who proposes candidates: the samplers, one entry each with its facts.

To add a sampler of Optuna, add an entry. To add another one, write a class that is a `Proposer` in a file of its own,
and add an entry. The libraries that samplers use are imported when a proposer is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from prunesearch.extras import need
from prunesearch.samplers.proposer import SAMPLERS, Handover, Proposer, ProposerSettings, Sampler

__all__ = ["SAMPLERS", "Handover", "Proposer", "ProposerSettings", "Sampler", "from_optuna"]


def from_optuna(class_name: str, startup: str | None = None, **options: Any) -> Callable[[ProposerSettings], Proposer]:
    """`Sampler.make` for a class of `optuna.samplers`.

    startup: the name of the class's parameter that takes `ProposerSettings.startup`. options: its other parameters.
    """

    def make(settings: ProposerSettings) -> Proposer:
        need(f"sampler {settings.sampler.name}", "search", "optuna", "scipy")
        import optuna

        from prunesearch.samplers.optuna_samplers import ModelStudy

        given = options if startup is None else {**options, startup: settings.startup}
        return ModelStudy(settings, partial(getattr(optuna.samplers, class_name), **given))

    return make


def _token_gp(settings: ProposerSettings) -> Proposer:
    need(f"sampler {settings.sampler.name}", "search", "scipy", "sklearn")
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
        from_optuna("TPESampler", startup="n_startup_trials", multivariate=True, constant_liar=True),
        draws=8,
        window=400,  # a question takes longer with each result that it looks at
    ),
    Sampler(
        "nsga2",
        "genetic algorithm, generations of 50 (or of sampler.startup)",
        from_optuna("NSGAIISampler", startup="population_size"),
        draws=8,
        startup=50,
        least_startup=2,
        counts_generations=True,
    ),
    Sampler(
        "gp",
        "Gaussian process with expected hypervolume; for up to 200 costly candidates",
        from_optuna("GPSampler", startup="n_startup_trials"),
        draws=2,
        least_startup=1,  # it cannot begin with no result
        most_trials=200,
    ),
    Sampler("random", "uniform, the baseline", from_optuna("RandomSampler")),
):
    SAMPLERS.add(_sampler.name, _sampler)
