"""Score: mean attention a token receives from all tokens (LTMP). Works without a class token; needs every row."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from prunesearch.tokens.inputs import ScoreInput


def attention_received(scene: ScoreInput, *, merged: str) -> Tensor:
    """Attention each patch token receives, averaged over heads and over all queries (prefix tokens included).

    Builds the attention matrix a second time beside the fused one: N^2 A extra MACs and B H N^2 floats.
    merged: the score of tokens that an earlier stage of the same attention merged: the sum of their scores or the
    largest of them (LTMP). It has no effect on a stage before which nothing merges.
    """
    attended = scene.attended
    assert attended is not None
    logits_BHNN = (attended.query_BHND.float() * attended.scale) @ attended.key_BHND.float().transpose(-2, -1)
    if attended.bias_B11N is not None:
        logits_BHNN = logits_BHNN + attended.bias_B11N.float()
    attention_BNN = logits_BHNN.softmax(dim=-1).mean(dim=1)
    if attended.present_Bn is None:
        return attention_BNN.mean(dim=1)[:, attended.prefix_tokens :]
    asking_BN = F.pad(attended.present_Bn, (attended.prefix_tokens, 0), value=1.0)  # empty slots ask nothing
    received_BN = (attention_BNN * (asking_BN / asking_BN.sum(dim=1, keepdim=True))[..., None]).sum(dim=1)
    return received_BN[:, attended.prefix_tokens :]
