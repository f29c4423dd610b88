"""Import, apply and check work with the oldest supported versions and without Ray.

`scripts/test_oldest` runs this file and test_variants.py with the oldest versions, the ordinary run with the newest.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from small_models import images, randomise, small_model, some_pairs, two_stages

from prunesearch import Schedule, Stage, apply_schedule, estimate_cost, load_schedule, save_schedule, shape_of
from prunesearch.cli import main

SPACES = Path(__file__).parents[2] / "search_spaces"
MAPS = {
    "swin_tiny_patch4_window7_224": dict(img_size=64, window_size=2, embed_dim=16, num_heads=(1, 1, 2, 2)),
    "convnext_tiny": dict(dims=(8, 8, 16, 16), depths=(1, 1, 2, 1)),
}


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_and_its_command_line_need_no_ray() -> None:
    code = "import sys; sys.modules['ray'] = None\nimport prunesearch.cli as c; sys.exit(c.main(['list', 'scores']))"
    assert "class_attention" in run("-c", code)


@pytest.mark.parametrize(("score", "verb"), some_pairs())
def test_schedules_are_applied(score: str, verb: str, tmp_path: Path) -> None:
    """A schedule from a file gives the predicted token counts."""
    model, schedule = small_model(), two_stages(score, verb)
    save_schedule(schedule, tmp_path / "best.yaml")
    apply_schedule(model, load_schedule(tmp_path / "best.yaml"), untrained=True)
    with torch.inference_mode():
        tokens = model.forward_features(images())
    assert tokens.shape[1] == estimate_cost(shape_of(model), schedule).tokens[-1] and tokens.isfinite().all()


@pytest.mark.parametrize("name", MAPS)
def test_schedules_are_applied_to_maps(name: str) -> None:
    model = randomise(timm.create_model(name, num_classes=5, **MAPS[name])).eval()
    if name == "convnext_tiny":
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    x = images(2, 64)
    with torch.inference_mode():
        before = model(x)
        assert torch.equal(apply_schedule(model, Schedule())(x), before)
        held = apply_schedule(
            model, Schedule((Stage(1, at="pre", score="predictor", keep=0.5, reduce="hold"),)), untrained=True
        )
        assert held(x).shape == before.shape and not torch.equal(held(x), before)


@pytest.mark.parametrize("space", ["digits", "digits_predictor", "digits_thresholds", "deit_small_everything"])
def test_studies_are_checked(space: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(SPACES / f"{space}.yaml")]) == 0
    assert "fine" in capsys.readouterr().out


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (self.path,)


def test_a_study_file_cannot_make_timm_load_a_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """timm 1.0.22 unpickles the file that `checkpoint_path` names."""
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    given = f"model.options={{checkpoint_path: {tmp_path / 'weights.pth'}}}"
    assert main(["check", str(SPACES / "digits.yaml"), "--set", given]) == 2
    assert "checkpoint_path" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()
