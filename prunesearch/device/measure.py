"""Measure a device profile: every part of a model in turns, then what each score and verb adds, then the whole.

What is measured are real parts with the model's own sizes, in the runtime that will run them. In a model they take
more than alone, where they run from warm caches. How much more a block takes is found on the whole model: dense, and
with one stage in its first block that leaves few tokens to all others. How much more a stage takes is found on a piece
of the model with and without stages.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunesearch.config import DEFAULT_SCORE
from prunesearch.cost import total_cost
from prunesearch.device.runtimes import Run, Runtime, Settings, prepare, threads_set
from prunesearch.device.stairs import filled, places, probes, width_of
from prunesearch.device.timing import Measured, in_turns
from prunesearch.errors import DeviceError, ScheduleError
from prunesearch.evaluate.speed import synchronise
from prunesearch.models import apply_schedule, input_size, parts_of, shape_of
from prunesearch.models.parts import Part, example, sharing_copy
from prunesearch.profile import Curve, Profile, StageTime
from prunesearch.schedule import END, Schedule, Stage, Step, resolve
from prunesearch.shape import ModelShape
from prunesearch.space.choices import may_return
from prunesearch.tokens import REDUCERS, SCORERS

FRACTIONS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.28, 0.17, 0.08)
"""Of the patch tokens: where curves are measured first."""
BENT = 0.03
"""A curve is measured between two points when its middle is further from a straight line than this share."""
DESIGNS = tuple(itertools.product((1.0, 0.35), (0.92, 0.6, 0.25)))
"""For each verb: the patch tokens present, as a share of the model's, and the share of these that stay."""
RETURNS = ((1.0, 0.6), (1.0, 0.25), (0.35, 0.6))
"""The same for verbs whose tokens come back, which add to what they take otherwise."""
CHECKS = 2
FINE = 1e-5
"""Seconds; a clock that is coarser is not used."""
FEWEST_TOKENS = 4
SECOND_LOOK = 0.3
"""Share of the time for points where curves bend."""
Key = tuple[Any, ...]


@dataclass(frozen=True)
class _Work:
    """What is measured: a call, and how many blocks it runs."""

    run: Run
    blocks: int = 1


