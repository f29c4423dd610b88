"""Sensitivities, the effects of single stages in the dense model: which stages a space has, and the table of effects.

`measure_sensitivity.py` measures them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from prunesearch.config import DataConfig, ModelConfig, Range, SpaceConfig, StudyConfig
from prunesearch.errors import FileError, ScheduleError
from prunesearch.evaluate.shapes import model_shape
from prunesearch.files import write_atomically
from prunesearch.schedule import Place, Schedule, Stage, resolve
from prunesearch.shape import ModelShape
from prunesearch.space.choices import BlockChoices, blocks_of, grid_of, until_of
from prunesearch.strict import from_mapping, to_mapping
from prunesearch.tokens import REDUCERS, SCORERS, Reducer, Scorer

IMAGES = 256
IMAGES_FOR_A_START = 64
"""Number of images when sensitivities only predict start schedules. It takes a quarter of the time, and the starts are
as good."""
CONTINUOUS = 8
"""Number of keep ratios that are measured for a continuous range."""


@dataclass(frozen=True)
class Effect:
    """The effect of one stage alone.

    divergence: mean KL(dense || pruned) of the class probabilities, in nats. agreement: percent of the images that get
    the dense model's class. For a model without a classifier: 1 - cosine of the features, and the cosine in percent.
    """

    stage: Stage
    divergence: float
    agreement: float


@dataclass(frozen=True)
class Sensitivities:
    """The effects of all stages of a space, each alone, on one model and its training images.

    images: how many were measured. confidence: mean of the dense model's largest probability. Near 1 the model is
    saturated: divergences are tiny for most images and a weak signal. seconds: duration of the measurement.
    left_out: scores, verbs and "thresholds" of the space that cannot be measured without training. of_features: the
    model has no classifier; then confidence is 1.
    """

    version: Literal[1]
    model: ModelConfig
    data: DataConfig
    images: int
    confidence: float
    effects: tuple[Effect, ...]
    seconds: float
    device: str
    left_out: tuple[str, ...] = ()
    of_features: bool = False

    @property
    def damage(self) -> str:
        """What `Effect.divergence` is, in words."""
        return "1 - cosine of features" if self.of_features else "KL(dense || pruned) in nats"

    def fits(self, config: StudyConfig) -> bool:
        """Whether it was measured on the model and training data of a study, and has every stage of its space."""
        wanted, _ = stages_of(config.space, model_shape(config.model))
        known = {effect.stage for effect in self.effects}
        same = self.model == config.model and _training(self.data) == _training(config.data)
        return same and known.issuperset(wanted)


def stages_of(space: SpaceConfig, shape: ModelShape) -> tuple[list[Stage], tuple[str, ...]]:
    """Every stage of a space that is possible alone and can be measured without training, in the order of the blocks.

    Also returns the names of scores and verbs that are left out because they learn, and "thresholds" when the space has
    any. A continuous range is replaced by CONTINUOUS ratios.
    """
    stages: list[Stage] = []
    left_out: set[str] = set()
    for block in sorted(blocks_of(space), key=lambda block: block.block):
        if "threshold" in block.amount:
            left_out.add("thresholds")
        if "keep" not in block.amount:
            continue
        for verb, at in itertools.product(block.reduce, block.at):
            scores = block.score if REDUCERS[verb].ranks else ("none",)
            for score in scores:
                learns = [name for name in (verb, score) if _learns(name, shape)]
                left_out.update(learns)
                if not learns:
                    stage = Stage(block.block, at=cast(Place, at), score=score, keep=1.0, reduce=verb)
                    stages += [
                        replace(stage, keep=keep, until=until_of(until, verb))
                        for until, keep in itertools.product(block.until, _keeps(block))
                    ]
    possible = [stage for stage in dict.fromkeys(stages) if _is_possible(stage, shape)]
    return possible, tuple(sorted(left_out))


def most_stages(space: SpaceConfig) -> int:
    """Upper bound on the number of stages that `stages_of` looks at, computed without listing them."""
    return sum(
        len(block.reduce) * len(block.at) * len(block.score) * len(block.until) * len(_keeps(block))
        for block in blocks_of(space)
        if "keep" in block.amount
    )


def nothing_to_measure(left_out: Collection[str]) -> str:
    """The error message for a space in which no stage can be measured."""
    what = f"{', '.join(left_out)} mean nothing without training" if left_out else "no stage can stand alone in it"
    return (
        f"sensitivity: {what}, so that this space has nothing to measure. Possible: keep ratios below 1 with scores "
        f"and verbs that do not learn. Add some, or take sensitivity out of space.start_from."
    )


def save_sensitivities(found: Sensitivities, path: Path) -> None:
    """Write a JSON file, atomically."""
    write_atomically(path, (json.dumps(to_mapping(found), indent=1) + "\n").encode())


def load_sensitivities(path: Path) -> Sensitivities:
    """Read what `save_sensitivities` wrote. Raises FileError with all mistakes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = f"cannot be read as JSON: {error}. Possible: what prunesearch sensitivity -o wrote. Measure again."
        raise FileError(str(path), [problem]) from None
    return from_mapping(Sensitivities, content, str(path))


def _learns(name: str, shape: ModelShape) -> bool:
    entries: list[Scorer | Reducer] = [registry[name] for registry in (SCORERS, REDUCERS) if name in registry]
    return any(entry.learns(shape) for entry in entries)


def _keeps(block: BlockChoices) -> list[float]:
    keep = block.keep
    if not isinstance(keep, Range):
        values = list(keep)
    elif keep.step is not None:
        values = list(grid_of(keep))
    else:
        share = (keep.high - keep.low) / (CONTINUOUS - 1)
        inner = [round(keep.low + index * share, 4) for index in range(1, CONTINUOUS - 1)]
        values = [keep.low, *(value for value in inner if keep.low < value < keep.high), keep.high]
    return sorted({value for value in values if value < 1.0})


def _is_possible(stage: Stage, shape: ModelShape) -> bool:
    try:
        resolve(Schedule((stage,)), shape)
    except ScheduleError:
        return False
    return True


def _training(data: DataConfig) -> DataConfig:
    """The data section with only the fields that decide which training images are read, and how."""
    other = {"val_root": None, "val_split": "", "test_root": None, "test_split": None, "val_images": None}
    return replace(data, **other, train_images=None, in_memory=True, loaders=0)  # type: ignore[arg-type]
