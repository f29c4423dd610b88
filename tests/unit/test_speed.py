"""Measured speed at the end of a study: what is timed, on which images, when again, and where it is shown."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_search
import pytest
import torch
from fake_profiles import fake_profile
from fake_search import SHAPE, records, study
from rich.console import Console
from torch import nn

from prunesearch.config import Budget, ConfirmConfig, DataConfig, DeviceConfig, ModelConfig, StudyConfig
from prunesearch.cost import total_cost
from prunesearch.device import whole_models
from prunesearch.device.runtimes import RUNTIMES, Runtime, Settings
from prunesearch.device.timing import Ratio
from prunesearch.device.whole_models import DENSE, chosen_batches, models_in_turns
from prunesearch.errors import DeviceError
from prunesearch.evaluate import build_model
from prunesearch.evaluate.data import open_split
from prunesearch.evaluate.task import Conditions, Evaluation, Speed, Task, TimingWork, ToTime
from prunesearch.export.schedules import export
from prunesearch.files import load_schedule_file
from prunesearch.front import front, front_rows
from prunesearch.record import SPEED, Record
from prunesearch.report import front_csv, status_view
from prunesearch.report.speed_tables import speed_table
from prunesearch.report.tables import speeds_table
from prunesearch.schedule import Schedule, Stage
from prunesearch.search.confirm import Confirmed
from prunesearch.search.driver import run_study
from prunesearch.search.events import Event, Timing
from prunesearch.search.speed import Timed, wanted
from prunesearch.strict import to_mapping
from prunesearch.study.reader import confirmations_of
from prunesearch.study.store import Store

CONDITIONS = Conditions("torch", 64, "some CPU", 1, "float32", rounds=9)
TIMED: list[Task] = []
SPACE = replace(fake_search.SPACE, start_from=("evit-0.7",))
CONFIG = study(8, space=SPACE, confirm=ConfirmConfig(1, speed_seconds=2.0))


class Killed(BaseException):
    """Simulates SIGKILL."""


@pytest.fixture(autouse=True)
def nothing_timed_yet() -> None:
    TIMED.clear()
    fake_search.EVALUATED.clear()


def evaluate(task: Task) -> Evaluation:
    return replace(fake_search.evaluate(replace(task, uid=task.uid.split(".")[0])), uid=task.uid)


def timer(task: Task) -> Evaluation:
    """Each schedule is 0.25 faster than the one before it."""
    TIMED.append(task)
    assert task.timing is not None
    speeds = [Speed("", 1.0, 1.0, 1.0, 20.0, 20.0, None, CONDITIONS)]
    for index, one in enumerate(task.timing.schedules, start=1):
        ratio = 1 + index / 4
        speeds.append(Speed(one.name, ratio, ratio - 0.1, ratio + 0.3, 20 / ratio, 20.0, None, CONDITIONS))
    return Evaluation(task.uid, "complete", speeds=tuple(speeds))


def failing_timer(task: Task) -> Evaluation:
    TIMED.append(task)
    return Evaluation(task.uid, "failed", cause="error", error="runtime openvino: it is not installed")


def search(folder: Path, config: StudyConfig = CONFIG, timer: str = "timer", **how: Any) -> list[Event]:
    events: list[Event] = []
    url = f"journal:{folder / 'study.log'}"
    names = {"evaluate": "test_speed:evaluate", "timer": f"test_speed:{timer}"}
    run_study(config, folder, storage=url, on_event=events.append, **names, **how)
    return events


def names_of(task: Task) -> list[str]:
    assert task.timing is not None
    return [one.name for one in task.timing.schedules]


# --- what is timed, and when -------------------------------------------------------------------------------------


def test_the_front_and_the_starts_are_timed_once_after_the_confirmation(tmp_path: Path) -> None:
    events = search(tmp_path)
    kinds = [type(event) for event in events]
    assert kinds[-3:-1] == [Timing, Timed] and Confirmed in kinds
    found = records(tmp_path)
    chosen = {record.uid for record in front(found, CONFIG.objectives)} | {one.uid for one in found if one.is_start}
    (task,) = TIMED
    assert set(names_of(task)) == chosen - {found[0].uid}  # the dense model is what they are compared with
    assert (task.threads, task.timing.batch, task.timing.seconds) == (1, 64, 2.0)  # type: ignore[union-attr]
    assert {record.uid for record in found if record.speed is not None} == chosen
    evaluated = len(fake_search.EVALUATED)
    assert not any(isinstance(event, Timing | Timed) for event in search(tmp_path, search=False))
    assert len(TIMED) == 1 and len(fake_search.EVALUATED) == evaluated


@pytest.mark.parametrize("confirm", [ConfirmConfig(0), ConfirmConfig(1, speed_seconds=0)])
def test_nothing_is_timed_that_nobody_asked_for(tmp_path: Path, confirm: ConfirmConfig) -> None:
    search(tmp_path, replace(CONFIG, confirm=confirm))
    assert TIMED == [] and all(record.speed is None for record in records(tmp_path))


def test_there_is_nothing_to_time_but_the_dense_model(tmp_path: Path) -> None:
    search(tmp_path, replace(CONFIG, space=fake_search.SPACE, stop=replace(CONFIG.stop, trials=1)))
    assert TIMED == []


def die(*_: object) -> None:
    raise Killed


def test_after_a_kill_between_training_and_timing_only_the_timing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("prunesearch.search.driver.time_schedules", die)
        search(tmp_path)
    evaluated = len(fake_search.EVALUATED)
    assert TIMED == [] and all(record.speed is None for record in records(tmp_path))
    search(tmp_path)
    assert len(TIMED) == 1 and len(fake_search.EVALUATED) == evaluated
    assert any(record.speed for record in records(tmp_path))


def test_what_was_timed_before_a_kill_is_not_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Store.confirm
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Store, "confirm", lambda self, uid, *rest: (die if uid == SPEED else write)(self, uid, *rest))
        search(tmp_path)
    assert len(TIMED) == 1 and list((tmp_path / "outbox").glob("speed-*.json"))
    search(tmp_path)
    assert len(TIMED) == 1 and any(record.speed for record in records(tmp_path))
    assert not list((tmp_path / "outbox").iterdir())


def test_what_fails_is_said_and_tried_again_next_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        events = search(tmp_path, timer="failing_timer")
    assert "speed: not measured (error): runtime openvino: it is not installed" in caplog.text
    assert any(isinstance(event, Timed) for event in events) and len(TIMED) == 1
    search(tmp_path)
    assert len(TIMED) == 2 and any(record.speed for record in records(tmp_path))


def test_another_front_and_other_conditions_are_timed_anew(tmp_path: Path) -> None:
    search(tmp_path)
    longer = replace(CONFIG, stop=replace(CONFIG.stop, trials=40))
    search(tmp_path, longer)
    assert len(TIMED) == 2 and names_of(TIMED[1]) != names_of(TIMED[0])
    search(tmp_path, replace(longer, confirm=ConfirmConfig(1, speed_seconds=3.0)))
    assert len(TIMED) == 3
    search(tmp_path, replace(longer, workers=replace(longer.workers, cpus_each=2), confirm=ConfirmConfig(1, 3.0)))
    assert len(TIMED) == 4 and TIMED[3].threads == 2


def test_with_a_profile_it_is_timed_as_that_was_measured(tmp_path: Path) -> None:
    profile = replace(fake_profile(SHAPE, batch=3), runtime="onnxruntime")
    search(tmp_path)
    config = replace(CONFIG, device=DeviceConfig(table=profile))
    (one,) = wanted(config, tmp_path, records(tmp_path))
    work = one.task.timing
    assert work is not None and (work.runtime, work.batch, work.precision) == ("onnxruntime", 3, "float32")
    assert (one.task.threads, one.task.profile) == (2, profile)
    (elsewhere,) = wanted(config, tmp_path / "elsewhere", records(tmp_path))
    assert elsewhere.task.uid == one.task.uid != TIMED[0].uid


@pytest.mark.parametrize("images", [0, 64])
def test_thresholds_are_timed_as_they_were_learned_with_their_weights(tmp_path: Path, images: int) -> None:
    schedule, learned = (Schedule((Stage(2, threshold=value),)) for value in (0.01, 0.02))
    values = (("top1", 90.0), ("gmacs", 0.009))
    found = Evaluation("u1", "complete", metrics=values, images=images, schedule=learned)
    if images:
        found = replace(found, checkpoint="/study/weights/u1.0")
    dense = Evaluation("u0", "complete", metrics=(("top1", 91.0), ("gmacs", 0.012)))
    rows = [
        Record(0, "u0", Schedule(), "complete", "dense", 0, (dense,), (0,)),
        Record(1, "u1", schedule, "complete", "sampler", 0, (found,), (1,)),
    ]
    (one,) = wanted(CONFIG, tmp_path, rows)
    assert one.task.timing is not None
    weights = "/study/weights/u1.0.safetensors" if images else None
    assert one.task.timing.schedules == (ToTime("u1", learned, weights),)


# --- how it is timed ---------------------------------------------------------------------------------------------


def counted(calls: list[list[str]]) -> Callable[..., dict[str, Ratio]]:
    """In place of a clock: the n-th piece of work is n times as fast as the first."""

    def ratios(
        work: dict[str, list[Callable[[], object]]], base: str, seconds: float, wait: object
    ) -> dict[str, Ratio]:
        calls.append(list(work))
        for runs in work.values():
            for run in runs:
                run()
        return {name: Ratio(n, n - 0.25, n + 0.5, 0.012 / n, 7) for n, name in enumerate(work, start=1)}

    return ratios


def task(*schedules: ToTime, runtime: str = "torch", batch: int = 8, **changes: Any) -> Task:
    work = TimingWork(schedules, 1.0, batch, runtime, "float32")  # type: ignore[arg-type]
    model = ModelConfig("vit_digits_patch1_8", True)
    plain = Task("speed", model, DataConfig(val_images=40), Schedule(), Budget(images=0), threads=1, timing=work)
    return replace(plain, **changes)


def test_models_are_timed_together_and_predicted_by_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(whole_models, "ratios_in_turns", counted(calls))
    profile, fixed = fake_profile(SHAPE, batch=8), Schedule((Stage(2, keep=0.5),))
    all_stay = Schedule((Stage(2, threshold=0.0),))
    some_go = Schedule((Stage(2, threshold=0.014),))
    given = [ToTime("fixed", fixed), ToTime("all", all_stay), ToTime("some", some_go)]
    found = whole_models.evaluate(task(*given, profile=profile))
    assert found.status == "complete", found.traceback
    assert calls == [[DENSE, "fixed", "all", "some"]]
    dense, one, all_, some = found.speeds
    assert (dense.name, dense.ratio, dense.predicted, dense.ms) == (DENSE, 1, 1.0, 12.0)
    assert (one.ratio, one.low, one.high, one.ms, one.dense_ms) == (2, 1.75, 2.5, 6.0, 12.0)
    assert one.predicted == total_cost(SHAPE, Schedule(), profile) / total_cost(SHAPE, fixed, profile)
    verb = profile.verbs[-1].at(64, 64) + profile.scores[0].at(65, 0)  # all tokens stay, and the stage still takes time
    total = total_cost(SHAPE, Schedule(), profile)
    assert all_.predicted == pytest.approx(total / (total + verb))
    assert all_.predicted < some.predicted  # type: ignore[operator]
    assert one.conditions is not None and (one.conditions.rounds, one.conditions.profiled) == (7, "none")


@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if not RUNTIMES[name].counts_may_differ])
def test_thresholds_that_a_runtime_cannot_run_are_named(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not RUNTIMES[runtime].is_there:
        pytest.skip(f"{runtime} is not installed")
    calls: list[list[str]] = []
    monkeypatch.setattr(whole_models, "ratios_in_turns", counted(calls))
    plain = replace(RUNTIMES[runtime], prepare=RUNTIMES["torch"].prepare)
    monkeypatch.setitem(RUNTIMES, runtime, plain)
    given = [ToTime("a", Schedule((Stage(2, threshold=0.01),))), ToTime("b", Schedule((Stage(2, keep=0.5),)))]
    found = whole_models.evaluate(task(*given, runtime=runtime))
    assert calls == [[DENSE, "b"]]
    _, refused, timed = found.speeds
    assert refused.ratio is None and "thresholds" in refused.problem and "freeze" in refused.problem
    assert timed.ratio == 2 and timed.problem == ""


def test_thresholds_without_their_weights_are_not_timed_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_models, "ratios_in_turns", counted([]))
    gone = str(tmp_path / "gone.safetensors")
    found = whole_models.evaluate(task(ToTime("a", Schedule((Stage(2, threshold=0.01),)), gone)))
    assert found.speeds[1].ratio is None and f"{gone} is not there" in found.speeds[1].problem
    fixed = whole_models.evaluate(task(ToTime("a", Schedule((Stage(2, keep=0.5),)), gone)))
    assert fixed.speeds[1].ratio == 2  # time does not depend on weights


def test_a_runtime_that_refuses_one_model_times_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_models, "ratios_in_turns", counted([]))

    def picky(modules: Any, inputs: Any, axis: Any, settings: Settings) -> list[Callable[[], object]]:
        if isinstance(modules[0], nn.Tanh):
            raise ValueError("no hyperbolas\nhere")
        return [lambda: None for _ in inputs]

    engine, settings = Runtime("picky", "", picky), Settings(torch.device("cpu"), 1)
    images = [torch.zeros(1, 1, 8, 8)]
    models = {DENSE: nn.Identity(), "a": nn.Tanh(), "b": nn.ReLU()}
    found, problems = models_in_turns(models, images, engine, settings, 1.0)
    assert list(found) == [DENSE, "b"] and problems == {"a": "picky cannot run it: ValueError: no hyperbolas"}
    with pytest.raises(DeviceError, match="the dense model cannot be timed"):
        models_in_turns({DENSE: nn.Tanh()}, images, engine, settings, 1.0)


@pytest.mark.parametrize(("batch", "batches"), [(1, 32), (8, 4), (16, 4), (64, 4)])
def test_images_come_from_the_whole_set(batch: int, batches: int) -> None:
    model = build_model(ModelConfig("vit_digits_patch1_8"))
    images = open_split(DataConfig(val_images=40), model, "validation")
    found = chosen_batches(images, batch, torch.device("cpu"))
    assert [len(one) for one in found] == [batch] * batches
    every = next(pixels for pixels, _ in images.batches([torch.arange(40)], torch.device("cpu")))
    places = [(every == one).flatten(1).all(dim=1).nonzero()[0].item() for one in torch.cat(found)]
    assert len(set(places)) == min(batch * batches, 40) and max(places) >= 38


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threads": 10_000, "profile": fake_profile(SHAPE, batch=8)}, "measured with 10000 threads. Possible here: 1"),
        ({"device": "gpu"}, "'gpu' is not available"),
    ],
)
def test_what_this_machine_cannot_do_fails(changes: dict[str, Any], said: str) -> None:
    found = whole_models.evaluate(task(ToTime("a", Schedule((Stage(2, keep=0.5),))), **changes))
    assert found.status == "failed" and said in found.error and found.speeds == ()


def test_a_study_that_reserves_more_cores_than_there_are_is_timed_on_those(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_models, "ratios_in_turns", counted([]))
    monkeypatch.setattr(whole_models, "cores", lambda: 1)
    found = whole_models.evaluate(task(ToTime("a", Schedule((Stage(2, keep=0.5),))), threads=4))
    assert [speed.conditions and speed.conditions.threads for speed in found.speeds] == [1, 1], found.error


# --- where it is shown -------------------------------------------------------------------------------------------


def shown(renderable: Any, width: int = 140) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def timed(tmp_path: Path) -> list[Record]:
    search(tmp_path)
    return records(tmp_path)


def with_predictions(found: list[Record]) -> list[Record]:
    return [replace(one, speed=replace(one.speed, predicted=1.375)) if one.speed else one for one in found]


def test_tables_show_measured_beside_predicted(timed: list[Record]) -> None:
    best = front(timed, CONFIG.objectives)
    text = shown(speeds_table(timed))
    assert "1.25 (1.15 to 1.55)" in text and "predicted" not in text
    assert "batch 64 in torch on some CPU, 1 thread, float32, 9 rounds" in " ".join(text.split())
    rows = [line.split()[0] for line in text.splitlines() if line[:7].strip().isdecimal()]
    assert rows[0] == "0" and len(rows) == len(TIMED[0].timing.schedules) + 1  # type: ignore[union-attr]
    predicted = with_predictions(timed)
    assert "1.38" in shown(speeds_table(predicted)) and "predicted" in shown(speeds_table(predicted))
    fastest = max(one.speed.ratio for one in best if one.speed and one.speed.ratio)
    assert "fastest" in shown(status_view(timed, CONFIG)) and f"{fastest:.2f} (" in shown(status_view(timed, CONFIG))
    plain = [replace(one, speed=None) for one in timed]
    assert speeds_table(plain) is None and "fastest" not in shown(status_view(plain, CONFIG))


def test_a_profile_of_another_device_and_what_was_not_timed_are_said(timed: list[Record]) -> None:
    elsewhere = replace(CONDITIONS, profiled="a small board")
    found = [
        replace(one, speed=replace(one.speed, conditions=elsewhere) if one.number else Speed("x", problem="it is odd"))
        for one in with_predictions(timed)
        if one.speed
    ]
    text = " ".join(shown(speeds_table(found)).split())
    assert "predicted: for another device than this one, a small board" in text and "not timed: it is odd" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("field", ["ratio", "low", "ms", "predicted"])
def test_stored_speeds_that_cannot_be_are_left_out(field: str, value: float, caplog: pytest.LogCaptureFixture) -> None:
    good = Evaluation("speed-1", "complete", speeds=(Speed("u1", 1.5, 1.4, 1.6, 2.0, 3.0, 1.4, CONDITIONS),))
    stored = to_mapping(good)
    assert confirmations_of({"confirm:speed:0": stored}, SPEED) == (good,)
    damaged = {**stored, "speeds": [{**stored["speeds"][0], field: value}]}
    assert confirmations_of({"confirm:speed:0": damaged}, SPEED) == ()
    assert f"speeds[0].{field}" in caplog.text


def test_rows_for_other_programs_and_exports_have_it(timed: list[Record], tmp_path: Path) -> None:
    best = front(with_predictions(timed), CONFIG.objectives)
    lines = list(csv.DictReader(io.StringIO(front_csv(best, CONFIG.objectives))))
    for record, row, line in zip(best, front_rows(best, CONFIG.objectives), lines, strict=True):
        assert record.speed is not None and row["speed"]["x_dense"] == record.speed.ratio
        assert (row["speed"]["predicted_x_dense"], row["speed"]["batch"]) == (1.375, 64)
        assert (float(line["speed_x_dense"]), float(line["speed_high"])) == (record.speed.ratio, row["speed"]["high"])
    export(best[0], CONFIG, tmp_path / "best.yaml")
    measured = load_schedule_file(tmp_path / "best.yaml").measured
    assert measured is not None and measured["speed"] == front_rows(best, CONFIG.objectives)[0]["speed"]
    plain = [replace(record, speed=None) for record in best]
    assert "speed" not in front_csv(plain, CONFIG.objectives) and "speed" not in front_rows(plain, CONFIG.objectives)[0]


@pytest.mark.parametrize(("low", "high", "noisy"), [(1.4, 1.6, False), (0.03, 1.4, True)])
def test_a_busy_machine_is_told(low: float, high: float, noisy: bool) -> None:
    where = Conditions("torch", 16, "a CPU", 1, "float32", 5)
    dense = Speed("", 1.0, 1.0, 1.0, 30.0, 30.0, conditions=where)
    table = speed_table(
        [("", "dense", "", dense), ("", "pruned", "", Speed("a", 1.0, low, high, 30.0, conditions=where))]
    )
    assert ("something else kept the machine busy" in str(table.caption)) == noisy
