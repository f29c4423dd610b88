"""Segmentation: heads for each patch, pictures with masks, metrics of pixels, training, and the check of a study."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from fake_search import study as made_study
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import prunesearch
from prunesearch.cli import main
from prunesearch.config import (
    BlockSpace,
    Budget,
    DataConfig,
    FinetuneConfig,
    MeasureConfig,
    ModelConfig,
    Objective,
    SpaceConfig,
    StudyConfig,
    as_options,
)
from prunesearch.cost import estimate_cost, total_cost
from prunesearch.errors import DataError, FileError, ModelError, RunError, ScheduleError, UserError
from prunesearch.evaluate import Task, build_model, evaluate, model_shape
from prunesearch.evaluate.data import open_data
from prunesearch.evaluate.finetune import distillation_loss
from prunesearch.evaluate.inputs import check_inputs
from prunesearch.evaluate.measure_sensitivity import measure_sensitivities
from prunesearch.evaluate.metrics import METRICS
from prunesearch.evaluate.scenes import CLASSES, SIDE, scene
from prunesearch.evaluate.train_head import train_head
from prunesearch.models import apply_schedule, input_size, shape_of
from prunesearch.models.dense_head import DenseHead, resized, segments, with_dense_head
from prunesearch.schedule import END, NEXT, Schedule, Stage
from prunesearch.search.problems import study_problems
from prunesearch.strict import from_mapping

TINY = ModelConfig(
    "vit_scenes_patch4_rope_64", image_size=32, options=as_options({"depth": 3, "embed_dim": 24, "num_heads": 3})
)
DATA = DataConfig("scenes", train_images=24, val_images=16, loaders=0)
BACK = Schedule((Stage(1, keep=0.4, reduce="squeeze", score="key_norm", until=END),))
BACK_BY_DROP = Schedule((Stage(1, keep=0.4, score="key_norm", until=END),))
PIXELS = ("miou", "pixel_accuracy", "agreement", "loss")


def values(schedule: Schedule = BACK, **changes: Any) -> dict[str, float]:
    task = Task("one", TINY, DATA, schedule, Budget(images=0), PIXELS, threads=1)
    found = evaluate(replace(task, **changes))
    assert found.status == "complete", found.error
    return dict(found.metrics)


# --- the head ----------------------------------------------------------------------------------------------------

SMALL = {"depth": 2, "num_classes": 0}
FAMILIES = {
    "vit_tiny_patch16_224": {**SMALL, "img_size": 64, "embed_dim": 24, "num_heads": 3},
    "vit_base_patch16_siglip_224": {**SMALL, "img_size": 64, "embed_dim": 24, "num_heads": 3},
    "deit3_small_patch16_224": {**SMALL, "img_size": 64, "embed_dim": 24, "num_heads": 3},
    "vit_small_patch16_dinov3": {**SMALL, "img_size": 64, "embed_dim": 48, "num_heads": 3},
    "beit_base_patch16_224": {**SMALL, "img_size": 64, "embed_dim": 24, "num_heads": 3},
    "vit_relpos_small_patch16_224": {**SMALL, "img_size": 64, "embed_dim": 24, "num_heads": 3},
}


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_gives_classes_to_each_patch(name: str, kind: Any) -> None:
    torch.manual_seed(0)
    model = with_dense_head(timm.create_model(name, **FAMILIES[name]), kind, 7).eval()
    x = torch.rand(2, *input_size(model))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    with torch.no_grad():
        dense = model(x)
    assert dense.shape == (2, 7, 4, 4) and segments(model)
    shape = shape_of(model)
    assert shape.segments and not shape.gives_features
    assert estimate_cost(shape).gmacs == pytest.approx(counter.get_total_flops() / 2e9, rel=0.01)
    with torch.no_grad():
        assert torch.equal(apply_schedule(model, Schedule())(x), dense)
    back = Schedule((Stage(1, at="mid", keep=0.5, score="key_norm", until=END),))
    with torch.no_grad():
        pruned = apply_schedule(model, back)(x)
    assert pruned.shape == dense.shape and not torch.equal(pruned, dense)
    with pytest.raises(ScheduleError, match="all must be back at the end"):
        apply_schedule(model, Schedule((Stage(1, at="mid", keep=0.5, score="key_norm"),)))


@pytest.mark.parametrize(
    "name",
    ["swin_tiny_patch4_window7_224", "convnext_tiny", "deit_tiny_distilled_patch16_224", "naflexvit_base_patch16_gap"],
)
def test_models_without_a_token_for_each_patch_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    with pytest.raises(ModelError, match=r"model.head: a \w+ cannot have one. Possible: ViTs"):
        with_dense_head(model, "linear", 3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("mlp", 3), r"model.head is 'mlp'. Possible: linear, conv"),
        *((("linear", classes), r"model.num_classes is .*Possible: a whole number from 1") for classes in (0, -1, "3")),
    ],
)
def test_a_head_that_cannot_be_is_refused(given: tuple[Any, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        with_dense_head(timm.create_model("vit_tiny_patch16_224", **FAMILIES["vit_tiny_patch16_224"]), *given)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule((Stage(1, keep=0.25),)), BACK])
def test_the_head_comes_before_the_schedule(schedule: Schedule) -> None:
    """A quarter of the tokens would be a smaller square picture."""
    model = timm.create_model("vit_tiny_patch16_224", **FAMILIES["vit_tiny_patch16_224"])
    with pytest.raises(ModelError, match=r"the model has a schedule. Possible: the head first"):
        with_dense_head(apply_schedule(model, schedule), "linear", 3)


def test_a_size_that_is_padded_to_whole_patches_has_a_head_of_its_own_grid() -> None:
    options = {
        **FAMILIES["vit_tiny_patch16_224"],
        "img_size": (40, 90),
        "dynamic_img_size": True,
        "dynamic_img_pad": True,
    }
    model = with_dense_head(timm.create_model("vit_tiny_patch16_224", **options), "linear", 5)
    assert model(torch.rand(1, 3, 40, 90)).shape == (1, 5, 3, 6)


def test_other_sizes_of_images() -> None:
    head = DenseHead("conv", 8, 3, 4, 6, prefix_tokens=1)
    assert head(torch.rand(2, 25, 8)).shape == (2, 3, 4, 6)
    assert head(torch.rand(2, 10, 8)).shape == (2, 3, 3, 3)
    with pytest.raises(ModelError, match="12 patches arrive"):
        head(torch.rand(2, 13, 8))


@pytest.mark.parametrize("verb", ["drop", "fuse", "squeeze", "absorb", "merge", "hold"])
@pytest.mark.parametrize("until", [NEXT, END])
def test_each_patch_has_its_own_place(verb: str, until: str) -> None:
    """A token that left returns to its own place: rows of images that no stage touched first keep their classes."""
    model = build_model(TINY)
    score = "none" if verb == "merge" else "key_norm"
    stages = (Stage(0, at="mid", keep=0.5, reduce=verb, score=score, until=until),)
    x = torch.rand(3, 1, 32, 32)
    with torch.no_grad():
        together = apply_schedule(model, Schedule(stages))(x)
        alone = torch.cat([model(one[None]) for one in x])
    assert together.shape == (3, 11, 8, 8)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_without_a_head_says_how_to_get_one(tmp_path: Path) -> None:
    given = {"image_size": 64, "options": as_options({"depth": 1, "embed_dim": 24, "num_heads": 3})}
    plain = build_model(ModelConfig("vit_tiny_patch16_224", num_classes=5, **given))
    path = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(plain.state_dict(), path)
    with pytest.raises(ModelError, match="prunesearch train-head"):
        build_model(ModelConfig("vit_tiny_patch16_224", checkpoint=str(path), head="linear", num_classes=5, **given))
    with pytest.raises(ModelError, match=r"model.num_classes: absent, but a linear head"):
        build_model(ModelConfig("vit_tiny_patch16_224", head="linear", **given))


# --- pictures with masks -----------------------------------------------------------------------------------------


def test_scenes_are_always_the_same_and_differ_between_splits() -> None:
    picture, mask = scene("train", 5)
    again, same = scene("train", 5)
    assert torch.equal(picture, again) and torch.equal(mask, same) and picture.shape == (SIDE, SIDE)
    assert not torch.equal(scene("validation", 5)[0], picture) and not torch.equal(scene("test", 5)[0], picture)
    found = torch.cat([scene("train", index)[1].unique() for index in range(40)]).unique()
    assert found.tolist() == list(range(len(CLASSES)))
    train, held_out = open_data(DATA, build_model(TINY))
    ((images, masks),) = held_out.batches([torch.arange(16)], torch.device("cpu"))
    assert images.shape == (16, 1, 32, 32) and masks.shape == (16, 32, 32) and masks.dtype == torch.int64
    assert len(train) == 24 and train.fingerprint


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Twelve scenes as files, in ROOT/train/images, ROOT/train/masks and so on."""
    for split, first in (("train", 0), ("val", 8)):
        for kind in ("images", "masks"):
            (tmp_path / split / kind / "deep").mkdir(parents=True)
        for index in range(first, first + (8 if split == "train" else 4)):
            picture, mask = scene("train", index)
            Image.fromarray(picture.numpy()).save(tmp_path / split / "images" / "deep" / f"{index}.jpg")
            Image.fromarray(mask.numpy()).save(tmp_path / split / "masks" / "deep" / f"{index}.png")
    return tmp_path


