"""Options of scores and verbs: a string option has named values; others are refused with a clear message."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from rich.console import Console

import prunesearch
from prunesearch.report.catalogue import CATALOGUES, table
from prunesearch.schedule import Schedule, Stage, stage_problems
from prunesearch.tokens import REDUCERS, SCORERS

WORDS = [
    (kind, name, option)
    for kind, registry in (("score", SCORERS), ("reduce", REDUCERS))
    for name, entry in registry.items()
    for option, default in entry.options.items()
    if isinstance(default, str)
]


def stage_with(kind: str, name: str, option: str, value: object) -> Stage:
    chosen = {"reduce": "drop", "score": "class_attention", kind: name}
    if not REDUCERS[chosen["reduce"]].ranks:
        chosen["score"] = "none"
    return Stage(2, keep=0.5, options={option: value}, **chosen)  # type: ignore[arg-type]


def test_there_are_some() -> None:
    assert {option for _, _, option in WORDS} == {"merged", "parity", "position", "returns"}


@pytest.mark.parametrize(("kind", "name", "option"), WORDS)
def test_a_string_option_has_named_values(kind: str, name: str, option: str) -> None:
    entry = (SCORERS if kind == "score" else REDUCERS)[name]
    values = entry.choices[option]
    assert len(set(values)) == len(values) > 1
    assert values[0] == entry.options[option], "the default comes first"
    for value in values:
        assert stage_problems(stage_with(kind, name, option, value)) == []


@pytest.mark.parametrize(("kind", "name", "option"), WORDS)
@pytest.mark.parametrize("wrong", ["", "SUM", "Max", "everything", 1, True, 0.5])
def test_another_value_is_refused(kind: str, name: str, option: str, wrong: object) -> None:
    (problem,) = stage_problems(stage_with(kind, name, option, wrong))
    assert f"option {option} is {wrong!r}; possible: " in problem
    if isinstance(wrong, str):
        values = (SCORERS if kind == "score" else REDUCERS)[name].choices[option]
        assert f"possible: {', '.join(values)}. Its default is {values[0]!r}" in problem


def test_a_close_word_is_guessed() -> None:
    (problem,) = stage_problems(stage_with("reduce", "merge", "parity", "patch"))
    assert 'Did you mean "patches"?' in problem


@pytest.mark.parametrize(("kind", "name", "option"), WORDS)
def test_lists_show_the_other_values(kind: str, name: str, option: str) -> None:
    columns, rows = CATALOGUES[f"{kind}s"]
    row = next(row for row in rows() if row[0] == name)
    values = (SCORERS if kind == "score" else REDUCERS)[name].choices[option]
    assert f"{option}={values[0]} (or {', '.join(values[1:])})" in row[columns.index("options")]


@pytest.mark.parametrize("registry", [SCORERS, REDUCERS])
def test_only_options_have_choices_and_bounds(registry) -> None:
    for entry in registry.values():
        assert entry.choices.keys() | entry.bounds.keys() <= entry.options.keys()


def test_a_list_never_cuts_a_name() -> None:
    console = Console(width=60, record=True)
    console.print(table("reduces"))
    text = console.export_text()
    assert "…" not in text


NUMBERS = [
    (kind, name, option)
    for kind, registry in (("score", SCORERS), ("reduce", REDUCERS))
    for name, entry in registry.items()
    for option, default in entry.options.items()
    if isinstance(default, (int, float)) and not isinstance(default, bool)
]


def test_there_are_numbers() -> None:
    assert {option for _, _, option in NUMBERS} == {"seed", "temperature", "variance", "momentum"}


@pytest.mark.parametrize(("kind", "name", "option"), NUMBERS)
def test_a_number_has_bounds_and_both_ends_give_finite_logits(kind: str, name: str, option: str) -> None:
    low, high = (SCORERS if kind == "score" else REDUCERS)[name].bounds[option]
    for value in (low, high):
        stage = stage_with(kind, name, option, value)
        assert stage_problems(stage) == []
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2)
        prunesearch.apply_schedule(model.eval(), Schedule((stage,)))
        with torch.inference_mode():
            assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(("kind", "name", "option"), NUMBERS)
def test_a_number_out_of_bounds_is_refused(kind: str, name: str, option: str) -> None:
    entry = (SCORERS if kind == "score" else REDUCERS)[name]
    low, high = entry.bounds[option]
    for value in (type(low)(low - 1), type(high)(high * 2), -math.inf, math.nan):
        (problem,) = stage_problems(stage_with(kind, name, option, value))
        assert f"option {option} is {value!r}; possible: " in problem and repr(entry.options[option]) in problem
