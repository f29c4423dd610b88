"""`Stage` and `Schedule`, and `resolve`, which turns a schedule into token counts for a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Literal, NamedTuple

from prunesearch.config import (
    DEFAULT_SCORE,
    LARGEST,
    MOST_BLOCKS,
    MOST_GMACS,
    MOST_NAMES,
    MOST_TOKENS,
    TARGETS,
    Options,
    Scalar,
    as_options,
    bounded,
)
from prunesearch.errors import ScheduleError
from prunesearch.profile import MOST_MS
from prunesearch.registry import did_you_mean
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS, SCORERS, Reducer, Scorer
from prunesearch.tokens.scores import MOMENTUM
from prunesearch.tokens.verbs import RETURNS

Place = Literal["mid", "pre"]
PLACES: tuple[Place, ...] = ("pre", "mid")
AMOUNTS = ("keep", "tokens", "threshold")
END, NEXT = "end", "next"
"""`until` of a stage whose tokens come back after the last block; or before the block of the next stage, or after the
last block when there is none."""


_UNTIL: dict[int | str, str] = {NEXT: "the next stage", END: "the end"}


@dataclass(frozen=True)
class Stage:
    """One reduction of tokens: where it happens, how many stay, by which score, and what happens to the others.

    block: 0-based index. at: "mid" (between attention and MLP) or "pre" (on the block's input).
    score: a registered scorer; "none" for verbs that do not rank. Default: class_attention, or none for such verbs.
    Exactly one of keep, tokens and threshold is given.
    keep: fraction of the patch tokens present, in (0, 1]. tokens: number of patch tokens that stay.
    threshold: each image keeps the tokens whose score is above it. For `merge`: pairs merge whose cosine is above it.
    reduce: a registered reducer (verb). options: options of the scorer and the reducer.
    until: the block before which the tokens that left are back in their places; "next": the block of the next stage;
    "end": after the last block, before the final norm. None: they are gone for good.
    Raises ScheduleError for a value that is impossible in every model.
    """

    block: int = bounded("0-based block index", low=0, high=MOST_BLOCKS)
    at: Place = "mid"
    score: str = ""
    keep: float | None = bounded("fraction of the patch tokens present", None, above=0, high=1)
    tokens: int | None = bounded("count of patch tokens that stay", None, low=1, high=MOST_TOKENS)
    threshold: float | None = bounded("in units of the score", None, low=-LARGEST, high=LARGEST)
    reduce: str = "drop"
    options: Options = bounded("of the score and the verb", (), low=-LARGEST, high=LARGEST, most=MOST_NAMES)
    until: int | str | None = bounded(
        "block before which the tokens that left are back, next (the next stage's) or end",
        None,
        low=1,
        high=MOST_BLOCKS,
        pattern=f"^({NEXT}|{END})$",
        form=f"a later block as a whole number, {NEXT} or {END}; without until they never come back",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", as_options(self.options))
        if not self.score:
            object.__setattr__(self, "score", _score_unless_written(self.reduce))
        problems = []
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 0:
            problems.append(f"block is {self.block!r}; possible: a whole number from 0. Count blocks from 0.")
        if self.at not in PLACES:
            problems.append(f"at is {self.at!r}; possible: {', '.join(PLACES)}.")
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            which = " and ".join(given) or f"none of {', '.join(AMOUNTS)}"
            problems.append(f"{which} given; write exactly one of {', '.join(AMOUNTS)}.")
        if self.keep is not None and not (_is_number(self.keep) and 0 < self.keep <= 1):
            problems.append(f"keep is {self.keep!r}; possible: a fraction above 0, up to 1 (1 removes nothing).")
        if self.tokens is not None and not (type(self.tokens) is int and self.tokens >= 1):
            problems.append(f"tokens is {self.tokens!r}; possible: a whole number from 1 (patch tokens that stay).")
        if self.threshold is not None and not (_is_number(self.threshold) and math.isfinite(self.threshold)):
            problems.append(f"threshold is {self.threshold!r}; possible: a finite number, in units of the score.")
        if self.until not in (None, NEXT, END) and not (type(self.until) is int and self.until > self.block):
            problems.append(f"until is {self.until!r}; possible: a block after {self.block}, {NEXT} or {END}.")
        if problems:
            raise ScheduleError(f"stage at block {self.block}", problems)

    @property
    def is_adaptive(self) -> bool:
        """Whether the number of tokens that stay differs between images."""
        return self.threshold is not None

    @property
    def learns_to_score(self) -> bool:
        """Whether its scorer has weights of its own."""
        return self.score in SCORERS and SCORERS[self.score].part is not None

    def __str__(self) -> str:
        rest = "" if self.score == "none" else f" by {self.score}"
        rest += f" with {unusual}" if (unusual := unusual_options(self)) else ""
        rest += "" if self.until is None else f" until {_UNTIL.get(self.until, f'block {self.until}')}"
        if self.threshold is not None:
            return f"block {self.block} {self.at}: {self.reduce} at threshold {self.threshold:.3g}{rest}"
        amount = f"keep {self.keep:g}" if self.keep is not None else f"{self.tokens} tokens"
        return f"block {self.block} {self.at}: {self.reduce} to {amount}{rest}"


class MeanCost(NamedTuple):
    """What images shall cost on average. field: that which says so. unit: of the amount."""

    field: str
    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:.5g} {self.unit}"


@dataclass(frozen=True)
class Schedule:
    """Stages in the order they run: by block, `pre` before `mid`, else as given. Empty is the dense model.

    target_gmacs, target_predicted_latency_ms: mean cost of an image towards which thresholds are trained and
    calibrated, in GMACs, or in milliseconds of a batch of such images by a device's profile.
    Raises ScheduleError when both are given, or one and no stage has a threshold.
    """

    stages: tuple[Stage, ...] = bounded("in any order", (), most=MOST_BLOCKS)
    target_gmacs: float | None = bounded("mean GMACs of an image", None, above=0, high=MOST_GMACS)
    target_predicted_latency_ms: float | None = bounded("mean over images", None, above=0, high=MOST_MS)

    def __post_init__(self) -> None:
        ordered = sorted(self.stages, key=lambda stage: (stage.block, PLACES.index(stage.at)))  # stable
        object.__setattr__(self, "stages", tuple(ordered))
        problems = []
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            problems.append(f"{' and '.join(given)} are given; possible: one target. Leave the other out.")
        for name in given:
            amount = getattr(self, name)
            if not (_is_number(amount) and amount > 0):
                problems.append(f"{name} is {amount!r}; possible: {TARGETS[name]} above 0.")
            if not self.is_adaptive:
                problems.append(
                    f"{name} is given, but no stage has a threshold that could move towards it. "
                    f"Possible: thresholds. Leave it out, or give a stage a threshold."
                )
        if problems:
            raise ScheduleError("schedule", problems)

    @property
    def target(self) -> MeanCost | None:
        """The mean cost towards which thresholds are trained, if there is one."""
        for name, unit in TARGETS.items():
            if (amount := getattr(self, name)) is not None:
                return MeanCost(name, amount, unit)
        return None

    @property
    def is_adaptive(self) -> bool:
        """Whether images keep different numbers of tokens."""
        return any(stage.is_adaptive for stage in self.stages)

    @property
    def needs_weights(self) -> bool:
        """Whether a stage's score or verb has learned weights, without which the schedule is of no use.

        Thresholds do not count, because the schedule itself holds them. For a model without a feature map ask the
        `spelled_out` schedule.
        """
        return any(
            stage.learns_to_score or (stage.reduce in REDUCERS and REDUCERS[stage.reduce].part is not None)
            for stage in self.stages
        )

    def __str__(self) -> str:
        target = "" if self.target is None else f" towards {self.target}"
        return ("; ".join(map(str, self.stages)) or "dense") + target


@dataclass(frozen=True)
class Step:
    """A stage with its counts of patch tokens: `before` arrive, `kept` are selected, `after` go on.

    `after` is `kept` plus what the verb adds (one fused token). `before == after` and `kept == before` mean that the
    stage removes nothing. From the first stage with a threshold on, the counts are the most that an image can have.
    With a verb that holds, all positions arrive at every stage, and `after` counts those that go through the MLP.
    until: the block before which the tokens that left are back, the number of blocks for the end; None if never.
    verb: the entry of the stage's verb. options: the verb's, completed with the defaults.
    """

    stage: Stage
    before: int
    kept: int
    after: int
    until: int | None = None
    verb: Reducer = field(init=False, compare=False, repr=False)
    options: Mapping[str, Scalar] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verb", REDUCERS[self.stage.reduce])
        object.__setattr__(self, "options", options_for(self.verb, self.stage))

    def __reduce__(self) -> tuple[type[Step], tuple[object, ...]]:
        """Copies and pickles look the entry up again, because its functions cannot be pickled."""
        return type(self), (self.stage, self.before, self.kept, self.after, self.until)

    def returns_by(self, block: int) -> bool:
        """Whether the tokens that left are back when a block begins."""
        return self.until is not None and self.until <= block

    @property
    def is_idle(self) -> bool:
        """True when the stage removes nothing. The models skip it, and it costs nothing."""
        return self.kept == self.before and not self.stage.is_adaptive


def spelled_out(schedule: Schedule, shape: ModelShape) -> Schedule:
    """The schedule with `hold` replaced by what it does in a model without a feature map, and `until: next` by a block.

    There `hold` is another verb with `until: next`. The next stage is one in a later block with a keep below 1.
    """
    if shape.holds or not any(stage.until == NEXT or _holds(stage) for stage in schedule.stages):
        return schedule
    stages = []
    for index, stage in enumerate(schedule.stages):
        if _holds(stage):
            entry = REDUCERS[stage.reduce]
            assert entry.on_tokens is not None
            verb, options = entry.on_tokens(options_for(entry, stage))
            options = {**{name: value for name, value in stage.options if name not in entry.options}, **options}
            stage = replace(stage, reduce=verb, options=as_options(options), until=stage.until or NEXT)
        if stage.until == NEXT:
            later = (one.block for one in schedule.stages[index + 1 :] if one.block > stage.block and one.keep != 1)
            stage = replace(stage, until=next(later, END))
        stages.append(stage)
    return replace(schedule, stages=tuple(stages))


def verb_in(shape: ModelShape, name: str) -> str:
    """The verb that this one is in a model of this kind, with its usual options."""
    if name not in REDUCERS or shape.holds:
        return name
    entry = REDUCERS[name]
    return name if entry.on_tokens is None else entry.on_tokens(entry.options)[0]


def until_in_words(stage: Stage, shape: ModelShape) -> int | str | None:
    """`until` of a stage as it is written, or as `hold` means it in a model without a feature map."""
    return NEXT if stage.until is None and _holds(stage) and not shape.holds else stage.until


def _holds(stage: Stage) -> bool:
    return stage.reduce in REDUCERS and REDUCERS[stage.reduce].on_tokens is not None


def resolve(schedule: Schedule, shape: ModelShape) -> tuple[Step, ...]:
    """Turn a schedule into integer counts for a model. There is a step for each stage, with its `spelled_out` form.

    `count_of` rounds `keep` up, in exact decimal arithmetic (EViT's rule: ceil(keep * present); 0.28 of 25 is 7).
    Raises ScheduleError, which names every stage that does not fit the model.
    """
    problems: list[str] = []
    steps: list[Step] = []
    present = shape.patch_tokens
    masked, pooled, scored, held = False, -1, -1, -1
    returned: int | None = None  # the block before which tokens came back last
    remembered = False  # whether a running mean of scores has them too
    means: int | None = None  # the block whose attention began that mean, for all tokens that are there
    # steps whose tokens will come back, whether counts differed before them, and whether there was a mean of scores
    away: list[tuple[Step, bool, bool]] = []
    for written, stage in zip(schedule.stages, spelled_out(schedule, shape).stages, strict=True):
        where = f"stage at block {stage.block} ({stage.at})"
        if stage.block >= shape.depth:
            problems.append(f"{where}: the model has blocks 0 to {shape.depth - 1}. Choose one of those.")
            continue
        wrong = stage_problems(written) or _misfits(stage, shape)
        if wrong:
            problems += [f"{where}: {text}" for text in wrong]
            continue
        while away and away[-1][0].returns_by(stage.block):
            step, masked, remembered = away.pop()
            present, returned = step.before, step.until
            means = means if remembered or means is None else step.until  # what came back without one begins it anew
        reducer, kept, until = REDUCERS[stage.reduce], count_of(stage, present), _until(stage, shape)
        masked_before = masked
        masked = masked or stage.is_adaptive or stage.learns_to_score
        if masked and reducer.masked is None:
            possible = ", ".join(name for name, other in REDUCERS.items() if other.masked is not None)
            problems.append(
                f"{where}: {stage.reduce} cannot follow a stage that learns its decisions (a threshold or a learned "
                f"score), as images then keep different numbers of tokens. Possible: {possible}. Choose one of those."
            )
        if stage.learns_to_score:
            if scored == stage.block:
                problems.append(
                    f"{where}: {stage.score} is the second learned score of block {stage.block}. Possible: one in a "
                    f"block. Move one of the two to another block, or give it a score that is computed."
                )
            scored = stage.block
        if kept > present:
            problems.append(
                f"{where}: tokens is {kept}, but only {present} patch tokens are present there. "
                f"Possible: 1 to {present}. Lower tokens or move the stage to an earlier block."
            )
            kept = present
        if reducer.holds and held == stage.block:
            problems.append(
                f"{where}: a {stage.reduce} stage there chooses among all positions already, and the second would undo "
                f"it. Possible: one per block. Remove one of them."
            )
        held = stage.block if reducer.holds else held
        read = stage.block - (stage.at == "pre")  # the block whose attention decides
        if pooled == read and reads_attention(stage):
            problems.append(
                f"{where}: the tokens that block {read}'s attention saw were pooled before. Possible: a stage from "
                f"block {read + 1} (mid) on. Move it or the stage that pools."
            )
        is_known = remembers(stage) and remembered and not reducer.needs_keys
        if returned == read + 1 == stage.block and reads_attention(stage) and not is_known:
            problems.append(
                f"{where}: it reads the attention of block {read}, which says nothing of the tokens that come back "
                f"before block {stage.block}. Possible: at mid, a score and a verb that read no attention, or "
                f"class_attention with the option momentum in this stage and in the one whose tokens come back. "
                f"Choose one of those, or let them come back earlier."
            )
        if reducer.pools and kept < present:
            pooled, means = read, None
        fewest = reducer.fewest_kept(present)
        if kept < fewest:
            problems.append(
                f"{where}: {stage.reduce} cannot go from {present} to {kept} patch tokens; the fewest it can keep "
                f"is {fewest}. Keep more, or spread the reduction over two blocks."
            )
            kept = fewest
        after = kept if kept == present and not stage.is_adaptive else kept + reducer.extra_tokens
        steps.append(Step(stage, before=present, kept=kept, after=after, until=until))
        if not steps[-1].is_idle:
            means = read if means is None and remembers(stage) else means
            problems += [f"{where}: {text}" for step, *_ in away[-1:] if (text := _crossing(until, step, shape))]
            if until is not None:
                away.append((steps[-1], masked_before, means is not None and means <= read))
        present = present if reducer.holds else after
    if problems:
        raise ScheduleError("schedule", problems)
    return tuple(steps)


def refuse_everywhere(schedule: Schedule) -> None:
    """Raise ScheduleError for a schedule that fits no model: neither a large one whose tokens can go, nor one with a
    feature map."""
    ends = [stage.until for stage in schedule.stages if isinstance(stage.until, int)]
    depth = 1 + max([*(stage.block for stage in schedule.stages), *ends], default=0)
    large = ModelShape(depth, 1, 1, 1, MOST_TOKENS, 1, 1, mlp_macs=1, stem_macs=1, head_macs=1)
    try:
        resolve(schedule, large)
    except ScheduleError:
        try:
            resolve(schedule, replace(large, holds=True, prefix_tokens=0, class_tokens=0))
        except ScheduleError:
            pass
        else:
            return
        raise


def _until(stage: Stage, shape: ModelShape) -> int | None:
    """The block before which the tokens that left are back, the number of blocks for the end; None if never."""
    return shape.depth if stage.until == END else stage.until  # type: ignore[return-value]  # other texts are refused


def _crossing(until: int | None, step: Step, shape: ModelShape) -> str:
    """Why the tokens of a stage cannot come back before `until` (or never), when those of an earlier step that is not
    over are back earlier; "" when they can."""
    assert step.until is not None
    if until is not None and until <= step.until:
        return ""
    what = "go for good" if until is None else "come back later"
    where = END if step.until == shape.depth else str(step.until)
    return (
        f"its tokens {what}, but some that left at block {step.stage.block} come back before "
        f"{_block(step.until, shape)}, to places among them or as a part of them. Possible: until up to {where}. Write "
        f"until: {where} here too, or leave until out there."
    )


def _block(block: int, shape: ModelShape) -> str:
    return "the end" if block == shape.depth else f"block {block}"


def canonical(schedule: Schedule, shape: ModelShape) -> Schedule:
    """The canonical form of a schedule: schedules that do the same to this model have equal forms (and equal hashes).

    Stages that remove nothing are left out. Fractions become counts, where all images have the same count. Options
    that are at their default, or have no effect on this model, are dropped.
    """
    stages: list[Stage] = []
    for step in resolve(schedule, shape):
        if step.is_idle:
            continue
        stage = replace(step.stage, options=_given_options(step.stage, shape))
        if not any(earlier.is_adaptive for earlier in (*stages, stage)):
            stage = replace(stage, keep=None, tokens=step.kept)
        stages.append(stage)
    is_adaptive = any(stage.is_adaptive for stage in stages)
    return replace(schedule, stages=tuple(stages)) if is_adaptive else Schedule(tuple(stages))


def count_of(stage: Stage, present: int) -> int:
    """How many of `present` patch tokens a stage keeps; with a threshold, the most it can."""
    if stage.tokens is not None:
        return stage.tokens
    if stage.threshold is not None:
        return present
    # repr gives the shortest decimal that means this float, so 0.28 is 28/100 here and not 0.28000000000000003
    return math.ceil(Decimal(repr(float(stage.keep or 0))) * present)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def stage_problems(stage: Stage) -> list[str]:
    """Mistakes in a stage's names and options that do not depend on a model."""
    problems = unknown_words(stage)
    if problems:
        return problems
    reducer = REDUCERS[stage.reduce]
    if reducer.ranks and stage.score == "none":
        known = ", ".join(SCORERS)
        problems.append(f"{stage.reduce} needs a score, but score is none. Known: {known}. Name one of them.")
    if not reducer.ranks and stage.score != "none":
        problems.append(
            f"{stage.reduce} does not rank tokens, so score {stage.score!r} would have no effect. "
            f"Write score: none, or leave it out."
        )
    if stage.until is not None and reducer.pools:
        possible = ", ".join(name for name, other in REDUCERS.items() if not other.pools and not other.holds)
        problems.append(
            f"until is given, but {stage.reduce} replaces all tokens by new ones, which are not in places of theirs. "
            f"Possible: {possible}. Choose one of those, or leave until out."
        )
    if stage.is_adaptive and not reducer.takes_threshold:
        possible = ", ".join(name for name, other in REDUCERS.items() if other.takes_threshold)
        problems.append(
            f"threshold is given, but {stage.reduce} keeps a fixed number of tokens. "
            f"Possible: keep or tokens; with a threshold {possible}. Change one of them."
        )
    known_options = _default_options(stage)
    entries: list[Scorer | Reducer] = [reducer] if stage.score == "none" else [SCORERS[stage.score], reducer]
    choices = {name: values for entry in entries for name, values in entry.choices.items()}
    bounds = {name: values for entry in entries for name, values in entry.bounds.items()}
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
        elif name in choices and value not in choices[name]:
            problems.append(
                f"option {name} is {value!r}; possible: {', '.join(choices[name])}. Its default is "
                f"{known_options[name]!r}. Write one of them.{did_you_mean(value, choices[name])}"
            )
        elif name in bounds and not bounds[name][0] <= float(value) <= bounds[name][1]:
            low, high = bounds[name]
            problems.append(
                f"option {name} is {value!r}; possible: from {low} to {high}. Its default is "
                f"{known_options[name]!r}. Change it."
            )
    return problems


def unknown_words(stage: Stage) -> list[str]:
    """Error messages for a score and a verb that are not registered; empty when both are."""
    problems = []
    if stage.score != "none" and stage.score not in SCORERS:
        problems.append(SCORERS.unknown(stage.score))
    if stage.reduce not in REDUCERS:
        problems.append(REDUCERS.unknown(stage.reduce))
    return problems


def options_of(stage: Stage) -> dict[str, Scalar]:
    """The stage's options, completed with the defaults of its score and verb, if those are registered.

    Those without effect are left out, see `unused_options`.
    """
    defaults = {name: value for name, value in _default_options(stage).items() if name not in unused_options(stage)}
    return {**defaults, **dict(stage.options)}


def unused_options(stage: Stage) -> tuple[str, ...]:
    """Options that have no effect: what tokens are that come back, where none do; a running mean that forgets all."""
    returns = () if stage.until is not None else (RETURNS,)
    return returns if dict(stage.options).get(MOMENTUM) else (*returns, MOMENTUM)


def options_for(entry: Scorer | Reducer, stage: Stage) -> Mapping[str, Scalar]:
    """The stage's options for one of its two functions, completed with the defaults."""
    given = {name: value for name, value in stage.options if name in entry.options}
    return {**entry.options, **given} if given else entry.options


def without_defaults(schedule: Schedule) -> Schedule:
    """The schedule without options at their default, as in a search, so that it compares equal to a candidate."""
    return replace(schedule, stages=tuple(replace(stage, options=_given_options(stage)) for stage in schedule.stages))


def _default_options(stage: Stage) -> dict[str, Scalar]:
    scorer = SCORERS[stage.score].options if stage.score in SCORERS else {}
    reducer = REDUCERS[stage.reduce].options if stage.reduce in REDUCERS else {}
    return {**scorer, **reducer}


def _given_options(stage: Stage, shape: ModelShape | None = None) -> Options:
    """The options that differ from their default. With a shape, also without those that have no effect on it."""
    defaults = _default_options(stage)
    idle = () if shape is None else REDUCERS[stage.reduce].no_effect(shape)
    idle = (*idle, *unused_options(stage))
    return as_options(
        {
            name: value
            for name, value in stage.options
            if name not in idle and (name not in defaults or value != defaults[name])
        }
    )


def unusual_options(stage: Stage) -> str:
    """The options that differ from their default in words, such as "position mean"; "" if none does."""
    return ", ".join(f"{name} {value}" for name, value in _given_options(stage))


def _score_unless_written(reduce: str) -> str:
    return DEFAULT_SCORE if reduce not in REDUCERS or REDUCERS[reduce].ranks else "none"


def _fits(value: Scalar, default: Scalar) -> bool:
    if isinstance(default, float):
        return _is_number(value)
    return type(value) is type(default)


def remembers(stage: Stage) -> bool:
    """Whether its score is a running mean of what attention layers gave, see `MOMENTUM`."""
    return stage.score in SCORERS and momentum_of(stage) > 0


def momentum_of(stage: Stage) -> float:
    """The share that a running mean keeps of what it was before a block; 0 for a score of one block."""
    return float(options_for(SCORERS[stage.score], stage).get(MOMENTUM, 0.0))


def blocks_read(steps: Sequence[Step]) -> list[tuple[int, ...]]:
    """For each step, the blocks whose attention its score reads; none for a score that reads no attention.

    A running mean begins in the block that its first stage reads, and anew after tokens were pooled. Later stages
    update it in every block since.
    """
    found: list[tuple[int, ...]] = []
    last: int | None = None  # the block that the running mean has read last
    for step in steps:
        stage, read = step.stage, step.stage.block - (step.stage.at == "pre")
        if stage.score == "none" or not SCORERS[stage.score].needs_attention:
            found.append(())
        elif not remembers(stage):
            found.append((read,))
        else:
            found.append(tuple(range(read if last is None else last + 1, read + 1)))
            last = read
        last = None if REDUCERS[stage.reduce].pools else last
    return found


def reads_attention(stage: Stage) -> bool:
    """Whether a stage reads an attention layer, for its score or for keys."""
    return REDUCERS[stage.reduce].needs_keys or (stage.score != "none" and SCORERS[stage.score].needs_attention)


def _misfits(stage: Stage, shape: ModelShape) -> list[str]:
    """Why a stage without other mistakes cannot run on this model."""
    problems = []
    scorer = None if stage.score == "none" else SCORERS[stage.score]
    if not REDUCERS[stage.reduce].fits(shape):
        why = (
            "needs tokens that can go, but this model has a feature map, whose positions stay in place"
            if shape.holds
            else "needs a model with a feature map (Swin, ConvNeXt), but this one has none"
        )
        possible = ", ".join(name for name, other in REDUCERS.items() if other.fits(shape))
        return [f"{stage.reduce} {why}. Possible: {possible}. Choose one of those, or another model."]
    if shape.holds and stage.until is not None:
        problems.append(
            f"until is {stage.until!r}, but in a model with a feature map no token leaves its place: {stage.reduce} "
            f"lasts until the next stage. Leave until out."
        )
    if shape.holds and stage.at != "pre":
        problems.append(f"{stage.reduce} decides on the block's input. Possible: at pre. Write at: pre.")
    if shape.holds and scorer is not None and scorer.needs_attention:
        possible = ", ".join(name for name, other in SCORERS.items() if not other.needs_attention)
        return [
            *problems,
            f"score {stage.score} reads an attention over all tokens, but a model with a feature map mixes them in "
            f"windows. Possible: {possible}. Choose one of those.",
        ]
    if isinstance(stage.until, int) and stage.until >= shape.depth:
        later = f"a block from {stage.block + 1} to {shape.depth - 1}, or " if stage.block + 1 < shape.depth else ""
        problems.append(f"until is {stage.until}; the model has {shape.depth} blocks. Possible: {later}{END}.")
    if shape.segments and (stage.until is None or REDUCERS[stage.reduce].pools):
        problems.append(
            f"{stage.reduce} without until takes tokens away for good, but this model gives classes to each patch, so "
            f"all must be back at the end. Possible: until: a later block, next or {END}, with verbs that do not pool. "
            f"Write until."
        )
    if scorer is not None and scorer.needs_class_token and not shape.has_class_token:
        possible = ", ".join(name for name, other in SCORERS.items() if not other.needs_class_token)
        problems.append(
            f"score {stage.score} reads the class token's attention, but this model has no class token. "
            f"Possible: {possible}. Choose one of those."
        )
    if stage.at == "pre" and stage.block == 0 and reads_attention(stage):
        what = stage.reduce if scorer is None else stage.score
        problems.append(
            f"{what} at pre reads the attention of the block before, and block 0 has none. "
            f"Possible: at mid, or a later block. Move the stage."
        )
    return problems
