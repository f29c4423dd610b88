"""The authors' released code of ToMe and EViT on a dense model of timm. Used by the benchmarks that compare with it.

The checkouts are not modified. Their code is for timm 0.4, so the names that it imports are added to timm here.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import timm.layers
import timm.models
import torch

from prunesearch.models.parts import sharing_copy


def official_tome(folder: Path, dense: torch.nn.Module, rate: int | list[int]) -> torch.nn.Module:
    """A copy of the dense model with the authors' patch applied. folder: checkout of facebookresearch/ToMe."""
    sys.path.insert(0, str(folder))
    import tome

    model = sharing_copy(dense)
    tome.patch.timm(model)
    model.r = rate
    return model.eval()


def official_evit(folder: Path, dense: torch.nn.Module, keep: float, fuse: bool) -> torch.nn.Module:
    """The authors' model with the weights of a dense DeiT of 12 blocks. folder: checkout of youweiliang/evit."""
    sys.modules.setdefault("timm.models.layers", timm.layers)
    lent = types.ModuleType("timm.models.helpers")
    lent.build_model_with_cfg = timm.models.build_model_with_cfg  # type: ignore[attr-defined]
    lent.named_apply = timm.models.named_apply  # type: ignore[attr-defined]
    lent.adapt_input_conv = timm.models.adapt_input_conv  # type: ignore[attr-defined]
    sys.modules["timm.models.helpers"] = lent
    lent = types.ModuleType("timm.models.registry")
    lent.register_model = lambda function: function  # type: ignore[attr-defined]
    sys.modules["timm.models.registry"] = lent
    lent = types.ModuleType("torchprofile")  # imported by their code, but not used here
    lent.profile_macs = None  # type: ignore[attr-defined]
    sys.modules.setdefault("torchprofile", lent)
    sys.path.insert(0, str(folder))
    from evit import EViT

    rates = [keep if block in (3, 6, 9) else 1.0 for block in range(12)]
    heads = dense.blocks[0].attn.num_heads  # type: ignore[index, union-attr]
    model = EViT(embed_dim=dense.embed_dim, num_heads=heads, keep_rate=rates, fuse_token=fuse)
    model.load_state_dict(dense.state_dict())
    return model.to(next(dense.parameters())).eval()
