"""Storage of a study: Optuna's database or journal, locks, and which driver may write."""
