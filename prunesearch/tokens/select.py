"""Select the tokens that stay: the k best of each image, those above a threshold, or a random draw in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_is_tracing = torch._C._is_tracing
"""torch.jit.is_tracing without its two calls in Python. Stages ask it many times in a pass."""


def in_onnx_export() -> bool:
    """Whether torch.onnx.export runs. PyTorch's own function is slow, so it is asked only while a graph is recorded."""
    return (torch.compiler.is_compiling() or _is_tracing()) and torch.onnx.is_in_onnx_export()


def may_overwrite() -> bool:
    """Whether a tensor that nothing else needs may be written to: without gradients, and not in an ONNX graph, where
    writing to a part of one is a scatter."""
    return not (torch.is_grad_enabled() or in_onnx_export())


def top_k(scores_Bn: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Indices of the `kept` best tokens, ascending (image order), and of the others, by descending score."""
    kept_BK, guests_BG, _ = top_k_and_rest(scores_Bn, kept)
    return kept_BK, guests_BG


def top_k_and_rest(scores_Bn: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `top_k`, and the scores of the others."""
    ranked_Bn, order_Bn = ranked(scores_Bn)
    return ascending(order_Bn[:, :kept])[0], order_Bn[:, kept:], ranked_Bn[:, kept:]


def ranked(scores_Bn: Tensor) -> tuple[Tensor, Tensor]:
    """The scores in descending order, and their tokens. Of equal scores, the one of the earlier token comes first."""
    if not in_onnx_export():
        return scores_Bn.sort(dim=1, descending=True, stable=True)
    # ONNX has TopK instead of a stable sort, and OpenVINO's TopK returns equal values in any order. So the indices are
    # sorted again within each run of equal scores.
    tokens = scores_Bn.shape[1]
    ranked_Bn, order_Bn = scores_Bn.topk(tokens, dim=1)
    run_Bn = F.pad((ranked_Bn[:, 1:] < ranked_Bn[:, :-1]).cumsum(dim=1), (1, 0))
    return ranked_Bn, ascending(run_Bn * tokens + order_Bn)[0] % tokens


def ascending(places_Bn: Tensor) -> tuple[Tensor, Tensor]:
    """Integers that all differ, in ascending order, and where each of them was."""
    if not in_onnx_export():
        return places_Bn.sort(dim=1)
    # the exporter turns a sort into a TopK whose size the graph computes, which some runtimes refuse
    return places_Bn.topk(places_Bn.shape[1], dim=1, largest=False)


def gather(values_BnC: Tensor, places_BK: Tensor) -> Tensor:
    """The values of some tokens, (B, K, C).

    On CPUs PyTorch's gather reads value by value, while index_select copies whole rows; OpenVINO is alike. On other
    devices gather is one kernel, and needs no places in the batch.
    """
    images, tokens, channels = values_BnC.shape
    if images == 1 and not _is_tracing():  # places are rows then. A traced graph also runs on other batches
        return values_BnC.index_select(1, places_BK.flatten())
    if channels == 1 or not (values_BnC.is_cpu or in_onnx_export()):
        return values_BnC.gather(1, places_BK[..., None].expand(-1, -1, channels))
    rows = _rows(places_BK, images, tokens)
    return values_BnC.flatten(0, 1).index_select(0, rows).view(*places_BK.shape, channels)


def add_rows(values_BnC: Tensor, places_BG: Tensor, more_BGC: Tensor, scale: float, overwrites: bool = False) -> Tensor:
    """The values of all tokens plus `scale` times more at some places. Rows are added whole, see `gather`.

    overwrites: in the memory of `values_BnC`, which is contiguous.
    """
    images, tokens, _ = values_BnC.shape
    if images == 1 and not _is_tracing():
        add = values_BnC.index_add_ if overwrites else values_BnC.index_add
        return add(1, places_BG.flatten(), more_BGC, alpha=scale)
    rows, flat_MC = _rows(places_BG, images, tokens), values_BnC.flatten(0, 1)
    add = flat_MC.index_add_ if overwrites else flat_MC.index_add
    return add(0, rows, more_BGC.flatten(0, 1), alpha=scale).view(values_BnC.shape)


def _rows(places_BK: Tensor, images: int, tokens: int) -> Tensor:
    """Indices of tokens among those of all images of the batch, one after the other."""
    return (places_BK + tokens * torch.arange(images, device=places_BK.device)[:, None]).flatten()


def put(values_BnC: Tensor, places_BK: Tensor, new_BKC: Tensor) -> Tensor:
    """The values with those of some tokens replaced. Rows are copied whole where `gather` does so too."""
    images, tokens, channels = values_BnC.shape
    dtype = torch.promote_types(values_BnC.dtype, new_BKC.dtype)  # mixed precision may change it between blocks
    values_BnC, new_BKC = values_BnC.to(dtype), new_BKC.to(dtype)
    if in_onnx_export():  # no scatter, see `placed`
        from_BK = torch.arange(1, places_BK.shape[1] + 1, device=places_BK.device).expand_as(places_BK)
        from_Bn = placed(from_BK, places_BK, tokens)
        return torch.where(from_Bn[..., None] > 0, gather(new_BKC, (from_Bn - 1).clamp_min(0)), values_BnC)
    if not values_BnC.is_cpu:
        return values_BnC.scatter(1, places_BK[..., None].expand(-1, -1, channels), new_BKC)
    rows = _rows(places_BK, images, tokens)
    return values_BnC.flatten(0, 1).index_copy(0, rows, new_BKC.flatten(0, 1)).view(values_BnC.shape)


def placed(values_BK: Tensor, places_BK: Tensor, tokens: int) -> Tensor:
    """The values at the places of some of `tokens` tokens, and 0 at the others, (B, tokens).

    An ONNX graph has a sum over a one-hot matrix here, because not all runtimes can scatter.
    """
    if not in_onnx_export():
        return values_BK.new_zeros(places_BK.shape[0], tokens).scatter(1, places_BK, values_BK)
    is_there_BnK = places_BK[:, None] == torch.arange(tokens, device=places_BK.device)[:, None]
    return (is_there_BnK * values_BK[:, None]).sum(dim=-1)


def unit(vectors_BnC: Tensor) -> Tensor:
    """The vectors at length 1, in fp32. It equals F.normalize, which is much Python for so small tensors."""
    vectors_BnC = vectors_BnC.float()
    return vectors_BnC / torch.linalg.vector_norm(vectors_BnC, dim=-1, keepdim=True).clamp_min(1e-6)


def best(scores_Bn: Tensor, present_Bn: Tensor, kept_B: Tensor) -> Tensor:
    """1 for the kept_B best of the present tokens of each image. No gradients."""
    ranked_Bn = scores_Bn.detach().masked_fill(present_Bn == 0, -torch.inf)
    order_Bn = ranked_Bn.sort(dim=1, descending=True, stable=True).indices
    place_Bn = torch.arange(order_Bn.shape[1], device=order_Bn.device).expand_as(order_Bn)
    rank_Bn = placed(place_Bn, order_Bn, order_Bn.shape[1])
    return (rank_Bn < kept_B[:, None]).to(present_Bn.dtype) * (present_Bn > 0)


def above(scores_Bn: Tensor, threshold: Tensor, present_Bn: Tensor, softness: float) -> Tensor:
    """1 for present tokens whose score is above the threshold; at least the best one stays.

    The gradient is that of sigmoid((score - threshold) / softness) (straight-through; AS-ViT).
    """
    passed_Bn = straight_through(scores_Bn > threshold, ((scores_Bn - threshold) / softness).sigmoid())
    return _at_least_one(passed_Bn * present_Bn, scores_Bn, present_Bn)


def draw(probability_Bn: Tensor, present_Bn: Tensor) -> Tensor:
    """1 for present tokens drawn to stay, each with its probability (hard Gumbel-softmax at temperature 1; DynamicViT).

    The gradient is that of the relaxed draw. At least the most probable token stays.
    """
    tiny = torch.finfo(torch.float32).tiny
    logit_Bn = probability_Bn.clamp_min(tiny).log() - (1 - probability_Bn).clamp_min(tiny).log()
    uniform_Bn = torch.rand_like(logit_Bn).clamp(1e-7, 1 - 1e-7)
    noise_Bn = uniform_Bn.log() - (1 - uniform_Bn).log()  # the difference of two Gumbel variables is logistic
    soft_Bn = (logit_Bn + noise_Bn).sigmoid()
    drawn_Bn = straight_through(soft_Bn > 0.5, soft_Bn)
    return _at_least_one(drawn_Bn * present_Bn, probability_Bn, present_Bn)


def straight_through(decision: Tensor, soft: Tensor) -> Tensor:
    """The decision as 1.0 or 0.0, with the gradient of `soft`."""
    return decision.to(soft.dtype) + (soft - soft.detach())


def _at_least_one(stays_Bn: Tensor, scores_Bn: Tensor, present_Bn: Tensor) -> Tensor:
    """Add the best token where none stays, because later stages need at least one."""
    nothing_B = (stays_Bn.detach().sum(dim=1) == 0).to(torch.int64)
    return stays_Bn + best(scores_Bn, present_Bn, nothing_B)
