"""Promise: every field of every stored dataclass is read as it was written, with every kind of value.

Fields and kinds of values are found from the annotations.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import fake_search
import pytest

from prunesearch.cli import main
from prunesearch.config import TARGETS, FinetuneConfig, SpaceConfig, StopConfig, StudyConfig
from prunesearch.errors import FileError, UserError
from prunesearch.evaluate.sensitivity import Sensitivities
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import PresetFile, ScheduleFile, load_study, write_yaml
from prunesearch.json_schema import json_schema
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.sensitivity_front import Predicted
from prunesearch.strict import from_mapping, is_pairs, to_mapping
from prunesearch.study.reader import open_study_readonly
from prunesearch.tokens import REDUCERS, SCORERS
from prunesearch.yaml_text import read_yaml_text

ROOTS = (StudyConfig, Task, Evaluation, Schedule, ScheduleFile, PresetFile, Sensitivities, Predicted)
NAMES = {("Stage", "score"): SCORERS, ("Stage", "reduce"): REDUCERS}  # text that must be a registered name
AMOUNTS = ("keep", "tokens", "threshold")


def dataclasses_in(kind: Any) -> set[type]:
    """All dataclasses in an annotation, nested ones included."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        inside = [dataclasses_in(hints[field.name]) for field in dataclasses.fields(kind)]
        return {typing.cast(type, kind)}.union(*inside)
    return set[type]().union(*map(dataclasses_in, get_args(kind)))


KINDS = sorted(set[type]().union(*map(dataclasses_in, ROOTS)), key=lambda kind: kind.__name__)
FIELDS = [(kind, field) for kind in KINDS for field in dataclasses.fields(kind)]
BY_NAME = pytest.mark.parametrize(("kind", "field"), FIELDS, ids=[f"{kind.__name__}.{f.name}" for kind, f in FIELDS])


def number_within(limits: Mapping[str, Any]) -> list[float]:
    """The bounds, if any, and a number between them."""
    ends = [limits[name] for name in ("low", "high") if name in limits]
    low = limits.get("low", limits.get("above", 0))
    return [*ends, min(low + 1, limits.get("high", math.inf)) if "above" in limits else low]


def values_of(kind: Any, limits: Mapping[str, Any]) -> list[Any]:
    """Values of every kind that an annotation allows. Named values are sorted by name, as everywhere."""
    origin, parameters = get_origin(kind), get_args(kind)
    if kind is Any:
        return [None, 1, 0.5, "text", [1, None], {"a": {"b": None}}]
    if origin in (Union, types.UnionType):
        return list(itertools.chain.from_iterable(values_of(part, limits) for part in parameters))
    if origin is Literal:
        return list(parameters)
    if kind is type(None):
        return [None]
    if kind is bool:
        return [True, False]
    if kind is int:
        return [math.ceil(number) for number in number_within(limits)]
    if kind is float:
        return [float(number) for number in number_within(limits)]
    if kind is str:
        texts = ["text", "", "null", "1e5", "2024-01-05", "ä: #"]
        return [text for text in texts if re.search(limits.get("pattern", ""), text)]
    if dataclasses.is_dataclass(kind):
        return [smallest(typing.cast(type, kind))]
    if is_pairs(kind):
        items = values_of(get_args(parameters[0])[1], limits)
        return [
            (),
            *((("name", item),) for item in items),
            tuple((f"n{index:02}", item) for index, item in enumerate(items)),
        ]
    if origin is tuple and parameters[-1] is Ellipsis:
        items = values_of(parameters[0], limits)
        return [(), *((item,) for item in items), tuple(items)]
    assert isinstance(origin, type) and issubclass(origin, Mapping), kind
    return [{}, {"name": None}, {"name": [1, 2.5, {"deep": "text"}]}]


