"""A device profile: what the parts of a model take on a device, in milliseconds, and the latency of a schedule by it.

Made by `prunesearch profile`. Reading it and adding up needs neither PyTorch nor the device.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from prunesearch.errors import DeviceError
from prunesearch.shape import ModelShape

Count = Any
"""An int, or a tensor with one count for each image."""


@dataclass(frozen=True)
class Curve:
    """Milliseconds as a function of a number of tokens: linear between the measured points, and beyond them as there.

    tokens: ascending. error: standard errors as shares of ms.
    """

    tokens: tuple[int, ...]
    ms: tuple[float, ...]
    error: tuple[float, ...]

    def at(self, tokens: Count) -> Count:
        """Milliseconds at a number of tokens. Tensors give tensors, and gradients pass through: the slope between two
        measured points, so none on the flat part of a stair."""
        if isinstance(tokens, (int, float)):
            right = bisect_right(self.tokens, tokens)
            if right in (0, len(self.tokens)):
                return self.ms[max(right - 1, 0)]
            return self.ms[right - 1] + self._slope(right - 1) * (tokens - self.tokens[right - 1])
        within = tokens.clamp(min=self.tokens[0], max=self.tokens[-1])
        value, before = self.ms[0] + within * 0.0, 0.0
        for place in range(len(self.tokens) - 1):
            slope = self._slope(place)
            value = value + (slope - before) * (within - self.tokens[place]).clamp(min=0)
            before = slope
        return value

    def plus(self, more: Mapping[int, float]) -> Curve:
        """The curve with more milliseconds: given at some numbers of tokens, in between on a straight line, and beyond
        the last ones as there. At most half of a value is taken away."""
        if not more:
            return self
        tokens, ms = zip(*sorted(more.items()), strict=True)
        line = Curve(tokens, ms, (0.0,) * len(ms))
        values = (value + max(line.at(count), -0.5 * value) for count, value in zip(self.tokens, self.ms, strict=True))
        return Curve(self.tokens, tuple(values), self.error)

    def _slope(self, place: int) -> float:
        """Milliseconds of one token more, between two measured points."""
        step = self.tokens[place + 1] - self.tokens[place]
        return (self.ms[place + 1] - self.ms[place]) / step


@dataclass(frozen=True)
class StageTime:
    """Milliseconds that a stage adds.

    fixed + per_before x before + per_kept x kept + per_pair x before x kept + per_guest x (before - kept)

    before, kept: patch tokens. name: of a verb, its usual score included; or of a score, beyond the usual one's time.
    error: of the fit, as a share of the time, root mean square over what was measured.
    """

    name: str
    fixed: float
    per_before: float = 0.0
    per_kept: float = 0.0
    per_pair: float = 0.0
    error: float = 0.0
    per_guest: float = 0.0

    def at(self, before: Count, kept: Count) -> Count:
        """Milliseconds for these patch tokens."""
        by_one = self.per_before * before + self.per_kept * kept + self.per_guest * (before - kept)
        return self.fixed + by_one + self.per_pair * before * kept


@dataclass(frozen=True)
class Profile:
    """What the parts of one model take on one device, for one batch size. All times are milliseconds of one batch.

    model: its timm name. shape: its sizes, by which it is recognised. device, runtime, threads, precision, batch,
    versions: what it was measured with; threads is 0 on a GPU. fixed: what does not depend on tokens.
    attention, sized_attention, mlp: one block's halves by all tokens in them, prefix included; sized_attention after
    merging, when the sizes of tokens are added to its logits. last: norm, pooling and classifier, by all tokens.
    verbs: a stage's verb by patch tokens. scores: a stage's score by the tokens it reads (as `before`). returning: what
    a verb takes more when its tokens come back, by patch tokens.
    dense_ms: the dense model, measured whole. check: how far schedules that were measured whole, and not used
    otherwise, are from their predictions, as shares (predicted / measured - 1).
    """

    model: str
    shape: ModelShape
    device: str
    runtime: str
    batch: int
    fixed: float
    mlp: Curve
    verbs: tuple[StageTime, ...]
    scores: tuple[StageTime, ...]
    dense_ms: float
    attention: Curve | None = None
    sized_attention: Curve | None = None
    last: Curve | None = None
    threads: int = 0
    precision: str = "float32"
    check: tuple[float, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    returning: tuple[StageTime, ...] = ()

    metric: ClassVar[str] = "predicted_latency_ms"
    unit: ClassVar[str] = "ms"
    per_unit: ClassVar[float] = 1.0
    knows_sizes: ClassVar[bool] = True

    def whole(self, shape: ModelShape) -> float:
        """What does not depend on tokens."""
        return self.fixed

    def block(self, shape: ModelShape, attention_tokens: Count, mlp_tokens: Count, sized: bool) -> Count:
        """One block. sized: its tokens have sizes that its attention adds to the logits."""
        attention = self.sized_attention if sized and self.sized_attention is not None else self.attention
        return self.mlp.at(mlp_tokens) + (0.0 if attention is None else attention.at(attention_tokens))

    def stage(self, shape: ModelShape, step: Any, before: Count, after: Count, scored: Sequence[Count]) -> Count:
        """A stage. Raises DeviceError for a score or verb that was not measured."""
        stage = step.stage
        time = self._time(self.verbs, "verb", stage.reduce).at(before, after)
        if step.until is not None:
            time = time + self._time(self.returning, "verb", stage.reduce, " with until").at(before, after)
        for tokens in scored:
            time = time + self._time(self.scores, "score", stage.score).at(tokens, 0)
        return time

    def end(self, shape: ModelShape, tokens: Count) -> Count:
        """What follows the last block."""
        return 0.0 if self.last is None else self.last.at(tokens)

    def _time(self, times: tuple[StageTime, ...], kind: str, name: str, how: str = "") -> StageTime:
        for time in times:
            if time.name == name:
                return time
        known = ", ".join(time.name for time in times) or "none"
        raise DeviceError(
            f"profile of {self.model}: the {kind} {name!r} was not measured{how}. Possible{how}: {known}. Profile "
            f"again: `prunesearch profile STUDY.yaml` for all of a study, or with --{kind} {name} beside the others."
        )


def refuse_other_shape(profile: Profile, shape: ModelShape) -> None:
    """Raise DeviceError for a profile, given by --profile, of another model than the one of this shape."""
    if profile.shape != shape:
        raise DeviceError(
            f"--profile: it is of {profile.model} with {profile.shape.patch_tokens} patch tokens, not of this model. "
            f"Possible: a profile of the same model at the same size. Make one with prunesearch profile."
        )


@dataclass(frozen=True)
class ProfileFile:
    """Profiles of one model on one device, one for each batch size."""

    version: Literal[1]
    profiles: tuple[Profile, ...]


MOST_MS = 1e9
MOST_POINTS = 1000
MOST_NAMES = 1000
MOST_LETTERS = 200


def profile_problems(profile: Profile) -> list[str]:
    """What is wrong with a profile that was read from a file; empty for one that was measured."""
    problems = []
    for name in ("attention", "sized_attention", "mlp", "last"):
        curve: Curve | None = getattr(profile, name)
        if curve is None:
            continue
        if not 1 <= len(curve.tokens) <= MOST_POINTS or not len(curve.tokens) == len(curve.ms) == len(curve.error):
            problems.append(f"{name}: tokens, ms and error are not of one length, 1 to {MOST_POINTS}.")
        elif any(right <= left for left, right in itertools.pairwise(curve.tokens)):
            problems.append(f"{name}: its tokens do not ascend.")
        elif not 1 <= curve.tokens[0] <= curve.tokens[-1] <= MOST_MS or not all(map(_is_time, curve.ms + curve.error)):
            problems.append(f"{name}: a number is not within its bounds: tokens from 1, ms and error from 0.")
    times = (*profile.verbs, *profile.scores, *profile.returning)
    for time in times[:MOST_NAMES]:
        if not all(
            map(_is_time, (time.fixed, time.per_before, time.per_kept, time.per_pair, time.error, time.per_guest))
        ):
            problems.append(f"{time.name[:MOST_LETTERS]}: a time is not within 0 to {MOST_MS:g} ms.")
    if len(times) > MOST_NAMES or any(
        len({one.name for one in kind}) < len(kind) for kind in (profile.verbs, profile.scores, profile.returning)
    ):
        problems.append("a verb or a score is there twice, or there are too many.")
    if not _is_time(profile.fixed) or not _is_time(profile.dense_ms) or profile.dense_ms < 1e-6:
        problems.append(f"fixed or dense_ms is not within 0 to {MOST_MS:g} ms.")
    if not 1 <= profile.batch <= 65_536 or not 0 <= profile.threads <= 1024:
        problems.append("batch is not within 1 to 65536, or threads not within 0 to 1024.")
    if not all(-1 <= miss <= MOST_MS for miss in profile.check[:MOST_NAMES]):
        problems.append("check has something else than shares.")
    texts = (profile.model, profile.device, profile.runtime, profile.precision, *itertools.chain(*profile.versions))
    if any(len(text) > MOST_LETTERS for text in texts):
        problems.append(f"a text is longer than {MOST_LETTERS} letters.")
    place = f"profile of {profile.model[:MOST_LETTERS] or '?'}, batch {min(profile.batch, 10**6)}"
    return [f"{place}: {problem} Possible: what prunesearch profile wrote. Profile again." for problem in problems]


def _is_time(value: float) -> bool:
    return 0 <= value <= MOST_MS  # false for NaN
