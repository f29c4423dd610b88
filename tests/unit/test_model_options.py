"""Promise: a model section only changes the architecture, and `check` uses no network, files or pickles.

tests/contract tests that every option builds.
"""

from __future__ import annotations

import pickle
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_search
import pytest
import timm
import torch

from prunesearch.cli import main
from prunesearch.config import DataConfig, ModelConfig, Scalar, as_options
from prunesearch.errors import ModelError
from prunesearch.evaluate import model_problems, model_shape
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.sections import OPTIONS, Bounds
from prunesearch.search.problems import study_problems

STUDY = """
version: 1
name: x
model: {{name: "{name}", pretrained: {pretrained}, options: {options}}}
space: {{blocks: [1], keep: [0.5, 1.0], score: key_norm}}
objectives: [{{metric: top1, goal: maximise}}]
"""
# arguments of create_model and its builders that must never reach them
FORBIDDEN: dict[str, Scalar] = {
    "checkpoint_path": "weights.pth",
    "cache_dir": "/tmp",
    "pretrained": True,
    "pretrained_cfg": "x",
    "pretrained_cfg_overlay": "x",
    "pretrained_strict": False,
    "pretrained_filter_fn": "x",
    "pretrained_custom_load": True,
    "features_only": True,
    "feature_cls": "dict",
    "out_indices": 1,
    "scriptable": True,
    "exportable": True,
    "no_jit": True,
    "pruned": True,
    "kwargs_filter": "depth",
    "model_cfg": "x",
    "url": "http://localhost/x",
    "file": "weights.pth",
    "device": "cpu",
    "dtype": "float16",
    "block_fn": "x",
    "embed_layer": "x",
    "weight_init": "jax",
    "dept": 3,
    "": 1,
}


class Unsafe:
    def __reduce__(self) -> Any:
        return Path("this-must-never-be-made").touch, ()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, and without a network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("no network here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_no_architecture_is_refused_before_anything_is_built(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("weights.pth").write_bytes(pickle.dumps(Unsafe()))
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("something was built"))
    config = ModelConfig("vit_digits_patch1_8", options=((name, FORBIDDEN[name]),))
    for act in (model_shape, build_model):
        with pytest.raises(ModelError, match=f"model.options.{name}: unknown, or not a matter of the architecture"):
            act(config)
    assert not Path("this-must-never-be-made").exists()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_has_bounds(name: str) -> None:
    possible = OPTIONS[name]
    wrong: list[Any] = ["", "text", -1, 1e9, float("nan"), float("inf"), 10**400, [1]]
    if isinstance(possible, Bounds):
        assert possible.low < possible.high < 1e5
        wrong += [True, *([1.5] if possible.kind is int else [])]
    for value in wrong:
        if not isinstance(possible, Bounds) and value in possible:
            continue
        problems = model_problems(ModelConfig("vit_digits_patch1_8", options=((name, value),)))
        assert len(problems) == 1 and f"model.options.{name}: is " in problems[0] and "possible: " in problems[0]


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("values", [0, 1, 3, 64])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_normalisation_has_a_value_for_each_channel(name: str, values: int, in_chans: int) -> None:
    model = ModelConfig("vit_digits_patch1_8", options=(("in_chans", in_chans),))
    data = replace(DataConfig(), **{name: (0.5,) * values})
    problems = study_problems(fake_search.study(model=model, data=data))
    if in_chans == 4:
        said = "the model wants 4"
    else:
        said = "" if values == in_chans else f"data.{name}: {values} values were given, but the model has {in_chans}"
    assert (said in problems[0]) if said else problems == []


