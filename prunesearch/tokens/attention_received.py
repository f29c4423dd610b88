"""Score: mean attention a token receives from all tokens (LTMP). Works without a class token."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from prunesearch.tokens.inputs import ScoreInput


def attention_received(scene: ScoreInput, *, merged: str) -> Tensor:
    """Attention each patch token receives, averaged over heads and over all queries (prefix tokens included).

    Fused attention does not return its matrix, so it is computed again: N^2 A extra MACs and B H N^2 floats.
    merged: how tokens combine their scores when an earlier stage that read the same attention merges them: "sum" or
    "max" (LTMP). It has no effect when no such stage merges.
    """
    attended = scene.attended
    assert attended is not None
    logits_BHNN = (attended.query_BHND.float() * attended.scale) @ attended.key_BHND.float().transpose(-2, -1)
    if attended.bias is not None:
        logits_BHNN = logits_BHNN + attended.bias.float()
    attention_BNN = logits_BHNN.softmax(dim=-1).mean(dim=1)
    if attended.present_Bn is None:
        return attention_BNN.mean(dim=1)[:, attended.prefix_tokens :]
    asking_BN = F.pad(attended.present_Bn, (attended.prefix_tokens, 0), value=1.0)  # empty slots have no query
    received_BN = (attention_BNN * (asking_BN / asking_BN.sum(dim=1, keepdim=True))[..., None]).sum(dim=1)
    return received_BN[:, attended.prefix_tokens :]
