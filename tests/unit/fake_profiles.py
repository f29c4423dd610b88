"""A device profile without a device: simple times, so that sums can be checked by hand."""

from __future__ import annotations

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
    scores = ("class_attention", "key_norm", "random", "attention_received")
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
    )
