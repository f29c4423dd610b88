"""Recorded graphs (compile, export, trace) equal the model for fixed counts; thresholds are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import images, small_model, some_pairs, two_stages
from test_feature_map import HOLDS, inputs, map_model
from test_masked import adaptive
from torch import Tensor, nn

from prunesearch.errors import ModelError
from prunesearch.models import apply_schedule, remove_schedule, schedule_of
from prunesearch.schedule import Schedule, Stage
from prunesearch.tokens import REDUCERS

pytestmark = [
    pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
ADAPTIVE = {
    verb: adaptive("class_attention" if entry.ranks else "none", verb)
    for verb, entry in REDUCERS.items()
    if entry.takes_threshold
}


def recorded(x: Tensor) -> dict[str, Callable[[nn.Module], object]]:
    """Ways to record a graph of a model."""
    return {
        "jit.trace": lambda model: torch.jit.trace(model, x, check_trace=False),
        "export": lambda model: torch.export.export(model, (x,)),
        "strict export": lambda model: torch.export.export(model, (x,), strict=True),
        "compile": lambda model: torch.compile(model, fullgraph=True, backend="eager")(x),
    }


@pytest.mark.parametrize("verb", ADAPTIVE)
@pytest.mark.parametrize("way", recorded(torch.zeros(1)))
def test_thresholds_are_refused_and_freeze_named(way: str, verb: str) -> None:
    model, x = apply_schedule(small_model("avg"), ADAPTIVE[verb]), images()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        # dynamo wraps our error
        with pytest.raises(Exception, match=r"prunesearch freeze") as caught:
            recorded(x)[way](model)
        assert isinstance(caught.value, ModelError) or "ModelError" in str(caught.value)
        assert torch.equal(model(x), expected), "afterwards the model is as it was"


@pytest.mark.slow
def test_without_fullgraph_thresholds_run_uncompiled() -> None:
    model = apply_schedule(small_model("avg", depth=1), Schedule((Stage(0, score="key_norm", threshold=0.027),)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for x in (images(4), images(4).flip(0)[:3]):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize(("score", "verb"), some_pairs())
def test_fixed_counts_trace_exactly_for_any_batch(score: str, verb: str, at: str) -> None:
    model, x = apply_schedule(small_model("registers"), two_stages(score, verb, at)), images(6)
    with torch.no_grad():
        for made_with in (x[:1], x[:3]):
            traced = torch.jit.trace(model, made_with, check_trace=False)
            for others in (x[3:], x[:1], x):
                assert torch.equal(traced(others), model(others))


@pytest.mark.parametrize("layout", ["swin", "convnext"])
def test_maps_trace_exactly(layout: str) -> None:
    model = apply_schedule(map_model(layout), HOLDS)
    x = inputs(model, 4)
    with torch.no_grad():
        traced = torch.jit.trace(model, x[:2], check_trace=False)
        torch.testing.assert_close(traced(x[2:]), model(x[2:]))


def test_another_size_is_refused_by_compile_and_recorded_by_the_others() -> None:
    model = apply_schedule(small_model("avg", dynamic_img_size=True), two_stages("class_attention", "fuse"))
    x = images(2, 32)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"ModelError.*set_input_size"):
            torch.compile(model, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), expected)
        schedule = schedule_of(model)
        remove_schedule(model).set_input_size(img_size=(32, 32))
        apply_schedule(model, schedule)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_scripting_is_one_sentence(family: str) -> None:
    model = small_model() if family == "vit" else map_model(family)
    schedule = HOLDS if family != "vit" else Schedule((Stage(1, keep=0.5),))
    apply_schedule(model, schedule)
    for given in (model, nn.Sequential(model), next(m for n, m in model.named_modules() if n.endswith("blocks.1"))):
        with pytest.raises(ModelError, match=r"^torch.jit.script: .*Possible: torch.jit.trace.* Use one of those."):
            torch.jit.script(given)
    remove_schedule(model)
    assert not any(hasattr(module, "__prepare_scriptable__") for module in model.modules())
