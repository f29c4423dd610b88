"""Models without a classifier, and pictures without classes: metrics, training, sensitivities, data."""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_search import study as made_study
from PIL import Image
from torch.nn import functional as F

from prunesearch.config import (
    Budget,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    Objective,
    SpaceConfig,
    StopConfig,
    StudyConfig,
)
from prunesearch.errors import DataError, ScheduleError
from prunesearch.evaluate import Task, build_model, evaluate, model_shape
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.measure_sensitivity import measure_sensitivities
from prunesearch.evaluate.metrics import METRICS
from prunesearch.models import apply_schedule, patches_of, refuse_missing_places
from prunesearch.schedule import END, NEXT, Schedule, Stage
from prunesearch.search.driver import run_study
from prunesearch.search.problems import study_problems
from prunesearch.study.reader import open_study_readonly

DIGITS = ModelConfig("vit_digits_patch1_8", pretrained=True, num_classes=0)
DATA = DataConfig("digits", train_images=60, val_images=40)
BACK = Schedule((Stage(2, keep=0.4, reduce="squeeze", until=END),))
GONE = Schedule((Stage(2, keep=0.4),))
FEATURES = ("feature_similarity", "patch_similarity", "knn_top1")


def task(schedule: Schedule, metrics: tuple[str, ...] = FEATURES, **changes: Any) -> Task:
    given = Task("one", DIGITS, DATA, schedule, Budget(images=0), metrics, threads=1)
    return replace(given, **changes)


def values(schedule: Schedule, metrics: tuple[str, ...] = FEATURES, **changes: Any) -> dict[str, float]:
    found = evaluate(task(schedule, metrics, **changes))
    assert found.status == "complete", found.error
    return dict(found.metrics)


# --- models without a classifier ---------------------------------------------------------------------------------


def test_the_shape_knows_that_there_is_no_classifier() -> None:
    assert model_shape(DIGITS).gives_features
    assert not model_shape(replace(DIGITS, num_classes=None)).gives_features
    for name in ("vit_small_patch16_dinov3", "vit_base_patch16_siglip_224", "naflexvit_base_patch16_siglip"):
        assert model_shape(ModelConfig(name)).gives_features
    for name in ("swin_tiny_patch4_window7_224", "convnext_tiny", "beit_base_patch16_224"):
        assert model_shape(ModelConfig(name, num_classes=0)).gives_features
        assert not model_shape(ModelConfig(name)).gives_features


def test_metrics_are_cosines_and_neighbours() -> None:
    dense = values(Schedule())
    assert dense["feature_similarity"] == pytest.approx(100) and dense["patch_similarity"] == pytest.approx(100)
    pruned, before = apply_schedule(build_model(DIGITS), BACK), build_model(DIGITS)
    train, held_out = open_data(DATA, before)
    ((x, labels),) = held_out.batches([torch.arange(40)], torch.device("cpu"))
    ((known, their_labels),) = train.batches([torch.arange(60)], torch.device("cpu"))
    with torch.inference_mode():
        tokens = pruned.forward_features(x), before.forward_features(x)
        pooled = pruned(x), before(x)
        near = F.normalize(pooled[0], dim=1) @ F.normalize(pruned(known), dim=1).T
        patches = [patches_of(one, found) for one, found in zip((pruned, before), tokens, strict=True)]
    expected = {
        "feature_similarity": F.cosine_similarity(*pooled).mean().item(),
        "patch_similarity": F.cosine_similarity(*patches, dim=-1).mean().item(),
        "knn_top1": 0.0,
    }
    for row, label in zip(near, labels, strict=True):
        cosine, nearest = row.topk(20)
        votes = [(cosine[their_labels[nearest] == digit] / 0.07).exp().sum().item() for digit in range(10)]
        expected["knn_top1"] += (votes.index(max(votes)) == label.item()) / 40
    assert values(BACK) == pytest.approx({name: 100 * value for name, value in expected.items()}, rel=1e-4)


def test_patches_that_are_gone_cannot_be_compared() -> None:
    failed = evaluate(task(GONE))
    assert failed.cause == "invalid" and "write until: end" in failed.error.lower()
    with pytest.raises(ScheduleError, match="not all there at the end"):
        refuse_missing_places(apply_schedule(build_model(DIGITS), GONE))
    hold = Schedule((Stage(2, keep=0.4, reduce="hold"), Stage(5, keep=0.4, reduce="hold")))
    assert values(hold, ("patch_similarity",))["patch_similarity"] < 100


FEW = Schedule((Stage(2, keep=0.25, reduce="squeeze", until=END),))
MORE = replace(DATA, train_images=300)


def trained(images: int, data: DataConfig = MORE, **given: Any) -> dict[str, float]:
    finetune = FinetuneConfig(learning_rate=3e-4, batch_size=30, distill_weight=1.0, **given)
    return values(FEW, FEATURES[:2], data=data, finetune=finetune, budget=Budget(images=images))


def test_training_brings_the_features_nearer() -> None:
    before, after, patches = trained(0), trained(1500), trained(600, distill_patches_weight=5.0)
    assert after["feature_similarity"] > before["feature_similarity"] + 0.05
    assert patches["patch_similarity"] > max(before["patch_similarity"], after["patch_similarity"]) + 1