def masks_data(root: Path, **given: Any) -> DataConfig:
    return DataConfig("masks", str(root), loaders=0, **given)


@pytest.mark.parametrize("in_memory", [True, False])
def test_masks_in_folders(folders: Path, in_memory: bool) -> None:
    train, held_out = open_data(masks_data(folders, in_memory=in_memory), build_model(TINY))
    assert (len(train), len(held_out)) == (8, 4)
    ((_, masks),) = held_out.batches([torch.arange(4)], torch.device("cpu"))
    expected = torch.stack([scene("train", index)[1] for index in range(8, 12)])[:, 1::2, 1::2]
    assert torch.equal(masks, expected.long())  # nearest, from 64 to 32
    assert (values(data=masks_data(folders, in_memory=in_memory)))["miou"] >= 0


def test_the_other_layout_of_folders(folders: Path) -> None:
    (folders / "images").mkdir()
    (folders / "annotations").mkdir()
    for split, name in (("train", "training"), ("val", "validation")):
        (folders / split / "images").rename(folders / "images" / name)
        (folders / split / "masks").rename(folders / "annotations" / name)
        (folders / split).rmdir()
    assert [len(one) for one in open_data(masks_data(folders), build_model(TINY))] == [8, 4]


def test_what_is_wrong_with_masks_is_said(folders: Path) -> None:
    def problem(model: ModelConfig = TINY, data: DataConfig | None = None) -> str:
        with pytest.raises(DataError) as caught:
            open_data(data or masks_data(folders), build_model(model))
        return str(caught.value)

    for in_memory in (True, False):
        data = masks_data(folders, in_memory=in_memory)
        with pytest.raises(DataError, match=r"the mask of .*\d.jpg has label \d+, but the model has 3 outputs"):
            train, _ = open_data(data, build_model(replace(TINY, num_classes=3)))
            list(train.batches([torch.arange(len(train))], torch.device("cpu")))
    assert "do not go up to" not in problem(replace(TINY, num_classes=3))
    assert "nothing was given for training" in problem(data=DataConfig("masks"))
    assert "has no folders of pictures and masks" in problem(data=masks_data(folders / "train" / "images"))
    assert "for training and for validation" in problem(data=masks_data(folders / "train"))
    with pytest.raises(DataError, match="one class each, but the model gives classes to each patch"):
        open_data(DataConfig("digits", train_images=9, val_images=9), build_model(replace(TINY, num_classes=10)))
    with pytest.raises(DataError, match="a class for each pixel, but the model gives one to a picture"):
        open_data(DATA, build_model(ModelConfig("vit_digits_patch1_8", num_classes=11)))
    with pytest.raises(DataError, match=r"data.crop_pct: 0.9, but a class for each pixel needs the whole picture"):
        open_data(replace(DATA, crop_pct=0.9), build_model(TINY))
    mask = folders / "val" / "masks" / "deep" / "8.png"
    Image.open(mask).convert("RGB").save(mask)
    assert "8.jpg: the mask has the mode RGB" in problem(data=masks_data(folders, val_images=4))
    first = min((folders / "train" / "masks").rglob("*.png"))
    grey = first.read_bytes()
    Image.open(first).convert("RGB").save(first)
    with pytest.raises(DataError, match=r"data \(train\).*the mask has the mode RGB"):  # without decoding it
        check_inputs(TINY, masks_data(folders, allow_unreadable=0.0))
    first.write_bytes(grey)
    Image.open(mask).convert("L").resize((9, 9)).save(mask)
    assert "its mask deep/8.png has (9, 9) pixels, the picture (64, 64)" in problem(
        data=masks_data(folders, val_images=4)
    )
    mask.write_bytes(b"no picture")
    assert "its mask deep/8.png: cannot identify" in problem(data=masks_data(folders, val_images=4))
    Image.fromarray(scene("train", 8)[1].numpy()).save(mask.with_suffix(".jpg"))
    assert "deep/8.png and deep/8.jpg have the same name" in problem(data=masks_data(folders)).replace(
        "deep/8.jpg and deep/8.png", "deep/8.png and deep/8.jpg"
    )
    mask.unlink()
    assert "1 masks are JPEG (deep/8.jpg)" in problem(data=masks_data(folders))
    mask.with_suffix(".jpg").unlink()
    assert "1 of 4 pictures have no mask (deep/8.jpg)" in problem(data=masks_data(folders, train_images=7))


