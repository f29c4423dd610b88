"""A device profile: what the parts of a model take on a device, in milliseconds, and the latency of a schedule by it.

Made by `prunesearch profile`. Reading it and adding up needs neither PyTorch nor the device.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from prunesearch.errors import DeviceError
from prunesearch.shape import ModelShape

Count = Any
"""An int, or a tensor with one count for each image."""


@dataclass(frozen=True)
class Curve:
    """Milliseconds as a function of a number of tokens: linear between the measured points, and beyond the last ones.

    tokens: ascending. error: standard errors as shares of ms.
    """

    tokens: tuple[int, ...]
    ms: tuple[float, ...]
    error: tuple[float, ...]

    def at(self, tokens: Count) -> Count:
        """Milliseconds at a number of tokens. Tensors give tensors, and gradients pass through."""
        slopes = self._slopes()
        if isinstance(tokens, (int, float)):
            place = min(max(bisect_right(self.tokens, tokens) - 1, 0), max(len(slopes) - 1, 0))
            return self.ms[place] + (slopes[place] * (tokens - self.tokens[place]) if slopes else 0.0)
        value = self.ms[0] + tokens * 0.0
        before = 0.0
        for place, slope in enumerate(slopes):
            above = tokens - self.tokens[place]
            value = value + (slope - before) * (above.clamp(min=0) if place else above)
            before = slope
        return value

    def plus(self, more: Mapping[int, float]) -> Curve:
        """The curve with more milliseconds: given at some numbers of tokens, in between on a straight line, and beyond
        the last ones as there. At most half of a value is taken away."""
        if not more:
            return self
        tokens, ms = zip(*sorted(more.items()), strict=True)
        line = Curve(tokens, ms, (0.0,) * len(ms))
        more_at = [line.at(min(max(count, tokens[0]), tokens[-1])) for count in self.tokens]
        values = (value + max(extra, -0.5 * value) for value, extra in zip(self.ms, more_at, strict=True))
        return Curve(self.tokens, tuple(values), self.error)

    def _slopes(self) -> list[float]:
        points = list(zip(self.tokens, self.ms, strict=True))
        return [(high - low) / (right - left) for (left, low), (right, high) in itertools.pairwise(points)]


@dataclass(frozen=True)
class StageTime:
    """Milliseconds that a stage adds: fixed + per_before x before + per_kept x kept + per_pair x before x kept.

    before, kept: patch tokens. name: of a verb, its usual score included; or of a score, beyond the usual one's time.
    error: of the fit, as a share of the time, root mean square over what was measured.
    """

    name: str
    fixed: float
    per_before: float = 0.0
    per_kept: float = 0.0
    per_pair: float = 0.0
    error: float = 0.0

    def at(self, before: Count, kept: Count) -> Count:
        """Milliseconds for these patch tokens."""
        return self.fixed + self.per_before * before + self.per_kept * kept + self.per_pair * before * kept


@dataclass(frozen=True)
class Profile:
    """What the parts of one model take on one device, for one batch size. All times are milliseconds of one batch.

    model: its timm name. shape: its sizes, by which it is recognised. device, runtime, threads, precision, batch,
    versions: what it was measured with; threads is 0 on a GPU. fixed: what does not depend on tokens.
    attention, sized_attention, mlp: one block's halves by all tokens in them, prefix included; sized_attention after
    merging, when the sizes of tokens are added to its logits. last: norm, pooling and classifier, by all tokens.
    verbs: a stage's verb by patch tokens. scores: a stage's score by the tokens it reads (as `before`).
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

    def stage(self, shape: ModelShape, step: Any, before: Count, after: Count, scored: Count) -> Count:
        """A stage. Raises DeviceError for a score or verb that was not measured."""
        stage = step.stage
        verb = self._time(self.verbs, "verb", stage.reduce).at(before, after)
        return verb if stage.score == "none" else verb + self._time(self.scores, "score", stage.score).at(scored, 0)

    def end(self, shape: ModelShape, tokens: Count) -> Count:
        """What follows the last block."""
        return 0.0 if self.last is None else self.last.at(tokens)

    def _time(self, times: tuple[StageTime, ...], kind: str, name: str) -> StageTime:
        for time in times:
            if time.name == name:
                return time
        known = ", ".join(time.name for time in times)
        raise DeviceError(
            f"profile of {self.model}: the {kind} {name!r} was not measured. Possible: {known}. Profile again with "
            f"`prunesearch profile ... --{kind} {name}`."
        )


@dataclass(frozen=True)
class ProfileFile:
    """Profiles of one model on one device, one for each batch size."""

    version: Literal[1]
    profiles: tuple[Profile, ...]


def profile_problems(profile: Profile) -> list[str]:
    """What is wrong with a profile that was read from a file; empty for one that was measured."""
    place, problems = f"profile of {profile.model or '?'}, batch {profile.batch}", []
    for name in ("attention", "sized_attention", "mlp", "last"):
        curve: Curve | None = getattr(profile, name)
        if curve is None:
            continue
        if not curve.tokens or not len(curve.tokens) == len(curve.ms) == len(curve.error):
            problems.append(f"{place}: {name}: tokens, ms and error are not of one length.")
        elif any(right <= left for left, right in itertools.pairwise(curve.tokens)):
            problems.append(f"{place}: {name}: its tokens do not ascend.")
        elif not all(math.isfinite(value) and value >= 0 for value in curve.ms):
            problems.append(f"{place}: {name}: its ms are not all finite and positive.")
    times = [
        profile.fixed,
        profile.dense_ms,
        *(
            value
            for time in (*profile.verbs, *profile.scores)
            for value in (time.fixed, time.per_before, time.per_kept, time.per_pair)
        ),
    ]
    if not all(map(math.isfinite, times)) or profile.dense_ms <= 0 or profile.batch < 1:
        problems.append(f"{place}: a time is not finite, or dense_ms or batch is not positive.")
    return [f"{problem} Possible: what prunesearch profile wrote. Profile again." for problem in problems]
