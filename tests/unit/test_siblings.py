"""Dense siblings: which ones are found, that each is measured once beside the search, and where they are shown."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_search
import fake_sizes  # noqa: F401  (registers its models with timm)
import pytest
from dying import Killed
from fake_records import study_records
from fake_search import finished, study
from rich.console import Console

from prunesearch.cli import main
from prunesearch.config import DataConfig, ModelConfig, Objective, StudyConfig
from prunesearch.errors import FileError
from prunesearch.evaluate.siblings import find_siblings, sibling_problems
from prunesearch.evaluate.task import Evaluation, Task
from prunesearch.front import beats, front, sibling_rows
from prunesearch.record import Record, Sibling
from prunesearch.report import front_csv, siblings_table, status_view
from prunesearch.report.live import LiveReport
from prunesearch.report.plot import plot_front
from prunesearch.search.driver import run_study
from prunesearch.search.events import Done, Event
from prunesearch.search.siblings import SiblingMeasured, sibling_task, uid_of
from prunesearch.study.reader import open_study_readonly
from prunesearch.study.store import Store, open_store
from prunesearch.workers.outbox import evaluate_into
from prunesearch.workers.protocol import Lost, Outcome
from prunesearch.workers.serial import SerialWorkers

OBJECTIVES = (Objective("top1", "maximize"), Objective("gmacs", "minimize"))
SMALL, TINY = (
    ModelConfig("vit_digits_patch1_8", pretrained=True, options=(("depth", depth), ("embed_dim", 24)))
    for depth in (4, 2)
)
TASKS: list[Task] = []
BROKEN: set[ModelConfig] = set()
"""Siblings whose evaluation fails."""


@pytest.fixture(autouse=True)
def nothing_evaluated_yet() -> None:
    TASKS.clear()
    BROKEN.clear()


def evaluate(task: Task) -> Evaluation:
    """As in `fake_search`; siblings are worse than the dense model, and cheaper."""
    TASKS.append(task)
    if task.sibling is None:
        return fake_search.evaluate(task)
    if task.sibling in BROKEN:
        return Evaluation(task.uid, "failed", cause="error", error="no weights\nanywhere")
    cost = 0.001 * dict(task.sibling.options)["depth"]  # type: ignore[operator]
    return Evaluation(task.uid, "complete", metrics=(("top1", 60 + 1e3 * cost), ("gmacs", cost)), tokens=(65,) * 4)


def with_siblings(trials: int = 6, *siblings: str | ModelConfig, **changes: Any) -> StudyConfig:
    return study(trials, siblings=siblings or (SMALL, TINY), **changes)


def search(config: StudyConfig, folder: Path, database: bool = False, **how: Any) -> list[Event]:
    events: list[Event] = []
    storage = None if database else f"journal:{folder / 'study.log'}"
    run_study(config, folder, storage=storage, on_event=events.append, evaluate="test_siblings:evaluate", **how)
    return events


def stored(folder: Path, database: bool = False) -> tuple[list[Record], list[Sibling]]:
    reader = open_study_readonly(folder, storage=None if database else f"journal:{folder / 'study.log'}", name="fake")
    try:
        return reader.records(), reader.siblings()
    finally:
        reader.close()


def measured() -> list[ModelConfig]:
    """The siblings that were evaluated, in order."""
    return [task.sibling for task in TASKS if task.sibling is not None]


# --- which ones there are ----------------------------------------------------------------------------------------


def of(model: ModelConfig, *siblings: str | ModelConfig) -> StudyConfig:
    return replace(study(), model=model, siblings=siblings or ("auto",))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deit_small_patch16_224.fb_in1k", ["deit_tiny_patch16_224.fb_in1k"]),
        ("deit_base_distilled_patch16_224", ["deit_small_distilled_patch16_224", "deit_tiny_distilled_patch16_224"]),
        (
            "vit_base_patch16_224.augreg2_in21k_ft_in1k",
            ["vit_small_patch16_224.augreg_in21k_ft_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"],
        ),
        ("swinv2_base_window8_256", ["swinv2_small_window8_256.ms_in1k", "swinv2_tiny_window8_256.ms_in1k"]),
        ("beit_large_patch16_224", ["beit_base_patch16_224"]),
        ("vit_relpos_base_patch16_224", ["vit_relpos_medium_patch16_224.sw", "vit_relpos_small_patch16_224.sw"]),
        ("vit_small_toy_8.v1_digits", ["vit_tiny_toy_8.v1_digits"]),
        ("vit_small_toy_8.v2_digits", ["vit_tiny_toy_8.v1_digits"]),
        ("vit_small_toy_8.v1_more", ["vit_tiny_toy_8.v1_more"]),
    ],
)
def test_auto_finds_the_next_smaller_sizes_of_the_same_training(name: str, expected: list[str]) -> None:
    found = find_siblings(of(ModelConfig(name, pretrained=True)))
    assert found.notes == () and all(model.pretrained for model in found.models)
    assert len(found.models) == len(expected)
    assert all(model.name.startswith(want) for model, want in zip(found.models, expected, strict=True))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (ModelConfig("deit_tiny_patch16_224", pretrained=True), "timm has no smaller size"),
        (ModelConfig("deit_small_patch16_224"), "its weights are not timm's"),
        (ModelConfig("deit_small_patch16_224", checkpoint="mine.safetensors"), "its weights are not timm's"),
        (ModelConfig("vit_digits_patch1_8", pretrained=True), "no word for its size"),
        (ModelConfig("hf-hub:somebody/vit", pretrained=True), "does not say what its family is"),
        (ModelConfig("vit_small_toy_8", pretrained=True, num_classes=7), "weights have 10 classes, the model has 7"),
    ],
)
def test_auto_says_why_it_finds_none(model: ModelConfig, why: str) -> None:
    found = find_siblings(of(model))
    assert found.models == () and len(found.notes) == 1 and why in found.notes[0]


def test_listed_siblings_get_the_sizes_of_the_model_and_must_fit_it() -> None:
    toy = ModelConfig("vit_small_toy_8", image_size=16, num_classes=5, options=(("depth", 3), ("in_chans", 3)))
    own = ModelConfig("vit_tiny_toy_8", checkpoint="tiny.safetensors", options=(("in_chans", 1),))
    found = find_siblings(of(toy, own, own, replace(own, num_classes=6), "resnet18", "vit_tiny_toy_8.digits"))
    assert found.models == (replace(own, image_size=16, num_classes=5),)
    assert [why for note in found.notes for why in ("6 classes", "ResNet", "10 classes") if why in note] == [
        "6 classes",
        "ResNet",
        "10 classes",
    ]


def test_the_hub_is_asked_by_the_run_only() -> None:
    remote = ModelConfig("hf-hub:somebody/vit", pretrained=True)
    assert find_siblings(of(ModelConfig("vit_digits_patch1_8"), remote), offline=True).models == (remote,)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("vit_tinny_toy_8", "siblings[0].name: timm "),
        (ModelConfig("vit_tiny_toy_8"), "siblings[0]: vit_tiny_toy_8 has no weights"),
        (ModelConfig("vit_tiny_toy_8", pretrained=True, checkpoint="x"), "siblings[0]: both pretrained"),
        (ModelConfig("vit_tiny_toy_8", pretrained=True, options=(("deep", 1),)), "siblings[0].options.deep: unknown"),
    ],
)
def test_mistakes_are_found_before_anything_runs(entry: str | ModelConfig, problem: str, tmp_path: Path) -> None:
    found = sibling_problems(study(siblings=(entry,)))
    assert len(found) == 1 and found[0].startswith(problem)
    with pytest.raises(FileError, match=r"siblings\[0\]"):
        search(with_siblings(2, entry), tmp_path)
    assert not TASKS


# --- beside the search -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", [False, True])
def test_each_is_measured_once_before_the_search_and_is_no_part_of_it(tmp_path: Path, database: bool) -> None:
    config = with_siblings(6)
    events = search(config, tmp_path / "with", database)
    assert measured() == [task.sibling for task in TASKS[:2]] == [SMALL, TINY], "they come first"
    for task in TASKS[:2]:
        about = task.budget.images, task.resume_from, task.save_to, task.start, task.split, task.schedule.stages
        assert about == (0, None, None, None, "validation", ()) and task.metrics == config.metric_names
        assert (task.model, task.data, task.measure) == (config.model, config.data, config.measure)
    told = [event for event in events if isinstance(event, SiblingMeasured)]
    assert [(one.sibling.model, one.done, one.total) for one in told] == [(SMALL, 1, 2), (TINY, 2, 2)]
    records, siblings = stored(tmp_path / "with", database)
    for known, one in zip(siblings, told, strict=True):
        assert known.evaluation and dict(known.evaluation.metrics) == dict(one.evaluation.metrics)
    search(replace(config, siblings=()), tmp_path / "without", database)
    plain, none = stored(tmp_path / "without", database)
    assert none == [] and [one.uid for one in records] == [one.uid for one in plain] and len(records) == 6
    assert len(finished(events)) == 6 and not list((tmp_path / "with").rglob("outbox/*.json"))


def test_nothing_is_repeated_and_what_is_asked_for_later_is_added(tmp_path: Path) -> None:
    search(with_siblings(3, SMALL), tmp_path)
    search(with_siblings(3, SMALL), tmp_path)
    assert measured() == [SMALL] and len(TASKS) == 4
    events = search(with_siblings(3, SMALL, TINY), tmp_path)
    assert measured() == [SMALL, TINY] and len(TASKS) == 5 and isinstance(events[-1], Done)
    search(with_siblings(3, TINY), tmp_path)
    assert [sibling.model for sibling in stored(tmp_path)[1]] == [TINY], "only those that the study names"
    search(study(3), tmp_path)
    assert stored(tmp_path)[1] == [] and len(TASKS) == 5


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    write = Store.confirm

    def die(self: Store, *arguments: Any) -> None:
        if after:
            write(self, *arguments)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Store, "confirm", die)
        search(with_siblings(3), tmp_path, database=True)
    assert measured() == [SMALL]
    search(with_siblings(3), tmp_path, database=True)
    assert measured() == [SMALL, TINY]
    records, siblings = stored(tmp_path, database=True)
    assert len(records) == 3 and all(sibling.evaluation is not None for sibling in siblings)
    assert not list((tmp_path / "outbox").glob("*.json"))


def test_one_that_fails_is_a_warning_and_is_tried_again_next_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BROKEN.add(SMALL)
    with caplog.at_level(logging.WARNING):
        events = search(with_siblings(3, SMALL, TINY, "vit_tiny_toy_8.v1_more"), tmp_path, database=True)
    assert "dense sibling vit_digits_patch1_8: not measured (error): no weights" in caplog.text
    assert "vit_tiny_toy_8.v1_more is not measured: it has 12 classes, the model has 10" in caplog.text
    assert measured() == [SMALL, TINY] and len(TASKS) == 5
    assert isinstance(events[-1], Done) and events[-1].failed == 0
    assert [sibling.evaluation is None for sibling in stored(tmp_path, database=True)[1]] == [True, False]
    BROKEN.clear()
    search(with_siblings(3), tmp_path, database=True)
    assert measured() == [SMALL, TINY, SMALL] and len(TASKS) == 6


def test_a_worker_that_dies_costs_one_attempt(tmp_path: Path) -> None:
    class Unlucky(SerialWorkers):
        deaths = 0

        def wait(self, seconds: float) -> list[Outcome]:
            self.deaths += 1
            return [(self._tasks.popleft(), Lost("crash", "killed"))] if self.deaths == 1 else super().wait(seconds)

    def make(config: StudyConfig, folder: Path, evaluate: str) -> SerialWorkers:
        return Unlucky(config.workers, folder / "outbox", evaluate)

    search(with_siblings(2, SMALL), tmp_path, make_workers=make)
    assert [task.attempt for task in TASKS if task.sibling] == [1]
    assert stored(tmp_path)[1][0].evaluation is not None


def test_they_wait_for_no_candidate_and_stop_when_the_search_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunesearch.search.driver._is_interrupted", lambda interrupt: len(TASKS) >= 1)
    search(with_siblings(2), tmp_path)
    assert measured() == [SMALL], "the second one is left to the next run"
    monkeypatch.undo()
    search(with_siblings(2), tmp_path)
    assert measured() == [SMALL, TINY]


def test_confirming_alone_measures_none(tmp_path: Path) -> None:
    search(study(2), tmp_path)
    search(with_siblings(2), tmp_path, search=False)
    assert measured() == [] and len(stored(tmp_path)[1]) == 2


def test_what_an_evaluation_depends_on_makes_another_one() -> None:
    config = study()
    uid = uid_of(SMALL, config)
    same = [DataConfig(root="/elsewhere"), DataConfig(loaders=0, in_memory=False), DataConfig(test_root="/test")]
    assert {uid_of(SMALL, replace(config, data=data)) for data in same} == {uid}
    assert {uid_of(SMALL, replace(config, metrics=("loss",))), uid_of(SMALL, study(99))} == {uid}
    others = [
        uid_of(TINY, config),
        uid_of(SMALL, replace(config, data=DataConfig(name="folder"))),
        uid_of(SMALL, replace(config, model=replace(config.model, num_classes=7))),
        uid_of(SMALL, replace(config, measure=replace(config.measure, speed_batch_size=3))),
    ]
    assert len({uid, *others}) == 5


# --- several drivers ---------------------------------------------------------------------------------------------


@pytest.fixture
def drive(tmp_path: Path) -> Callable[..., list[Event]]:
    """A function that runs the study as another driver of the same database."""

    def run(name: str, on_event: Callable[[Event], None] = lambda event: None) -> list[Event]:
        events: list[Event] = []

        def note(event: Event) -> None:
            events.append(event)
            on_event(event)

        run_study(
            with_siblings(3),
            tmp_path / name,
            storage=f"sqlite:///{tmp_path / 'study.db'}",
            on_event=note,
            evaluate="test_siblings:evaluate",
            lease=0.2,
        )
        return events

    return run


def claimed(tmp_path: Path, name: str) -> tuple[Store, Sibling]:
    """A driver that has claimed the first sibling, and nothing else."""
    config = with_siblings(3)
    store = open_store(config, f"sqlite:///{tmp_path / 'study.db'}", owner=name, alone=False)
    sibling = Sibling(uid_of(SMALL, config), SMALL)
    store.name_siblings([sibling, Sibling(uid_of(TINY, config), TINY)])
    assert store.claim(sibling.uid, 0, sibling.uid, None)
    return store, sibling


def test_what_another_driver_measures_is_not_waited_for(
    tmp_path: Path, drive: Callable[..., list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search goes on without it. Only at the end the driver looks whether the other one has finished."""
    store, sibling = claimed(tmp_path, "another")
    monkeypatch.setattr("prunesearch.study.team.Team.dead", lambda team, names: set())
    monkeypatch.setattr("prunesearch.search.once.TICK_SECONDS", 0.02)
    found = replace(evaluate(sibling_task(sibling, with_siblings(3))), host="another")

    def finish(event: Event) -> None:
        if len(TASKS) == 5:
            assert store.confirm(sibling.uid, 0, found)

    assert isinstance(drive("here", finish)[-1], Done)
    assert measured() == [SMALL, TINY] and len(TASKS) == 5
    assert [one.evaluation and one.evaluation.host for one in store.siblings()] == ["another", ""]
    store.close()


