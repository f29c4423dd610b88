"""A whole search for a model of every family: random weights, the digits, three candidates with a short training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunesearch.config import (
    Budget,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    Objective,
    SamplerConfig,
    SpaceConfig,
    StopConfig,
    StudyConfig,
    WorkersConfig,
)
from prunesearch.evaluate.build import build_model
from prunesearch.export.schedules import export
from prunesearch.models import apply_schedule, class_of
from prunesearch.search.driver import run_study
from prunesearch.study.reader import open_study_readonly

VIT = {"patch_size": 2, "embed_dim": 32, "num_heads": 2, "depth": 3, "in_chans": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "VisionTransformer": ("vit_base_patch16_siglip_224", VIT),
    "VisionTransformerDistilled": ("deit_tiny_distilled_patch16_224", VIT),
    "Eva": ("vit_small_patch16_dinov3", VIT),
    "Beit": ("beit_base_patch16_224", VIT),
    "VisionTransformerRelPos": ("vit_relpos_small_patch16_224", VIT),
    "NaFlexVit": ("naflexvit_base_patch16_gap", VIT),
    "SwinTransformer": ("swin_tiny_patch4_window7_224", {"patch_size": 1, "embed_dim": 12, "in_chans": 1}),
    "SwinTransformerV2": ("swinv2_tiny_window8_256", {"patch_size": 1, "embed_dim": 12, "in_chans": 1}),
    "ConvNeXt": ("test_convnext", {"in_chans": 1}),
}


def study(family: str) -> StudyConfig:
    name, options = MODELS[family]
    is_map = family in ("SwinTransformer", "SwinTransformerV2", "ConvNeXt")
    space = SpaceConfig(
        blocks=(0, 1) if is_map else (1, 2),
        keep=(0.5, 0.7),
        at=("pre",) if is_map else ("mid",),
        score=("random",) if is_map else ("key_norm", "attention_received"),
        reduce=("hold",) if is_map else ("drop", "squeeze", "merge"),
    )
    return StudyConfig(
        version=1,
        name="families",
        model=ModelConfig(
            name, image_size=64 if family == "ConvNeXt" else 8, num_classes=10, options=tuple(options.items())
        ),
        data=DataConfig(name="digits", mean=(0.3,), std=(0.38,)),
        space=space,
        objectives=(Objective("top1", "maximize"), Objective("gmacs", "minimize")),
        finetune=FinetuneConfig(batch_size=32),
        rungs=(Budget(images=64),),
        sampler=SamplerConfig("random", 0),
        workers=WorkersConfig(kind="serial"),
        stop=StopConfig(trials=4),
    )


@pytest.mark.parametrize("family", MODELS)
def test_three_candidates_and_an_export(family: str, tmp_path: Path) -> None:
    config = study(family)
    run_study(config, tmp_path / "study")
    reader = open_study_readonly(folder=tmp_path / "study")
    records = reader.records()
    assert [record.state for record in records] == ["complete"] * 4, [record.outcome for record in records]
    pruned = next(record for record in records if record.schedule.stages)
    export(pruned, reader.config, tmp_path / "best.yaml", weights=True, vocabulary=reader.vocabulary)
    reader.close()
    model = build_model(replace(config.model, pretrained=False)).eval()
    assert class_of(model) == family
    apply_schedule(model, tmp_path / "best.yaml")
    size = config.model.image_size or 0
    with torch.no_grad():
        assert model(torch.rand(2, 1, size, size)).isfinite().all()