@pytest.mark.parametrize(
    ("name", "pretrained", "says"),
    [
        ("hf-hub:timm/vit_tiny", True, ""),
        ("local-dir:here", True, ""),
        ("hf-hub:timm/vit_tiny", False, "with pretrained: true"),
        ("local-dir:here", False, "with pretrained: true"),
        ("https://host/x", True, "has the source 'https'"),
        ("hf-hup:timm/vit_tiny", True, 'Did you mean "hf-hub"'),
        ("vit_digits_patch1_9", False, 'Did you mean "vit_digits_patch1_8"'),
        ("", False, "does not know ''"),
        ("../vit_digits_patch1_8", False, "does not know"),
    ],
)
def test_check_looks_nothing_up_and_says_what_it_can(
    name: str, pretrained: bool, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("here").mkdir()
    Path("here/config.json").write_text('{"architecture": "vit_digits_patch1_8"}')
    Path("here/pytorch_model.bin").write_bytes(pickle.dumps(Unsafe()))
    text = STUDY.format(name=name, pretrained=str(pretrained).lower(), options="{}")
    Path("study.yaml").write_text(text)
    assert main(["check", "study.yaml"]) == 2  # the goal is misspelled in any case
    Path("study.yaml").write_text(text.replace("maximise", "maximize") + "promote: 3\nmetrics: [topp1]\n")
    assert main(["check", "study.yaml"]) == 2
    error = capsys.readouterr().err
    assert 'Did you mean "maximize"' in error and 'Did you mean "top1"' in error and says in error
    Path("study.yaml").write_text(text.replace("maximise", "maximize"))
    assert main(["check", "study.yaml"]) == (2 if says else 0)
    if not says:
        assert "fine as far as it can be checked here" in capsys.readouterr().out
    assert not Path("this-must-never-be-made").exists()


def test_weights_in_a_folder_are_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig("local-dir:here", pretrained=True)
    assert model_problems(config) == []

    def as_in_timm_1_0_22(path: str, weights_only: bool = False) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(timm.models._hub, "load_state_dict_from_path", as_in_timm_1_0_22)
    with pytest.raises(ModelError, match=r"runs code that weights in a folder may hold.*a newer timm"):
        build_model(config)


@pytest.mark.parametrize("plugin", ["a b", "a-b", "../x", "a..b", ".a", "a.", "1a", "a;import os", "", "a/b.py"])
def test_a_plug_in_is_the_name_of_a_module(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = STUDY.format(name="vit_digits_patch1_8", pretrained="false", options="{}").replace("maximise", "maximize")
    Path("study.yaml").write_text(text)
    assert main(["check", "study.yaml", "--set", f'plugins=["{plugin}"]']) == 2
    assert "plugins[0]: is" in capsys.readouterr().err


def test_a_deep_model_is_checked_without_memory_for_its_weights() -> None:
    options = as_options({"depth": 100, "embed_dim": 16_384, "num_heads": 1})
    shape = model_shape(ModelConfig("vit_digits_patch1_8", image_size=512, options=options))
    assert shape.depth == 100 and shape.patch_tokens == 512**2
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize("size", [8, 4096])
def test_a_model_with_too_few_or_too_many_tokens_is_a_sentence(size: int) -> None:
    options = as_options({"depth": 1, "patch_size": 16 if size == 8 else 1})
    with pytest.raises(
        ModelError, match=r"patch tokens of an image. Possible: from 1|cannot build|images of its own size"
    ):
        model_shape(ModelConfig("vit_digits_patch1_8", image_size=size, options=options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beit_base_patch16_224", {"embed_dim": 32, "num_heads": 5}),
        ("vit_small_patch16_dinov3", {"embed_dim": 36, "num_heads": 2}),
    ],
)
def test_a_model_that_can_be_built_but_not_run_is_a_sentence(name: str, options: dict[str, int]) -> None:
    with pytest.raises(ModelError, match=rf"{name} cannot take images of its own size: .* 4 x num_heads divides\)"):
        model_shape(ModelConfig(name, options=as_options(options)))


@pytest.mark.parametrize(
    ("model", "code", "says"),
    [
        ("{name: 'hf-hub:timm/vit_tiny', pretrained: true}", 0, "is looked up when it is evaluated"),
        ("{name: 'local-dir:here', pretrained: true}", 0, "is looked up when it is evaluated"),
        ("{name: 'hf-hub:timm/vit_tiny'}", 2, "with pretrained: true"),
        ("{name: vit_digits_patch1_8, options: {checkpoint_path: weights.pth}}", 2, "not a matter of the architecture"),
        ("{name: vit_digits_patch1_8, options: {depth: 100000}}", 2, "possible: a whole number from 1 up to 100"),
    ],
)
def test_a_schedule_of_a_stranger_makes_check_open_nothing(
    model: str, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("weights.pth").write_bytes(pickle.dumps(Unsafe()))
    Path("best.yaml").write_text(f"version: 1\nstages: [{{block: 1, keep: 0.5}}]\nmodel: {model}\n")
    assert main(["check", "best.yaml"]) == code
    output = capsys.readouterr()
    assert says in output.out + output.err and not Path("this-must-never-be-made").exists()
