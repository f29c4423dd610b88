"""Stairs in the time of attention: on CPUs it falls by up to a third where the tokens fill the processor's vectors.

Between two such numbers of tokens it rises nearly linearly. So a curve with stairs is known from two points for each:
the last number of tokens before the fall and the first one after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prunesearch.profile import Curve

WIDTHS = (8, 16)
"""Numbers of fp32 values in a vector: AVX2, AVX-512."""
LEAST_FALL = 0.02
"""A fall by a smaller share is taken for noise."""
ALIKE = 0.5
"""Stairs are narrow when the fall in the middle of a wide one is at least this share of that at its end. With AVX-512 a
small one is there too."""
MOST_TOKENS = 2048
"""With more tokens a stair is a small part of the time."""
MOST_PLACES = 6
"""So many stairs are measured at most; those between them follow from their neighbours."""


def probes(tokens: int) -> list[int]:
    """Where to measure to see whether a curve up to `tokens` has stairs, and how wide they are."""
    wide = max(WIDTHS)
    place = 3 * tokens // 4 // wide * wide or wide
    if not place <= tokens <= MOST_TOKENS:
        return []
    return [count for before in (wide // 2, 0) for count in _edges(place - before)]


def width_of(curve: Curve, tokens: int) -> int | None:
    """The width of the stairs that the probes show; None when there are none."""
    edges = probes(tokens)
    if not edges:
        return None
    pairs = zip(edges[::2], edges[1::2], strict=True)
    at_half, at_whole = (1 - curve.at(after) / curve.at(before) for before, after in pairs)
    if at_whole < LEAST_FALL:
        return None
    return min(WIDTHS) if at_half > ALIKE * at_whole else max(WIDTHS)


def places(width: int, tokens: int) -> list[int]:
    """Where to measure a curve with stairs: at both edges of some of them, the first and the last among them."""
    every = range(width, tokens + 1, width)
    step = max(1, -(-(len(every) - 1) // (MOST_PLACES - 1)))
    step += step > 1 and step % 2  # narrow stairs are not all alike: those at the end of a wide one are a little larger
    return sorted({count for place in (*every[::-step], every[0]) for count in _edges(place)})


def filled(curve: Curve, width: int) -> Curve:
    """The curve with the edges of the stairs that lie between measured ones."""
    known = dict(zip(curve.tokens, curve.ms, strict=True))
    measured = [place for place in curve.tokens if place % width == 0 and place - 1 in known]
    if len(measured) < 2:
        return curve
    error = max(curve.error, default=0.0)
    points = {count: (ms, error) for count, ms, error in zip(curve.tokens, curve.ms, curve.error, strict=True)}
    for shift in (-1, 0):
        edge = _line([place + shift for place in measured], known)
        for place in range(measured[0], measured[-1], width):
            points.setdefault(place + shift, (edge.at(place + shift), error))
    tokens = tuple(sorted(points))
    return replace(
        curve, tokens=tokens, ms=tuple(points[n][0] for n in tokens), error=tuple(points[n][1] for n in tokens)
    )


def _edges(place: int) -> tuple[int, int]:
    return place - 1, place


def _line(tokens: Sequence[int], known: dict[int, float]) -> Curve:
    return Curve(tuple(tokens), tuple(known[count] for count in tokens), (0.0,) * len(tokens))
