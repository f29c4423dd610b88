"""Schedules with fixed counts compile: one graph, none more for another batch, and the logits of eager PyTorch.

What makes or breaks a graph is seen without a C++ compiler (backend "eager": PyTorch runs the graph as it is).
Tests that compile for real are slow, and are skipped where there is no compiler.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CASES, images, pairs, small_model, two_stages
from test_feature_map import inputs, map_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from prunesearch.device.measure import measure_profile
from prunesearch.device.runtimes import Settings, prepare, runtime_of, threads_set
from prunesearch.errors import DeviceError
from prunesearch.models import apply_schedule
from prunesearch.models.parts import Part
from prunesearch.profile import Profile
from prunesearch.schedule import Schedule, Stage

pytestmark = [
    pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
BATCHES = (2, 3, 5)
LAYOUTS = (*CASES, "swin", "convnext")
"""The cases of ViTs, which cover their layouts, every score and every verb, and the two families with a feature map."""
SAMPLE = ("two that merge, sizes in the attention", "scores without attention", "swin", "convnext")
"""Class token and registers, no class token and average pool, and the feature maps."""


def has_compiler() -> bool:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


compiles = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler (g++) is installed")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def pruned(layout: str) -> tuple[nn.Module, Tensor]:
    """A model of two blocks (a feature map: of two in its third stage) with a schedule, and five images."""
    if layout in CASES:
        kind, stages = CASES[layout]
        return apply_schedule(small_model(kind, depth=2), Schedule(stages)), images(5)
    stage = Stage(0, at="pre", score="predictor", keep=0.6, reduce="hold")
    model = apply_schedule(map_model(layout, depths=(1, 1, 2, 1)), Schedule((stage,)))
    return model, inputs(model, 5)


def assert_one_graph(model: nn.Module, x: Tensor, backend: str, dynamic: bool = True) -> None:
    """Compiled for any batch, or for the first of BATCHES, which is then the only one. Fails at a second graph."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=None if dynamic else False, backend=counter)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for count in BATCHES if dynamic else BATCHES[:1] * 2:
            batch = x[:count].clone()
            expected = model(batch)
            if dynamic:
                torch._dynamo.mark_dynamic(batch, 0)  # raises when the graph needs a certain batch
            torch.testing.assert_close(compiled(batch), expected, atol=1e-4, rtol=0)
    assert counter.frame_count == 1


# --- graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_graph_serves_all_batches(layout: str) -> None:
    assert_one_graph(*pruned(layout), backend="eager")


@pytest.mark.slow
def test_one_graph_serves_all_batches_that_were_not_marked() -> None:
    """`dynamic=True` alone."""
    model, x = pruned("two that merge, sizes in the attention")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for count in BATCHES:
            torch.testing.assert_close(compiled(x[:count]), model(x[:count]))


def test_a_graph_of_one_batch_is_not_used_for_another() -> None:
    """That these tests would notice a second graph."""
    model, x = apply_schedule(small_model(depth=1), Schedule((Stage(0, keep=0.5),))), images(5)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x[:2])
        with pytest.raises(torch._dynamo.exc.RecompileError, match="size mismatch at index 0"):
            compiled(x[:3])


@pytest.mark.slow
@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize(("score", "verb"), pairs())
def test_one_graph_for_every_score_and_verb(score: str, verb: str, at: str) -> None:
    model = apply_schedule(small_model("registers", depth=3), two_stages(score, verb, at))
    assert_one_graph(model, images(5), backend="eager")


# --- compiled for real -------------------------------------------------------------------------------------------


@compiles
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "dynamic"), [*((layout, True) for layout in LAYOUTS), *((layout, False) for layout in SAMPLE)]
)
def test_compiled_code_gives_the_same_logits(layout: str, dynamic: bool) -> None:
    assert_one_graph(*pruned(layout), backend="inductor", dynamic=dynamic)


