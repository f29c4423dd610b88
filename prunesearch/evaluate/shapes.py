"""The `ModelShape` of a model by its name: from the caches, or from timm when they do not have it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache

from prunesearch.config import ModelConfig
from prunesearch.errors import ModelError
from prunesearch.evaluate import shape_cache
from prunesearch.evaluate.sections import model_problems
from prunesearch.evaluate.shape_cache import Facts
from prunesearch.shape import ModelShape


def model_shape(config: ModelConfig) -> ModelShape:
    """The shape of a model, without its weights. Raises ModelError, also for models that take no schedule."""
    return _facts(config).shape


def input_channels(config: ModelConfig) -> int:
    """The number of channels of a model's images. Raises ModelError as `model_shape`."""
    return _facts(config).channels


def prunable_models(say: Callable[[str], None]) -> dict[str, Facts]:
    """Names of timm to which a schedule can be applied, with their facts.

    The names have no tags of weights. For a version of timm that is in no cache this takes a minute once; `say` is then
    called with a message.
    """
    known = dict(shape_cache.all_models())
    if not known:
        from prunesearch.evaluate.timm_models import architectures, facts_of_names

        version = shape_cache.timm_version()
        say(f"the models of timm {version} are looked at for the first time, which takes a minute")
        known = facts_of_names(architectures())
        shape_cache.keep({ModelConfig(name): facts for name, facts in known.items()}, all_models=True)
    return known


@lru_cache(maxsize=16)
def _facts(config: ModelConfig) -> Facts:
    asks_timm = sys.modules.get("timm") is not None  # if imported, asking is fast, and plug-ins may have added models
    if not asks_timm:
        problems = model_problems(config)
        if problems:
            raise ModelError("; ".join(problems))
        known = shape_cache.find(config)
        if known is not None:
            return known
    from prunesearch.evaluate.build import facts_of, is_timms_own

    facts = facts_of(config)
    if not asks_timm and is_timms_own(config):
        shape_cache.keep({config: facts})
    return facts