def smallest(kind: type) -> Any:
    """An instance with the required fields only."""
    if kind is Stage:
        return Stage(0, keep=0.5)
    hints = typing.get_type_hints(kind)
    required = [field for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    return kind(**{field.name: values_of(hints[field.name], field.metadata)[0] for field in required})


def other_amount(field: dataclasses.Field[Any]) -> dict[str, Any]:
    return {"threshold": 0.5} if field.name == "keep" else {}


def instances(kind: type, field: dataclasses.Field[Any]) -> Iterator[Any]:
    """For each kind of value of each field, the smallest instance with it. Fields that exclude it are left out."""
    base, hint = smallest(kind), typing.get_type_hints(kind)[field.name]
    if "expand" in field.metadata:  # exists in files only, as a shorthand for other fields
        yield base
        return
    registry = NAMES.get((kind.__name__, field.name))
    for value in values_of(hint, field.metadata) if registry is None else registry:
        changes = {field.name: value}
        if kind is Stage and field.name in AMOUNTS:
            changes = {**dict.fromkeys(AMOUNTS), **changes} if value is not None else {**changes, **other_amount(field)}
        if kind is Stage and field.name == "options" and value:
            continue  # a registered name with a value of its type: below
        if kind is Stage and field.name == "reduce" and not REDUCERS[value].ranks:
            changes["score"] = "none"
        try:
            yield dataclasses.replace(base, **changes)
        except UserError:  # a field that excludes another, or a shorthand
            adaptive = (Stage(0, threshold=0.5),)
            if kind is Schedule and field.name in TARGETS:
                yield Schedule(adaptive, **{field.name: value})
    if kind is Stage and field.name == "options":
        yield from (
            Stage(1, keep=0.5, score=name, options=tuple(entry.options.items())) for name, entry in SCORERS.items()
        )
        yield from (
            Stage(1, keep=0.5, reduce=name, score="class_attention" if entry.ranks else "none", options=entry.options)
            for name, entry in REDUCERS.items()
        )


@BY_NAME
def test_every_field_survives_with_every_kind_of_value(
    kind: type, field: dataclasses.Field[Any], tmp_path: Path
) -> None:
    made = list(instances(kind, field))
    kinds = {type(getattr(one, field.name)) for one in made}
    assert kinds and (type(None) in kinds) == (type(None) in get_args(typing.get_type_hints(kind)[field.name]))
    for one in made:
        for defaults in (False, True):
            mapping = to_mapping(one, defaults=defaults)
            text = json.dumps(mapping)
            assert from_mapping(kind, json.loads(text), "json") == one, text
    write_yaml([to_mapping(one) for one in made], tmp_path / "file.yaml")
    read = read_yaml_text((tmp_path / "file.yaml").read_text())
    assert read.problems == [] and [from_mapping(kind, one, "yaml") for one in read.content] == made


@BY_NAME
def test_no_field_at_its_default_is_written(kind: type, field: dataclasses.Field[Any]) -> None:
    for one in instances(kind, field):
        value = getattr(one, field.name)
        is_default = field.default is not dataclasses.MISSING and value == field.default
        assert (field.name in to_mapping(one)) == (not is_default)
        is_nothing = field.default is not dataclasses.MISSING and field.default in (None, ())
        assert (field.name in to_mapping(one, defaults=True)) == (not (is_default and is_nothing))


def numbers_in(kind: Any) -> bool:
    """Whether an annotation allows numbers outside nested dataclasses."""
    return kind in (int, float) or (not dataclasses.is_dataclass(kind) and any(map(numbers_in, get_args(kind))))


def tuples_in(kind: Any) -> bool:
    return get_origin(kind) is tuple or any(map(tuples_in, get_args(kind)))


READ_BACK = {
    "Evaluation", "Sensitivities", "Effect", "Predicted", "Task", "SupernetWork", "AbsoluteLimit", "Profile", "Curve",
    "StageTime", "ModelShape", "TimingWork", "ToTime", "Speed", "Conditions",
}  # fmt: skip
"""Not written by users. They hold measured values, which must never be refused."""
WRITTEN = [(kind, field) for kind, field in FIELDS if kind.__name__ not in READ_BACK]


@pytest.mark.parametrize(("kind", "field"), WRITTEN, ids=[f"{kind.__name__}.{f.name}" for kind, f in WRITTEN])
def test_every_number_and_every_list_has_bounds(kind: type, field: dataclasses.Field[Any]) -> None:
    hint = typing.get_type_hints(kind)[field.name]
    if get_origin(hint) is Literal:
        return
    limits, schema = field.metadata, json.dumps(json_schema(kind)["$defs"][kind.__name__]["properties"][field.name])
    if numbers_in(hint):
        low = limits.get("low", limits.get("above"))
        assert math.isfinite(low) and math.isfinite(limits["high"]) and low < limits["high"]
        assert '"maximum"' in schema and ('"minimum"' in schema or '"exclusiveMinimum"' in schema)
        beyond = [limits["high"] * 2 + 1, low - 1, math.inf, -math.inf, math.nan, 10**400, -(10**400)]
        mapping = to_mapping(smallest(kind), defaults=True)
        for value in beyond:
            wrong: Any = {"name": value} if is_pairs(hint) else value
            with pytest.raises(FileError, match=rf"{field.name}.*: is .*; possible: ") as caught:
                from_mapping(kind, {**mapping, field.name: wrong}, "place")
            assert "more than 300 digits" in str(caught.value) or len(str(caught.value)) < 500
    if tuples_in(hint):
        assert 1 <= limits["most"] <= 10_000 and ('"maxItems"' in schema or '"maxProperties"' in schema)


WHOLE = [(kind, field) for kind, field in WRITTEN if typing.get_type_hints(kind)[field.name] in (int, int | None)]


@pytest.mark.parametrize(("kind", "field"), WHOLE, ids=[f"{kind.__name__}.{f.name}" for kind, f in WHOLE])
def test_whole_numbers_are_whole(kind: type, field: dataclasses.Field[Any]) -> None:
    mapping = to_mapping(smallest(kind), defaults=True)
    for value in (1.0, 1e3, True, "1", [1]):
        with pytest.raises(FileError, match=rf"{field.name}.*possible: a whole number"):
            from_mapping(kind, {**mapping, field.name: value}, "place")


def test_floats_take_whole_numbers(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("version: 1\nname: x\nmodel: {name: x}\nspace: {blocks: [1]}\nfinetune: {learning_rate: 0}\n")
    rate = load_study(path).finetune.learning_rate
    assert rate == 0.0 and type(rate) is float


NULLS = {
    "finetune": FinetuneConfig(clip_grad=None),
    "stop": StopConfig(trials=None),
    "space": SpaceConfig(blocks=(1, 2), keep=(0.5, 0.8, 1.0)),
}


def test_a_study_with_nulls_goes_on_and_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = fake_search.study(**NULLS)
    fake_search.EVALUATED.clear()
    done, _ = fake_search.run(config, tmp_path, journal=False)
    first = len(fake_search.EVALUATED)
    assert done.complete == first == 9  # all combinations: there is no limit
    assert load_study(tmp_path / "study.yaml") == config
    fake_search.run(load_study(tmp_path / "study.yaml"), tmp_path, journal=False)
    assert main(["resume", str(tmp_path), "--no-progress"]) == 0
    assert len(fake_search.EVALUATED) == first
    reader = open_study_readonly(tmp_path)
    reader.close()
    assert reader.config == config
    changes = ("finetune.clip_grad=2.0", "finetune.batch_size=3", "model.image_size=12")
    assert main(["resume", str(tmp_path), *(f"--set={change}" for change in changes)]) == 2
    refusal = capsys.readouterr().err
    for line in ("finetune.clip_grad: null -> 2.0", "finetune.batch_size: 128 -> 3", "model.image_size: absent -> 12"):
        assert line in refusal
