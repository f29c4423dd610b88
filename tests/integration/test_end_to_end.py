"""End to end as a new user: image folder, timm ViT, study file, Ray, export, and a new process that applies it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

STUDY = """
version: 1
name: own
model:
  name: vit_tiny_patch16_224
  image_size: 32
  num_classes: 3
  options: {patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2}
data: {name: folder, root: ROOT}
space:
  blocks: [1, {block: 2, reduce: [drop, merge]}]
  keep: {low: 0.5, high: 1.0, step: 0.1}
  at: [mid, pre]
  score: [class_attention, key_norm]
  reduce: [fuse, squeeze]
objectives: [{metric: top1, goal: maximize}, {metric: gmacs, goal: minimize}]
metrics: [loss]
finetune: {learning_rate: 1e-3, batch_size: 8, augment: flip}
rungs: [{images: 24}]
workers: {kind: ray, count: 2, cpus_each: 0.5}
stop: {trials: 8}
"""

APPLY = """
import json, sys, timm, torch
from prunesearch import apply_schedule, load_schedule
from safetensors.torch import load_file
size = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)
apply_schedule(model, load_schedule("best.yaml")).eval()
model.load_state_dict(load_file("best.safetensors"))
print(model(torch.zeros(2, 3, 32, 32)).shape)
"""


def image_folder(root: Path) -> Path:
    """A data set with three colours as classes: split/class/image.png."""
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 8)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_an_image_folder_to_a_schedule_in_a_new_process(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    (tmp_path / "own.yaml").write_text(STUDY.replace("ROOT", str(root)))
    cli = ("-m", "prunesearch")
    assert "fine" in run(tmp_path, *cli, "check", "own.yaml")
    lines = run(tmp_path, *cli, "run", "own.yaml")
    assert "2 Ray workers" in lines and "8/8" in lines and "failed (" not in lines
    rows = json.loads(run(tmp_path, *cli, "front", "outputs/own", "--json", "--plot", "front.png"))
    assert rows and (tmp_path / "front.png").exists()
    trained = next(row for row in rows if row["schedule"])
    run(tmp_path, *cli, "export", "outputs/own", "--trial", str(trained["trial"]), "--weights", "-o", "best.yaml")
    assert run(tmp_path, "-c", APPLY).strip() == "torch.Size([2, 3])"
    again = json.loads(run(tmp_path, *cli, "evaluate", "best.yaml", "--metric", "top1", "--metric", "loss", "--json"))
    assert again["pruned"]["top1"] == trained["metrics"]["top1"]