@pytest.mark.parametrize("delivers", [False, True])
def test_what_a_dead_driver_had_claimed_is_taken_over_after_the_search(
    tmp_path: Path, drive: Callable[..., list[Event]], delivers: bool
) -> None:
    store, sibling = claimed(tmp_path, "dead")
    store.close()
    if delivers:  # a driver without a beat has its outbox in the folder of the one that looks
        task = sibling_task(sibling, with_siblings(3))
        (tmp_path / "second" / "outbox").mkdir(parents=True)
        evaluate_into(tmp_path / "second" / "outbox", evaluate, task)
    drive("second")
    assert measured() == ([SMALL, TINY] if delivers else [TINY, SMALL])
    assert all(one.evaluation for one in stored_in(tmp_path))


def test_what_failed_is_not_tried_twice_in_a_run(tmp_path: Path, drive: Callable[..., list[Event]]) -> None:
    BROKEN.update((SMALL, TINY))
    drive("first")
    assert measured() == [SMALL, TINY]
    BROKEN.clear()
    drive("second")
    assert measured() == [SMALL, TINY, SMALL, TINY] and all(one.evaluation for one in stored_in(tmp_path))


def stored_in(place: Path) -> list[Sibling]:
    reader = open_study_readonly(storage=f"sqlite:///{place / 'study.db'}")
    try:
        return reader.siblings()
    finally:
        reader.close()


