"""Mistakes in the limits of a study, found before anything is measured."""

from __future__ import annotations

from prunesearch.config import Limit, StudyConfig
from prunesearch.evaluate.limits import (
    AbsoluteLimit,
    bound_in_words,
    computed_dense,
    computed_limits,
    in_numbers,
    share_of_dense,
)
from prunesearch.evaluate.metrics import METRICS


def limit_problems(config: StudyConfig) -> list[str]:
    """The mistakes that can be found without the model. Unknown names of metrics are left to the caller."""
    return [problem for name, limit in config.limits for problem in _problems_of(name, limit)]


def resolved_problems(config: StudyConfig) -> list[str]:
    """The mistakes that the dense model's computed values show. Raises ModelError for a model of unknown shape."""
    dense, problems = computed_dense(config.limits, config.target), []
    for (name, limit), (_, found) in zip(config.limits, computed_limits(config), strict=True):
        if name in dense and not dense[name] > 0:
            problems.append(
                f"limits.{name}: a share of the dense model's value, which is {dense[name]:g}. Possible: a share of a "
                f"value above 0. Write a number."
            )
        elif _is_crossed(found) and not _are_alike(limit):  # else `limit_problems` sees it
            problems.append(_crossed(name, limit, found))
    return problems


def drop_problem(name: str) -> str | None:
    """Why a metric cannot be bounded by its drop from the dense model; None when it can, or is unknown."""
    if name not in METRICS or not METRICS[name].computed:
        return None
    word = "at_most" if METRICS[name].goal == "minimize" else "at_least"
    return (
        f"{name} is computed from the schedule, and a drop is for what is measured. Possible: {word}, with a number or "
        f"a share of the dense model's value such as 70%. Write that."
    )


def _problems_of(name: str, limit: Limit) -> list[str]:
    bounds = {"at_most": limit.at_most, "at_least": limit.at_least, "drop_at_most": limit.drop_at_most}
    given = {field: bound for field, bound in bounds.items() if bound is not None}
    problems = []
    if not given:
        words = ", ".join(bounds)
        problems.append(f"limits.{name}: has no bound. Possible: {words}. Write one, or leave it out.")
    shares = {field: share_of_dense(bound) for field, bound in given.items()}
    for field, share in shares.items():
        if share == 0:
            problems.append(
                f"limits.{name}.{field}: is 0 % of the dense model's value. Possible: above 0 %. Write a share, or a "
                f"number."
            )
    if name in METRICS and METRICS[name].unit == "%":
        problems += [
            f"limits.{name}.{field}: is {bound:g}, but {name} is a percentage. Possible: 0 to 100. Correct it."
            for field, bound in given.items()
            if not isinstance(bound, str) and not 0 <= bound <= 100
        ]
    refused = drop_problem(name) if limit.drop_at_most is not None else None
    if refused is not None:
        problems.append(f"limits.{name}.drop_at_most: {refused}")
    of_any = AbsoluteLimit(in_numbers(limit.at_most, 1.0), in_numbers(limit.at_least, 1.0))
    if _is_crossed(of_any) and _are_alike(limit):
        problems.append(_crossed(name, limit, AbsoluteLimit()))
    return problems


def _is_crossed(limit: AbsoluteLimit) -> bool:
    return limit.at_most is not None and limit.at_least is not None and limit.at_most < limit.at_least


def _are_alike(limit: Limit) -> bool:
    """Whether both bounds are numbers, or both are shares, so that they can be compared without the model."""
    return isinstance(limit.at_most, str) == isinstance(limit.at_least, str)


def _crossed(name: str, limit: Limit, found: AbsoluteLimit) -> str:
    most = bound_in_words(limit.at_most, found.at_most)
    return (
        f"limits.{name}: at_most {most} is below at_least {bound_in_words(limit.at_least, found.at_least)}, so that "
        f"nothing is within. Possible: at_least up to at_most. Swap them."
    )
