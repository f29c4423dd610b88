"""Tests on a GPU: the same decisions as on the CPU, no hidden transfers, compiled graphs, and GPU memory.

Skipped without a CUDA device. These tests need PyTorch and timm, but neither Ray nor Optuna.
"""

from __future__ import annotations

import pytest
import timm
import torch

from prunesearch.config import Budget, DataConfig, ModelConfig
from prunesearch.evaluate import Task, evaluate
from prunesearch.models import apply_schedule, trace
from prunesearch.schedule import Schedule, Stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::prunesearch.errors.UntrainedWarning"),
]
SCHEDULES = {
    "drop": Schedule((Stage(1, keep=0.7), Stage(2, keep=0.5))),
    "squeeze": Schedule((Stage(1, keep=0.7, reduce="squeeze"),)),
    "merge": Schedule((Stage(1, keep=0.7, reduce="merge"),)),
    "pool": Schedule((Stage(1, at="pre", tokens=20, reduce="pool"),)),
    "threshold": Schedule((Stage(1, at="pre", score="head_weighted_class_attention", threshold=0.01),)),
}
FAMILIES = {
    "vit_small_patch16_dinov3": "host",
    "vit_small_patch16_rope_mixed_224": "mean",
    "beit_base_patch16_224": "mean",
    "vit_relpos_small_patch16_224": "host",
    "naflexvit_base_patch16_gap": "mean",
}
"""One model of each other family of ViTs, and where it puts a token that stands for several."""
SCHEDULES |= {
    name: Schedule(
        (
            Stage(1, score="key_norm", keep=0.7, reduce="squeeze", options=(("position", position),)),
            Stage(2, at="pre", score="none", keep=0.7, reduce="merge", options=(("position", position),)),
        )
    )
    for name, position in FAMILIES.items()
}


def model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    family = name if name in FAMILIES else "vit_tiny_patch16_224"
    sizes: dict[str, object] = dict(depth=4, embed_dim=192, num_heads=3, num_classes=10)
    if family.startswith("naflexvit"):
        sizes["pretrained_cfg_overlay"] = {"input_size": (3, 96, 96)}
    else:
        sizes["img_size"] = 96
    return apply_schedule(timm.create_model(family, **sizes).eval(), SCHEDULES[name])


def images() -> torch.Tensor:
    return torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_gpu_decides_as_the_cpu_does(name: str) -> None:
    with torch.no_grad():
        on_cpu = trace(model(name), images())
        on_gpu = trace(model(name).cuda(), images().cuda())
    assert [count.tolist() for count in on_gpu.counts] == [count.tolist() for count in on_cpu.counts]
    torch.testing.assert_close(on_gpu.logits.cpu(), on_cpu.logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "threshold"])
def test_fixed_counts_never_wait_for_the_gpu(name: str) -> None:
    pruned, batch = model(name).cuda(), images().cuda()
    pruned(batch)
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            pruned(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "threshold"])
def test_one_graph_on_the_gpu(name: str) -> None:
    pruned, batch = model(name).cuda(), images().cuda()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(pruned, fullgraph=True)(batch), pruned(batch), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_half_precision_learns(name: str) -> None:
    pruned, batch = model(name).cuda().train(), images().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = trace(pruned, batch).logits.float().square().mean()
    loss.backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in pruned.parameters())


def test_an_evaluation_runs_on_the_gpu() -> None:
    task = Task(
        "gpu",
        ModelConfig("vit_digits_patch1_8", pretrained=True),
        DataConfig(),
        SCHEDULES["drop"],
        Budget(images=128),
        metrics=("top1", "latency_ms", "throughput", "peak_memory_mb"),
        device="cuda",
    )
    found = evaluate(task, raise_user_errors=True)
    assert found.status == "complete", found.error
    assert found.device and found.value("peak_memory_mb") > 1 and found.value("throughput") > 100
