"""Published recipes: the loss is the paper's, recipes are expanded on reading, and begun studies never change."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from fake_search import study
from torch import Tensor, nn

from prunesearch.cli import main
from prunesearch.config import Budget, DataConfig, FinetuneConfig, ModelConfig, StudyConfig
from prunesearch.cost import estimate_cost
from prunesearch.errors import FileError, StudyError, UserError
from prunesearch.evaluate import Task, evaluate
from prunesearch.evaluate import finetune as module
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.finetune import Batch, DenseOutput, Progress, finetune
from prunesearch.evaluate.schedule_loss import cost_by_counts, distills_tokens
from prunesearch.files import load_study, override_study, to_mapping, write_yaml
from prunesearch.json_schema import json_schema
from prunesearch.models import Trace, apply_schedule, schedule_of, shape_of, steps_of, trace
from prunesearch.presets import load_preset, presets
from prunesearch.recipes import RECIPES, RecipeName
from prunesearch.schedule import Schedule
from prunesearch.search.problems import study_problems
from prunesearch.shape import ModelShape
from prunesearch.strict import from_mapping
from prunesearch.study.reader import open_study_readonly
from prunesearch.study.storage import storage_url
from prunesearch.study.store import open_store
from prunesearch.tokens import REDUCERS, SCORERS

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def settings(**section: Any) -> FinetuneConfig:
    return from_mapping(FinetuneConfig, section, "here")


# --- the loss ----------------------------------------------------------------------------------------------------

VIT = ModelConfig("vit_digits_patch1_8", options=(("depth", 4), ("embed_dim", 24), ("num_heads", 2)))
WIDER = ModelConfig("vit_digits_patch1_8", options=(("depth", 5), ("embed_dim", 48), ("num_heads", 4)))
SWIN = ModelConfig("swin_tiny_patch4_window7_224", image_size=32, num_classes=10,
                   options=(("embed_dim", 24), ("in_chans", 1)))  # fmt: skip

# The loss of each method, as in its paper. ce: cross entropy; kl: of the classes, dense || pruned; ratio:
# mean over stages and images of (kept fraction - wanted fraction)^2; squared, tokens_kl: of tokens kept to the end
PUBLISHED: dict[str, Any] = {
    "asvit": (lambda t: t.ce + 2 * abs(t.gmacs - t.target) + 0.5 * t.kl, "asvit-0.65", (VIT, WIDER)),
    "dtps": (lambda t: t.ce + 2 * t.ratio + 0.5 * t.kl + 0.5 * t.tokens_kl, "dtps-0.7", (VIT,)),
    "dynamicvit": (lambda t: t.ce + 2 * t.ratio + 0.5 * t.kl + 0.5 * t.squared, "dynamicvit-0.7", (VIT,)),
    "dynamicvit-maps": (lambda t: t.ce + 10 * t.ratio + 0.5 * t.kl + 0.5 * t.squared, "dynswin-t-0.7", (SWIN,)),
    "evit": (lambda t: t.ce, "evit-fuse-0.7", (VIT,)),
    "ltmp": (lambda t: t.ce + 10 * ((t.gmacs - t.target) / t.dense_gmacs) ** 2, "ltmp-0.6", (VIT, WIDER)),
    "svit": (lambda t: t.ce + 4 * ((t.gmacs - t.target) / t.dense_gmacs) ** 2, "svit", (VIT,)),
}


def spread_out(schedule: Schedule, shape: ModelShape) -> Schedule:
    """Set thresholds to the middle of the scores of random weights, so that images keep different counts."""
    moved = [
        replace(stage, threshold=0.5 if stage.score in ("none", "predictor") else 1 / (shape.patch_tokens + 1))
        if stage.threshold is not None
        else stage
        for stage in schedule.stages
    ]
    return replace(schedule, stages=tuple(moved))


def terms(model: nn.Module, found: Trace, labels: Tensor, dense: DenseOutput) -> SimpleNamespace:
    """Every loss term by its definition, in loops over images and tokens."""
    schedule, shape = schedule_of(model), shape_of(model)
    student, teacher = found.logits.double().log_softmax(1), dense.logits.double().log_softmax(1)
    images = range(len(labels))
    wanted = [stage.tokens for stage in schedule.stages]
    kept = [[round(float(count[image].detach())) for count in found.counts] for image in images]
    pairs = []
    if found.counts:
        present = torch.ones(found.patches_BnC.shape[:2]) if found.present_Bn is None else found.present_Bn
        tokens = dense.patches_BnC.shape[1]
        pairs = [
            (found.patches_BnC[image, slot].double(), dense.patches_BnC[image, slot].double())
            for image in images
            for slot in range(tokens)
            if present[image, slot] == 1
        ]
    steps = steps_of(model)
    costs = [float(cost_by_counts([torch.tensor([n]) for n in own], steps, shape, 1)) / 1e9 for own in kept]

    def mean(values: Any) -> float:
        values = [float(torch.as_tensor(value).detach()) for value in values]
        return sum(values) / len(values) if values else 0.0

    return SimpleNamespace(
        ce=mean(-student[image, labels[image]] for image in images),
        kl=mean((teacher[i].exp() * (teacher[i] - student[i])).sum() for i in images),
        ratio=mean(
            ((count - target) / shape.patch_tokens) ** 2
            for own in kept
            for count, target in zip(own, wanted, strict=bool(own))
            if target is not None
        ),
        squared=mean(((pruned - full) ** 2).mean() for pruned, full in pairs),
        tokens_kl=mean(
            (full.softmax(0) * (full.log_softmax(0) - pruned.log_softmax(0))).sum() for pruned, full in pairs
        ),
        gmacs=mean(costs),
        target=schedule.target_gmacs,
        dense_gmacs=estimate_cost(shape).gmacs,
        kept=kept,
    )


@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name, (_, _, models) in PUBLISHED.items() for model in models]
)
def test_the_loss_is_the_published_one(name: str, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    formula, preset, _ = PUBLISHED[name]
    torch.manual_seed(0)
    pruned, dense_model = build_model(model), build_model(model)
    shape = shape_of(pruned)
    schedule = spread_out(load_preset(preset, shape), shape)
    apply_schedule(pruned, schedule, untrained=True).train()
    if name == "svit":  # fresh predictors say nearly the same of every token
        for parameter in pruned.token_stages.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    size = model.image_size or 8
    images, labels = torch.rand(6, 1, size, size), torch.tensor([0, 3, 3, 9, 5, 1])
    config = settings(recipe=name)
    with torch.no_grad():
        features = dense_model.forward_features(images)
        flat = features.flatten(1, 2) if shape.holds else features[:, 1:]
        dense = DenseOutput(dense_model.forward_head(features) * 3, flat)
    given = dense if distills_tokens(pruned, config) else DenseOutput(dense.logits)
    batch = Batch(images, labels, given if config.distill else None)  # as a worker's teacher has it

    losses: list[Tensor] = []
    passes: list[Trace] = []  # the same pass as the loss, because decisions are random

    def recorded(*arguments: Any) -> Trace:
        passes.append(trace(*arguments))
        return passes[-1]

    monkeypatch.setattr(module, "trace", recorded)
    monkeypatch.setattr(module, "take_steps", lambda *arguments: losses.extend(arguments[8](batch)))
    finetune(pruned, None, Budget(images=6), config, None, CPU, 0, Progress())  # type: ignore[arg-type]
    plain = terms(pruned, passes[0] if passes else trace(pruned, images), labels, dense)
    assert float(losses[0].detach()) == pytest.approx(formula(plain), rel=2e-6)
    assert len(set(map(tuple, plain.kept))) > 1 or not plain.kept[0], "images differ, so that a mean is one"
    assert losses[0].requires_grad
    assert plain.kl > 0.001 and plain.ce > 0.1


def test_asvit_weighs_gmacs_which_is_its_weight_per_share_of_each_model() -> None:
    """2.5, 9.1 and 34.9 per unit of share for DeiT-T, S and B. AS-ViT's code counts without head and class token."""
    from prunesearch.evaluate import model_shape

    for name, per_share in (("tiny", 2.5), ("small", 9.1), ("base", 34.9)):
        dense = estimate_cost(model_shape(ModelConfig(f"deit_{name}_patch16_224"))).gmacs
        assert RECIPES["asvit"].fields["budget_weight"] * dense == pytest.approx(per_share, rel=0.02)