# --- metrics and training ----------------------------------------------------------------------------------------


def test_metrics_of_pixels_count_pixels(folders: Path) -> None:
    for path in (folders / "val" / "masks" / "deep").iterdir():  # the left half belongs to no class
        mask = Image.open(path).copy()
        mask.paste(255, (0, 0, 32, 64))
        mask.save(path)
    data = masks_data(folders)
    found = values(data=data)
    model, dense = apply_schedule(build_model(TINY), BACK), build_model(TINY)
    ((x, masks),) = open_data(data, dense)[1].batches([torch.arange(4)], torch.device("cpu"))
    with torch.inference_mode():
        logits = F.interpolate(model(x), size=(32, 32), mode="bilinear", align_corners=False)
        guesses, theirs = logits.argmax(dim=1), resized(dense(x), (32, 32)).argmax(dim=1)
    known = masks != 255
    assert known.double().mean() == 0.5
    assert found["pixel_accuracy"] == pytest.approx(100 * (guesses == masks)[known].double().mean().item())
    assert found["agreement"] == pytest.approx(100 * (guesses == theirs).double().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, masks, ignore_index=255).item(), rel=1e-5)
    shares = []
    for one in range(11):
        here, there = (guesses == one) & known, (masks == one) & known
        if (here | there).any():
            shares.append(((here & there).sum() / (here | there).sum()).item())
    assert found["miou"] == pytest.approx(100 * sum(shares) / len(shares), rel=1e-5)


