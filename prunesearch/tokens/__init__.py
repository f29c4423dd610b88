"""What happens to tokens inside one block: pure tensor functions that know no timm.

`scores.py` and `verbs.py` are the tables of what there is; each function has a file here, which is loaded when it runs.
Everything that a plug-in needs is imported from this package:

    from prunesearch.tokens import Grouping, ReduceInput, ScoreInput, reducer, scorer
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunesearch.registry import lazily
from prunesearch.tokens import scores as scores
from prunesearch.tokens import verbs as verbs
from prunesearch.tokens.registry import INPUTS, REDUCERS, SCORERS, Reducer, Scorer, reducer, scorer

if TYPE_CHECKING:
    from prunesearch.tokens.inputs import Attended, Grouping, Joining, MaskedInput, Pooled, ReduceInput, ScoreInput

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
]
__getattr__ = lazily(__name__, INPUTS)
