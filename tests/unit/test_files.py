"""Reading and writing files: everything round-trips, and each mistake is reported with its place and a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunesearch.config import BlockSpace, Budget, Limit, ModelConfig, Range, StudyConfig
from prunesearch.errors import FileError
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.files import (
    from_mapping,
    load_schedule,
    load_study,
    save_schedule,
    to_mapping,
    write_atomically,
)
from prunesearch.json_schema import json_schema
from prunesearch.schedule import Schedule, Stage

STUDY = """
version: 1
name: deit_small
model: {name: deit_small_patch16_224.fb_in1k, pretrained: true, options: {drop_path_rate: 0.1}}
space:
  blocks: [1, 2, {block: 4, keep: {low: 0.3, high: 1.0}, reduce: merge}]
  keep: [0.5, 1.0]
  score: class_attention        # one value is a list of one
limits: {gmacs: {at_most: 3.5}}
finetune: {learning_rate: 2e-5, batch_size: 256}
rungs: [{images: 0}, {images: 20000}]
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    return path


def mistakes(tmp_path: Path, text: str, read=load_study) -> str:
    with pytest.raises(FileError) as caught:
        read(write(tmp_path, text))
    assert "file.yaml" in str(caught.value)
    return str(caught.value)


def test_a_study_is_read_as_it_is_meant(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, STUDY))
    assert study.space.blocks == (1, 2, BlockSpace(4, keep=Range(0.3, 1.0), reduce=("merge",)))
    assert study.space.score == ("class_attention",)
    assert study.limits == (("gmacs", Limit(at_most=3.5)),)
    assert study.finetune.learning_rate == 2e-5  # YAML 1.1 would have made it text
    assert study.rungs == (Budget(images=0), Budget(images=20000))
    assert study.model.options == (("drop_path_rate", 0.1),)
    assert study.metric_names == ("top1", "gmacs")


def test_set_replaces_single_values(tmp_path: Path) -> None:
    changed = ["stop.trials=7", "space.keep=[0.25]", "rungs.1.images=5", "model.options.depth=3"]
    study = load_study(write(tmp_path, STUDY), changed)
    assert (study.stop.trials, study.space.keep, study.rungs[1].images) == (7, (0.25,), 5)
    assert dict(study.model.options)["depth"] == 3
    with pytest.raises(FileError, match='Did you mean "trials"'):
        load_study(tmp_path / "file.yaml", ["stop.trails=7"])
    with pytest.raises(FileError, match="field=value"):
        load_study(tmp_path / "file.yaml", ["stop"])
    with pytest.raises(FileError, match="no such place"):
        load_study(tmp_path / "file.yaml", ["rungs.7.images=1"])


@pytest.mark.parametrize("defaults", [False, True])
def test_dataclasses_round_trip_through_json(tmp_path: Path, defaults: bool) -> None:
    study = load_study(write(tmp_path, STUDY))
    schedule = Schedule((Stage(3, keep=0.7, reduce="squeeze", options={"temperature": 2.0}),))
    task = Task("u", study.model, study.data, schedule, Budget(images=3), ("top1",), seed=4, save_to="x")
    evaluation = Evaluation(
        "u",
        "complete",
        metrics=(("top1", 97.5),),
        spread=(("throughput", 1.0),),
        tokens=(65, 40),
        seconds=(("train", 1.5),),
    )
    for value in (study, task, evaluation, schedule):
        text = json.dumps(to_mapping(value, defaults=defaults))
        assert from_mapping(type(value), json.loads(text), "json") == value


def test_schedules_round_trip_through_yaml(tmp_path: Path) -> None:
    schedule = Schedule(
        (Stage(3, keep=0.7), Stage(6, tokens=30, reduce="merge", options={"proportional_attention": False}))
    )
    path = tmp_path / "best.yaml"
    save_schedule(schedule, path, measured={"top1": 79.6, "tokens": [197, 139]}, made_by={"trial": 4})
    assert load_schedule(path) == schedule
    text = path.read_text()
    assert text.startswith('# prunesearch schedule. Use:  apply_schedule(model, "best.yaml")')
    assert "- {block: 3, at: mid, score: class_attention, keep: 0.7, reduce: drop}" in text


