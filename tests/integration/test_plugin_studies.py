"""A study with scores, verbs, metrics and images of a plug-in, and every command on it.

Read-only commands do not import the plug-in. Commands that run its code need permission.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from prunesearch.cli import main
from prunesearch.errors import FileError, StudyError
from prunesearch.evaluate import DATASETS, METRICS
from prunesearch.export.schedules import export
from prunesearch.files import load_schedule, load_schedule_file, load_study
from prunesearch.models import apply_schedule
from prunesearch.search.driver import run_study
from prunesearch.space.choices import parameters_of
from prunesearch.study.reader import open_study_readonly
from prunesearch.tokens import REDUCERS, SCORERS

MODULE = "their_vocabulary"
PLUGIN = '''
import torch
from torch import nn
from prunesearch.cost import estimate_cost
from prunesearch.evaluate import DATASETS, computed_metric, measured_metric, model_shape
from prunesearch.evaluate.data import open_digits
from prunesearch.tokens import Reducer, reducer, scorer
from prunesearch.tokens import Grouping, Pooled

@scorer("their_score", source="theirs", needs_attention=False, options={"power": 1.0})
def their_score(scene, *, power):
    """Length of the token."""
    return scene.patches_BnC.float().norm(dim=-1) ** power

@reducer("their_stride", source="theirs", ranks=False, options={"offset": 0})
def their_stride(scene, *, offset):
    """The first ones stay."""
    images = scene.patches_BnC.shape[0]
    return Grouping(torch.arange(offset, offset + scene.kept, device=scene.patches_BnC.device).expand(images, -1))

class Mix(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(kept, 1))

@reducer("their_pool", source="theirs", ranks=False, pools=True, part=lambda shape, kept: Mix(kept))
def their_pool(scene):
    """Means of all, scaled."""
    mean = scene.patches_BnC.float().mean(dim=1, keepdim=True)
    return Pooled(mean * (1 + scene.part.logits))

@computed_metric("their_cost", unit="tokens", goal="minimize", summary="tokens of all blocks")
def their_cost(model, schedule):
    return float(sum(estimate_cost(model_shape(model), schedule).tokens))

@measured_metric("their_images", unit="images", goal="maximize", summary="how many there are")
def their_images(subject):
    return len(subject.validation)

@DATASETS.register("their_digits")
def their_digits(config, split):
    return open_digits(config, split)
'''
STUDY = """
version: 1
name: theirs
plugins: [their_vocabulary]
model: {name: vit_digits_patch1_8, options: {depth: 3}}
data: {name: their_digits, train_images: 40, val_images: 40}
space:
  blocks: [{block: 0, reduce: [their_stride, drop]}, {block: 1, reduce: [their_pool], tokens: [8, 16]}]
  keep: [0.5, 0.7]
  score: [their_score]
