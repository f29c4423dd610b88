"""Hooks, replaced forwards, replaced layers and compiled blocks work on a model with a schedule as on one without.

The rule is in the docstring of `prunesearch.models`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from small_models import images, small_model, some_pairs, two_stages
from test_feature_map import HOLDS, inputs, map_model
from test_masked import adaptive, learned_first
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunesearch.errors import ModelError
from prunesearch.models import apply_schedule, remove_schedule, shape_of, trace
from prunesearch.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning", "ignore:Full backward hook")

FAMILIES: dict[str, tuple[Callable[[], nn.Module], Schedule]] = {
    "vit": (small_model, two_stages("class_attention", "squeeze")),
    "swin": (lambda: map_model("swin"), HOLDS),
    "convnext": (lambda: map_model("convnext"), HOLDS),
}
SEQUENCE = {"vit": "blocks", "swin": "layers", "convnext": "stages"}
BLOCK = {"vit": "blocks.1", "swin": "layers.2.blocks.1", "convnext": "stages.2.blocks.1"}
PARTS = {
    "vit": ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1"),
    "swin": ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1"),
    "convnext": ("conv_dw", "norm", "mlp", "mlp.fc1"),
}
MODULES = [
    (family, path)
    for family in FAMILIES
    for path in dict.fromkeys(
        (
            "",
            SEQUENCE[family],
            BLOCK[family].rpartition(".blocks")[0],
            BLOCK[family].rpartition(".")[0],
            BLOCK[family],
            *(f"{BLOCK[family]}.{part}" for part in PARTS[family]),
        )
    )
]
CASES = {
    **{f"{score}-{verb}-{at}": two_stages(score, verb, at) for score, verb in some_pairs() for at in ("pre", "mid")},
    "masked": learned_first("none", "merge", "mid"),
    "threshold": adaptive("class_attention", "fuse"),
}


def made(family: str) -> tuple[nn.Module, Tensor, Schedule]:
    model, x = _made(family)
    return copy.deepcopy(model), x, FAMILIES[family][1]


@functools.cache
def _made(family: str) -> tuple[nn.Module, Tensor]:
    model = FAMILIES[family][0]()
    return model, images(2) if family == "vit" else inputs(model, 2)


@functools.cache
def _scheduled(family: str) -> nn.Module:
    model, _, schedule = made(family)
    return apply_schedule(model, schedule)


def with_schedule(family: str) -> tuple[nn.Module, Tensor]:
    return copy.deepcopy(_scheduled(family)), _made(family)[1]


def fired(model: nn.Module, x: Tensor, kind: str) -> list[str]:
    """Names of the dense model's modules whose hooks of one kind fire in a training step, in that order."""
    names: list[str] = []
    register = {
        "forward": lambda module, note: module.register_forward_hook(note),
        "forward_pre": lambda module, note: module.register_forward_pre_hook(note),
        "full_backward": lambda module, note: module.register_full_backward_hook(note),
        "full_backward_pre": lambda module, note: module.register_full_backward_pre_hook(note),
    }[kind]
    hooks = [
        register(module, lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
        if not name.startswith("token_stages")
    ]
    model(x.clone().requires_grad_()).sum().backward()
    for hook in hooks:
        hook.remove()
    return names


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_hooks_fire_in_the_same_order(family: str, kind: str) -> None:
    model, x, schedule = made(family)
    before = fired(model, x, kind)
    after = fired(apply_schedule(model, schedule), x, kind)
    assert BLOCK[family] in before and f"{BLOCK[family]}.mlp.fc1" in before
    assert after == before if kind.startswith("forward") else sorted(after) == sorted(before)


@pytest.mark.parametrize("case", CASES)
def test_hooks_fire_with_every_score_and_verb(case: str) -> None:
    for training in (False, True):
        model = small_model("registers").train(training)
        before = fired(model, images(), "forward")
        after = fired(apply_schedule(model, CASES[case]), images(), "forward")
        if case == "threshold" and not training:  # once for each group of images
            assert list(dict.fromkeys(after)) == list(dict.fromkeys(before))
        else:
            assert [name for name in after if "attn_drop" not in name] == [
                name for name in before if "attn_drop" not in name
            ]


def shifted(x: Tensor) -> Tensor:
    """Add a different amount in each channel and place, so that normalisation does not remove it."""
    return x + torch.linspace(-1, 1, x.numel()).view_as(x)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *given: shifted(given[-1]))


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, given: (shifted(given[0]),))


