"""Registries (name -> entry, with "did you mean"), and imports of our own modules at first use.

The tables of scores, verbs and metrics import nothing heavy. There, `Named` stands for a function whose module imports
torch. `lazily` gives a package names that are imported at first use. No other file imports our modules by a string.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, Generic, TypeVar

from prunesearch.errors import UnknownNameError

T = TypeVar("T")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A sentence such as ' Did you mean "drop"?' (with its leading space), or '' when nothing is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping that grows by `add`. The error for an unknown name lists the known ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def add(self, name: str, thing: T) -> T:
        """Register `thing`; a name can be taken only once."""
        if name in self._things:
            raise ValueError(f"{self.kind} {name!r} is registered twice; choose another name")
        self._things[name] = thing
        return thing

    def register(self, name: str) -> Callable[[T], T]:
        """`add` as a decorator."""
        return lambda thing: self.add(name, thing)

    def unknown(self, name: object) -> str:
        """The error message for an unknown name."""
        return f"unknown {self.kind} {name!r}. Known: {', '.join(sorted(self._things))}.{did_you_mean(name, self)}"

    def __getitem__(self, name: str) -> T:
        try:
            return self._things[name]
        except KeyError:
            raise UnknownNameError(self.unknown(name)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)


class Named:
    """A function given as "package.module:name". Its module is imported at the first call."""

    def __init__(self, place: str) -> None:
        self.place = place

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The function itself."""
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(module), name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.function(*arguments, **options)

    def __repr__(self) -> str:
        return f"Named({self.place!r})"


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package: each name is imported from its module when it is first asked for.

    homes: name -> module.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