def measure_profile(
    model: nn.Module,
    name: str,
    batch: int,
    runtime: Runtime,
    settings: Settings,
    seconds: float,
    *,
    verbs: Sequence[str] | None = None,
    scores: Sequence[str] | None = None,
    returning: Sequence[str] | None = None,
    versions: tuple[tuple[str, str], ...] = (),
    device: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> Profile:
    """What the parts of a model take on this machine, for one batch size.

    model: dense, in evaluation mode, on the device and in the precision of the settings. seconds: for measuring;
    exporting and compiling come on top. verbs, scores: those that are measured; all that fit the model when None.
    returning: the verbs that are measured with `until` too; all of verbs when None.
    versions, device: written into the profile.
    Raises DeviceError when the runtime cannot run a part of the model.
    """
    shape = shape_of(model)
    verbs = fitting_verbs(shape) if verbs is None else list(verbs)
    fitting = fitting_scores(shape)
    scores = fitting if scores is None else [score for score in scores if score in fitting]
    if shape.patch_tokens < FEWEST_TOKENS:
        raise DeviceError(
            f"model: it has {shape.patch_tokens} patch tokens. Possible: from {FEWEST_TOKENS}; with fewer there is "
            f"nothing to measure. Take larger images."
        )
    learned_alone = not shape.holds and all(SCORERS[score].part is not None for score in scores)
    if learned_alone and any(REDUCERS[verb].ranks for verb in verbs):
        scores = [*scores, usual_score(shape, fitting)]
    score = usual_score(shape, scores)
    channels, height, width = input_size(model)
    images = example(batch, channels, height, width, like=next(model.parameters()).detach())
    returning = verbs if shape.segments or returning is None else returning
    back = [verb for verb in verbs if may_return(verb) and verb in returning]
    look = _Look(model, shape, images, runtime, settings, say)
    wait = partial(synchronise, settings.device)
    with threads_set(settings):
        slow = f"; {runtime.readying} for each part, and is not counted" if runtime.readying else ""
        say(f"making {runtime.name} ready for batch {batch}{slow}")
        work = look.constants() | look.curves(_counts(shape)) | look.stages(verbs, scores, back)
        checks = _checks(shape, verbs, score)
        steep = _steep(verbs, shape, score)
        work |= look.models({verb: _gentle(verb, look.piece_shape, score) for verb in verbs}, steep, checks)
        say(f"measuring {len(work)} parts for up to {seconds:.3g} s")
        clock = _clock(settings)
        first = _times(work, seconds * (1 - SECOND_LOOK), wait, clock)
        stairs = _stairs(first, shape)
        more = look.curves(_bends(first, shape, stairs))
        if stairs is not None:
            more |= look.curves(_at_stairs(stairs, first, shape), only="attention")
        if more:
            anchored = more | {("dense",): work[("dense",)]}
            second = _times(anchored, seconds * SECOND_LOOK, wait, clock)
            drift = first[("dense",)].seconds / second[("dense",)].seconds
            first |= {
                key: Measured(value.seconds * drift, value.error) for key, value in second.items() if key != ("dense",)
            }
    found = _profile(first, shape, verbs, scores, back, stairs, steep)
    found = replace(
        found,
        model=name,
        batch=batch,
        device=device or str(settings.device),
        runtime=runtime.name,
        threads=settings.threads,
        precision=settings.precision,
        versions=versions,
    )
    found = _with_time_in_models(found, first, look.piece_shape, score)
    misses = [
        total_cost(shape, schedule, found) / (1e3 * first[("check", index)].seconds) - 1
        for index, schedule in enumerate(checks)
    ]
    return replace(found, check=tuple(round(miss, 4) for miss in misses))


class _Look:
    """Makes the parts of one model ready to run."""

    def __init__(
        self,
        model: nn.Module,
        shape: ModelShape,
        images: Tensor,
        runtime: Runtime,
        settings: Settings,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.shape, self.images, self.say = model, shape, images, say
        self.runtime, self.settings, self.parts = runtime, settings, parts_of(model)
        self.piece = self.parts.piece_of(model)
        self.piece_shape = shape_of(self.piece)

    def constants(self) -> dict[Key, _Work]:
        """The dense model, and what does not depend on tokens."""
        stem = self.parts.stem_part(self.model, self.images)
        found: dict[Key, Part] = {("dense",): Part((self.model,), (self.images,))}
        return self._ready(found if stem is None else found | {("stem",): stem})

    def curves(self, counts: Sequence[int], only: str | None = None) -> dict[Key, _Work]:
        """The parts that depend on a number of tokens. counts: patch tokens. only: this curve alone."""
        tokens = [count + self.shape.prefix_tokens for count in counts]
        found: dict[Key, _Work] = {}
        for name, parts in (
            self.parts.curve_parts(self.model, self.shape, self.images, tokens).items() if tokens else ()
        ):
            if only not in (None, name):
                continue
            runs = self._prepared(list(parts.values()), f"{name} of a block")
            rows = zip(parts.items(), runs, strict=True)
            found |= {(name, count): _Work(run, part.blocks) for (count, part), run in rows}
        return found

    def stages(self, verbs: Sequence[str], scores: Sequence[str], returning: Sequence[str]) -> dict[Key, _Work]:
        """Scores and verbs alone. returning: the verbs with `until` too."""
        shape = self.shape
        found: dict[Key, Part] = {}
        for name in scores:
            for share in (1.0, 0.35):
                tokens = round(share * shape.patch_tokens) + shape.prefix_tokens
                found[("score", name, tokens)] = self.parts.score_part(self.model, shape, self.images, name, tokens)
        for verb in verbs:
            score = usual_score(shape, scores)
            for step in _designs(verb, shape, score, DESIGNS):
                found[("verb", verb, step.before, step.after)] = self.parts.verb_part(
                    self.model, shape, self.images, replace(step, until=None)
                )
            for step in _designs(verb, shape, score, RETURNS) if verb in returning else ():
                step = replace(step, until=shape.depth)
                found[("return", verb, step.before, step.after)] = self.parts.verb_part(
                    self.model, shape, self.images, step
                )
        return self._ready(found)

    def models(
        self, pieces: Mapping[str, Schedule], steep: Mapping[int, Schedule], checks: Sequence[Schedule]
    ) -> dict[Key, _Work]:
        """A piece of the model without and with stages, whole models with few tokens, and such that check the
        predictions."""
        found: dict[Key, Part] = {("piece", ""): Part((self.piece,), (self.images,))}
        for verb, schedule in pieces.items():
            found[("piece", verb)] = Part((self._pruned(self.piece, schedule),), (self.images,))
        for tokens, schedule in steep.items():
            found[("steep", tokens)] = Part((self._pruned(self.model, schedule),), (self.images,))
        for index, schedule in enumerate(checks):
            found[("check", index)] = Part((self._pruned(self.model, schedule),), (self.images,))
        return self._ready(found)

    def _pruned(self, model: nn.Module, schedule: Schedule) -> nn.Module:
        return apply_schedule(sharing_copy(model), schedule, untrained=True).eval()

    def _ready(self, parts: Mapping[Key, Part]) -> dict[Key, _Work]:
        return {
            key: _Work(self._prepared([part], " ".join(map(str, key)))[0], part.blocks) for key, part in parts.items()
        }

    def _prepared(self, parts: Sequence[Part], what: str) -> list[Run]:
        if self.runtime.readying:
            self.say(f"making {what} ready")
        try:
            return prepare(parts, self.runtime, self.settings)
        except Exception as error:  # exporters and compilers raise anything
            raise DeviceError(
                f"runtime {self.runtime.name}: it cannot run {what}: {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}. Possible: another "
                f"runtime, or without this score or verb. Choose with --runtime, --verb and --score."
            ) from error


def _clock(settings: Settings) -> Callable[[], float] | None:
    """What counts the time. With one thread all runtimes work in the thread that calls them, and its processor time
    does not grow while something else has the processor. On Windows it is too coarse."""
    alone = settings.threads == 1 and settings.device.type == "cpu"
    return time.thread_time if alone and time.get_clock_info("thread_time").resolution < FINE else None


def _times(
    work: Mapping[Key, _Work], seconds: float, wait: Callable[[], None], clock: Callable[[], float] | None
) -> dict[Key, Measured]:
    """Seconds of one block (or of the whole) for each piece of work."""
    found = in_turns({key: one.run for key, one in work.items()}, seconds, wait, clock=clock)
    return {key: Measured(value.seconds / work[key].blocks, value.error) for key, value in found.items()}


# --- what is measured --------------------------------------------------------------------------------------------


def _counts(shape: ModelShape) -> list[int]:
    """Patch tokens at which curves are measured first."""
    counts = {max(1, round(share * shape.patch_tokens)) for share in FRACTIONS}
    if shape.holds or shape.has_positions:
        # with one token less nearly no time goes, and positions are held or have to be followed
        counts.add(shape.patch_tokens - 1)
    if not shape.holds:
        counts |= {tokens - shape.prefix_tokens for tokens in probes(shape.patch_tokens + shape.prefix_tokens)}
    return sorted(count for count in counts if count > 0)


def _stairs(times: Mapping[Key, Measured], shape: ModelShape) -> int | None:
    """The width of the stairs of attention, see `stairs.py`; None when it has none."""
    attention = _curve("attention", times)
    return None if attention is None else width_of(attention, shape.patch_tokens + shape.prefix_tokens)


def _at_stairs(width: int, times: Mapping[Key, Measured], shape: ModelShape) -> list[int]:
    """Patch tokens at the edges of stairs that are not measured yet."""
    known = {key[1] for key in times if key[0] == "attention"}
    edges = places(width, shape.patch_tokens + shape.prefix_tokens)
    return [tokens - shape.prefix_tokens for tokens in edges if tokens > shape.prefix_tokens and tokens not in known]


def _bends(times: Mapping[Key, Measured], shape: ModelShape, stairs: int | None) -> list[int]:
    """Patch tokens half-way between two measured points of which a curve is not straight, but for stairs."""
    found = set()
    for name in ("mlp",) if stairs else ("attention", "mlp"):
        points = sorted((key[1], value.seconds) for key, value in times.items() if key[0] == name)
        for (left, low), (middle, seconds), (right, high) in zip(points, points[1:], points[2:], strict=False):
            straight = low + (high - low) * (middle - left) / (right - left)
            if abs(seconds / straight - 1) > BENT:
                found |= {(left + middle) // 2, (middle + right) // 2}
    known = {key[1] for key in times if key[0] == "mlp"}
    return sorted(tokens - shape.prefix_tokens for tokens in found - known)


def fitting_verbs(shape: ModelShape) -> list[str]:
    """The verbs that models of this kind take."""
    return [
        name for name, entry in REDUCERS.items() if entry.holds == shape.holds and not (shape.segments and entry.pools)
    ]


def fitting_scores(shape: ModelShape) -> list[str]:
    """The scores that models of this kind take."""
    return [
        name
        for name, entry in SCORERS.items()
        if (shape.has_class_token or not entry.needs_class_token) and not (shape.holds and entry.needs_attention)
    ]


def usual_score(shape: ModelShape, scores: Sequence[str]) -> str:
    """The score, among those that are measured, that stages have when the time of a verb is found."""
    plain = [name for name in scores if SCORERS[name].part is None]  # verbs without a masked form cannot follow others
    return DEFAULT_SCORE if DEFAULT_SCORE in plain else next(iter(plain or scores), "none")


def _stage(verb: str, block: int, shape: ModelShape, keep: float, score: str) -> Stage:
    score = score if REDUCERS[verb].ranks else "none"
    until = END if shape.segments else None  # where each patch is needed at the end, nothing else runs
    return Stage(block, at="pre" if shape.holds else "mid", score=score, keep=keep, reduce=verb, until=until)


def _designs(verb: str, shape: ModelShape, score: str, designs: Iterable[tuple[float, float]]) -> list[Step]:
    """Steps at which a verb is measured alone. designs: as `DESIGNS`."""
    found = {}
    for present, keep in designs:
        before = max(2, round(present * shape.patch_tokens))
        keep = max(keep, REDUCERS[verb].fewest_kept(before) / before)
        step = resolve(Schedule((_stage(verb, 0, shape, keep, score),)), replace(shape, patch_tokens=before))[0]
        found[(step.before, step.after)] = step
    return [step for step in found.values() if not step.is_idle]


def _gentle(verb: str, shape: ModelShape, score: str) -> Schedule:
    """A schedule with a stage in every block, to numbers of tokens at which curves are measured: the largest ones.

    Between those a curve is not known well enough, as what stages take is a small difference of large times.
    """
    entry, present, stages = REDUCERS[verb], shape.patch_tokens, []
    counts = [count - entry.extra_tokens for count in _counts(shape) if count < present]
    for block in range(shape.depth):
        most = present - entry.extra_tokens - 1
        possible = [count for count in counts if max(entry.fewest_kept(present), 1) <= count <= most]
        if not possible:
            break
        count = max(possible)
        stage = _stage(verb, block, shape, 1.0, score)
        stages.append(replace(stage, keep=None, tokens=count))
        present = shape.patch_tokens if shape.holds else count + entry.extra_tokens
    return Schedule(tuple(stages))


def _steep(verbs: Sequence[str], shape: ModelShape, score: str) -> dict[int, Schedule]:
    """Schedules with one stage in the first block, that leaves few tokens to the others: by their number, all counted.

    Empty when no verb can leave so few.
    """
    counts, found = _counts(shape), {}
    for count in {counts[0], counts[len(counts) // 2]}:
        for verb in sorted(verbs, key=lambda name: REDUCERS[name].part is not None):
            entry = REDUCERS[verb]
            left = count - entry.extra_tokens
            if not entry.holds and max(entry.fewest_kept(shape.patch_tokens), 1) <= left < shape.patch_tokens:
                stage = replace(_stage(verb, 0, shape, 1.0, score), keep=None, tokens=left)
                found[count + shape.prefix_tokens] = Schedule((stage,))
                break
    return found


def _checks(shape: ModelShape, verbs: Sequence[str], score: str) -> list[Schedule]:
    """Schedules, drawn with a fixed seed, that no time is derived from."""
    draw, found = random.Random(0), []
    for _ in range(100):
        blocks = draw.sample(range(shape.depth), min(3, shape.depth))
        verb = draw.choice(list(verbs))
        keeps = [draw.choice((0.6, 0.7, 0.8)) for _ in blocks]
        stages = [_stage(verb, block, shape, keep, score) for block, keep in zip(blocks, keeps, strict=True)]
        schedule = Schedule(tuple(stages))
        try:
            resolve(schedule, shape)
        except ScheduleError:  # pooled tokens have no attention to be scored by
            continue
        found.append(schedule)
        if len(found) == CHECKS:
            break
    return found


# --- what follows from it ----------------------------------------------------------------------------------------


def _profile(
    times: Mapping[Key, Measured],
    shape: ModelShape,
    verbs: Sequence[str],
    scores: Sequence[str],
    returning: Sequence[str],
    stairs: int | None,
    steep: Mapping[int, Schedule],
) -> Profile:
    """The profile of parts alone, with what a block takes more inside a model than its halves take alone."""
    dense = 1e3 * times[("dense",)].seconds
    attention, sized, mlp, last = (_curve(name, times) for name in ("attention", "sized_attention", "mlp", "last"))
    assert mlp is not None
    if attention is not None and stairs is not None:
        attention = filled(attention, stairs)
    if attention is not None and sized is not None:  # measured at fewer tokens: the sizes add nearly a straight line
        rows = zip(sized.tokens, sized.ms, strict=True)
        sized = attention.plus({tokens: ms - attention.at(tokens) for tokens, ms in rows})
    fixed = 1e3 * times[("stem",)].seconds if ("stem",) in times else dense - shape.depth * mlp.at(shape.patch_tokens)
    found = Profile(
        model="",
        shape=shape,
        device="",
        runtime="",
        batch=1,
        fixed=fixed,
        mlp=mlp,
        verbs=tuple(_stage_time(verb, "verb", times) for verb in verbs),
        scores=tuple(_stage_time(score, "score", times) for score in scores),
        returning=tuple(_return_time(verb, times) for verb in returning),
        dense_ms=dense,
        attention=attention,
        sized_attention=sized,
        last=last,
    )
    if attention is None:  # the rest of a model with a feature map has been measured whole
        return found
    schedules = {shape.patch_tokens + shape.prefix_tokens: Schedule(), **steep}
    wholes = {tokens: 1e3 * times["steep", tokens].seconds for tokens in steep}
    wholes[shape.patch_tokens + shape.prefix_tokens] = dense
    more = {
        tokens: (wholes[tokens] - total_cost(shape, schedule, found)) / shape.depth
        for tokens, schedule in schedules.items()
    }
    return replace(found, mlp=mlp.plus(more))


def _curve(name: str, times: Mapping[Key, Measured]) -> Curve | None:
    points = sorted((key[1], 1e3 * value.seconds, value.error) for key, value in times.items() if key[0] == name)
    if not points:
        return None
    tokens, ms, error = zip(*points, strict=True)
    return Curve(tokens, ms, error)


def _stage_time(name: str, kind: str, times: Mapping[Key, Measured]) -> StageTime:
    """Fit a score's or verb's time. A score depends on one number of tokens only."""
    points = [(*key[2:], 1e3 * value.seconds) for key, value in times.items() if key[:2] == (kind, name)]
    measured = np.array([point[-1] for point in points])
    if kind == "score":
        (fixed, per_before), error = non_negative_fit(np.array([[1.0, point[0]] for point in points]), measured)
        return StageTime(name, fixed, per_before, error=error)
    columns = [[1.0, before, kept, before * kept, before - kept] for before, kept, _ in points]
    weights, error = non_negative_fit(np.array(columns), measured)
    fixed, per_before, per_kept, per_pair, per_guest = weights
    return StageTime(name, fixed, per_before, per_kept, per_pair, error, per_guest)


def _return_time(verb: str, times: Mapping[Key, Measured]) -> StageTime:
    """What a verb takes more when its tokens come back: a part for each token, and a part for each that was away."""
    points = [(*key[2:], 1e3 * value.seconds) for key, value in times.items() if key[:2] == ("return", verb)]
    alone = {key[2:]: 1e3 * value.seconds for key, value in times.items() if key[:2] == ("verb", verb)}
    whole = np.array([ms for _, _, ms in points])
    more = np.array([ms - alone[before, after] for before, after, ms in points])
    columns = np.array([[1.0, before, before - after] for before, after, _ in points])
    (fixed, per_before, per_guest), error = non_negative_fit(columns, more, whole)
    return StageTime(verb, fixed, per_before, error=error, per_guest=per_guest)


def non_negative_fit(
    columns: np.ndarray, values: np.ndarray, scale: np.ndarray | None = None
) -> tuple[list[float], float]:
    """Weights >= 0 of the columns (rows, columns) with the least squared relative error, and its root mean square.

    scale: what errors are shares of; the values when None. All choices of columns are tried: there are five at most.
    """
    scale = values if scale is None else scale
    scaled, wanted = columns / scale[:, None], values / scale
    best, least = [0.0] * columns.shape[1], float(np.sqrt(np.mean(wanted**2)))
    for size in range(1, min(columns.shape) + 1):
        for chosen in itertools.combinations(range(columns.shape[1]), size):
            weights = np.linalg.lstsq(scaled[:, chosen], wanted, rcond=None)[0]
            error = float(np.sqrt(np.mean((scaled[:, chosen] @ weights - wanted) ** 2)))
            if weights.min() >= 0 and error < least - 1e-9:
                least, best = error, [0.0] * columns.shape[1]
                for place, weight in zip(chosen, weights, strict=True):
                    best[place] = float(weight)
    return best, least


def _with_time_in_models(profile: Profile, times: Mapping[Key, Measured], piece: ModelShape, score: str) -> Profile:
    """Add to each verb what its stages take in a piece of the model beyond their parts: calls, cold caches."""
    dense = times[("piece", "")].seconds

    def corrected(verb: StageTime) -> StageTime:
        schedule = _gentle(verb.name, piece, score)
        if not schedule.stages:
            return verb
        measured = 1e3 * (times[("piece", verb.name)].seconds - dense)
        predicted = total_cost(piece, schedule, profile) - total_cost(piece, Schedule(), profile)
        return replace(verb, fixed=max(verb.fixed + (measured - predicted) / len(schedule.stages), 0.0))

    return replace(profile, verbs=tuple(map(corrected, profile.verbs)))
