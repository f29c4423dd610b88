"""Loss terms of a schedule that learns decisions: they hold counts to their budget, and tokens to the dense model's.

Letters in tensor names as in `tokens/inputs.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunesearch.config import FinetuneConfig
from prunesearch.cost import MACS, CostTable, cost_of_counts, target_of
from prunesearch.models import PlannedStep, Trace, keeps_places, schedule_of, shape_of, steps_of
from prunesearch.profile import Profile
from prunesearch.shape import ModelShape
from prunesearch.tokens import REDUCERS


def learns_decisions(model: nn.Module) -> bool:
    """Whether the model's schedule has learned scores or thresholds, so that tokens stay in their slots in training."""
    return any(step.decisions_learn for step in steps_of(model))


def distills_tokens(model: nn.Module, config: FinetuneConfig) -> bool:
    """Whether the loss compares final tokens with the dense model's: with a predictor, and if tokens are in their slots
    at the end, because no stage pools, and each either keeps them there or brings them back."""
    steps = steps_of(model)
    predicts = any(step.stage.learns_to_score for step in steps)
    pools = any(REDUCERS[step.stage.reduce].pools for step in steps)
    stay = shape_of(model).holds or all(step.decisions_learn or step.step.until is not None for step in steps)
    return predicts and config.distill_tokens_weight > 0 and not pools and stay


def distills_patches(model: nn.Module, config: FinetuneConfig) -> bool:
    """Whether the loss compares patch tokens with the dense model's, because all are in their places at the end."""
    return config.distill_patches_weight > 0 and keeps_places(model)


class ScheduleLoss:
    """The loss terms of one model, called with each batch's trace.

    profile: of the device, for a schedule whose target is in milliseconds; without it that raises DeviceError.
    """

    def __init__(self, model: nn.Module, config: FinetuneConfig, profile: Profile | None = None) -> None:
        self._config, self._shape, self._steps = config, shape_of(model), steps_of(model)
        schedule = schedule_of(model)
        self._target = None if schedule is None else target_of(schedule, profile)

    def __call__(self, trace: Trace, dense_patches_BnC: Tensor | None) -> Tensor:
        """Weighted sum of the terms. dense_patches_BnC: final normalised patch tokens of the dense model, or None."""
        config = self._config
        loss = config.ratio_weight * ratio_loss(trace, self._steps, self._shape)
        if self._target is not None:
            amount, table = self._target
            dense, _, _ = cost_of_counts(self._shape, [], [], table)
            share = costs_of_images(trace, self._steps, self._shape, table).mean() / dense
            miss = share - table.per_unit * amount / dense
            if config.budget_loss == "absolute_gmacs":
                miss = miss * (dense / table.per_unit)
            loss = loss + config.budget_weight * (miss.square() if config.budget_loss == "squared" else miss.abs())
        if dense_patches_BnC is not None:
            distance = token_loss(trace, dense_patches_BnC, config.distill_tokens_loss)
            loss = loss + config.distill_tokens_weight * distance
        return loss


def ratio_loss(trace: Trace, steps: Sequence[PlannedStep], shape: ModelShape) -> Tensor:
    """DynamicViT, eq. 10: squared difference between each image's kept fraction and its stage's.

    Mean over images and over stages with learned scores. Fractions are of the model's patch tokens.
    """
    first = len(steps) - len(trace.counts)
    losses = []
    for step, count_B in zip(steps[first:], trace.counts, strict=True):
        if step.stage.learns_to_score and not step.stage.is_adaptive:
            kept_B = count_B - REDUCERS[step.stage.reduce].extra_tokens
            losses.append(((kept_B - step.step.kept) / shape.patch_tokens).square().mean())
    return torch.stack(losses).mean() if losses else trace.logits.new_zeros(())


def token_loss(trace: Trace, dense_patches_BnC: Tensor, kind: Literal["squared", "kl"] = "squared") -> Tensor:
    """Distance between the final tokens that were kept and the same tokens of the dense model, mean over tokens.

    squared: mean over the channels (DynamicViT, eq. 12). kl: KL(dense || pruned) of the softmax over the channels, as
    in the released code of TPS.
    """
    tokens = dense_patches_BnC.shape[1]  # a fused token is in a later slot and has no counterpart
    pruned_BnC, dense_BnC = trace.patches_BnC[:, :tokens].float(), dense_patches_BnC.float()
    if kind == "kl":
        logs = pruned_BnC.log_softmax(dim=-1), dense_BnC.log_softmax(dim=-1)
        distance_Bn = F.kl_div(*logs, reduction="none", log_target=True).sum(dim=-1)
    else:
        distance_Bn = (pruned_BnC - dense_BnC).square().mean(dim=-1)
    if trace.present_Bn is None:
        return distance_Bn.mean()
    kept_Bn = trace.present_Bn[:, :tokens].detach()
    return (distance_Bn * kept_Bn).sum() / kept_Bn.sum()


def costs_of_images(trace: Trace, steps: Sequence[PlannedStep], shape: ModelShape, table: CostTable = MACS) -> Tensor:
    """Cost of each image, (B,), by its own counts. In training they carry gradients to the decisions."""
    return cost_by_counts(trace.counts, steps, shape, trace.logits.shape[0], table)


def cost_by_counts(
    counts: Sequence[Tensor],
    steps: Sequence[PlannedStep],
    shape: ModelShape,
    images: int,
    table: CostTable = MACS,
) -> Tensor:
    """Cost of each image (MACs, or milliseconds of a profile), (images,), from counts as in a `Trace`."""
    fixed = [step.step.after for step in steps[: len(steps) - len(counts)]]
    after = [*fixed, *(count_B.double() for count_B in counts)]
    cost, _, _ = cost_of_counts(shape, [step.step for step in steps], after, table)
    return cost if isinstance(cost, Tensor) else torch.full((images,), float(cost), dtype=torch.float64)
