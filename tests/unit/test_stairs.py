"""Stairs in the time of attention: found, measured at their edges, and filled in; and memory that timing keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prunesearch.device.stairs import MOST_PLACES, filled, places, probes, width_of
from prunesearch.profile import Curve


def milliseconds(tokens: int, width: int) -> float:
    """Attention whose last vector is worked off value by value."""
    return 0.1 + 0.01 * tokens + 0.001 * tokens * (tokens % width)


def curve(counts: list[int], width: int) -> Curve:
    return Curve(tuple(counts), tuple(milliseconds(count, width) for count in counts), (0.01,) * len(counts))


@pytest.mark.parametrize("tokens", [65, 197, 577])
@pytest.mark.parametrize("width", [8, 16])
def test_a_curve_with_stairs_is_known_everywhere(tokens: int, width: int) -> None:
    found = width_of(curve(sorted({*probes(tokens), 20, tokens}), width), tokens)
    assert found == width
    edges = places(width, tokens)
    assert len(edges) <= 2 * (MOST_PLACES + 1) and {width - 1, width} < set(edges)
    whole = filled(curve(sorted({*edges, tokens}), width), width)
    for count in range(width, edges[-1] + 1):
        assert whole.at(count) == pytest.approx(milliseconds(count, width), rel=0.1)


def test_a_straight_curve_has_no_stairs() -> None:
    counts = sorted({*probes(197), 20, 197})
    assert width_of(curve(counts, 1), 197) is None
    noisy = Curve(
        tuple(counts), tuple(0.01 * count * (1 + 0.01 * (count % 2)) for count in counts), (0.0,) * len(counts)
    )
    assert width_of(noisy, 197) is None


@pytest.mark.parametrize("tokens", [1, 5, 15])
def test_few_tokens_are_not_probed(tokens: int) -> None:
    assert probes(tokens) == [] and width_of(curve([1, tokens], 16), tokens) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux returns memory in this way")
@pytest.mark.parametrize("keeps", [False, True])
def test_timing_keeps_the_memory_that_is_freed(keeps: bool) -> None:
    """Minor faults of the system, counted: every page that a process gets anew is one."""
    code = f"""
import ctypes, resource, numpy
from prunesearch.device.timing import keep_freed_memory
if {keeps} and getattr(ctypes.CDLL(None), "mallopt", None):
    keep_freed_memory()
numpy.ones(2**22), numpy.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    numpy.ones(2**22)  # 32 MB, 8192 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    faults = int(done.stdout)
    assert faults < 100 if keeps else faults > 1000
