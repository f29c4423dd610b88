"""Import plug-ins: modules of others that register scores, verbs, metrics or data sets. Importing runs their code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence

from prunesearch.errors import UserError


def import_plugins(plugins: Iterable[str]) -> None:
    """Import modules by name, in their order. Raises UserError for one that is not there or fails.

    This runs their code, so the caller must only pass names that the user chose: from the user's own study file, from
    the command line, or from a file that the user said to trust.
    """
    for name in plugins:
        try:
            importlib.import_module(name)
        except Exception as error:  # a module may raise anything
            raise UserError(
                f"plug-in {name!r}: it cannot be imported: {type(error).__name__}: {error}. Possible: a module on "
                f"Python's path, without .py. Install it, or put its folder on PYTHONPATH."
            ) from error


def missing_plugins(plugins: Iterable[str]) -> list[str]:
    """The plug-ins that this process has not imported."""
    return [name for name in plugins if name not in sys.modules]


def all_plugins(*several: Sequence[str]) -> tuple[str, ...]:
    """Names from several places, each once, in their order."""
    return tuple(dict.fromkeys(name for names in several for name in names))