objectives: [{metric: top1, goal: maximize}, {metric: their_cost, goal: minimize}]
limits: {their_cost: {at_most: 150}}
metrics: [their_images, gmacs]
finetune: {learning_rate: 1e-3, batch_size: 20}
rungs: [{images: 20}]
workers: {kind: serial}
siblings: [vit_digits_patch1_8]
stop: {trials: 5}
"""


def forget() -> None:
    """Unregister the plug-in, as in a process that has not imported it."""
    sys.modules.pop(MODULE, None)
    for registry in (SCORERS, REDUCERS, METRICS, DATASETS):
        for name in [name for name in registry if name.startswith("their_")]:
            del registry._things[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a plug-in study that was run: theirs.yaml, outputs/theirs, and the exported best.yaml."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / f"{MODULE}.py").write_text(PLUGIN)
    (folder / "theirs.yaml").write_text(STUDY)
    sys.path.insert(0, str(folder))
    try:
        assert main(["run", str(folder / "theirs.yaml"), "--output", str(folder / "outputs")]) == 0
        forget()
        assert main(["export", str(folder / "outputs" / "theirs"), "-o", str(folder / "best.yaml")]) == 0
        assert MODULE not in sys.modules
        yield folder
    finally:
        sys.path.remove(str(folder))
        forget()


@pytest.fixture(autouse=True)
def nothing_imported() -> Iterator[None]:
    forget()
    yield
    forget()


LOOKING = {
    "status": (["status", "STUDY"], "siblings   1 of 1 measured; vit_digits_patch1_8"),
    "status --json": (["status", "STUDY", "--json"], '"complete": 5'),
    "front": (["front", "STUDY", "--plot", "TMP/front.png"], "their_cost"),
    "front --json": (["front", "STUDY", "--json"], '"their_stride"'),
    "front --csv": (["front", "STUDY", "--csv"], "their_images"),
    "export": (["export", "STUDY", "--at-most", "their_cost=150", "-o", "TMP/a.yaml"], "their_pool"),
    "export --weights": (["export", "STUDY", "--weights", "-o", "TMP/a.yaml"], "a.safetensors"),
    "schema": (["schema", "schedule"], "plugins"),
}


@pytest.mark.parametrize("verb", LOOKING)
def test_looking_imports_nothing(verb: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = LOOKING[verb]
    assert main(placed(arguments, folder, tmp_path)) == 0
    assert expected in capsys.readouterr().out
    assert MODULE not in sys.modules


TRUSTING = {
    "resume": (["resume", "STUDY", "--trials", "5", "--no-progress"], "continuing (5 of 5 done"),
    "confirm": (
        ["confirm", "STUDY", "--seeds", "1", "--set", "confirm.speed_seconds=0", "--no-progress"],
        "continuing (5 of 5 done",
    ),
    "evaluate": (["evaluate", "FILE", "--metric", "their_images", "--metric", "their_cost"], "their_cost (tokens)"),
    "evaluate --study": (["evaluate", "FILE", "--study", "STUDY", "--metric", "top1", "--json"], '"pruned"'),
    "freeze": (["freeze", "FILE", "-o", "TMP/frozen.yaml"], None),
    "check": (["check", "FILE"], "fine for vit_digits_patch1_8"),
}


@pytest.mark.parametrize("verb", TRUSTING)
def test_what_would_run_its_code_asks_first(
    verb: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = placed(TRUSTING[verb][0], folder, tmp_path), TRUSTING[verb][1]
    for lacking in ([], ["--plugin", "json"]):  # permission for another module is not enough
        assert main([*arguments, *lacking]) == 2
        error = capsys.readouterr().err
        assert MODULE in error and "--trust-plugins" in error and f"--plugin {MODULE}" in error
        assert MODULE not in sys.modules
    for trusting in (["--trust-plugins"], ["--plugin", MODULE]):
        code = main([*arguments, *trusting])
        said = capsys.readouterr()
        if expected is None:  # the schedule has no threshold to freeze
            assert code == 2 and "it has no threshold" in said.err
        else:
            assert code == 0 and expected in said.out
        assert MODULE in sys.modules
        forget()


OWN = {
    "run": (["run", "OWN", "--output", "OUTPUT", "--no-progress"], "continuing (5 of 5 done"),
    "check": (["check", "OWN"], "theirs: fine"),
    "sensitivity": (["sensitivity", "OWN", "--images", "20"], "their_stride"),
    "list": (["list", "reduces", "--plugin", MODULE], "their_pool"),
}


@pytest.mark.parametrize("verb", OWN)
def test_what_the_user_wrote_is_trusted(
    verb: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = OWN[verb]
    assert main(placed(arguments, folder, tmp_path)) == 0
    assert expected in capsys.readouterr().out


def placed(arguments: Sequence[str], folder: Path, tmp_path: Path) -> list[str]:
    places = {
        "STUDY": folder / "outputs" / "theirs",
        "OUTPUT": folder / "outputs",
        "OWN": folder / "theirs.yaml",
        "FILE": folder / "best.yaml",
        "TMP": tmp_path,
    }
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    return list(arguments)


def test_an_export_says_everything_without_the_plugin(folder: Path) -> None:
    file = yaml.safe_load((folder / "best.yaml").read_text())
    assert file["plugins"] == [MODULE]
    first, second = file["stages"]
    if first["reduce"] == "drop":
        assert first["options"] == {"power": 1.0}
    else:
        assert (first["options"], first["score"]) == ({"offset": 0}, "none")
    assert second["reduce"] == "their_pool" and second["score"] == "none"
    assert (folder / "best.safetensors").exists()  # learned parts are known without the plug-in


def test_the_exported_schedule_is_the_one_of_the_study(folder: Path) -> None:
    config = load_study(folder / "theirs.yaml")
    reader = open_study_readonly(folder / "outputs" / "theirs")
    records = {record.uid: record for record in reader.records()}
    reader.close()
    made_by = yaml.safe_load((folder / "best.yaml").read_text())["made_by"]
    record = records[made_by["uid"]]
    loaded = load_schedule(folder / "best.yaml", plugins=[MODULE])
    assert loaded == record.schedule
    assert parameters_of(loaded, config.space) == parameters_of(record.schedule, config.space) is not None


def test_a_schedule_whose_plugins_are_missing_names_them(folder: Path) -> None:
    for load in (load_schedule, lambda path: apply_schedule(None, path)):
        with pytest.raises(FileError) as caught:
            load(folder / "best.yaml")
        text = str(caught.value)
        assert MODULE in text and "stranger" in text and "load_schedule(path, plugins=" in text
        assert MODULE not in sys.modules
    # a file that does not use the plug-in can be loaded without it
    plain = yaml.safe_load((folder / "best.yaml").read_text())
    plain["stages"] = [{"block": 0, "keep": 0.5}]
    (folder / "plain.yaml").write_text(yaml.safe_dump(plain))
    assert load_schedule_file(folder / "plain.yaml").plugins == (MODULE,)


def test_weights_are_not_made_again_by_code_that_nobody_trusted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = open_study_readonly(folder / "outputs" / "theirs")
    record = next(record for record in reader.records() if record.schedule.stages)
    config, vocabulary = reader.config, reader.vocabulary
    reader.close()
    evaluation = replace(record.evaluation, checkpoint=str(tmp_path / "gone"))
    record = replace(record, evaluations=(evaluation,))
    with pytest.raises(StudyError, match="which an export never does"):
        export(record, config, tmp_path / "a.yaml", vocabulary=vocabulary)
    assert MODULE not in sys.modules
    __import__(MODULE)
    assert len(export(record, config, tmp_path / "a.yaml", vocabulary=vocabulary)) == 2


def test_a_plugin_that_changed_its_defaults_does_not_continue_a_study(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_study(folder / "theirs.yaml")
    __import__(MODULE)
    changed = replace(REDUCERS["their_stride"], options={"offset": 1})
    monkeypatch.setitem(REDUCERS._things, "their_stride", changed)
    with pytest.raises(StudyError, match="verb their_stride: offset: 0 -> 1"):
        run_study(config, folder / "outputs" / "theirs")


def test_plugins_that_cannot_be_imported_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "their_broken.py").write_text("1 / 0")
    for name, why in (
        ("no_such_module", "No module named"),
        ("their_broken", "ZeroDivisionError"),
    ):
        study = tmp_path / "study.yaml"
        study.write_text(STUDY.replace(MODULE, name))
        for verb in (["run", str(study), "--output", str(tmp_path)], ["check", str(study)]):
            assert main(verb) == 2
            error = capsys.readouterr().err
            assert f"plug-in {name!r}: it cannot be imported" in error and why in error and "Traceback" not in error


def test_json_of_a_front_is_read_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", str(folder / "outputs" / "theirs"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"top1", "their_cost", "their_images", "gmacs"} <= rows[0]["metrics"].keys()


def test_a_plugin_that_never_works_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dense model succeeds, but runs none of it. The error says where in the plug-in it was raised."""
    (tmp_path / "broken_verbs.py").write_text(
        "from prunesearch.tokens import reducer\n"
        "@reducer('broken_verb', source='theirs')\n"
        "def broken_verb(scene):\n"
        "    return missing(scene)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    digits = Path(__file__).parents[2] / "search_spaces" / "digits.yaml"
    changes = ("rungs=[{images: 0}]", "workers={kind: serial}", "plugins=[broken_verbs]", "space.reduce=[broken_verb]")
    changes += ("space.start_from=[]",)
    arguments = [word for change in changes for word in ("--set", change)]
    try:
        assert main(["run", str(digits), "--no-progress", "--trials", "4", *arguments]) == 1
    finally:
        REDUCERS._things.pop("broken_verb", None)
    said = "name 'missing' is not defined (NameError at "
    assert said in capsys.readouterr().err
    assert main(["status", "outputs/digits"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown and "broken_verbs.py:4)" in shown.replace(" ", "")
