"""A device profile without a device: simple times, so that sums can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

from prunesearch.profile import Curve, Profile, StageTime
from prunesearch.shape import ModelShape


def fake_profile(shape: ModelShape, model: str = "some_vit", batch: int = 1) -> Profile:
    """Attention: 0.02 ms a token (with sizes 0.03); MLP: a staircase; a verb: 0.05 ms (merge 0.1) and a bit a token."""
    tokens = shape.patch_tokens + shape.prefix_tokens
    straight = Curve((1, tokens), (0.02, 0.02 * tokens), (0.0, 0.0))
    sized = Curve((1, tokens), (0.03, 0.03 * tokens), (0.0, 0.0))
    half = tokens // 2
    stairs = Curve((1, half, half + 1, tokens), (0.5, 0.5, 1.0, 1.0), (0.0,) * 4)
    verbs = ("fuse", "squeeze", "absorb", "merge", "drop_or_merge", "drop")
    scores = ("class_attention", "head_weighted_class_attention", "key_norm", "random", "attention_received")
    return Profile(
        model=model,
        shape=shape,
        device="none",
        runtime="torch",
        batch=batch,
        fixed=2.0,
        mlp=stairs,
        verbs=tuple(StageTime(name, 0.1 if name == "merge" else 0.05, 0.001, 0.002, 0.0001) for name in verbs),
        scores=tuple(StageTime(name, 0.05, 0.0005) for name in scores),
        dense_ms=2.0 + shape.depth * (0.02 * tokens + 1.0) + 0.3,
        attention=straight,
        sized_attention=sized,
        last=Curve((1, tokens), (0.3, 0.3), (0.0, 0.0)),
        threads=2,
        check=(0.02, -0.01),
        returning=tuple(StageTime(name, 0.01, 0.002, per_guest=0.003) for name in verbs),
    )


def stairs_profile(shape: ModelShape, width: int = 16) -> Profile:
    """Attention and MLP 1 ms more for each `width` tokens begun, and nothing else that depends on tokens."""
    tokens = shape.patch_tokens + shape.prefix_tokens
    ends = [(first, min(first + width - 1, tokens)) for first in range(1, tokens + 1, width)]
    points = {place: float(step) for step, both in enumerate(ends, 1) for place in both}
    stairs = Curve(tuple(points), tuple(points.values()), (0.0,) * len(points))
    plain = fake_profile(shape)
    return replace(
        plain,
        attention=stairs,
        sized_attention=stairs,
        mlp=stairs,
        verbs=tuple(StageTime(verb.name, 0.05) for verb in plain.verbs),
        scores=tuple(StageTime(score.name, 0.05) for score in plain.scores),
        dense_ms=2.0 + shape.depth * 2.0 * len(ends) + 0.3,
    )