def test_all_mistakes_come_at_once_with_line_and_hint(tmp_path: Path) -> None:
    text = mistakes(
        tmp_path,
        """version: 2
nme: x
model: {name: deit, pretraind: true}
space: {blocks: [1, a], keep: {low: 0, high: 2}}
objectives: [{metric: top1, goal: maximise}]
finetune: {learning_rate: fast, batch_size: 0}
workers: ray
stop: {trials: true}
""",
    )
    for expected in (
        "version (line 1): is 2; possible: 1.",
        "nme (line 2): unknown field. Known: version, name,",
        "name: missing.",
        "model.pretraind (line 3): unknown field. Known: name, pretrained",
        'Did you mean "pretrained"?',
        "space.blocks[1] (line 4): is 'a'; possible: a whole number.",
        "space.keep.low (line 4): is 0; possible: a number above 0 up to 1.",
        "objectives[0].goal (line 5): is 'maximise'; possible: maximize, minimize. Did you mean \"maximize\"?",
        "finetune.learning_rate (line 6): is 'fast'; possible: a number.",
        "finetune.batch_size (line 6): is 0; possible: a whole number from 1 up to 65,536.",
        "workers (line 7): is 'ray'; possible: a mapping with the fields kind,",
        "stop.trials (line 8): is True; possible: a whole number",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; possible: a mapping"),
        ("- a\n- b\n", "is a list; possible: a mapping"),
        ("just words", "is 'just words'; possible: a mapping"),
        ("a: [1", "line 1, column 6: this is not YAML"),
        ("a: !!python/object:os.system {}", "missing"),
        ("name: a\nname: b\n", "name (line 2): given twice. Keep one."),
        ("\t- x: y: z", "this is not YAML"),
    ],
)
def test_files_that_are_no_study_are_explained(tmp_path: Path, text: str, says: str) -> None:
    assert says in mistakes(tmp_path, text)


def test_crooked_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no such file"):
        load_study(tmp_path / "nowhere.yaml")
    with pytest.raises(FileError, match="cannot be read"):
        load_study(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(FileError, match="cannot be read as text"):
        load_study(tmp_path / "binary.yaml")


def test_mistakes_in_stages_are_found_without_a_model(tmp_path: Path) -> None:
    text = mistakes(
        tmp_path,
        """version: 1
stages:
  - {block: 3, keep: 1.5}
  - {block: 2, keep: 0.5, score: clas_attention}
  - {block: 2, keep: 0.5, reduce: merge, options: {foo: 1}}
  - {blok: 2}
""",
        load_schedule,
    )
    assert "stages[0].keep (line 3): is 1.5; possible: a number above 0 up to 1." in text
    assert "stages[1] (line 4): unknown score 'clas_attention'" in text and 'Did you mean "class_attention"?' in text
    assert "stages[2] (line 5): unknown option 'foo'" in text
    assert "stages[3].blok (line 6): unknown field." in text and 'Did you mean "block"?' in text


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_json_schema_describes_what_the_reader_takes() -> None:
    schema = json_schema(StudyConfig)
    study = schema["$defs"]["StudyConfig"]
    assert set(study["required"]) == {"version", "name", "model", "space"} and study["additionalProperties"] is False
    keep = schema["$defs"]["SpaceConfig"]["properties"]["keep"]
    assert {"$ref": "#/$defs/Range"} in keep["anyOf"] and keep["description"]
    assert schema["$defs"]["FinetuneConfig"]["properties"]["batch_size"]["minimum"] == 1
    assert schema["$defs"]["ModelConfig"]["properties"]["options"]["type"] == "object"
    assert json.loads(json.dumps(schema)) == schema
    assert ModelConfig("x").pretrained is False