def test_the_dense_model_agrees_with_itself() -> None:
    assert values(Schedule())["agreement"] == 100


def test_training_learns_pixels_and_patches() -> None:
    config = FinetuneConfig(learning_rate=3e-3, batch_size=8, augment="flip")
    before, after = values(Schedule()), values(BACK, budget=Budget(images=240), finetune=config)
    assert after["loss"] < before["loss"] - 0.5
    logits, target, masks = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.randint(0, 3, (2, 8, 8))
    kl = F.kl_div(logits.log_softmax(1), target.log_softmax(1), log_target=True, reduction="none").sum(1).mean()
    hard = F.cross_entropy(resized(logits, (8, 8)), masks)
    found = distillation_loss(logits, masks, target, FinetuneConfig(distill_weight=0.25))
    assert found.item() == pytest.approx((0.75 * hard + 0.25 * kl).item(), rel=1e-5)


def test_a_class_of_the_number_255_counts_in_pictures() -> None:
    logits, labels = torch.zeros(1, 300), torch.tensor([255])
    assert distillation_loss(logits, labels, None, FinetuneConfig()).isfinite()


def test_sensitivities_are_means_over_patches() -> None:
    space = SpaceConfig(blocks=(1,), keep=(0.25, 0.75), score=("key_norm",), until=(END,), start_from=("sensitivity",))
    config = made_study(model=TINY, data=DATA, space=space, objectives=(Objective("miou", "maximize"),))
    found = measure_sensitivities(config, 16)
    most, least = (next(one for one in found.effects if one.stage.keep == keep) for keep in (0.25, 0.75))
    assert most.divergence > least.divergence > 0 and most.agreement < least.agreement <= 100


# --- a study -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": DataConfig("digits")}, "data.name: digits has no class for each pixel"),
        ({"model": ModelConfig("vit_digits_patch1_8")}, "model.head: absent, but data scenes has a class"),
        ({"objectives": (Objective("top1", "maximize"),)}, "top1 reads classes, but the model gives classes to each"),
        ({"space": SpaceConfig(blocks=(1,), score=("key_norm",))}, "space.until: never takes tokens away for good"),
        (
            {"space": SpaceConfig(blocks=(1, BlockSpace(block=2, until=("never",))), until=(END,))},
            "space.blocks[1].until: never takes tokens away for good",
        ),
        (
            {"model": ModelConfig("vit_tiny_patch16_224", pretrained=True, head="conv", num_classes=11)},
            "a conv head is random, as timm's weights have none",
        ),
    ],
)
def test_what_does_not_go_together_is_a_mistake(changes: dict[str, Any], says: str) -> None:
    space = SpaceConfig(blocks=(1,), score=("key_norm",), until=(END,))
    given = {"model": TINY, "data": DATA, "objectives": (Objective("miou", "maximize"),), "space": space}
    assert not study_problems(made_study(**given))
    assert says in "\n".join(study_problems(made_study(**{**given, **changes})))