# --- where they are shown ----------------------------------------------------------------------------------------


def sibling(name: str, top1: float, gmacs: float, latency: float = 1.0, **about: Any) -> Sibling:
    metrics = (("gmacs", gmacs), ("top1", top1), ("latency_ms", latency))
    evaluation = Evaluation(name, "complete", metrics=metrics, tokens=(65,) * 4)
    return Sibling(name, ModelConfig(name, **about), evaluation)


RECORDS = study_records()
FRONT = front(RECORDS, OBJECTIVES)
SIBLINGS = [
    sibling("vit_small_x.augreg_in1k", 94.9, 0.0085, pretrained=True),
    sibling("vit_tiny_x.augreg_in1k", 91.9, 0.0036, checkpoint="/weights/mine.safetensors"),
    replace(sibling("vit_nano_x", 1.0, 0.001), evaluation=None),
]


def printed(renderable: Any, width: int = 130) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_table_says_who_beats_them_and_whom_they_beat() -> None:
    rows = sibling_rows([*SIBLINGS, sibling("best", 97.0, 0.005)], FRONT, OBJECTIVES)
    assert [row["origin"].removeprefix("dense sibling: ") for row in rows] == [
        "vit_small_x.augreg_in1k",
        "vit_tiny_x.augreg_in1k (mine)",
        "best",
    ]
    for row in rows:
        cost, top1 = row["metrics"]["gmacs"], row["metrics"]["top1"]
        better = [one.number for one in FRONT if one.evaluation and one.evaluation.value("gmacs") <= cost
                  and one.evaluation.value("top1") >= top1]  # fmt: skip
        assert row["beaten_by"] == better
    assert rows[0]["beaten_by"] and not rows[0]["beats"] and not rows[1]["beaten_by"] and rows[2]["beats"]
    text = " ".join(printed(siblings_table(SIBLINGS, FRONT, OBJECTIVES, RECORDS)).split())
    trials = ", ".join(map(str, rows[0]["beaten_by"]))
    assert f"vit_small_x.augreg_in1k 94.90 -2.60 0.00850 66% {trials} none" in text
    assert "vit_tiny_x.augreg_in1k (mine) 91.90 -5.60 0.00360 28% none none" in text and "not fine-tuned" in text
    assert "nano" not in text


