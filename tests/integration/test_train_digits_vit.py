"""The script that trained the shipped weights still runs, and timm loads its output."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm

import prunesearch.models.digits_vit  # noqa: F401  (registers the model)

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_digits_vit.py"


def test_one_epoch_writes_weights_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "weights.safetensors"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--epochs", "1", "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    timm.create_model("vit_digits_patch1_8").load_state_dict(safetensors.torch.load_file(output))
    card = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "`python scripts/train_digits_vit.py --epochs 1`" in card
    assert "155,530 parameters" in card
