"""A device profile in plain words: what can be gained on this device at all, before any search."""

from __future__ import annotations

import math

from prunesearch.cost import total_cost
from prunesearch.device.stairs import width_of
from prunesearch.errors import ScheduleError
from prunesearch.printable import counted
from prunesearch.profile import Profile
from prunesearch.schedule import Schedule, Stage
from prunesearch.tokens import REDUCERS

HALF = 0.5
MERGED_PER_BLOCK = 0.92
"""Share of the tokens that stay in each block when a verb runs in every block; about half of them are left at the end
of twelve."""

WORTH = 1.02
"""A schedule that is less than this much faster is no gain."""


def profile_lines(profile: Profile) -> list[str]:
    """What can be gained, a sentence each: how it was measured, the summary, verbs in every block, stairs, how sure.

    What `cost.doubts` says comes on top.
    """
    threads = f", {counted(profile.threads, 'thread')}" if profile.threads else ""
    lines = [
        f"{profile.model} on {profile.device}{threads}, {profile.runtime}, {profile.precision}",
        summary(profile),
        *_in_every_block(profile),
        *_stairs(profile),
    ]
    if profile.check:
        worst, count = max(map(abs, profile.check)), len(profile.check)
        lines.append(
            f"How sure: {count} schedules that were measured whole are within {worst:.0%} of what the parts say."
        )
    return lines


def summary(profile: Profile) -> str:
    """What can be gained, in one sentence."""
    shape, dense = profile.shape, profile.dense_ms
    least = min(floor_ms(profile), dense)
    parts = [
        f"batch {profile.batch}: {_ms(least)} of {_ms(dense)} do not depend on tokens, so no schedule is more than "
        f"{dense / least:.1f} x as fast"
    ]
    block = shape.depth // 3
    half = [
        (gain, verb)
        for verb in _verbs(profile)
        if (gain := _gain(profile, Schedule((_stage(verb, profile, block, HALF),)))) is not None
    ]
    if half:
        gain, verb = max(half)
        parts.append(f"half the tokens from block {block} on ({verb}) give {gain:.2f} x")
    every = [gain for _, gain in _gains_in_every_block(profile)]
    if every and max(every) <= WORTH:
        parts.append(f"gentle stages in every block (keep {MERGED_PER_BLOCK:.0%}) cost as much as they save, or more")
    return "; ".join(parts) + "."


def floor_ms(profile: Profile) -> float:
    """What the model takes where each of its parts is cheapest, in milliseconds: mostly with the fewest tokens that
    were measured, but curves may also rise towards few tokens."""
    attention = [min(curve.ms) for curve in (profile.attention, profile.sized_attention) if curve is not None]
    block = min(profile.mlp.ms) + min(attention, default=0.0)
    last = 0.0 if profile.last is None else min(profile.last.ms)
    return profile.whole(profile.shape) + profile.shape.depth * block + last


def _in_every_block(profile: Profile) -> list[str]:
    """For verbs that run in every block: what they gain, or that they cost more than they save."""
    gains = _gains_in_every_block(profile)
    listed = ", ".join(f"{verb} {gain:.2f} x" for verb, gain in sorted(gains, key=lambda one: -one[1]) if gain > WORTH)
    losses = ", ".join(verb for verb, gain in gains if gain <= WORTH)
    stage = f"A stage in every block that keeps {MERGED_PER_BLOCK:.0%}"
    text = [f"{stage}: {listed}."] if listed else []
    return text + ([f"{stage} costs as much as it saves, or more: {losses}."] if losses else [])


def _stairs(profile: Profile) -> list[str]:
    """Which numbers of tokens are cheap, where attention has stairs."""
    tokens = profile.shape.patch_tokens + profile.shape.prefix_tokens
    curve = profile.attention
    width = None if curve is None else width_of(curve, tokens)
    if curve is None or width is None:
        return []
    place = tokens // width * width
    less = 1 - curve.at(place) / curve.at(place - 1)
    return [
        f"Attention has stairs: {place} tokens, prefix included, take {less:.0%} less than {place - 1}. So do other "
        f"multiples of {width}, each against one token less."
    ]


def _gains_in_every_block(profile: Profile) -> list[tuple[str, float]]:
    found = []
    for verb in _verbs(profile):
        stages = [_stage(verb, profile, block, MERGED_PER_BLOCK) for block in range(profile.shape.depth)]
        gain = _gain(profile, Schedule(tuple(stages)))
        if gain is not None:
            found.append((verb, gain))
    return found


def _verbs(profile: Profile) -> list[str]:
    """The measured verbs that have a measured score, if they need one."""
    return [time.name for time in profile.verbs if profile.scores or not _ranks(time.name)]


def _ranks(verb: str) -> bool:
    return verb in REDUCERS and REDUCERS[verb].ranks


def _stage(verb: str, profile: Profile, block: int, keep: float) -> Stage:
    score = (
        min(profile.scores, key=lambda time: time.at(profile.shape.patch_tokens, 0)).name if _ranks(verb) else "none"
    )
    return Stage(block, at="pre" if profile.shape.holds else "mid", score=score, keep=keep, reduce=verb)


def _gain(profile: Profile, schedule: Schedule) -> float | None:
    """How many times as fast as the dense model; None for a schedule that is not possible."""
    try:
        return profile.dense_ms / total_cost(profile.shape, schedule, profile)
    except ScheduleError:
        return None


def _ms(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 3)}f} ms"
