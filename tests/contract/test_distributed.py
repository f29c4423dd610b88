"""Training in two processes with DDP and FSDP2 (each block wrapped) gives the same results as one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed
from two_processes import PROCESSES, SCHEDULES, work

CASES = [(wrapper, schedule) for wrapper in ("DDP", "FSDP2") for schedule in SCHEDULES]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo here"
)


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    """The differences found by each process. All cases run in one start, because imports take most of the time."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (str(folder), CASES), nprocs=PROCESSES)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "schedule"), CASES)
def test_two_processes_train_as_one(wrapper: str, schedule: str, differences: list[dict]) -> None:
    for found in (differences[rank][f"{wrapper} {schedule}"] for rank in range(PROCESSES)):
        assert found["trained"] > 1e-4, "training should change parameters by more than rounding"
        for what in ("losses", "parameters", "logits"):
            assert found[what] < 1e-5, (what, found)
