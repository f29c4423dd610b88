"""Scores and reduce verbs: pure tensor functions that work on the tokens of one block and do not use timm.

`scores.py` and `verbs.py` are tables of all of them. Each function has a file here, which is loaded when it runs.
A plug-in can import all that it needs from this package:

    from prunesearch.tokens import Grouping, ReduceInput, ScoreInput, reducer, scorer, top_k
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunesearch.registry import lazily
from prunesearch.tokens import scores as scores
from prunesearch.tokens import verbs as verbs
from prunesearch.tokens.registry import INPUTS, REDUCERS, SCORERS, Reducer, Scorer, reducer, scorer

if TYPE_CHECKING:
    from prunesearch.tokens.inputs import Attended, Grouping, Joining, MaskedInput, Pooled, ReduceInput, ScoreInput
    from prunesearch.tokens.select import top_k

__all__ = [
    "REDUCERS",
    "SCORERS",
    "Attended",
    "Grouping",
    "Joining",
    "MaskedInput",
    "Pooled",
    "ReduceInput",
    "Reducer",
    "ScoreInput",
    "Scorer",
    "reducer",
    "scorer",
    "top_k",
]
__getattr__ = lazily(__name__, INPUTS)
