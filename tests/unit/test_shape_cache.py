"""Shapes of models without importing timm: the caches return what timm would, or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from prunesearch.config import ModelConfig
from prunesearch.evaluate import shape_cache
from prunesearch.evaluate.build import facts_of
from prunesearch.evaluate.shape_cache import Facts
from prunesearch.evaluate.timm_models import architectures, facts_of_names

OTHER_VERSION = shape_cache.timm_version() != json.loads(shape_cache.SHIPPED.read_text())["timm"]
SOME = [
    *("vit_digits_patch1_8", "vit_digits_patch1_8.sklearn", "deit_small_patch16_224.fb_in1k", "convnext_tiny"),
    *("deit_tiny_distilled_patch16_224", "vit_base_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"),
    *("swin_tiny_patch4_window7_224", "vit_base_patch16_224.augreg_in21k"),
]
DEEP = ModelConfig("vit_digits_patch1_8", options=(("depth", 3),))
ASK = """
import sys
from prunesearch.config import ModelConfig
from prunesearch.errors import ModelError
from prunesearch.evaluate import model_shape, shape_cache
if {other_version}:
    shape_cache.shipped = dict
try:
    print(model_shape(ModelConfig({name!r}, options={options!r})).depth, "timm" in sys.modules)
except ModelError as error:
    print(error)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file of an empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape_cache._user.cache_clear()
    yield tmp_path / "prunesearch" / "shapes.json"
    shape_cache._user.cache_clear()


def ask(name: str, options: tuple[tuple[str, object], ...] = (), other_version: bool = False) -> str:
    """The answer of a process without timm. other_version: as if the shipped file was for another timm version."""
    process = [sys.executable, "-c", ASK.format(name=name, options=options, other_version=other_version)]
    return subprocess.run(process, capture_output=True, text=True, check=True, env={**os.environ}).stdout.strip()


@pytest.mark.skipif(OTHER_VERSION, reason="the shipped shapes are of another version of timm")
def test_the_shipped_shapes_are_those_of_timm() -> None:
    for name in SOME:
        assert shape_cache.find(ModelConfig(name)) == facts_of(ModelConfig(name)), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(OTHER_VERSION, reason="the shipped shapes are of another version of timm")
def test_the_shipped_file_has_every_name_and_every_tag() -> None:
    """Shapes of all names, and of every tenth tag: building all takes six minutes."""
    found = facts_of_names(architectures())
    tags = [name for name in timm.list_pretrained() if name.partition(".")[0] in found]
    assert set(shape_cache.shipped()) == {*found, *tags}
    found |= facts_of_names(tags[::10])
    assert {name: shape_cache.find(ModelConfig(name)) for name in found} == found


@pytest.mark.slow  # four processes import timm
def test_what_timm_was_asked_once_is_kept(cache: Path) -> None:
    assert ask(DEEP.name, DEEP.options) == "3 True"
    assert cache.is_file()
    assert ask(DEEP.name, DEEP.options) == "3 False"
    assert shape_cache.find(DEEP) == facts_of(DEEP)
    assert shape_cache.find(ModelConfig(DEEP.name, options=(("depth", 4),))) is None
    assert [ask("test_vit", other_version=True) for _ in range(2)] == ["6 True", "6 False"]


def test_names_that_others_define_are_not_kept(cache: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "model_entrypoint", lambda name: ask)  # a function of this file
        from prunesearch.evaluate.build import is_timms_own

        assert not is_timms_own(DEEP)
    assert is_timms_own(DEEP) and not is_timms_own(ModelConfig("hf-hub:timm/vit_tiny_patch16_224", pretrained=True))
    assert shape_cache.find(ModelConfig("local-dir:somewhere", pretrained=True)) is None


def test_mistakes_are_the_same_with_and_without_timm(cache: Path) -> None:
    said = ask(DEEP.name, (("depth", -1),))
    assert "model.options.depth: is -1" in said
    assert "does not know 'deit_smal_patch16_224'" in ask("deit_smal_patch16_224")
    assert not cache.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "[" * 100_000,
        lambda text: text.replace(shape_cache.timm_version(), "0.9.0"),
        lambda text: text.replace(shape_cache._code(), "0123456789abcdef"),
        lambda text: text.replace('"depth": 8', '"depth": "8"'),
        lambda text: text.replace('"depth": 8', '"blocks": 8'),
        lambda text: text.replace('"shapes": {', '"shapes": {"x": 1}, "other": {'),
    ],
)
def test_a_damaged_or_foreign_file_counts_as_empty_and_is_replaced(cache: Path, change) -> None:
    facts = facts_of(ModelConfig("vit_digits_patch1_8"))
    shape_cache.keep({DEEP: facts})
    assert shape_cache.find(DEEP) == facts
    changed = change(cache.read_text())
    cache.write_text(changed)
    shape_cache._user.cache_clear()
    assert shape_cache.find(DEEP) is None
    shape_cache.keep({DEEP: facts})
    assert shape_cache.find(DEEP) == facts


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: Facts = facts_of(ModelConfig("vit_digits_patch1_8"))
    cache.mkdir(parents=True)  # a folder where the file should be
    shape_cache.keep({DEEP: facts})
    assert shape_cache.find(DEEP) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "")
    assert shape_cache.user_file() is None or shape_cache.user_file().is_absolute()


def test_another_version_of_timm_is_looked_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunesearch.evaluate import shapes, timm_models

    names = ["vit_digits_patch1_8", "vit_pwee_patch16_reg1_gap_256", "test_vit"]
    looked: list[str] = []
    monkeypatch.setattr(shape_cache, "shipped", dict)
    monkeypatch.setattr(timm_models, "architectures", lambda: looked.append("looked") or names)
    said: list[str] = []
    first = shapes.prunable_models(said.append)
    assert len(said) == 1 and "takes a minute" in said[0] and "test_vit" in first
    assert shapes.prunable_models(said.append) == first and len(said) == len(looked) == 1
    assert "test_vit" in shapes.prunable_models(said.append)
