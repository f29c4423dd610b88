"""The program of each process in test_distributed.py: train small models with schedules under DDP or FSDP2.

The result is compared with one process that averages over both halves of the batch, each with its own random numbers.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from small_models import images, small_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunesearch.models import apply_schedule, trace
from prunesearch.schedule import Schedule, Stage

PROCESSES = 2
STEPS = 2
SCHEDULES = {
    "drop": Schedule((Stage(1, keep=0.6), Stage(2, at="pre", keep=0.6))),
    "merge": Schedule((Stage(1, keep=0.6, reduce="merge"), Stage(2, keep=0.7, reduce="merge"))),
    "predictor": Schedule((Stage(1, score="predictor", keep=0.6), Stage(2, score="predictor", keep=0.6, at="pre"))),
    "threshold": Schedule((Stage(1, threshold=0.028), Stage(2, threshold=0.9, reduce="merge"))),
    "threshold_checkpointed": Schedule((Stage(1, threshold=0.028), Stage(2, threshold=0.9, reduce="merge"))),
}
FAMILIES = {
    "eva_mixed": "class_attention",
    "eva_dinov3": "class_attention",
    "beit_both": "class_attention",
    "naflex_rotary": "class_attention",
    "relpos": "class_attention",
    "relpos_shared_mlp": "key_norm",
}
"""Layouts of other families than VisionTransformer, and a score that each has."""
for _layout, _score in FAMILIES.items():
    SCHEDULES[_layout] = Schedule(
        (
            Stage(1, score=_score, keep=0.6, reduce="squeeze", options=(("position", "mean"),)),
            Stage(2, at="pre", score="predictor", keep=0.7),
        )
    )


def fresh(case: str) -> nn.Module:
    """A new model for a case, in training mode."""
    layout = case if case in FAMILIES else "class"
    model = apply_schedule(small_model(layout), SCHEDULES[case], untrained=True).train()
    model.set_grad_checkpointing(case.endswith("checkpointed"))
    return model


def loss_of(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    """A loss of the logits and of the token counts, with random numbers from a seed."""
    torch.manual_seed(seed)
    outcome = trace(model, x)
    return outcome.logits.square().mean() + sum(0.01 * count.mean() for count in outcome.counts)


def train(model: nn.Module, shards: list[tuple[Tensor, int]]) -> tuple[list[float], dict[str, Tensor]]:
    """Train on the mean over shards; returns the loss of each shard in each step, and the final parameters."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, seed in shards:
            loss = loss_of(model, x, 10 * step + seed)
            (loss / len(shards)).backward()
            losses.append(loss.item())
        optimizer.step()
    return losses, dict(model.named_parameters())


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """Logits in evaluation mode."""
    with torch.no_grad():
        return model.eval()(x)


def compare(wrapper: str, case: str) -> dict[str, float]:
    """Largest difference to the single process: losses, parameters after training, logits."""
    rank, halves = dist.get_rank(), images(4 * PROCESSES).chunk(PROCESSES)
    single = fresh(case)
    losses, wanted = train(single, [(half, seed) for seed, half in enumerate(halves)])
    start = {name: value.detach().clone() for name, value in fresh(case).named_parameters()}
    model: nn.Module = fresh(case)
    if wrapper == "DDP":
        wrapped: nn.Module = DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        wrapped = fully_shard(model)
    own, found = train(wrapped, [(halves[rank], rank)])
    logits = evaluated(wrapped, halves[rank])
    whole = {name.removeprefix("module."): _whole(value) for name, value in found.items()}
    assert whole.keys() == wanted.keys()
    return {
        "losses": max(abs(one - other) for one, other in zip(own, losses[rank::PROCESSES], strict=True)),
        "parameters": max((whole[name] - value).abs().max().item() for name, value in wanted.items()),
        "trained": max((start[name] - value).abs().max().item() for name, value in wanted.items()),
        "logits": (logits - evaluated(single, halves[rank])).abs().max().item(),
    }


def _whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()


def work(rank: int, folder: str, cases: list[tuple[str, str]]) -> None:
    """Main function of a process: compare each (wrapper, schedule), and write the results to FOLDER/RANK.json."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    found = {f"{wrapper} {schedule}": compare(wrapper, schedule) for wrapper, schedule in cases}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