@pytest.mark.parametrize("distill_weight", [0.0, 0.3, 1.0])
def test_the_cross_entropy_has_its_own_weight_or_the_rest(distill_weight: float) -> None:
    torch.manual_seed(0)
    logits, labels, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 4]), torch.randn(4, 5)
    ce = torch.nn.functional.cross_entropy(logits, labels)
    kl = torch.nn.functional.kl_div(logits.log_softmax(1), target.softmax(1), reduction="batchmean")
    default = FinetuneConfig(distill_weight=distill_weight)
    own = replace(default, cross_entropy_weight=0.7)
    loss = module.distillation_loss
    assert loss(logits, labels, target, default) == pytest.approx(
        float((1 - distill_weight) * ce + distill_weight * kl)
    )
    assert loss(logits, labels, target, own) == pytest.approx(float(0.7 * ce + distill_weight * kl))
    assert torch.equal(loss(logits, labels, None, default), ce), "without distillation the default is the cross entropy"
    assert loss(logits, labels, None, own) == pytest.approx(float(0.7 * ce))


def test_no_loss_at_all_is_a_mistake() -> None:
    for section, wrong in (
        ({"cross_entropy_weight": 0, "distill": False}, True),
        ({"cross_entropy_weight": 0, "distill_weight": 0}, True),
        ({"cross_entropy_weight": 0}, False),
        ({"distill_weight": 1}, False),
    ):
        said = study_problems(study(finetune=settings(**section)))
        assert any("finetune.cross_entropy_weight: 0" in problem for problem in said) == wrong


