"""The rich console of prunesearch. It prints names and texts from files without markup or control characters."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from prunesearch.printable import printable


class PlainConsole(Console):
    """A console on which markup such as [red] or [link=...] is text, and control characters are escaped."""

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, lines=True))

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, which the command line handles; rich would end the process."""
        raise BrokenPipeError
