"""Old import paths fail with the new path in the message."""

from __future__ import annotations

import importlib

import pytest

from prunesearch.moved import MOVED

TOO_HEAVY_HERE = {"search.ray_workers", "search.tune"}  # the tests of Ray import them


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_names_the_new_one(old: str) -> None:
    new = f"prunesearch.{MOVED[old]}"
    with pytest.raises(ModuleNotFoundError, match=rf"prunesearch\.{old} is {new} now"):
        importlib.import_module(f"prunesearch.{old}")
    if old not in TOO_HEAVY_HERE:
        importlib.import_module(new)


def test_what_never_was_is_missing_as_ever() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'prunesearch\.nowhere'"):
        importlib.import_module("prunesearch.nowhere")
