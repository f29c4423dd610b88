"""Name -> thing, with "did you mean". One small class; each kind of thing has one instance where it is defined."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from prunesearch.errors import UnknownNameError

T = TypeVar("T")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A sentence such as ' Did you mean "drop"?' (with its leading space), or '' when nothing is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping that grows by `add` and says what it knows when asked for something else."""

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
        """What to say about a name that is not here."""
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
