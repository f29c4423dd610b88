"""Storage of a study: Optuna's database or journal, locks, and which driver may write."""

from prunesearch.extras import need

need("search and studies", "search", "optuna", "sqlalchemy")
