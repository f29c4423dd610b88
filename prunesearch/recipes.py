"""Published training recipes by name. A recipe stands for several fields of a study's `finetune` section.

When a section is read, the recipe is replaced by its fields. Studies store, show and compare the fields and not the
name, so a later change of a recipe does not change a study that has begun. docs/recipes.md says which parts of a
paper's training a recipe leaves out, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

RecipeName = Literal["asvit", "dtps", "dynamicvit", "dynamicvit-maps", "evit", "ltmp", "svit"]


@dataclass(frozen=True)
class Recipe:
    """What a method publishes about its training.

    fields: fields of `finetune` with their values. learned_rate: `learned_learning_rate` as a multiple of
    `learning_rate`; None when the source has no such rule.
    """

    summary: str
    source: str
    fields: Mapping[str, bool | float | str]
    learned_rate: float | None = None


RECIPES: dict[RecipeName, Recipe] = {
    "asvit": Recipe(
        summary="cross entropy + 2 x |GMACs miss| + 0.5 x KL",
        source="AS-ViT (IJCAI 2023, arXiv 2209.13802); losses.py, main.py of its released code",
        fields={
            "cross_entropy_weight": 1.0,
            "distill": True,
            "distill_weight": 0.5,
            "temperature": 1.0,
            "budget_weight": 2.0,
            "budget_loss": "absolute_gmacs",
            "freeze_backbone": 0.0,
        },
    ),
    "dtps": Recipe(
        summary="DynamicViT's, with KL between tokens too; nothing is frozen",
        source="TPS (CVPR 2023, arXiv 2304.10716); losses/loss.py, dtps_deit_s_30e.sh of its released code",
        fields={
            "cross_entropy_weight": 1.0,
            "distill": True,
            "distill_weight": 0.5,
            "temperature": 1.0,
            "ratio_weight": 2.0,
            "distill_tokens_weight": 0.5,
            "distill_tokens_loss": "kl",
            "freeze_backbone": 0.0,
        },
        learned_rate=100,
    ),
    "dynamicvit": Recipe(
        summary="cross entropy + 2 x ratio + 0.5 x KL + 0.5 x tokens",
        source="DynamicViT (NeurIPS 2021, arXiv 2106.02034); losses.py, optim_factory.py of its released code",
        fields={
            "cross_entropy_weight": 1.0,
            "distill": True,
            "distill_weight": 0.5,
            "temperature": 1.0,
            "ratio_weight": 2.0,
            "distill_tokens_weight": 0.5,
            "distill_tokens_loss": "squared",
            "freeze_backbone": 0.1667,  # the first 5 of 30 epochs
        },
        learned_rate=100,
    ),
    "dynamicvit-maps": Recipe(
        summary="DynamicViT's for Swin and ConvNeXt: 10 x ratio",
        source="Dynamic spatial sparsification (T-PAMI, arXiv 2207.01580); main.py, losses.py of its released code",
        fields={
            "cross_entropy_weight": 1.0,
            "distill": True,
            "distill_weight": 0.5,
            "temperature": 1.0,
            "ratio_weight": 10.0,
            "distill_tokens_weight": 0.5,
            "distill_tokens_loss": "squared",
            "freeze_backbone": 0.0417,  # the first 5 of 120 epochs
        },
        learned_rate=5,
    ),
    "evit": Recipe(
        summary="cross entropy alone",
        source="EViT (ICLR 2022, arXiv 2202.07800); finetune.sh of its released code",
        fields={"cross_entropy_weight": 1.0, "distill": False, "freeze_backbone": 0.0},
    ),
    "ltmp": Recipe(
        summary="cross entropy + 10 x (miss of the share)^2; only thresholds train",
        source="LTMP (TMLR 2023, arXiv 2307.10780); tools/train.py of its released code",
        fields={
            "cross_entropy_weight": 1.0,
            "distill": False,
            "budget_weight": 10.0,
            "budget_loss": "squared",
            "freeze_backbone": 1.0,
        },
    ),
    "svit": Recipe(
        summary="cross entropy + 4 x (miss of the share)^2",
        source="SViT (WACV 2024, arXiv 2306.07050); classification/engine.py, README.md of its released code",
        fields={
            "cross_entropy_weight": 1.0,
            "distill": False,
            "budget_weight": 4.0,
            "budget_loss": "squared",
            "freeze_backbone": 0.0,
        },
    ),
}


def expanded(section: Mapping[str, Any], learning_rate: float) -> dict[str, Any]:
    """Replace the recipe in a `finetune` section, as read from a file, by the fields it stands for.

    Fields written beside the recipe win. learning_rate: the default of that field. An unknown recipe stays in the
    section, and the reader reports it.
    """
    name = section.get("recipe")
    recipe = RECIPES.get(name) if isinstance(name, str) else None  # type: ignore[call-overload]
    if recipe is None:
        return dict(section)
    given = {field: value for field, value in section.items() if field != "recipe"}
    rate = given.get("learning_rate", learning_rate)
    if recipe.learned_rate is None or isinstance(rate, bool) or not isinstance(rate, int | float):
        return {**recipe.fields, **given}
    learned = float(Decimal(repr(rate)) * Decimal(repr(recipe.learned_rate)))  # decimal, so that 100 x 2.9e-5 is 0.0029
    return {**recipe.fields, "learned_learning_rate": learned, **given}
