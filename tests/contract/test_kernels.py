"""Kernels that a stage adds to a model in eager mode: small batches and small models wait for launches, not arithmetic.

Counted are the non-view ATen operators that PyTorch dispatches for one image, those of the dense model subtracted. A
reshape that copies counts. Composite operators are dispatched whole in inference mode and in parts without it, so both
are counted: neither may hide work in the other.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prunesearch import Schedule, Stage, apply_schedule
from prunesearch.tokens import SCORERS

VERBS = {"drop": 7, "fuse": 9, "squeeze": 18, "absorb": 20, "merge": 20, "drop_or_merge": 34}
"""Kernels of a stage with this verb and class_attention (merge without a score; drop_or_merge with value_weighted)."""
SCORES = {
    "class_attention": 7,
    "head_weighted_class_attention": 12,
    "value_weighted": 12,
    "attention_received": 9,
    "key_norm": 8,
    "predictor": 16,
    "random": 24,
}
"""Kernels of a stage with this score and drop."""


class Kernels(TorchDispatchMode):
    """Counts the operators that make new memory, or write to their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        made = [one for one in (result if isinstance(result, tuple | list) else (result,)) if torch.is_tensor(one)]
        writes = any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)
        self.count += writes or any(one.untyped_storage().data_ptr() not in inputs for one in made)
        return result


def kernels(stage: Stage | None, inference: bool) -> int:
    """Of a forward pass of DeiT-S with four blocks and small channels, which has as many as the whole one."""
    model = timm.create_model("deit_small_patch16_224", depth=4, embed_dim=48, num_heads=3).eval()
    if stage is not None:
        apply_schedule(model, Schedule((stage,)))
    image = torch.rand(1, 3, 224, 224)
    with torch.inference_mode() if inference else torch.no_grad(), Kernels() as counted:
        model(image)
    return counted.count


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "no_grad"])
@pytest.mark.parametrize("verb", VERBS)
def test_kernels_of_a_verb(verb: str, inference: bool) -> None:
    score = {"merge": "none", "drop_or_merge": "value_weighted"}.get(verb, "class_attention")
    added = kernels(Stage(1, keep=0.7, reduce=verb, score=score), inference) - kernels(None, inference)
    assert added == VERBS[verb]


@pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning")
@pytest.mark.parametrize("score", SCORES)
def test_kernels_of_a_score(score: str) -> None:
    stage = Stage(1, at="mid" if SCORERS[score].needs_attention else "pre", keep=0.7, score=score)
    assert kernels(stage, True) - kernels(None, True) == SCORES[score]


def test_merged_tokens_cost_later_blocks_nothing() -> None:
    """The bias of proportional attention is computed once, not in every block."""

    def of(block: int) -> int:
        return kernels(Stage(block, keep=0.7, reduce="merge", score="none"), True)

    assert of(0) == of(1) == of(2)
