"""All models of timm that a schedule can be applied to: each is built, without weights, to see."""

from __future__ import annotations

from collections.abc import Iterable

import timm

from prunesearch.config import ModelConfig
from prunesearch.errors import ModelError
from prunesearch.evaluate.build import facts_of
from prunesearch.evaluate.shape_cache import Facts

FILES = (
    *("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin", "digits_vit"),
    *("swin_transformer", "convnext"),
)
"""Files that build supported classes; building all of timm would take minutes."""


def architectures() -> list[str]:
    """Names of timm, without tags of weights, whose file builds supported classes."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1] in FILES]


def facts_of_names(names: Iterable[str]) -> dict[str, Facts]:
    """Those that a schedule can be applied to."""
    found = {}
    for name in names:
        try:
            found[name] = facts_of(ModelConfig(name))
        except ModelError:
            continue
    return found
