"""A search space: what it can propose, and what is wrong with it."""
