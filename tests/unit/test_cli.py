"""The command line: exit codes, messages without tracebacks, and every verb on a small real study."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_search
import pytest
from fake_profiles import fake_profile

from prunesearch.cli import main
from prunesearch.cost import total_cost
from prunesearch.files import load_schedule, save_profiles
from prunesearch.schedule import Schedule
from prunesearch.tokens import SCORERS

STUDY = """
version: 1
name: small
model: {name: vit_digits_patch1_8, pretrained: true}
data: {name: digits, train_images: 60, val_images: 60}
space: {blocks: [1, 3, 5], keep: [0.5, 0.7, 1.0], reduce: [drop, squeeze], start_from: [etps-0.7]}
metrics: [agreement]
finetune: {learning_rate: 1e-3, batch_size: 30}
rungs: [{images: 60}]
workers: {kind: serial}
stop: {trials: 5}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was run from the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.yaml").write_text(STUDY)
    assert main(["run", str(folder / "small.yaml"), "--output", str(folder / "outputs")]) == 0
    return folder / "outputs" / "small"


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_running_again_continues_and_more_trials_go_on(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(study.parents[1] / "small.yaml")
    output = ["--output", str(study.parent)]
    assert "continuing (5 of 5 done, 0 to run again, 0 recovered)" in out(capsys, "run", file, *output)
    assert "6/6" in out(capsys, "run", file, *output, "--trials", "6")
    assert "space.keep" in mistake(capsys, "run", file, *output, "--set", "space.keep=[0.25]")


def test_resume_needs_only_the_storage(study: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    database = f"sqlite:///{study / 'study.db'}"
    elsewhere = ["--output", str(tmp_path), "--no-progress"]
    assert main(["resume", "--storage", database, "--study", "small", "--trials", "8", *elsewhere]) == 0
    said = capsys.readouterr().out
    assert " of 8 done, 0 to run again" in said and "8/8" in said
    assert main(["resume", "--storage", database, "--study", "other", *elsewhere]) == 2
    assert "no study 'other'. Possible: small" in capsys.readouterr().err


def test_status_and_front(study: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "small" in out(capsys, "status", str(study))
    assert json.loads(out(capsys, "status", str(study), "--json"))["complete"] >= 5
    rows = json.loads(out(capsys, "front", str(study), "--json"))
    assert rows and {"trial", "metrics", "schedule", "tokens"} <= rows[0].keys()
    table = list(csv.DictReader(out(capsys, "front", str(study), "--csv").splitlines()))
    assert [int(row["trial"]) for row in table] == [row["trial"] for row in rows]
    assert str(rows[0]["trial"]) in out(capsys, "front", str(study), "--plot", str(tmp_path / "front.png"))
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    by_url = out(capsys, "front", "--storage", f"sqlite:///{study / 'study.db'}", "--study", "small", "--json")
    assert json.loads(by_url) == rows


def test_export_and_evaluate(study: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    best = tmp_path / "best.yaml"
    assert "best.safetensors" in out(
        capsys, "export", str(study), "--at-most", "gmacs=0.009", "--weights", "-o", str(best)
    )
    measured = json.loads(out(capsys, "evaluate", str(best), "--metric", "top1", "--metric", "gmacs", "--json"))[
        "pruned"
    ]
    assert measured["gmacs"] <= 0.009
    assert f"top1: {measured['top1']}" in best.read_text()  # exactly what the search measured
    out(capsys, "export", str(study), "--trial", "1", "-o", str(best))
    assert load_schedule(best).stages[0].reduce == "squeeze"
    assert "fine for vit_digits_patch1_8" in out(capsys, "check", str(best))
    assert "--trial 99" in mistake(capsys, "export", str(study), "--trial", "99", "-o", str(best))
    assert "nearest is trial" in mistake(capsys, "export", str(study), "--at-most", "gmacs=1e-9", "-o", str(best))
    assert "gmacs=3.0" in mistake(capsys, "export", str(study), "--at-most", "gmacs", "-o", str(best))


def test_everything_but_database_and_outbox_can_be_deleted(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = out(capsys, "front", str(study), "--json")
    for path in sorted(study.rglob("*"), reverse=True):
        if path.name not in ("study.db", "study.db-wal", "study.db-shm", "outbox"):
            path.unlink() if path.is_file() else path.rmdir()
    file = str(study.parents[1] / "small.yaml")
    trials = str(json.loads(out(capsys, "status", str(study), "--json"))["complete"])
    assert "continuing" in out(capsys, "run", file, "--output", str(study.parent), "--trials", trials)
    assert (study / "study.yaml").exists()
    assert out(capsys, "front", str(study), "--json") == before
    assert "fine-tuning again" in _err(
        capsys, "export", str(study), "--trial", "1", "--weights", "-o", str(study / "b.yaml")
    )


def _err(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().err


def test_check_says_which_start_schedules_are_beyond_the_limits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "study.yaml").write_text(STUDY.replace("version: 1", "version: 1\nlimits: {gmacs: {at_most: 50%}}"))
    text = out(capsys, "check", str(tmp_path / "study.yaml"))
    (dense,), (start,) = ([line for line in text.splitlines() if name in line] for name in ("dense  ", "etps-0.7"))
    assert "beyond the limits, and evaluated all the same" in start and "beyond" not in dense


def test_check_reports_every_mistake_of_a_study(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(STUDY.replace("[1, 3, 5]", "[1, 3, 50]").replace("drop", "dorp").replace("agreement", "agrement"))
    text = mistake(capsys, "check", str(file))
    assert "50" in text and 'Did you mean "drop"' in text and 'Did you mean "agreement"' in text
    file.write_text(STUDY)
    assert "fine" in out(capsys, "check", str(file))
    file.write_text(STUDY.replace("vit_digits_patch1_8", "vit_digit_patch1_8"))
    assert "does not know" in mistake(capsys, "check", str(file))
    file.write_text("version: 1\nstages: [{block: 40, keep: 0.5}]\n")
    assert "Give --model" in out(capsys, "check", str(file))
    assert "blocks 0 to 7" in mistake(capsys, "check", str(file), "--model", "vit_digits_patch1_8")


def test_studies_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such file" in mistake(capsys, "run", str(tmp_path / "nowhere.yaml"))
    assert "no such file" in mistake(capsys, "front", str(tmp_path))
    assert "no study given" in mistake(capsys, "status")


@pytest.mark.parametrize("what", ["scores", "reduces", "presets", "metrics", "samplers", "spaces"])
def test_list(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = {"scores": "class_attention", "reduces": "squeeze", "presets": "evit-0.7", "metrics": "top1",
                "samplers": "tpe", "spaces": "search_spaces/digits.yaml"}  # fmt: skip
    assert expected[what] in out(capsys, "list", what)


def test_a_list_in_a_pipe_has_a_row_for_each_name(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = [line for line in out(capsys, "list", "scores").splitlines() if line.startswith("predictor ")]
    assert SCORERS["predictor"].summary in row
    (row,) = [line for line in out(capsys, "list", "spaces").splitlines() if "cifar10_thresholds" in line]
    assert row.rstrip().endswith("trained so that images cost target_gmacs on average.")


def test_list_models_and_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "list", "models", "vit_digits*")
    assert "vit_digits_patch1_8" in text and "0.0128" in text
    assert "tome" not in out(capsys, "list", "presets", "evit-*")
    assert "vit_small_patch16_dinov3 " in out(capsys, "list", "models", "DINOv3")
    assert "beit_base_patch16_224" in (beits := out(capsys, "list", "models", "Beit")) and "deit" not in beits
    assert "vit_base_patch16_siglip_224" in out(capsys, "list", "models", "vit_base_patch16_siglip_224.v2_webli")
    for what, name in (("models", "hiera"), ("presets", "tome-r133"), ("scores", "class_atention")):
        assert main(["list", what, name]) == 2
        assert f"list {what}: nothing fits '{name}'. Possible: a part of a name" in capsys.readouterr().err


def test_confirm_measures_the_front_again(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = out(capsys, "confirm", str(study), "--seeds", "1", "--set", "confirm.speed_seconds=0.1")
    assert re.search(r"measured again: 1 of \d+, trial \d+ top1 [\d.]+ \(in the search [\d.]+\)", said)
    rows = json.loads(out(capsys, "front", str(study), "--json"))
    assert rows and all(row["again"]["seeds"] == 1 for row in rows)
    assert "trained and measured anew, 1 seed" in " ".join(out(capsys, "front", str(study)).split())
    assert re.search(r"timed in turns: \d+ models", said) and re.search(r" \d\.\d\d \(\d\.\d\d to \d\.\d\d\)", said)
    assert all(row["speed"]["low"] <= row["speed"]["x_dense"] <= row["speed"]["high"] for row in rows)
    assert "x dense" in out(capsys, "front", str(study)) and "fastest" in out(capsys, "status", str(study))
    again = out(capsys, "confirm", str(study), "--seeds", "1", "--set", "confirm.speed_seconds=0.1")
    assert "timed in turns:" not in again and re.search(r"\(\d\.\d\d to \d\.\d\d\)", again)  # it is stored


def test_evaluate_times_a_schedule_beside_its_dense_model(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "best.yaml").write_text(
        "version: 1\nmodel: {name: vit_digits_patch1_8, pretrained: true}\ndata: {name: digits, val_images: 60}\n"
        "stages: [{block: 1, keep: 0.5}]\n"
    )
    profile = replace(fake_profile(fake_search.SHAPE, batch=4), threads=1)
    save_profiles([profile], tmp_path / "profile.json")
    command = ["evaluate", str(tmp_path / "best.yaml"), "--metric", "gmacs", "--speed", "--seconds", "0.1"]
    text = out(capsys, *command)
    assert re.search(r"pruned +\d\.\d\d \(\d\.\d\d to \d\.\d\d\)", text) and "predicted" not in text
    assert "batch 64 in torch" in " ".join(text.split())
    text = out(capsys, *command, "--profile", str(tmp_path / "profile.json"))
    dense, pruned = (
        total_cost(profile.shape, one, profile) for one in (Schedule(), load_schedule(tmp_path / "best.yaml"))
    )
    assert "batch 4 in torch" in " ".join(text.split()) and re.search(rf"pruned +{dense / pruned:.2f} ", text)
    (row,) = json.loads(out(capsys, *command, "--study", str(study), "--json"))["speed"]
    assert row["low"] <= row["x_dense"] <= row["high"] and row["ms"] > 0 and "predicted_x_dense" not in row
    other = replace(profile, shape=replace(profile.shape, patch_tokens=9))
    save_profiles([other], tmp_path / "other.json")
    assert "9 patch tokens" in mistake(capsys, *command, "--profile", str(tmp_path / "other.json"))
    alone = ["evaluate", str(tmp_path / "best.yaml"), "--profile", str(tmp_path / "profile.json")]
    assert "--seconds: nothing is timed in turns" in mistake(capsys, *alone, "--seconds", "0.1")
    found = json.loads(out(capsys, *alone, "--json"))
    assert found["pruned"]["predicted_latency_ms"] == pytest.approx(pruned)
    assert found["dense"]["predicted_latency_ms"] == pytest.approx(dense)


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(out(capsys, "schema"))["title"] == "StudyConfig"
    assert json.loads(out(capsys, "schema", "schedule"))["title"] == "ScheduleFile"


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    code = "import sys; from prunesearch.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'rich', 'optuna', 'ray', 'numpy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout


def test_unknown_verbs_and_flags_are_usage_errors() -> None:
    for arguments in (["serch"], ["run"], ["list", "scorez"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_a_path_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = str([197 - 10 * block for block in range(12)])
    rates = {"ViT-T-DeiT": {"0.7": {"prune_kept_num": counts, "merge_kept_num": counts}}}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    arguments = ["import-diffrate", str(tmp_path / "rates.json"), "--model", "ViT-T-DeiT", "--target", "0.7"]
    assert main([*arguments, "-o", str(tmp_path / "good.yaml")]) == 0
    (tmp_path / "file").touch()
    assert main([*arguments, "-o", str(tmp_path)]) == 2
    assert main([*arguments, "-o", str(tmp_path / "file" / "below.yaml")]) == 2
    error = capsys.readouterr().err
    assert "it is a folder" in error and "is a file" in error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("space.blocks=[1, 99]", "space.blocks[1]: block 99"),
        (
            "limits={top1: {at_least: 101}}",
            "limits.top1.at_least: is 101, but top1 is a percentage. Possible: 0 to 100",
        ),
        ("data.root=/tmp", "data.root: is '/tmp', but the digits are in scikit-learn, and no folder is read"),
    ],
)
def test_mistakes_of_meaning_name_file_and_place(change: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("check", "run"):
        assert main([verb, "search_spaces/digits.yaml", "--set", change]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("prunesearch: search_spaces/digits.yaml: ") and said in shown


@pytest.mark.parametrize("verb", ["check", "run", "sensitivity"])
def test_mistakes_of_meaning_name_their_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        *("version: 1", "name: x", "model: {name: vit_digits_patch1_8}", "data: {name: digits}", "space:"),
        *("  blocks:", "    - 1", "    - 99", "  keep: [0.5, 1.0]", "metrics: [top1, top2]"),
    ]
    Path("x.yaml").write_text("\n".join(lines))
    assert main([verb, "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("prunesearch: x.yaml: 2 mistakes\n")
    assert "space.blocks[1] (line 8): block 99" in said and "metrics[1] (line 10): unknown metric 'top2'" in said