def test_metrics_say_what_they_read() -> None:
    assert {name for name, one in METRICS.items() if "patches" in one.of_output} == set(PIXELS)


def test_a_head_is_trained_once_and_then_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, weights = tmp_path / "study.yaml", tmp_path / "dense.safetensors"
    study.write_text(
        "version: 1\nname: seg\n"
        "model: {name: vit_tiny_patch16_224, image_size: 64, num_classes: 11, head: conv,\n"
        "  options: {depth: 2, embed_dim: 24, num_heads: 3, in_chans: 1}}\n"
        "data: {name: scenes, train_images: 32, val_images: 8, loaders: 0, mean: [0.3], std: [0.3]}\n"
        "space: {blocks: [1], score: [key_norm], until: [end]}\n"
        "objectives: [{metric: miou, goal: maximize}, {metric: gmacs, goal: minimize}]\n"
        "workers: {kind: serial}\n"
    )
    assert main(["train-head", str(study), "-o", str(weights), "--images", "64"]) == 0
    said = capsys.readouterr().out
    assert "miou" in said and f"write checkpoint: {weights}" in said.replace("\n", " ")
    config = ModelConfig(
        "vit_tiny_patch16_224",
        checkpoint=str(weights),
        image_size=64,
        num_classes=11,
        head="conv",
        options=as_options({"depth": 2, "embed_dim": 24, "num_heads": 3, "in_chans": 1}),
    )
    trained, fresh = build_model(config), build_model(replace(config, checkpoint=None))
    assert not torch.equal(trained.head.classify.weight, fresh.head.classify.weight)
    assert torch.equal(trained.blocks[0].attn.qkv.weight, fresh.blocks[0].attn.qkv.weight)
    assert main(["check", str(study), "--set", f"model.checkpoint={weights}"]) == 0
    before = weights.read_bytes()
    assert main(["train-head", str(study), "-o", str(weights), "--images", "64"]) == 2
    assert "is there already" in capsys.readouterr().err and weights.read_bytes() == before


def test_a_profile_knows_the_head() -> None:
    from prunesearch.device.profiles import measure_profiles

    names = {"verbs": ["drop"], "scores": ["key_norm"], "returning": []}
    (profile,) = measure_profiles(TINY, batches=(1,), seconds=0.5, threads=1, **names)
    assert profile.shape == model_shape(TINY) and profile.check
    assert total_cost(profile.shape, BACK_BY_DROP, profile) > 0  # what returning takes is known without asking


