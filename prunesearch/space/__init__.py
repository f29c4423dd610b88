"""Search spaces: `choices.py` has their parameters, `problems.py` finds their mistakes."""
