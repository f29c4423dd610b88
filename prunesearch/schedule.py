"""The noun: `Stage` and `Schedule`, and `resolve`, the one place where fractions become token counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from prunesearch.config import Options, Scalar, as_options
from prunesearch.errors import ScheduleError
from prunesearch.registry import did_you_mean

Place = Literal["mid", "pre"]
PLACES: tuple[Place, ...] = ("pre", "mid")


@dataclass(frozen=True)
class ModelShape:
    """What arithmetic needs to know of a model. Counts are per image.

    `attention_dim` is heads x head_dim (it may differ from `dim`); `mlp_macs` and `gate_macs` are per token;
    `stem_macs` is the patch embedding, `head_macs` the classifier(s), and a pooling head that attends costs
    `pool_macs + pool_macs_per_token * N + pool_macs_per_pair * N^2` for N tokens. `prefix_tokens` counts class,
    distillation and register tokens; `class_tokens` those whose attention ranks patches: 1, or 2 with a
    distillation token, or 0.
    """

    depth: int
    dim: int
    heads: int
    attention_dim: int
    patch_tokens: int
    prefix_tokens: int
    class_tokens: int
    mlp_macs: int
    stem_macs: int
    head_macs: int
    gate_macs: int = 0
    pool_macs: int = 0
    pool_macs_per_token: int = 0
    pool_macs_per_pair: int = 0

    @property
    def has_class_token(self) -> bool:
        """Whether class attention exists."""
        return self.class_tokens > 0


@dataclass(frozen=True)
class Stage:
    """Where tokens go, how many stay, by which score, and what becomes of the others.

    block: 0-based index. at: "mid" (between attention and MLP) or "pre" (on the block's input).
    score: a registered scorer; "none" for verbs that pick by similarity. Exactly one of keep (fraction of the
    patch tokens present, in (0, 1]) and tokens (absolute count of patch tokens that stay).
    reduce: a registered reducer. options: the few numbers a scorer or reducer takes.
    Raises ScheduleError when a value is impossible whatever the model.
    """

    block: int
    at: Place = "mid"
    score: str = ""
    keep: float | None = None
    tokens: int | None = None
    reduce: str = "drop"
    options: Options = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", as_options(self.options))
        if not self.score:  # the verb knows whether it ranks tokens
            object.__setattr__(self, "score", "none" if self.reduce == "merge" else "class_attention")
        problems = []
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 0:
            problems.append(f"block is {self.block!r}; possible: a whole number from 0. Count blocks from 0.")
        if self.at not in PLACES:
            problems.append(f"at is {self.at!r}; possible: {', '.join(PLACES)}.")
        if (self.keep is None) == (self.tokens is None):
            given = "neither keep nor tokens" if self.keep is None else "both keep and tokens"
            problems.append(f"{given} given; write exactly one of them.")
        if self.keep is not None and not (_is_number(self.keep) and 0 < self.keep <= 1):
            problems.append(f"keep is {self.keep!r}; possible: a fraction above 0, up to 1 (1 removes nothing).")
        if self.tokens is not None and not (type(self.tokens) is int and self.tokens >= 1):
            problems.append(f"tokens is {self.tokens!r}; possible: a whole number from 1 (patch tokens that stay).")
        if problems:
            raise ScheduleError(f"stage at block {self.block}", problems)

    def __str__(self) -> str:
        amount = f"keep {self.keep:g}" if self.keep is not None else f"{self.tokens} tokens"
        score = "" if self.score == "none" else f" by {self.score}"
        return f"block {self.block} {self.at}: {self.reduce} to {amount}{score}"


@dataclass(frozen=True)
class Schedule:
    """Stages in the order they run: by block, `pre` before `mid`, else as given. Empty is the dense model."""

    stages: tuple[Stage, ...] = field(default=())

    def __post_init__(self) -> None:
        ordered = sorted(self.stages, key=lambda stage: (stage.block, PLACES.index(stage.at)))  # stable
        object.__setattr__(self, "stages", tuple(ordered))

    def __str__(self) -> str:
        return "; ".join(map(str, self.stages)) or "dense"


@dataclass(frozen=True)
class Step:
    """A stage with its counts of patch tokens: `before` arrive, `kept` are selected, `after` go on.

    `after` is `kept` plus what the verb adds (one fused token). `before == after` and `kept == before`
    means that the stage removes nothing here.
    """

    stage: Stage
    before: int
    kept: int
    after: int

    @property
    def is_idle(self) -> bool:
        """True when the stage removes nothing at its place; the runtime skips it and it costs nothing."""
        return self.kept == self.before


def resolve(schedule: Schedule, shape: ModelShape) -> tuple[Step, ...]:
    """Turn a schedule into integer counts for a model. The only place that rounds.

    `keep` is rounded up, in exact decimal arithmetic (EViT's rule: ceil(keep * present); 0.28 of 25 is 7).
    Raises ScheduleError naming every stage that does not fit the model.
    """
    from prunesearch.tokens import REDUCERS  # late: the tokens package needs this module's nouns

    problems: list[str] = []
    steps: list[Step] = []
    present = shape.patch_tokens
    for stage in schedule.stages:
        where = f"stage at block {stage.block} ({stage.at})"
        if stage.block >= shape.depth:
            problems.append(f"{where}: the model has blocks 0 to {shape.depth - 1}. Choose one of those.")
            continue
        wrong = stage_problems(stage) or _misfits(stage, shape)
        if wrong:
            problems += [f"{where}: {text}" for text in wrong]
            continue
        reducer, kept = REDUCERS[stage.reduce], _count(stage, present)
        if kept > present:
            problems.append(
                f"{where}: tokens is {kept}, but only {present} patch tokens are present there. "
                f"Possible: 1 to {present}. Lower tokens or move the stage to an earlier block."
            )
            kept = present
        fewest = reducer.fewest_kept(present)
        if kept < fewest:
            problems.append(
                f"{where}: {stage.reduce} cannot go from {present} to {kept} patch tokens; the fewest it can keep "
                f"is {fewest}. Keep more, or spread the reduction over two blocks."
            )
            kept = fewest
        after = kept if kept == present else kept + reducer.extra_tokens
        steps.append(Step(stage, before=present, kept=kept, after=after))
        present = after
    if problems:
        raise ScheduleError("schedule", problems)
    return tuple(steps)


def canonical(schedule: Schedule, shape: ModelShape) -> Schedule:
    """The same schedule written in the one way that all its spellings share.

    Stages that remove nothing are left out, fractions become counts, and options at their default are dropped;
    two schedules that do the same to this model compare (and hash) equal.
    """
    return Schedule(
        tuple(
            Stage(
                block=step.stage.block,
                at=step.stage.at,
                score=step.stage.score,
                tokens=step.kept,
                reduce=step.stage.reduce,
                options=_given_options(step.stage),
            )
            for step in resolve(schedule, shape)
            if not step.is_idle
        )
    )


def _count(stage: Stage, present: int) -> int:
    if stage.tokens is not None:
        return stage.tokens
    # repr gives the shortest decimal that means this float, so 0.28 is 28/100 here and not 0.28000000000000003
    return math.ceil(Decimal(repr(float(stage.keep or 0))) * present)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def stage_problems(stage: Stage) -> list[str]:
    """What is wrong with a stage's names and options, whatever the model: one sentence or two for each mistake."""
    from prunesearch.tokens import REDUCERS, SCORERS

    problems = []
    if stage.score != "none" and stage.score not in SCORERS:
        problems.append(SCORERS.unknown(stage.score))
    if stage.reduce not in REDUCERS:
        problems.append(REDUCERS.unknown(stage.reduce))
    if problems:
        return problems
    reducer = REDUCERS[stage.reduce]
    if reducer.ranks and stage.score == "none":
        known = ", ".join(SCORERS)
        problems.append(f"{stage.reduce} needs a score, but score is none. Known: {known}. Name one of them.")
    if not reducer.ranks and stage.score != "none":
        problems.append(
            f"{stage.reduce} picks tokens by similarity, so score {stage.score!r} would have no effect. "
            f"Write score: none, or leave it out."
        )
    known_options = _default_options(stage)
    for name, value in stage.options:
        if name not in known_options:
            known = ", ".join(known_options) or "none"
            problems.append(
                f"unknown option {name!r} of {stage.score}/{stage.reduce}. Known: {known}."
                f"{did_you_mean(name, known_options)}"
            )
        elif not _fits(value, known_options[name]):
            kind = type(known_options[name]).__name__
            problems.append(
                f"option {name} is {value!r}; possible: a value of type {kind}. Its default is {known_options[name]!r}."
            )
    return problems


def options_of(stage: Stage) -> dict[str, Scalar]:
    """The stage's options with the published defaults filled in."""
    return {**_default_options(stage), **dict(stage.options)}


def _default_options(stage: Stage) -> dict[str, Scalar]:
    from prunesearch.tokens import REDUCERS, SCORERS

    scorer = {} if stage.score == "none" else dict(SCORERS[stage.score].options)
    return {**scorer, **dict(REDUCERS[stage.reduce].options)}


def _given_options(stage: Stage) -> Options:
    """The options that differ from their default."""
    defaults = _default_options(stage)
    return as_options({name: value for name, value in stage.options if value != defaults[name]})


def _fits(value: Scalar, default: Scalar) -> bool:
    if isinstance(default, float):
        return _is_number(value)
    return type(value) is type(default)


def _misfits(stage: Stage, shape: ModelShape) -> list[str]:
    """Why a stage whose names are right cannot run on this model."""
    from prunesearch.tokens import REDUCERS, SCORERS

    problems = []
    scorer = None if stage.score == "none" else SCORERS[stage.score]
    if scorer is not None and scorer.needs_class_token and not shape.has_class_token:
        possible = ", ".join(name for name, other in SCORERS.items() if not other.needs_class_token)
        problems.append(
            f"score {stage.score} reads the class token's attention, but this model has no class token. "
            f"Possible: {possible}. Choose one of those."
        )
    needs_attention = (scorer is not None and scorer.needs_attention) or REDUCERS[stage.reduce].needs_keys
    if stage.at == "pre" and stage.block == 0 and needs_attention:
        what = stage.reduce if scorer is None else stage.score
        problems.append(
            f"{what} at pre reads the attention of the block before, and block 0 has none. "
            f"Possible: at mid, or a later block. Move the stage."
        )
    return problems