# --- reading -----------------------------------------------------------------------------------------------------


def test_the_words_of_the_file_are_the_recipes() -> None:
    assert set(get_args(RecipeName)) == set(RECIPES) == set(PUBLISHED)
    choices = json_schema(StudyConfig)["$defs"]["FinetuneConfig"]["properties"]["recipe"]
    assert {"enum": list(get_args(RecipeName))} in choices["anyOf"] and "list recipes" in choices["description"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_the_method_is_not_what_a_budget_of_30_epochs_needs(name: RecipeName) -> None:
    recipe = RECIPES[name]
    of_a_budget = {"learning_rate", "weight_decay", "warmup", "batch_size", "augment", "label_smoothing", "clip_grad"}
    assert set(recipe.fields) <= {field.name for field in fields(FinetuneConfig)} - of_a_budget - {"recipe"}
    assert recipe.source and recipe.summary


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_expanded_and_what_is_written_beside_it_wins(name: RecipeName) -> None:
    recipe = RECIPES[name]
    whole = settings(recipe=name)
    assert whole.recipe is None and "recipe" not in to_mapping(whole, defaults=True)
    for field, value in recipe.fields.items():
        assert getattr(whole, field) == value
        other = {bool: False, str: "squared"}.get(type(value), 0.25) if value is not False else True
        assert settings(recipe=name, **{field: other}) == replace(whole, **{field: other})
    untouched = {field.name for field in fields(FinetuneConfig)} - set(recipe.fields) - {"learned_learning_rate"}
    assert all(getattr(whole, field) == getattr(FinetuneConfig(), field) for field in untouched)
    assert from_mapping(FinetuneConfig, to_mapping(whole), "again") == whole


def test_a_default_that_is_written_beside_a_recipe_wins_and_stays() -> None:
    unfrozen = settings(recipe="dynamicvit", freeze_backbone=0.0)
    assert unfrozen.freeze_backbone == 0 and settings(recipe="dynamicvit").freeze_backbone > 0
    assert from_mapping(FinetuneConfig, to_mapping(unfrozen), "again") == unfrozen
    assert settings(recipe=None) == FinetuneConfig()


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.learned_rate is not None])
def test_a_relative_learning_rate_follows_the_one_it_is_relative_to(name: RecipeName) -> None:
    factor = RECIPES[name].learned_rate
    assert settings(recipe=name).learned_learning_rate == pytest.approx(factor * 2e-5)
    assert settings(recipe=name, learning_rate=2.9e-5).learned_learning_rate == float(f"{factor * 2.9}e-5")
    assert settings(recipe=name, learning_rate=0.1).learned_learning_rate == pytest.approx(0.1 * factor)
    assert settings(recipe=name, learning_rate=1e-3, learned_learning_rate=3e-3).learned_learning_rate == 3e-3
    with pytest.raises(FileError, match="learning_rate: is 'fast'") as caught:
        settings(recipe=name, learning_rate="fast")
    assert len(caught.value.problems) == 1


