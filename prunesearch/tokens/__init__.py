"""What happens to tokens inside one block: pure tensor functions that know no timm.

One file per scorer or reducer; importing it registers it. To add one, write its file and import it here.
"""

from prunesearch.tokens import (
    absorb,
    attention_received,
    class_attention,
    drop,
    drop_or_merge,
    fuse,
    hold,
    key_norm,
    merge,
    pool,
    predictor,
    random_score,
    squeeze,
)
from prunesearch.tokens.registry import REDUCERS, SCORERS, Reducer, Scorer, reducer, scorer

__all__ = [
    "REDUCERS",
    "SCORERS",
    "Reducer",
    "Scorer",
    "absorb",
    "attention_received",
    "class_attention",
    "drop",
    "drop_or_merge",
    "fuse",
    "hold",
    "key_norm",
    "merge",
    "pool",
    "predictor",
    "random_score",
    "reducer",
    "scorer",
    "squeeze",
]
