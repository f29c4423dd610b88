"""Text for people: numbers with their noun; and names from files and other libraries, made harmless for a terminal."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL_OR_BREAK = re.compile(f"[\t\n]|{_CONTROL.pattern}")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Replace control characters by escapes such as \x1b.

    They could move the cursor, set colours, change the direction of writing, or fail to encode.
    lines: keep tabs and line breaks, for a table or an error of several lines. Otherwise the result is one line.
    """
    return (_CONTROL if lines else _CONTROL_OR_BREAK).sub(_escaped, text)


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as "1 thread" and "3 threads"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