STUDY = """version: 1
name: fake
model: {name: vit_digits_patch1_8}
space: {blocks: [1, 3]}
workers: {kind: serial}
finetune:
  batch_size: 64
  recipe: dynamicvit
"""


def test_an_unknown_recipe_is_said_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    for written, says in (
        ("dynamicvitt", "finetune.recipe (line 8): is 'dynamicvitt'; possible: asvit, dtps, dynamicvit"),
        ("[evit]", "finetune.recipe (line 8): is a list; possible: asvit"),
    ):
        file.write_text(STUDY.replace("recipe: dynamicvit", f"recipe: {written}"))
        with pytest.raises(FileError) as caught:
            load_study(file)
        assert says in str(caught.value)
    file.write_text(STUDY.replace("recipe: dynamicvit", "recipe: dynamicvitt"))
    with pytest.raises(FileError, match='Did you mean "dynamicvit"'):
        load_study(file)


def test_values_in_python_hold_no_recipe() -> None:
    with pytest.raises(UserError, match="from_mapping"):
        FinetuneConfig(recipe="ltmp")
    with pytest.raises(UserError, match="ltmp"):
        replace(FinetuneConfig(), recipe="ltmp")


# --- studies -----------------------------------------------------------------------------------------------------


def test_settings_override_the_file_before_its_recipe_is_expanded(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    faster = load_study(file, ["finetune.learning_rate=1e-4"]).finetune
    assert (faster.learning_rate, faster.learned_learning_rate, faster.ratio_weight) == (1e-4, 1e-2, 2.0)
    assert load_study(file, ["finetune.recipe=dynamicvit-maps"]).finetune.ratio_weight == 10
    assert load_study(file, ["finetune.recipe=null"]).finetune == FinetuneConfig(batch_size=64)
    assert load_study(file, ["finetune.ratio_weight=7"]).finetune.ratio_weight == 7


def test_a_study_keeps_its_fields_when_the_recipe_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its folder and database. A study file with a changed recipe is refused."""
    file, url = tmp_path / "study.yaml", storage_url(tmp_path)
    file.write_text(STUDY)
    config = load_study(file)
    assert config.finetune.ratio_weight == 2 and config.finetune.cross_entropy_weight == 1
    open_store(config, url).close()
    write_yaml(to_mapping(config), tmp_path / "kept.yaml")
    assert "recipe" not in (tmp_path / "kept.yaml").read_text()
    open_store(load_study(file, ["stop.trials=7"]), url).close()  # continues

    old = RECIPES["dynamicvit"]  # a later version has another recipe of this name
    later = replace(old, fields={**old.fields, "ratio_weight": 3.0, "cross_entropy_weight": 0.9}, learned_rate=50)
    monkeypatch.setitem(RECIPES, "dynamicvit", later)
    assert load_study(file).finetune.ratio_weight == 3, "the file now means the new one"
    assert load_study(tmp_path / "kept.yaml") == config
    reader = open_study_readonly(storage=url, name="fake")
    assert reader.config.finetune == config.finetune
    resumed = override_study(reader.config, ["stop.trials=9"])
    reader.close()
    open_store(resumed, url).close()
    with pytest.raises(StudyError) as caught:
        open_store(load_study(file), url)
    assert "finetune.ratio_weight: 2.0 -> 3.0" in str(caught.value)


# --- presets, list, docs -----------------------------------------------------------------------------------------


def test_every_preset_whose_decisions_learn_names_the_recipe_of_its_method() -> None:
    """`pool` learns no decisions, and no special loss is published for it."""
    for name, preset in presets().items():
        learned_scores = {score for score, entry in SCORERS.items() if entry.part is not None}
        learns = [row for row in preset.stages if row.threshold is not None or row.score in learned_scores]
        assert bool(preset.recipe) or not learns, name
        assert preset.recipe is None or preset.recipe in RECIPES
        if preset.recipe is not None:
            holds = any(REDUCERS[row.reduce].holds for row in preset.stages)
            assert holds == (RECIPES[preset.recipe].fields.get("ratio_weight") == 10), name
            assert (preset.target is not None) == ("budget_weight" in RECIPES[preset.recipe].fields), name
    assert {preset.recipe for preset in presets().values()} == {None, *RECIPES}


def test_list_shows_values_and_source(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["list", "recipes", "dynamicvit*"]) == 0
    text = capsys.readouterr().out
    for part in ("dynamicvit-maps", "ratio_weight: 10.0", "learned_learning_rate: 5 x", "2207.01580", "dynswin-t-0.7"):
        assert part in text
    assert "ltmp" not in text


@pytest.mark.parametrize("name", RECIPES)
def test_the_docs_hold_every_value(name: RecipeName) -> None:
    (row,) = (line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |"))
    recipe = RECIPES[name]
    for field, value in recipe.fields.items():
        assert f"`{field}: {json.dumps(value).strip(chr(34))}`" in row, field
    assert ("as it is" if recipe.learned_rate is None else f"{recipe.learned_rate:g} x `learning_rate`") in row
    assert recipe.source in row


@pytest.mark.parametrize(
    ("space", "name", "own"),
    [
        ("convnext_tiny", "dynamicvit-maps", set()),
        ("deit_small_predictor", "dynamicvit", set()),
        ("cifar10_predictor", "dynamicvit", set()),
        ("deit_small_thresholds", "asvit", set()),
        ("cifar10_thresholds", "asvit", {"budget_weight", "budget_loss"}),  # too small a model for a weight per GMAC
    ],
)
def test_spaces_of_one_methods_stages_train_as_it_does(space: str, name: RecipeName, own: set[str]) -> None:
    trained = load_study(DOCS.parents[1] / "search_spaces" / f"{space}.yaml").finetune
    recipe = RECIPES[name].fields
    assert {field for field, value in recipe.items() if getattr(trained, field) != value} == own


# --- what cannot apply is harmless -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("preset", [None, "evit-0.7", "tome-r8"])
def test_a_recipe_is_harmless_where_it_cannot_apply(name: RecipeName, preset: str | None) -> None:
    """The dense model and start presets are trained with the study's fine-tune, whatever its recipe."""
    model = replace(VIT, options=(("depth", 4),), pretrained=False)
    schedule = Schedule() if preset is None else load_preset(preset, shape_of(build_model(model)))
    task = Task(
        "x", model, DataConfig(train_images=32, val_images=16), schedule, Budget(images=32), ("top1",),
        settings(recipe=name, batch_size=16), threads=1,
    )  # fmt: skip
    found = evaluate(task)
    assert found.status == "complete", found.traceback
    frozen = RECIPES[name].fields["freeze_backbone"] == 1
    assert found.images == (0 if frozen else 32), "with nothing to learn no image is seen"