def test_of_equals_none_beats_the_other() -> None:
    one, other = sibling("one", 90, 0.5), sibling("other", 90, 0.5)
    assert not beats(one, other, OBJECTIVES)
    assert beats(sibling("cheaper", 90, 0.4), one, OBJECTIVES) and not beats(one, sibling("dear", 91, 0.6), OBJECTIVES)


def test_rows_for_other_programs_are_marked() -> None:
    text = front_csv(FRONT, OBJECTIVES, SIBLINGS)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(FRONT) + 2 and text.startswith(front_csv(FRONT, OBJECTIVES))
    about = [(row["trial"], row["schedule"], row["finetuned_images"], float(row["top1"])) for row in rows[-2:]]
    assert about == [("", "", "0", 94.9), ("", "", "0", 91.9)]
    assert all(row["origin"].startswith("dense sibling: vit_") for row in rows[-2:])
    assert sibling_rows(SIBLINGS, FRONT, OBJECTIVES)[1]["sibling"]["checkpoint"] == "/weights/mine.safetensors"


@pytest.mark.parametrize("objectives", [OBJECTIVES, OBJECTIVES[:1], (*OBJECTIVES, Objective("latency_ms", "minimize"))])
def test_the_picture_has_them_with_their_names(tmp_path: Path, objectives: tuple[Objective, ...]) -> None:
    plot_front(RECORDS, objectives, tmp_path / "with.svg", siblings=SIBLINGS)
    plot_front(RECORDS, objectives, tmp_path / "without.svg")
    drawn, plain = ((tmp_path / f"{name}.svg").read_text() for name in ("with", "without"))
    panels = max(1, len(objectives) - 1)
    for label, count in (("vit_small_x", panels), ("vit_tiny_x (mine)", panels), ("dense sibling, as it comes", 1)):
        assert drawn.count(f"<!-- {label} -->") == count and label not in plain
    assert "nano" not in drawn


