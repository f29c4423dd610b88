"""`start_from: [sensitivity]`: start schedules on the front that the sensitivities of the study predict."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prunesearch.config import StudyConfig
from prunesearch.cost import MACS, CostTable
from prunesearch.errors import FileError
from prunesearch.evaluate import METRICS
from prunesearch.evaluate.limits import budget_of, computed_limits, is_within
from prunesearch.evaluate.sensitivity import (
    IMAGES_FOR_A_START,
    Sensitivities,
    load_sensitivities,
    save_sensitivities,
)
from prunesearch.front import hypervolume
from prunesearch.record import cost_of
from prunesearch.search.sensitivity_front import Predicted, predicted_front
from prunesearch.shape import ModelShape

logger = logging.getLogger(__name__)

WORD = "sensitivity"
"""The word in `start_from` that stands for these schedules."""
FILE = "sensitivity.json"
MOST_STARTS = 16


def predicted_starts(config: StudyConfig, shape: ModelShape, found: Sensitivities) -> list[Predicted]:
    """At most MOST_STARTS schedules of the predicted front, within the limits that can be computed without running.

    They are spread evenly over the cost and ordered by how much hypervolume they add, so that a search that is stopped
    early has a front. If the study has a budget: the most expensive ones within it.
    """
    limits, budget = computed_limits(config), budget_of(config)
    possible = [
        point
        for point in predicted_front(found.effects, config.space, shape, cost_table(config))
        if point.schedule.stages and is_within(limits, config.target, point.schedule)
    ]
    if budget is not None:
        return [point for point in possible if point.cost <= budget.amount][-MOST_STARTS:]
    return _best_first(_evenly(possible, MOST_STARTS))


def cost_table(config: StudyConfig) -> CostTable:
    """By which costs are predicted: that of the budget, else of the cost that the study trades off, else MACs."""
    budget, metric = budget_of(config), cost_of(config.objectives)
    if budget is not None:
        return budget.table
    costs = METRICS[metric].costs if metric is not None and metric in METRICS else None
    return MACS if costs is None else costs(config.target)


def kept_sensitivities(config: StudyConfig, path: Path) -> Sensitivities:
    """Read the sensitivities from a file. If it is missing or does not fit the study, measure and save them.

    Raises what `measure_sensitivities` raises.
    """
    if path.is_file():
        try:
            found = load_sensitivities(path)
        except FileError as error:
            logger.warning("%s: measured again", error)
        else:
            if found.fits(config):
                return found
            logger.warning("%s is of another model, data or space: measured again", path)
    from prunesearch.evaluate.measure_sensitivity import measure_sensitivities

    found = measure_sensitivities(config, IMAGES_FOR_A_START)
    save_sensitivities(found, path)
    return found


def _evenly(front: Sequence[Predicted], most: int) -> list[Predicted]:
    """The points nearest to `most` equally spaced costs, both ends included."""
    if len(front) <= most:
        return list(front)
    low, high = front[0].cost, front[-1].cost
    targets = [low + (high - low) * index / (most - 1) for index in range(most)]
    nearest = (min(range(len(front)), key=lambda place: abs(front[place].cost - target)) for target in targets)
    return [front[place] for place in dict.fromkeys(nearest)]


def _best_first(front: Sequence[Predicted]) -> list[Predicted]:
    """Greedy order: each next point adds the most hypervolume (divergence and MACs scaled to [0, 1])."""
    if not front:
        return []
    losses = np.array([(point.divergence, point.cost) for point in front])
    extent = np.ptp(losses, axis=0)
    scaled, reference = (losses - losses.min(axis=0)) / np.where(extent > 0, extent, 1.0), np.full(2, 1.1)
    order: list[int] = []
    while len(order) < len(front):
        left = [index for index in range(len(front)) if index not in order]
        order.append(max(left, key=lambda index: hypervolume(scaled[[*order, index]], reference)))
    return [front[index] for index in order]
