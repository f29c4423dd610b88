"""Find all models of timm to which a schedule can be applied, by building each of them without weights."""

from __future__ import annotations

from collections.abc import Iterable

import timm

from prunesearch.config import ModelConfig
from prunesearch.errors import ModelError
from prunesearch.evaluate.build import facts_of
from prunesearch.evaluate.shape_cache import Facts
from prunesearch.models import may_be_supported


def architectures() -> list[str]:
    """Names of timm, without tags of weights, that may be supported. Building all of timm would take minutes."""
    return [name for name in timm.list_models() if may_be_supported(name)]


def facts_of_names(names: Iterable[str]) -> dict[str, Facts]:
    """The names to which a schedule can be applied, with their shapes and channels."""
    found = {}
    for name in names:
        try:
            found[name] = facts_of(ModelConfig(name))
        except ModelError:
            continue
    return found