def replace_forward(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda *args, **kwargs: shifted(old(*args, **kwargs))


def changed(model: nn.Module, path: str, x: Tensor, change: Callable[[nn.Module], object]) -> Tensor:
    """Logits of a copy in which one module was changed."""
    model = copy.deepcopy(model)
    change(model.get_submodule(path))
    with torch.no_grad():
        return model(x)


def works_inside(family: str, path: str) -> bool:
    """Whether a step works in a module, so that it is handed a `call`."""
    block = BLOCK[family]
    return block == path or block.startswith(f"{path}.") or path in ("", "blocks.1.attn")


@pytest.mark.parametrize(("family", "path"), MODULES)
def test_what_hooks_and_replaced_forwards_change_is_used(family: str, path: str) -> None:
    model, x = with_schedule(family)
    with torch.no_grad():
        plain = model(x)
    hooked = changed(model, path, x, hook)
    assert not torch.allclose(hooked, plain)
    assert torch.equal(changed(model, path, x, replace_forward), hooked)
    assert not torch.allclose(changed(model, path, x, pre_hook), plain)


@pytest.mark.parametrize(("family", "path"), MODULES)
def test_a_forward_replaced_before_is_used_or_named(family: str, path: str) -> None:
    """The replacement wraps timm's forward. A module in which a step works cannot use it, so it is refused by name."""
    model, x, schedule = made(family)
    replace_forward(model.get_submodule(path))
    if not works_inside(family, path):
        assert torch.equal(apply_schedule(model, schedule)(x), changed(with_schedule(family)[0], path, x, hook))
        return
    before, kind = model(x), type(model)
    with pytest.raises(ModelError, match=r"^model.*: its forward was replaced on the instance.*Undo the"):
        apply_schedule(model, schedule)
    assert type(model) is kind and torch.equal(model(x), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_replaced_on_the_model_is_named(family: str) -> None:
    """A pass with a schedule does not call it, so its changes would be lost silently."""
    names = with_schedule(family)[0].methods
    assert "forward_features" in names and ("forward_head" in names) == (family == "vit")
    for name in names:
        model, x, schedule = made(family)
        setattr(model, name, functools.partial(getattr(model, name)))
        kind = type(model)
        with pytest.raises(ModelError, match=rf"^model: its {name} was replaced on the instance.*del model.{name}"):
            apply_schedule(model, schedule)
        assert type(model) is kind
        delattr(model, name)
        setattr(apply_schedule(model, schedule), name, functools.partial(getattr(model, name)))
        if family != "vit":  # timm's forward calls it
            continue
        with pytest.raises(ModelError, match=rf"^model: its {name} was replaced"):
            trace(model, x)


@pytest.mark.parametrize(("family", "path"), [(f, path) for f, path in MODULES if works_inside(f, path)])
def test_a_forward_that_leaves_out_the_step_is_named(family: str, path: str) -> None:
    model, x = with_schedule(family)
    dense = made(family)[0].get_submodule(path)
    for forward in (lambda x: dense(x), lambda x, *args, **kwargs: dense(x)):
        model.get_submodule(path).forward = forward
        with pytest.raises(ModelError, match=r"does not run the step of the schedule.*Undo the"):
            trace(model, x)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replaced_forward_where_no_step_works_is_used(family: str) -> None:
    model, x, schedule = made(family)
    path = f"{BLOCK[family][:-1]}0"
    replace_forward(model.get_submodule(path))
    assert torch.equal(apply_schedule(model, schedule)(x), changed(with_schedule(family)[0], path, x, hook))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replaced_forward_outlives_the_schedule(family: str) -> None:
    model, x = with_schedule(family)
    replace_forward(model.get_submodule(BLOCK[family]))
    assert torch.equal(remove_schedule(model)(x), changed(made(family)[0], BLOCK[family], x, hook))


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """Half the weight."""
        return 0.5 * weight


class WithLora(nn.Module):
    """A linear layer with a low-rank addition, as peft wraps one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """The same as the layer."""
        return self.base(x) + x @ self.down.T @ self.up.T


LINEAR = [(family, path) for family, path in MODULES if path.endswith(("qkv", "proj", "fc1"))]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("family", "path"), LINEAR)
def test_parametrized_and_replaced_layers_are_used(family: str, path: str, when: str) -> None:
    model, x, schedule = made(family)
    weight = f"{path}.weight"

    def put(change: Callable[[nn.Module], object]) -> nn.Module:
        if when == "after":
            changed, _ = with_schedule(family)
            change(changed)
            return changed
        changed = copy.deepcopy(model)
        change(changed)
        return apply_schedule(changed, schedule)

    halved = copy.deepcopy(model)
    with torch.no_grad():
        halved.get_parameter(weight).mul_(0.5)
    expected = apply_schedule(halved, schedule)(x)
    found = put(lambda it: parametrize.register_parametrization(it.get_submodule(path), "weight", Halved()))
    torch.testing.assert_close(found(x), expected)
    assert shape_of(found) == shape_of(halved)

    def put_lora(it: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(it.get_submodule(parent), name, WithLora(it.get_submodule(path)))

    if when == "before":
        with pytest.raises(ModelError, match=rf"{path.rpartition('.')[2]}: the cost of a .*WithLora is not known"):
            put(put_lora)
        return
    lora = put(put_lora)
    merged = copy.deepcopy(model)
    wrapped = lora.get_submodule(path)
    with torch.no_grad():
        merged.get_parameter(weight).add_(wrapped.up @ wrapped.down)
    torch.testing.assert_close(lora(x), apply_schedule(merged, schedule)(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_block_runs_compiled(family: str, when: str) -> None:
    model, x, schedule = made(family)
    expected = with_schedule(family)[0](x)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    block = model.get_submodule(BLOCK[family])
    if when == "before":
        block.compile(backend=backend, fullgraph=True)
        with torch.no_grad():
            model(x)
        graphs.clear()
    apply_schedule(model, schedule)
    if when == "after":
        block.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x[:1]), expected[:1])
    assert graphs
