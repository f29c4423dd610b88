"""Schedules with fixed counts export to ONNX, and the runtimes give the logits of eager PyTorch for any batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from small_models import CASES, images, pairs, small_model
from test_feature_map import inputs, map_model
from torch import Tensor, nn

import prunesearch.models.digits_vit  # noqa: F401  (registers the shipped model)
from prunesearch.evaluate.digits import load_digits
from prunesearch.models import apply_schedule
from prunesearch.models.step import add_up, largest_part, regroup
from prunesearch.schedule import Schedule, Stage
from prunesearch.tokens import REDUCERS, SCORERS, Grouping
from prunesearch.tokens.select import top_k_and_rest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def exported(model: nn.Module, x: Tensor, folder: Path) -> Path:
    """The model as an ONNX file with a dynamic batch."""
    batch = torch.export.Dim("batch")
    shapes: dict = dict(dynamo=True, opset_version=18, verbose=False, dynamic_shapes=({0: batch},))
    with torch.no_grad():
        program = torch.onnx.export(model, (x,), **shapes)
    program.save(folder / "model.onnx")
    return folder / "model.onnx"


def in_onnxruntime(file: Path) -> Callable[[Tensor], list[np.ndarray]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda x: session.run(None, {given.name: x.numpy()})


def in_openvino(file: Path) -> Callable[[Tensor], list[np.ndarray]]:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    # without the hint, some processors compute in bf16
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: [np.array(one) for one in compiled([x.numpy()]).values()]


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def assert_same_logits(model: nn.Module, x: Tensor, run: Callable[[Tensor], list[np.ndarray]]) -> None:
    """On 1, 2 and all images; the graph was made with 2."""
    for count in (1, 2, len(x)):
        (logits,) = run(x[:count])
        with torch.no_grad():
            expected = model(x[:count])
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=0)
        assert (logits.argmax(axis=1) == expected.numpy().argmax(axis=1)).all()


def assert_plain(file: Path) -> None:
    """No branches or loops, no scatters, and every TopK has a size that the graph states."""
    graph = onnx.load(file).graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"If", "Loop", "Scan", "Sort", "NonZero", "ScatterElements", "ScatterND"}
    constants = {one.name for one in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    assert all(node.input[1] in constants for node in graph.node if node.op_type == "TopK")


def test_the_cases_cover_every_score_every_verb_and_both_places() -> None:
    stages = [stage for _, several in CASES.values() for stage in several]
    assert {stage.score for stage in stages} == {*SCORERS, "none"}
    assert {stage.reduce for stage in stages} == {name for name, entry in REDUCERS.items() if not entry.holds}
    assert {stage.at for stage in stages} == {"pre", "mid"}


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_exports_and_the_runtimes_agree(case: str, tmp_path: Path) -> None:
    layout, stages = CASES[case]
    model, x = apply_schedule(small_model(layout, depth=2), Schedule(stages)), images(5)
    file = exported(model, x[:2], tmp_path)
    assert_plain(file)
    for start in RUNTIMES.values():
        assert_same_logits(model, x, start(file))


@pytest.mark.parametrize("layout", [pytest.param("swin", marks=pytest.mark.slow), "convnext"])
def test_maps_export(layout: str, tmp_path: Path) -> None:
    stage = Stage(0, at="pre", score="predictor", keep=0.6, reduce="hold")
    model = apply_schedule(map_model(layout, depths=(1, 1, 2, 1)), Schedule((stage,)))
    x = inputs(model, 5)
    file = exported(model, x[:2], tmp_path)
    assert_plain(file)
    assert_same_logits(model, x, in_onnxruntime(file))


def test_real_images_and_weights(tmp_path: Path) -> None:
    model = timm.create_model("vit_digits_patch1_8", pretrained=True).eval()
    model.blocks = model.blocks[:2]  # for a quick export
    stages = Stage(0, keep=0.7, reduce="absorb"), Stage(1, score="none", keep=0.7, reduce="merge")
    apply_schedule(model, Schedule(stages))
    x = (load_digits("validation")[0][:64, None] / 255 - 0.305) / 0.376
    assert_same_logits(model, x, in_onnxruntime(exported(model, x[:2], tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("at", ["mid", "pre"])
@pytest.mark.parametrize(("score", "verb"), pairs())
def test_every_pair_exports(score: str, verb: str, at: str, tmp_path: Path) -> None:
    stages = tuple(Stage(block, at=at, score=score, keep=0.6, reduce=verb) for block in (1, 2))  # type: ignore[arg-type]
    model, x = apply_schedule(small_model("registers", depth=3), Schedule(stages)), images(5)
    file = exported(model, x[:2], tmp_path)
    assert_plain(file)
    assert_same_logits(model, x, in_onnxruntime(file))


class Chosen(nn.Module):
    """What stays, what goes and its scores."""

    def forward(self, scores_Bn: Tensor) -> tuple[Tensor, ...]:
        return top_k_and_rest(scores_Bn, 7)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_equal_scores_go_to_the_earlier_token(runtime: str, tmp_path: Path) -> None:
    scores = torch.randint(0, 4, (5, 20), generator=torch.Generator().manual_seed(0)).float()
    run = RUNTIMES[runtime](exported(Chosen().eval(), scores[:2], tmp_path))
    for values in (scores, torch.zeros(5, 20)):
        for ours, expected in zip(run(values), Chosen()(values), strict=True):
            assert (ours == expected.numpy()).all()


class Joined(nn.Module):
    """Features, amounts and largest amounts of new tokens. The first two have guests, the others have none."""

    def forward(self, x_BnC: Tensor) -> tuple[Tensor, ...]:
        place_Bn, amount_Bn = torch.arange(9).expand(x_BnC.shape[0], 9), x_BnC[..., 0].abs()
        host_BG = (x_BnC[:, 5:, 1] > 0).to(torch.int64)
        grouping = Grouping(place_Bn[:, :5], place_Bn[:, 5:], host_BG, size_share_BG=amount_Bn[:, 5:])
        return regroup(x_BnC, grouping), add_up(amount_Bn, grouping), largest_part(amount_Bn, grouping)


def test_tokens_join_as_in_eager(tmp_path: Path) -> None:
    x = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0))
    run = in_onnxruntime(exported(Joined().eval(), x[:2], tmp_path))
    for ours, expected in zip(run(x), Joined()(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), expected)


def test_only_an_onnx_export_leaves_the_stable_sort_and_the_sum_of_rows(tmp_path: Path) -> None:
    model, x = apply_schedule(small_model(depth=1), Schedule((Stage(0, keep=0.6, reduce="squeeze"),))), images(2)
    exported(Chosen().eval(), torch.rand(2, 20), tmp_path)
    recorded: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        recorded.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(x)
        recorded.append(str(torch.export.export(model, (x,)).graph))
    assert len(recorded) == 2
    assert all("sort" in text and "index_add" in text and "topk" not in text for text in recorded)