def test_names_that_differ_in_their_weights_only_are_whole_in_the_picture(tmp_path: Path) -> None:
    twins = [sibling("vit_tiny_x.one_in1k", 92, 0.004), sibling("vit_tiny_x.two_in1k", 93, 0.004)]
    plot_front(RECORDS, OBJECTIVES, tmp_path / "twins.svg", siblings=twins)
    drawn = (tmp_path / "twins.svg").read_text()
    assert "<!-- vit_tiny_x.one_in1k -->" in drawn and "<!-- vit_tiny_x.two_in1k -->" in drawn


def test_status_and_live_view_have_a_line(tmp_path: Path) -> None:
    text = printed(status_view(RECORDS, study(), SIBLINGS), 300)
    assert "siblings    2 of 3 measured; vit_small_x.augreg_in1k top1 94.90 %, 0.008500 GMACs; vit_tiny" in text
    assert "siblings" not in printed(status_view(RECORDS, study()), 300)
    console = Console(width=200, file=io.StringIO())
    BROKEN.add(TINY)
    config = with_siblings(2)
    with LiveReport(config, "here", console=console, plain=True) as report:
        run_study(config, tmp_path, storage="memory:", on_event=report, evaluate="test_siblings:evaluate")
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "dense sibling 1 of 2: vit_digits_patch1_8 top1 64\n" in said
    assert "dense sibling 2 of 2: vit_digits_patch1_8 failed (error): no weights\n" in said


def test_the_command_line_shows_them_without_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(with_siblings(4), tmp_path, database=True)
    assert main(["front", str(tmp_path), "--plot", str(tmp_path / "front.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.index("dense siblings") > shown.index("for comparison" if "for comparison" in shown else "knee")
    assert main(["front", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["origin"] for row in rows if row["trial"] is None] == ["dense sibling: vit_digits_patch1_8"] * 2
    assert main(["front", str(tmp_path), "--csv"]) == 0
    assert capsys.readouterr().out.count("\n,") == 2
    assert main(["status", str(tmp_path)]) == 0
    assert "2 of 2 measured" in capsys.readouterr().out


def test_damaged_siblings_are_left_out(tmp_path: Path) -> None:
    search(with_siblings(2), tmp_path, database=True)
    store = open_store(with_siblings(2), f"sqlite:///{tmp_path / 'study.db'}")
    good = store.siblings()
    for bad in ("x", ["x"], {good[0].uid: {"nome": "x"}, good[1].uid: {"name": TINY.name}}):
        store._storage.set_study_user_attr(store._study_id, "siblings", bad)
        left = store.siblings()
        assert [one.uid for one in left] == ([good[1].uid] if isinstance(bad, dict) else [])
    store.close()