def test_pictures_that_are_decoded_each_time_train_the_same() -> None:
    both = [
        trained(
            120, replace(MORE, in_memory=kept, loaders=0), distill_patches_weight=5.0, distill_features_loss="squared"
        )
        for kept in (True, False)
    ]
    assert both[1] == pytest.approx(both[0], abs=0.01) and both[0]["patch_similarity"] > trained(0)["patch_similarity"]


def test_learned_decisions_train_towards_features() -> None:
    learned = Schedule((Stage(3, at="pre", score="predictor", keep=0.5, until=NEXT),))
    finetune = FinetuneConfig(batch_size=20, distill_weight=1.0, distill_patches_weight=1.0)
    found = values(learned, finetune=finetune, budget=Budget(images=40))
    assert 0 < found["patch_similarity"] < 100


def test_a_checkpoint_with_a_classifier_is_taken_without_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole = build_model(replace(DIGITS, num_classes=None))
    save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, tmp_path / "w.safetensors")
    model = build_model(ModelConfig("vit_digits_patch1_8", checkpoint=str(tmp_path / "w.safetensors"), num_classes=0))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x), whole.forward_head(whole.forward_features(x), pre_logits=True))


def test_sensitivities_are_distances_of_features(capsys: pytest.CaptureFixture[str]) -> None:
    from prunesearch.report.sensitivity_tables import best_lines, sensitivity_table

    space = SpaceConfig(blocks=(2, 5), keep=(0.3, 0.7, 1.0), reduce=("drop", "hold"), until=("never", "next", "end"))
    found = measure_sensitivities(made_study(model=DIGITS, data=DATA, space=space), count=16)
    assert found.of_features and found.left_out == ()
    assert len(found.effects) == 2 * 2 * (3 + 1)
    by_stage = {effect.stage: effect for effect in found.effects}
    for effect in found.effects:
        assert 0 <= effect.divergence < 0.5 and effect.agreement == pytest.approx(
            100 * (1 - effect.divergence), abs=1e-3
        )
    alike = [Stage(2, keep=0.3, until=END), Stage(2, keep=0.3, until=NEXT), Stage(2, keep=0.3, reduce="hold")]
    assert len({by_stage[stage].divergence for stage in alike}) == 1
    assert sensitivity_table(found).title.plain == "Each stage alone: 1 - cosine of features"  # type: ignore[union-attr]
    assert {line.until for line in best_lines(found)} <= {"never", "next", "end"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "objectives[0].metric: top1 reads classes, but the model has no classifier. Possible: feature_similarity"),
        ({"metrics": ("agreement",)}, "metrics[0]: agreement reads classes"),
        ({"model": replace(DIGITS, num_classes=None), "metrics": ("knn_top1",)}, "knn_top1 reads features, but the mo"),
        ({"metrics": ("patch_similarity",)}, "in this space some may be gone. Possible: until: [next, end]"),
        ({"finetune": FinetuneConfig(distill=False), "rungs": (Budget(images=9),)}, "finetune.distill: false, but"),
        (
            {"data": DataConfig("images", "x"), "metrics": ("knn_top1",)},
            "knn_top1 needs labels, and pictures of data images have none. Possible: feature_similarity",
        ),
        (
            {"model": replace(DIGITS, num_classes=None), "data": DataConfig("images", "x"), "metrics": ("top5",)},
            "objectives[0].metric: top1 needs labels, and pictures of data images have none. Possible: agreement",
        ),
        (
            {
                "model": replace(DIGITS, num_classes=None),
                "data": DataConfig("images", "x"),
                "rungs": (Budget(images=9),),
            },
            "finetune.cross_entropy_weight: a cross entropy needs classes",
        ),
    ],
)
def test_what_the_output_cannot_give_is_a_mistake(changes: dict[str, Any], says: str) -> None:
    assert says in "\n".join(study_problems(made_study(**{"model": DIGITS, **changes})))


def test_every_metric_says_what_it_reads() -> None:
    reads = {name for name, one in METRICS.items() if "features" in one.of_output}
    assert reads == {"feature_similarity", "knn_top1"}
    needing = {name for name, one in METRICS.items() if one.needs_labels}
    assert needing == {"top1", "top5", "loss", "knn_top1", "miou", "pixel_accuracy"}


@pytest.mark.parametrize(("name", "model"), [("knn_top1", replace(DIGITS, num_classes=None)), ("miou", DIGITS)])
def test_a_metric_that_cannot_read_the_output_says_so(name: str, model: ModelConfig) -> None:
    found = evaluate(task(Schedule(), (name,), model=model))
    assert found.status == "failed" and f"metric {name} reads" in found.error


# --- pictures without classes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures of digits in nested folders, a text file, and a broken link's name."""
    from prunesearch.evaluate.digits import load_digits

    root = tmp_path_factory.mktemp("pictures")
    images, _ = load_digits("train")
    for index in range(30):
        folder = root / f"trip {index % 3}" / ("deep/er" if index % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index].numpy()).save(folder / f"{index}.png")
    (root / "trip 0" / "notes.txt").write_text("no picture")
    return root