def exported_for_any_batch(model: nn.Module, x: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    """Compiled ahead of time with a batch of two, written, and opened again."""
    with torch.no_grad():
        program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return torch._inductor.aoti_load_package(package)


@compiles
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", SAMPLE)
def test_a_package_compiled_ahead_gives_the_same_logits(layout: str, tmp_path: Path) -> None:
    model, x = pruned(layout)
    run = exported_for_any_batch(model, x, tmp_path / "model.pt2")
    with torch.no_grad():
        for count in (1, *BATCHES):
            torch.testing.assert_close(run(x[:count]), model(x[:count]), atol=1e-4, rtol=0)


# --- profiles ----------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """As many parts as profiles have share one forward."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.kept].sum(dim=1) * x.shape[1]


SETTINGS = Settings(torch.device("cpu"), 1)


def ready(parts: list[Part], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], CompileCounterWithBackend]:
    """Parts compiled by the runtime, with a backend that counts graphs and runs them as they are."""
    counter, compile_ = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_(module, backend=counter, **options))
    with threads_set(SETTINGS):
        return [run() for run in prepare(parts, runtime_of("compile"), SETTINGS)], counter


def test_every_part_of_a_profile_is_compiled_for_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch makes sizes variable at the second module with the same code, and compiles nothing after the eighth."""
    parts = [Part((Sum(kept),), (torch.ones(2, 20 + kept, 3),)) for kept in range(1, 14)]
    results, counter = ready(parts, monkeypatch)
    assert [result[0, 0] for result in results] == [kept * (20 + kept) for kept in range(1, 14)]
    assert counter.frame_count == 13
    given = [node for graph in counter.graphs for node in graph.graph.find_nodes(op="placeholder")]
    assert [tuple(node.meta["example_value"].shape) for node in given] == [(2, 20 + kept, 3) for kept in range(1, 14)]


def test_numbers_of_tokens_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Sum(3)
    parts = [Part((module,), (torch.ones(2, count, 3),), tokens_axis=((0, 1),)) for count in (4, 9, 20)]
    results, counter = ready(parts, monkeypatch)
    assert [result[0, 0] for result in results] == [12, 27, 60] and counter.frame_count == 1


def test_a_part_that_breaks_the_graph_is_refused() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    with threads_set(SETTINGS), pytest.raises(torch._dynamo.exc.Unsupported):
        prepare([Part((Breaks(),), (torch.ones(2),))], runtime_of("compile"), SETTINGS)


def small_profile(said: list[str]) -> Profile:
    names: dict[str, Any] = {"verbs": ["drop"], "scores": ["class_attention"], "say": said.append}
    return measure_profile(small_model(depth=1), "small", 2, runtime_of("compile"), SETTINGS, 0.3, **names)


@compiles
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_parts_are_measured() -> None:
    said: list[str] = []
    found = small_profile(said)
    assert found.runtime == "compile" and [time.name for time in found.verbs] == ["drop"]
    assert found.attention is not None and all(value > 0 for value in found.attention.ms)
    assert "for each part, and is not counted" in said[0] and "making mlp of a block ready" in said


def test_without_a_compiler_profiles_say_so() -> None:
    # monkeypatch would delete the setting afterwards, which PyTorch keeps in a place of its own
    without = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)})
    with without, pytest.raises(DeviceError, match=r"cannot run dense: .*No working C\+\+ compiler"):
        small_profile([])


# --- the page ----------------------------------------------------------------------------------------------------


@compiles
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "compile.md").read_text(encoding="utf-8")
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(codes) == 3
    monkeypatch.chdir(tmp_path)
    model, x = apply_schedule(small_model(depth=1), Schedule((Stage(0, keep=0.5),))), images(5)
    names: dict[str, Any] = {"model": model, "images": x}
    with torch.no_grad():
        for code in codes:
            exec(code, names)
            torch.testing.assert_close(names["logits"], model(x), atol=1e-4, rtol=0)
    assert (tmp_path / "best.pt2").exists()