def test_a_file_for_onnx_runtime_gives_the_class_of_each_patch(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from prunesearch.export.deploy import deploy
    from prunesearch.export.runtimes import ONNX_RUNTIME
    from prunesearch.files import ScheduleFile

    path = tmp_path / "best.onnx"
    measure = MeasureConfig(batch_size=8, speed_batch_size=2, speed_seconds=0.05)
    (one,) = deploy(
        ScheduleFile(1, BACK.stages), tmp_path, [(ONNX_RUNTIME, path)], model=TINY, data=DATA, measure=measure
    )
    assert one.facts.segments and one.facts.classes == CLASSES and one.check.same == one.check.images == 16
    assert one.top1 is None and one.pixel_accuracy == pytest.approx(values()["pixel_accuracy"], abs=0.1)
    picture = tmp_path / "scene.png"
    Image.fromarray(scene("train", 0)[0].numpy()).save(picture)
    said = run_example(path, picture)
    assert said.count("[") >= 9 and "'" in said  # a grid of 8 rows, and names of classes


def test_the_example_of_a_model_without_a_classifier_runs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from prunesearch.export.deploy import export_onnx

    path, picture = tmp_path / "features.onnx", tmp_path / "digit.png"
    export_onnx(build_model(ModelConfig("vit_digits_patch1_8", num_classes=0)), path)
    Image.fromarray(scene("train", 0)[0].numpy()).save(picture)
    assert run_example(path, picture).startswith("(48,) [")


def run_example(file: Path, picture: Path) -> str:
    from prunesearch.export.example import example_code

    script = file.with_name("example.py")
    script.write_text(example_code(file))
    command = [sys.executable, str(script), str(picture)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_task_stands_for_the_fields_that_suit_it() -> None:
    def read(**given: Any) -> StudyConfig:
        base = {"version": 1, "name": "one", "space": {"blocks": [1]}, "model": {"name": "vit_tiny_patch16_224"}}
        return from_mapping(StudyConfig, {**base, **given}, "study")

    features = read(task="features", finetune={"batch_size": 8})
    assert features.model.num_classes == 0 and features.objectives[0].metric == "feature_similarity"
    assert features.finetune.distill_weight == 1 and features.finetune.batch_size == 8 and features.task is None
    segmentation = read(task="segmentation", model={"name": "vit_tiny_patch16_224", "num_classes": 4})
    assert segmentation.model.head == "linear" and segmentation.space.until == ("next", "end")
    written = read(
        task="segmentation",
        objectives=[{"metric": "loss", "goal": "minimize"}],
        space={"blocks": [1], "until": ["end"]},
    )
    assert written.model.head is None and written.objectives[0].metric == "loss" and written.space.until == ("end",)
    assert read(task="classification") == read()
    with pytest.raises(FileError, match=r"study.task: 'x'|task.*possible|classification"):
        read(task="x")
    with pytest.raises(UserError, match=r"StudyConfig\(task='features'\)"):
        replace(features, task="features")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_scenes_patch4_rope_64"])
def test_a_head_is_trained_again_from_its_own_checkpoint(name: str, tmp_path: Path) -> None:
    model = replace(TINY, name=name, head="conv", num_classes=11)
    if name != TINY.name:
        options = as_options({"depth": 2, "embed_dim": 24, "num_heads": 3, "in_chans": 1, "patch_size": 4})
        model = replace(model, options=options)
    data = replace(DATA, mean=(0.3,), std=(0.3,))
    first = train_head(model, data, images=16, batch_size=8)
    path = str(tmp_path / "first.safetensors")
    safetensors.torch.save_file(first.model.state_dict(), path)
    again = train_head(replace(model, checkpoint=path), data, images=16, batch_size=8)
    assert again.miou == first.miou  # from the same random head on the same backbone
    with pytest.raises(ModelError, match=r"it has a conv head, but the model has a linear one"):
        build_model(replace(model, checkpoint=path, head="linear"))


def test_masks_without_any_class(folders: Path) -> None:
    """A batch without classes teaches nothing; a validation set without them is refused."""
    for index, path in enumerate(sorted((folders / "train" / "masks" / "deep").iterdir())):
        if index % 2:
            Image.new("L", (64, 64), 255).save(path)
    found = values(data=masks_data(folders), budget=Budget(images=16), finetune=FinetuneConfig(batch_size=1))
    assert found["loss"] > 0
    for path in (folders / "val" / "masks" / "deep").iterdir():
        Image.new("L", (64, 64), 255).save(path)
    data = masks_data(folders, val_images=4)  # opened anew
    task = Task("one", TINY, data, BACK, Budget(images=0), ("miou",), threads=1)
    assert "no pixel of the masks has a class (255 counts nowhere)" in evaluate(task).error


def test_what_train_head_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.num_classes: absent, but a linear head"):
        train_head(replace(TINY, head="linear"), DATA, images=8)
    with pytest.raises(ModelError, match=r"model.head: absent"):
        train_head(TINY, DATA, images=8)
    with pytest.raises(RunError, match="lower learning rate"):
        train_head(replace(TINY, head="linear", num_classes=11), DATA, images=400, learning_rate=1e30)
    assert main(["train-head", "nowhere.yaml", "--learning-rate", "nan"]) == 2


def test_weights_with_a_head_say_what_the_model_lacks() -> None:
    state = build_model(TINY).state_dict()
    model = timm.create_model(
        "vit_scenes_patch4_rope_64", num_classes=0, img_size=32, depth=3, embed_dim=24, num_heads=3
    )
    with pytest.raises(ModelError, match=r'with_dense_head\(model, "linear", 11\)'):
        apply_schedule(model, BACK, weights=state)
    apply_schedule(prunesearch.with_dense_head(model, "linear", 11), BACK, weights=state)
