"""A layer with unknown cost is refused by name, wherever it is in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from small_models import images, small_model
from test_feature_map import HOLDS, inputs, map_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.cost import estimate_cost
from prunesearch.errors import ModelError
from prunesearch.models import apply_schedule, shape_of
from prunesearch.schedule import Schedule, Stage

pytestmark = [
    pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization"),
    pytest.mark.filterwarnings("ignore:.*quantiz"),
]
DROP = Schedule((Stage(1, score="key_norm", keep=0.5),))
PLACES = {
    "vit": [f"blocks.{index}.{name}" for index in (0, 2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "norm1")],
    "swin": [f"layers.2.blocks.1.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc2")]
    + ["layers.0.blocks.0.mlp.fc1"],
    "convnext": ["stages.2.blocks.1.mlp.fc1", "stages.0.blocks.0.mlp.fc2", "head.fc"],
}


class Wrapped(nn.Module):
    """A wrapper around a layer, with parameters of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """The same as the layer."""
        return self.base(x) * self.scale


class Adapted(nn.Linear):
    """A linear layer with another matrix."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base.weight.shape[-1], base.weight.shape[0])
        self.down = nn.Parameter(torch.zeros(2, base.weight.shape[-1]))


class Silent(nn.Module):
    """A layer without parameters and with unknown cost."""

    def __init__(self, _: nn.Module) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        return x


UNKNOWN: dict[str, Callable[[nn.Module], nn.Module]] = {"wrapped": Wrapped, "silent": Silent}


def dense(family: str) -> nn.Module:
    return small_model("map") if family == "vit" else map_model(family)


def put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


@pytest.mark.parametrize("make", UNKNOWN)
@pytest.mark.parametrize(("family", "path"), [(family, path) for family, paths in PLACES.items() for path in paths])
def test_an_unknown_layer_is_named(family: str, path: str, make: str) -> None:
    model = dense(family)
    put(model, path, UNKNOWN[make](model.get_submodule(path)))
    name, kind = path.rpartition(".")[2], type(model)
    for call in (shape_of, lambda it: apply_schedule(it, DROP if family == "vit" else HOLDS)):
        with pytest.raises(ModelError, match=rf"^model.*{name}.*({UNKNOWN[make].__name__}).*Possible") as caught:
            call(model)
        assert "\n" not in str(caught.value)
    assert type(model) is kind


@pytest.mark.parametrize("path", ["head", "fc_norm", "norm", "attn_pool.kv", "attn_pool.mlp.fc1", "patch_embed.proj"])
def test_an_unknown_layer_around_the_blocks_is_named(path: str) -> None:
    model = small_model("map")
    put(model, path, Wrapped(model.get_submodule(path)))
    with pytest.raises(ModelError, match=rf"^model.{path}: the cost of a .*Wrapped is not known"):
        shape_of(model)


@pytest.mark.parametrize(
    "make",
    [
        Adapted,
        lambda base: nn.Conv1d(base.in_features, base.out_features, 1),
        lambda base: nn.Bilinear(base.in_features, base.in_features, base.out_features),
        lambda base: nn.MultiheadAttention(base.in_features, 1),
    ],
    ids=["adapted", "conv", "bilinear", "attention"],
)
def test_what_only_looks_like_a_linear_layer_is_named(make: Callable[[nn.Module], nn.Module]) -> None:
    model = small_model()
    put(model, "blocks.1.mlp.fc1", make(model.blocks[1].mlp.fc1))
    with pytest.raises(ModelError, match=r"^model.blocks\[1\].mlp.fc1: the cost of a .* is not known"):
        shape_of(model)


@pytest.mark.parametrize("family", PLACES)
def test_a_quantised_model_is_refused_and_one_that_has_its_schedule_runs(family: str) -> None:
    schedule = DROP if family == "vit" else HOLDS
    engines = torch.backends.quantized.supported_engines
    if "fbgemm" not in engines and "qnnpack" not in engines:
        pytest.skip("no engine for quantised layers here")

    def quantised(model: nn.Module) -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    with pytest.raises(
        ModelError, match=r"torch.ao.nn.quantized.dynamic.* is not known.*before such a layer is put in"
    ):
        shape_of(quantised(dense(family)))
    model = apply_schedule(dense(family), schedule)
    x = images(2) if family == "vit" else inputs(model, 2)
    with torch.no_grad():
        found, expected = quantised(model)(x), model(x)
    assert found.shape == expected.shape and torch.isfinite(found).all()


class Plain(nn.Linear):
    """A subclass of the linear layer with the same cost."""


def test_linear_layers_in_other_clothes_are_counted() -> None:
    model = small_model()
    expected = shape_of(model)
    model.blocks[1].mlp.fc1 = Plain(32, 64)
    parametrizations.weight_norm(model.blocks[2].attn.qkv)
    model.blocks[3].mlp.act = nn.ReLU()
    assert shape_of(model) == expected
    assert shape_of(apply_schedule(model, DROP)) == expected


def test_blocks_that_differ_are_named() -> None:
    for path, layer, says in (
        ("blocks.2.mlp", nn.Identity(), "mlp 0"),
        ("blocks.2.mlp.fc1", nn.Linear(32, 48), "mlp 3584"),
        ("blocks.1.norm1", nn.Linear(32, 32), "norm1 1024"),
    ):
        model = small_model()
        put(model, path, layer)
        with pytest.raises(ModelError, match=rf"^model.{path[:6]}\[{path[7]}\]: .*{says}.*blocks are alike"):
            shape_of(model)
    model = map_model("convnext")
    model.stages[2].blocks[1].mlp.fc2 = nn.Identity()
    with pytest.raises(ModelError, match=r"^model.stages\[2\].blocks\[1\]: .*blocks are alike"):
        shape_of(model)


def test_a_head_of_several_layers_is_counted() -> None:
    model = small_model()
    model.head = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 10))
    with FlopCounterMode(display=False) as counter:
        model(images(1))
    assert estimate_cost(shape_of(model)).macs == counter.get_total_flops() // 2
    model.head = nn.Identity()
    assert shape_of(model).head_macs == 0


@pytest.mark.parametrize("family", PLACES)
def test_counting_does_not_run_what_is_attached(family: str) -> None:
    model, seen = dense(family), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    expected = shape_of(copy.deepcopy(dense(family)))
    assert shape_of(model) == expected and not seen
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hiera_tiny_224", "its blocks pool over groups of neighbouring tokens"),
        ("mvitv2_tiny", "its blocks pool keys and values with convolutions"),
        ("samvit_base_patch16", "most of its blocks attend within windows"),
    ],
)
def test_a_class_that_needs_every_token_is_refused_with_the_reason(name: str, why: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ModelError, match=why):
        shape_of(model)
