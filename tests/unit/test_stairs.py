"""Stairs in the time of attention: found, measured at their edges, and filled in; and memory that timing keeps."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
import time

import pytest
import torch

from prunesearch.device.measure import _clock, _profile
from prunesearch.device.runtimes import Settings
from prunesearch.device.stairs import MOST_PLACES, MOST_TOKENS, filled, places, probes, width_of
from prunesearch.device.timing import Measured, in_turns
from prunesearch.profile import MOST_POINTS, Curve
from prunesearch.shape import ModelShape


def milliseconds(tokens: int, width: int) -> float:
    """Attention whose last vector is worked off value by value."""
    return 0.1 + 0.01 * tokens + 0.001 * (tokens - tokens % width) * (tokens % width)


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
        assert whole.at(count) == pytest.approx(milliseconds(count, width), rel=0.02)


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
def test_timing_keeps_the_memory_that_is_freed() -> None:
    """Minor faults, which the system counts: every page that a process gets anew is one, and huge pages count once."""
    code = """
import resource
import numpy
from prunesearch.device.timing import freed_memory_kept, in_turns

def faults(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def work():
    numpy.ones(2**22), numpy.ones(2**21)  # 32 and 16 MB

seen = []
in_turns({"a": lambda: seen.append(faults(work))}, 0.5)
print(max(seen[2:]))
print(rss() // 2**20)
with freed_memory_kept():
    work()
print(rss() // 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    faults, after, again = map(int, done.stdout.split())
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("only glibc returns memory in this way")
    assert faults < 50
    assert again <= after + 5, "the memory is given back at the end"


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_is_timed_by_its_own_clock(threads: int) -> None:
    clock = _clock(Settings(torch.device("cpu"), threads))
    assert (clock is time.thread_time) == (threads == 1 and time.get_clock_info("thread_time").resolution < 1e-5)
    assert _clock(Settings(torch.device("cuda"), threads)) is None


def test_another_clock_counts() -> None:
    """A visit is as long as the clock says."""

    def work() -> None:
        time.sleep(0.002)

    ticks = itertools.count()
    found = in_turns({"a": work}, 0.01, clock=lambda: next(ticks))  # one tick passes in a visit
    assert in_turns({"a": work}, 0.01)["a"].seconds > 0.002
    assert found["a"].seconds == 1.0


def test_a_profile_has_the_stairs_of_its_attention() -> None:
    """Between the edges that were measured, too; and with sizes."""
    shape = fake_shape(196)
    times = {}
    for tokens in sorted({*places(16, 197), 20, 197}):
        times["attention", tokens] = Measured(milliseconds(tokens, 16) / 1e3, 0.01)
    for tokens in (20, 197):
        times["mlp", tokens] = times["last", tokens] = Measured(tokens / 1e5, 0.01)
        times["sized_attention", tokens] = Measured((milliseconds(tokens, 16) + 0.5) / 1e3, 0.01)
    times["stem",] = times["dense",] = Measured(0.01, 0.01)
    profile = _profile(times, shape, [], [], [], 16, {})
    assert profile.attention is not None and profile.sized_attention is not None
    for tokens in (111, 112, 127, 128, 159, 160):
        assert profile.attention.at(tokens) == pytest.approx(milliseconds(tokens, 16), rel=0.02)
        assert profile.sized_attention.at(tokens) == pytest.approx(milliseconds(tokens, 16) + 0.5, rel=0.02)


def fake_shape(patches: int) -> ModelShape:
    return ModelShape(
        depth=4, dim=32, heads=4, attention_dim=32, patch_tokens=patches, prefix_tokens=1, class_tokens=1,
        mlp_macs=4096, stem_macs=1000, head_macs=320,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("half", "whole", "width"), [(0.0, 0.1, 16), (0.025, 0.1, 16), (0.08, 0.1, 8), (0.1, 0.01, None)]
)
def test_how_wide_stairs_are(half: float, whole: float, width: int | None) -> None:
    """With AVX-512 there is a small fall in the middle too."""
    a, b, c, d = probes(197)
    assert width_of(Curve((a, b, c, d), (1.0, 1 - half, 1.2, 1.2 * (1 - whole)), (0.0,) * 4), 197) == width


def test_a_curve_of_very_many_tokens_has_no_more_points_than_a_file_may_have() -> None:
    for width in (8, 16):
        edges = sorted({*places(width, MOST_TOKENS), MOST_TOKENS})
        assert len(filled(curve(edges, width), width).tokens) < MOST_POINTS
    assert probes(MOST_TOKENS + 1) == []