def names(root: Path, split: str, **given: Any) -> list[str]:
    from prunesearch.evaluate.data import _open_split

    opened = _open_split(DataConfig("images", str(root), **given), split)  # type: ignore[arg-type]
    assert opened.classes is None
    return [opened.images.name(index) for index in range(len(opened.images))]


def test_a_fifth_of_one_folder_is_for_validation(pictures: Path, tmp_path: Path) -> None:
    train, held_out = names(pictures, "train"), names(pictures, "validation")
    assert (len(train), len(held_out)) == (24, 6) and len({*train, *held_out}) == 30
    packed = tmp_path / "all.tar"
    with tarfile.open(packed, "w") as tar:
        tar.add(pictures, arcname=".")
    base = [Path(name).name for name in held_out]
    assert [Path(name).name for name in names(packed, "validation")] == base
    model = build_model(DIGITS)
    sets = open_data(DataConfig("images", str(pictures), loaders=0), model)
    assert [len(one) for one in sets] == [24, 6] and "1 training file is no picture" in sets[0].notes[0]


def test_folders_of_their_own_are_taken_as_they_are(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "both" / "train")
    shutil.copytree(pictures / "trip 1", tmp_path / "both" / "val")
    assert [len(names(tmp_path / "both", split)) for split in ("train", "validation")] == [30, 10]
    elsewhere = str(tmp_path / "both" / "val")
    assert [len(names(pictures, split, val_root=elsewhere)) for split in ("train", "validation")] == [30, 10]
    assert len(names(pictures, "test", test_root=elsewhere)) == 10
    assert len(names(pictures, "validation", test_root=elsewhere)) == 6


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"root": None}, "data.root: nothing was given"),
        ({"root": "nowhere"}, "data.root: 'nowhere' is not there"),
        ({"test_split": "test"}, "data.test_split: 'test', but .* is one folder for training and validation"),
        ({"val_root": "."}, "overlap"),
        ({"class_order": ("ascii",)}, "data.class_order"),
    ],
)
def test_mistakes_in_where_pictures_are(
    given: dict[str, Any], says: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunesearch.evaluate.data import check_paths

    monkeypatch.chdir(pictures)
    with pytest.raises(DataError, match=says):
        check_paths(DataConfig("images", **{"root": str(pictures), **given}))


def test_too_few_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 0 pictures, too few for training"):
        names(tmp_path, "train")
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="has 1 pictures, too few for validation"):
        names(tmp_path, "validation")


def test_a_study_of_features_without_labels_runs_to_its_export(pictures: Path, tmp_path: Path) -> None:
    """Sensitivities, rungs, training towards features and patches, a front; then a file that says what it gives."""
    config = made_study(
        trials=6,
        model=DIGITS,
        data=DataConfig("images", str(pictures), loaders=0),
        space=SpaceConfig(
            blocks=(2, 4, 6),
            keep=(0.4, 0.7, 1.0),
            reduce=("drop", "hold"),
            until=("next", "end"),
            start_from=("sensitivity",),
        ),
        objectives=(Objective("feature_similarity", "maximize"), Objective("gmacs", "minimize")),
        metrics=("patch_similarity",),
        finetune=FinetuneConfig(batch_size=12, distill_weight=1.0, distill_patches_weight=0.5),
        rungs=(Budget(images=0), Budget(images=24)),
        stop=StopConfig(trials=6),
    )
    assert study_problems(config) == []
    run_study(config, tmp_path / config.name)
    records = open_study_readonly(tmp_path / config.name).records()
    done = [record for record in records if record.state == "complete"]
    assert len(done) >= 6 and max(record.rung_done for record in done) == 1
    for record in done:
        found = dict(record.evaluation.metrics)  # type: ignore[union-attr]
        assert set(found) == {"feature_similarity", "gmacs", "patch_similarity"}


def test_a_classifier_learns_from_pictures_without_classes(pictures: Path) -> None:
    """By the dense model's answers alone."""
    model = replace(DIGITS, num_classes=None)
    finetune = FinetuneConfig(batch_size=12, cross_entropy_weight=0, distill_weight=1.0, learning_rate=2e-4)
    data = DataConfig("images", str(pictures), loaders=0)
    config: StudyConfig = made_study(
        model=model,
        data=data,
        objectives=(Objective("agreement", "maximize"), Objective("gmacs", "minimize")),
        finetune=finetune,
        rungs=(Budget(images=24),),
    )
    assert study_problems(config) == []
    found = evaluate(task(GONE, ("agreement",), model=model, data=data, finetune=finetune, budget=Budget(images=24)))
    assert found.status == "complete" and dict(found.metrics)["agreement"] > 50


def test_exported_features_say_so(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from prunesearch.export import example_code, export_onnx, read_facts

    model = apply_schedule(build_model(DIGITS), BACK)
    made = export_onnx(model, tmp_path / "features.onnx", name=DIGITS.name)
    assert made.facts.features and read_facts(tmp_path / "features.onnx").features
    assert "logits[:8]" in example_code(tmp_path / "features.onnx")
