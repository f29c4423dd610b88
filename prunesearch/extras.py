"""Libraries that an extra of prunesearch brings. What needs one that is missing says so, and how to install it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from prunesearch.errors import MissingLibraryError
from prunesearch.registry import Named

_PACKAGES = {"sklearn": "scikit-learn"}
"""Libraries whose package has another name."""


def missing(libraries: Iterable[str]) -> list[str]:
    """Those of the libraries that are not installed. None of them is imported."""
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def need(where: str, extra: str, *libraries: str) -> None:
    """Raise MissingLibraryError when one of the libraries is not installed. Call it before they are imported.

    where: what needs them; the message begins with it. extra: of pyproject.toml, which brings them. libraries: their
    names in Python.
    """
    absent = [_PACKAGES.get(name, name) for name in missing(libraries)]
    if absent:
        raise MissingLibraryError(
            f"{where}: {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed. Possible: the "
            f"libraries of the extra {extra!r}. Run pip install 'prunesearch[{extra}]'."
        )


def version_of(library: str) -> str:
    """The version of an installed library, which is imported."""
    return str(Named(f"{library}:__version__").function).split("-")[0]
