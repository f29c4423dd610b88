"""Parse YAML text to plain dicts, lists and scalars, with the line of each field and a message for each mistake.

Some features of YAML make a reader hang, fill the memory, or fail far from the cause. Only its core is read here:
mappings, lists, text, numbers, true and false, null. Sizes are bounded. Everything else is reported as a mistake, with
its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from prunesearch.strict import FieldPath, dotted

MOST_BYTES = 1_000_000
"""Largest file. Studies have a few kilobytes. PyYAML reads this much in about two seconds."""
MOST_VALUES = 10_000
"""Most keys, lists and scalars of a file. Values that aliases repeat count again."""
DEEPEST = 40
"""Most levels of mappings and lists within each other."""
LONGEST = 4096
"""Most characters of one text. No path is longer."""
MOST_PROBLEMS = 50
"""Most mistakes of a file that are listed."""

_CORE = "tag:yaml.org,2002:"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_INT = re.compile(r"[-+]?[0-9][0-9_]*$")
_BASED = re.compile(r"0o[0-7]+$|0x[0-9a-fA-F]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$")
_CONSTANT = re.compile(r"[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_BOOL = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_RESOLVERS = (
    ("null", re.compile(r"~$|null$|Null$|NULL$|$"), ["~", "n", "N", ""]),
    (
        "bool",
        re.compile(r"(yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$"),
        "yYnNtTfFoO",
    ),
    ("int", _INT, "-+0123456789"),
    ("int", _BASED, "0"),
    ("float", _FLOAT, "-+.0123456789"),
    ("float", _CONSTANT, "-+."),
)


@dataclass
class Text:
    """What was read. content: dicts, lists and scalars. lines: line of each field, from 1. problems: messages."""

    content: Any = None
    lines: dict[FieldPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_yaml_text(text: str) -> Text:
    """Read one YAML document. Mistakes are collected in `problems`; when there are none, `content` is complete."""
    read = Text()
    if len(text) > MOST_BYTES:
        read.problems.append(too_large())
        return read
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _Reading(read).value(node, (), ())
    except _TooMuch as error:
        read.problems.append(str(error))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        read.problems.append(
            f"line {line}: holds the character {_code(error.character)}; possible: printable ones. Remove it."
        )
    except (ValueError, OverflowError) as error:  # an impossible character code or YAML version
        read.problems.append(f"this is not YAML: {_short(str(error))}. Mend the syntax.")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        read.problems.append(f"{where}this is not YAML: {what}. Mend the syntax there.")
    return read


def too_large() -> str:
    """The message for a text of more than MOST_BYTES."""
    return (
        f"is larger than {MOST_BYTES // 1_000_000} MB. Possible: studies and schedules, which have a few kilobytes. "
        f"Check whether it is the right file."
    )


class _TooMuch(Exception):
    """Reading stopped early; further mistakes are unknown."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, and yes, no, on, off and 1_000 of YAML 1.1.

    So 2e-5 is a number, and 2024-01-05, 1:30 and 0b1 are text. It stops at too many or too deep values.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012
    _values = 0
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._values += 1
        self._depth += 1
        line = self.peek_event().start_mark.line + 1
        if self._values > MOST_VALUES:
            raise _TooMuch(_too_many(line))
        if self._depth > DEEPEST:
            raise _TooMuch(_too_deep(line))
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text that `read_yaml_text` or YAML 1.1 would read as something else."""


for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_CORE + _name, _pattern, list(_first))
    if _name != "null":
        Dumper.add_implicit_resolver(_CORE + _name, _pattern, list(_first))


def _too_many(line: int) -> str:
    return (
        f"line {line}: there are more than {MOST_VALUES:,} values up to here, repeated ones (*) included. Possible: "
        f"studies and schedules, which have a few hundred. Check whether it is the right file."
    )


def _too_deep(line: int) -> str:
    return (
        f"line {line}: more than {DEEPEST} lists or mappings within each other. Possible: the fields of a study or "
        f"schedule, which need fewer than ten. Check the brackets and the indentation."
    )


class _Reading:
    """Converts the nodes of a document, and collects lines and mistakes."""

    def __init__(self, read: Text) -> None:
        self._read, self._values = read, 0

    def value(self, node: yaml.Node, path: FieldPath, above: Sequence[yaml.Node]) -> Any:
        """Convert a node to dicts, lists and scalars. above: the nodes that it is part of."""
        read, line = self._read, node.start_mark.line + 1
        self._values += 1
        if any(node is other for other in above):
            raise _TooMuch(
                f"{dotted(path)} (line {line}): contains itself (*). Possible: values that end. Write it out."
            )
        if self._values > MOST_VALUES:
            raise _TooMuch(_too_many(line))
        if len(path) > DEEPEST:
            raise _TooMuch(_too_deep(line))
        read.lines[path] = line
        if path == ():
            read.content = None
        inner = (*above, node)
        content: Any
        if isinstance(node, yaml.MappingNode):
            self._check_tag(node, path, "map")
            content = {}
            for key_node, value_node in node.value:
                key = self._key(key_node, path)
                if key is None:
                    continue
                field_path = (*path, key)
                if key in content:
                    self._report(field_path, key_node.start_mark.line + 1, "given twice. Keep one.")
                content[key] = self.value(value_node, field_path, inner)
                read.lines[field_path] = key_node.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode):
            self._check_tag(node, path, "seq")
            content = [self.value(item, (*path, index), inner) for index, item in enumerate(node.value)]
        else:
            content = self._scalar(node, path)
        if path == ():
            read.content = content
        return content

    def _key(self, node: yaml.Node, path: FieldPath) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            what = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
            self._report(path, node.start_mark.line + 1, f"a name is {what}; possible: text. Write name: value.")
            return None
        return self._text(str(node.value), path, node.start_mark.line + 1)

    def _scalar(self, node: yaml.Node, path: FieldPath) -> Any:
        line, text = node.start_mark.line + 1, str(node.value)
        kind = str(node.tag).removeprefix(_CORE)
        if kind == "str":
            return self._text(text, path, line)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return _BOOL[text.lower()]
            if kind == "int":
                return _int(text)
            if kind == "float":
                return _float(text)
        except (ValueError, KeyError):
            what = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
            self._report(
                path, line, f"is {_short(text)}, which cannot be read as {what}. Write another one, or quote it."
            )
            return None
        self._check_tag(node, path, kind)
        return None

    def _text(self, text: str, path: FieldPath, line: int) -> str:
        found = _UNPRINTABLE.search(text)
        if len(text) > LONGEST:
            self._report(path, line, f"is a text of {len(text):,} characters; possible: up to {LONGEST:,}. Shorten it.")
        elif found:
            self._report(
                path, line, f"the text holds the character {_code(ord(found[0]))}; possible: printable ones. Remove it."
            )
        return text

    def _check_tag(self, node: yaml.Node, path: FieldPath, kind: str) -> None:
        if node.tag != _CORE + kind or kind not in ("map", "seq"):
            shown = _short(str(node.tag).replace(_CORE, "!!"))
            self._report(
                path,
                node.start_mark.line + 1,
                f"the tag {shown} is not known here; possible: plain values. Take the tag out.",
            )

    def _report(self, path: FieldPath, line: int, text: str) -> None:
        if len(self._read.problems) >= MOST_PROBLEMS:
            raise _TooMuch(f"there are more mistakes, which are not listed. Correct the first {MOST_PROBLEMS}.")
        where = f"{dotted(path)} (line {line}): " if path else f"line {line}: "
        self._read.problems.append(where + text)


def _int(text: str) -> int:
    digits = text.replace("_", "")
    if len(digits) > 400:  # beyond the largest float; Python does not print more than 4,300 digits either
        raise ValueError(digits)
    return int(digits, {"0o": 8, "0x": 16}.get(digits[:2], 10))


def _float(text: str) -> float:
    if _CONSTANT.match(text):
        return math.nan if text.lower() == ".nan" else math.copysign(math.inf, -1 if text.startswith("-") else 1)
    return float(text.replace("_", ""))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _code(character: int) -> str:
    return f"U+{character:04X}"
