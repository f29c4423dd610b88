"""Building models: weights from the package, from a file, or fresh; and errors that name what does not fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from prunesearch.config import ModelConfig, as_options
from prunesearch.errors import ModelError
from prunesearch.evaluate import build, model_shape
from prunesearch.evaluate.build import build_model, parameter_count
from prunesearch.evaluate.digits import load_digits
from prunesearch.models.digits_vit import WEIGHTS

SMALL = ModelConfig("vit_digits_patch1_8", options=(("depth", 2),))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_the_shipped_model_keeps_its_promises():
    model = timm.create_model("vit_digits_patch1_8", pretrained=True).eval()
    shape = model_shape(ModelConfig("vit_digits_patch1_8"))
    assert (shape.depth, shape.patch_tokens, shape.class_tokens) == (8, 64, 1)
    assert WEIGHTS.stat().st_size < 2e6
    assert WEIGHTS.with_suffix(".md").exists()
    settings = timm.data.resolve_model_data_config(model)
    assert settings["input_size"] == (1, 8, 8)
    assert settings["crop_pct"] == 1.0
    images, labels = load_digits("validation")
    pixels = ((images.float() / 255 - settings["mean"][0]) / settings["std"][0])[:, None]
    with torch.inference_mode():
        right = (model(pixels).argmax(dim=1) == labels).double().mean()
    assert right >= 0.95


def test_each_call_gives_an_independent_copy_of_weights_loaded_once(monkeypatch: pytest.MonkeyPatch):
    build._dense_model.cache_clear()
    created = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: created.append(args) or create(*args, **kwargs))
    first = build_model(SMALL)
    with torch.no_grad():
        first.head.bias.fill_(7.0)
    second = build_model(SMALL)
    assert len(created) == 1
    assert not torch.equal(first.head.bias, second.head.bias)
    assert not second.training


def test_fresh_weights_are_the_same_everywhere_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build._dense_model.cache_clear()
    first = build_model(SMALL).state_dict()
    assert torch.equal(torch.rand(1), expected)
    build._dense_model.cache_clear()
    assert all(torch.equal(first[name], value) for name, value in build_model(SMALL).state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_is_loaded(tmp_path: Path, suffix: str):
    path = str(tmp_path / f"weights{suffix}")
    state = {name: torch.randn_like(value) for name, value in build_model(SMALL).state_dict().items()}
    if suffix == ".pth":
        torch.save({"model": state}, path)  # as the DeiT authors' files are
    else:
        safetensors.torch.save_file(state, path)
    loaded = build_model(ModelConfig(SMALL.name, checkpoint=path, options=SMALL.options)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_checkpoint_for_another_image_size_is_resized_as_timm_does(tmp_path: Path):
    path = str(tmp_path / "weights.safetensors")
    safetensors.torch.save_file(build_model(SMALL).state_dict(), path)
    larger = build_model(ModelConfig(SMALL.name, checkpoint=path, image_size=12, options=SMALL.options))
    assert larger.pos_embed.shape == (1, 145, 48)


def test_shape_and_parameters_need_no_weights():
    wide = ModelConfig("vit_large_patch16_224", image_size=384)
    assert model_shape(wide).patch_tokens == 576
    assert parameter_count(ModelConfig("vit_digits_patch1_8")) == 155_530


class Unsafe:
    def __reduce__(self):
        return print, ("this must never run",)


def test_weights_of_another_family_do_not_fit(tmp_path: Path):
    sizes = dict(depth=1, embed_dim=48, num_heads=3)
    beit, path = timm.create_model("beit_base_patch16_224", **sizes), tmp_path / "beit.safetensors"
    safetensors.torch.save_file({name: value.contiguous() for name, value in beit.state_dict().items()}, path)
    for name in ("vit_relpos_small_patch16_224", "vit_small_patch16_dinov3", "naflexvit_base_patch16_gap"):
        config = ModelConfig(name, checkpoint=str(path), options=as_options(sizes))
        with pytest.raises(ModelError, match=r"does not fit the model: .*exactly this architecture"):
            build_model(config)


def test_errors_name_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other, broken, unsafe = tmp_path / "other.safetensors", tmp_path / "broken.safetensors", tmp_path / "unsafe.pth"
    safetensors.torch.save_file({"head.bias": torch.zeros(3), "extra": torch.zeros(1)}, other)
    broken.write_bytes(b"not a checkpoint")
    torch.save({"model": Unsafe()}, unsafe)
    os.mkfifo(tmp_path / "pipe.safetensors")
    mistakes = {
        'Did you mean "deit_small_patch16_224"': ModelConfig("deit_smal_patch16_224"),
        'model.options.dept: unknown.* Did you mean "depth"': ModelConfig(
            "vit_digits_patch1_8", options=(("dept", 2),)
        ),
        "there is no such file": ModelConfig("vit_digits_patch1_8", checkpoint="/nowhere.safetensors"),
        "it lacks cls_token, .* and 27 more; the model has no extra; other shapes: head.bias": ModelConfig(
            SMALL.name, checkpoint=str(other), options=SMALL.options
        ),
        "cannot be read": ModelConfig("vit_digits_patch1_8", checkpoint=str(broken)),
        "weights_only": ModelConfig("vit_digits_patch1_8", checkpoint=str(unsafe)),
        "both pretrained: true and checkpoint": ModelConfig("vit_digits_patch1_8", True, checkpoint=str(other)),
    }
    for text, config in mistakes.items():
        with pytest.raises(ModelError, match=text):
            build_model(config)
    with pytest.raises(ModelError, match="is no file"):
        build_model(SMALL, start=str(tmp_path / "pipe.safetensors"))
    with pytest.raises(ModelError, match="there is no such file"):
        build_model(ModelConfig("vit_digits_patch1_8", checkpoint=str(tmp_path / "pipe.safetensors")))
    assert capsys.readouterr().out == ""
