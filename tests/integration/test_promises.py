"""Promises of the README that no other test covers completely. tests/unit/test_readme.py checks the names."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import prunesearch.models  # noqa: F401  (registers the digits model)
from prunesearch import Schedule, Stage, apply_schedule, remove_schedule
from prunesearch.cli import main

STUDY = """
version: 1
name: small
model: {name: vit_digits_patch1_8, pretrained: true}
data: {name: digits, train_images: 60}
space: {blocks: [1, 3], keep: [0.5, 0.7], reduce: [drop, merge], start_from: [etps-0.7]}
finetune: {learning_rate: 1e-3, batch_size: 30}
rungs: [{images: 60}]
workers: {kind: serial}
stop: {trials: 4}
"""
USERS_SCRIPT = """
import timm, torch
import prunesearch.models
from prunesearch import apply_schedule
from prunesearch.evaluate.digits import load_digits
torch.set_num_threads(1)
model = timm.create_model("vit_digits_patch1_8", pretrained=False).eval()
apply_schedule(model, "best.yaml")
images, labels = load_digits("validation")
with torch.inference_mode():
    logits = model(((images / 255 - 0.305) / 0.376)[:, None])
print(100 * (logits.argmax(1) == labels).double().mean().item())
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(STUDY)
    arguments = ["run", str(tmp_path / "small.yaml"), "--output", str(tmp_path), "--no-progress"]
    assert main(arguments) == 0
    return tmp_path / "small"


def test_what_was_measured_is_what_is_applied(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's own evaluation loop in a new process, without the study, gives the measured top-1."""
    capsys.readouterr()
    main(["front", str(study), "--json"])
    rows = [row for row in json.loads(capsys.readouterr().out) if row["schedule"].get("stages")]
    for row in rows:
        main(["export", str(study), "--trial", str(row["trial"]), "--weights", "-o", str(study / "best.yaml")])
        done = subprocess.run(
            [sys.executable, "-c", USERS_SCRIPT], cwd=study, capture_output=True, text=True, check=True
        )
        assert float(done.stdout) == row["metrics"]["top1"]
    assert rows


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_no_surprises_in_the_model(name: str) -> None:
    model = timm.create_model(name, depth=3, embed_dim=24, num_heads=2, img_size=64, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        keys, before = list(model.state_dict()), model(images)
        assert torch.equal(apply_schedule(model, Schedule())(images), before)
        apply_schedule(model, Schedule((Stage(1, keep=0.5, reduce="squeeze"), Stage(2, keep=0.5, reduce="drop"))))
        pruned = model(images)
        assert list(model.state_dict()) == keys
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(twin(images), pruned)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), pruned)
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), pruned)
    model.set_grad_checkpointing()
    model.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(remove_schedule(model).eval()(images), before)
