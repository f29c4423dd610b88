"""Convert plain data (from YAML or JSON) to dataclasses and back. Reading is strict and reports all mistakes at once.

The annotations of the dataclasses are the only description of the format: the reader, the writer and `json_schema.py`
all follow them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from prunesearch.errors import FileError, ScheduleError
from prunesearch.registry import did_you_mean

T = TypeVar("T")
FieldPath = tuple[str | int, ...]

MOST_PROBLEMS = 50
"""Most mistakes that are listed. Of further ones only the number is given."""
MOST_UNKNOWN = 10
"""Most unknown fields of one mapping that are listed."""


def from_mapping(kind: type[T], mapping: Any, place: str) -> T:
    """Make a dataclass from plain YAML or JSON data. place: name of the source in errors. Raises FileError.

    Names of scores, verbs and metrics are not checked: stored data may come from another version, or from plug-ins
    that are not imported here.
    """
    return read(kind, mapping, place)


def to_mapping(value: Any, *, defaults: bool = False) -> Any:
    """Convert a dataclass to plain dicts, lists and scalars. `from_mapping` makes an equal dataclass from them.

    Fields at their default are left out. defaults: leave out only those whose default is None or an empty tuple.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = hints_of(type(value))
        return {
            field.name: _pairs_or_list(getattr(value, field.name), hints[field.name], defaults)
            for field in dataclasses.fields(value)
            if not _is_absent(getattr(value, field.name), field, defaults)
        }
    if isinstance(value, Mapping):
        return {str(key): to_mapping(item, defaults=defaults) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_mapping(item, defaults=defaults) for item in value]
    return value


def read(
    kind: type[T],
    content: Any,
    place: str,
    lines: Mapping[FieldPath, int] = types.MappingProxyType({}),
    problems: Sequence[str] = (),
) -> T:
    """`from_mapping` for a file. lines: line of each field. problems: mistakes that were found before."""
    found = list(problems)

    def report(path: FieldPath, text: str) -> None:
        where = dotted(path) + (f" (line {lines[path]})" if path in lines else "")
        found.append(f"{where}: {text}" if path else text)

    value = _value(kind, content, (), report)
    if len(found) > MOST_PROBLEMS:
        further = f"{len(found) - MOST_PROBLEMS} more mistakes, which are not listed. Correct these first."
        found = [*found[:MOST_PROBLEMS], further]
    if found:
        raise FileError(place, found)
    return typing.cast(T, value)


class _Report(typing.Protocol):
    def __call__(self, path: FieldPath, text: str) -> None: ...


_WRONG = object()  # a value that could not be read; its problem has been reported


def _value(kind: Any, value: Any, path: FieldPath, report: _Report, limits: Mapping[str, Any] = {}) -> Any:
    """Convert `value` to the annotation `kind`. When that is impossible, report why and return _WRONG."""
    origin, parameters = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _union(parameters, value, path, report, limits)
    if origin is Literal:
        if value in parameters and type(value) in {type(p) for p in parameters}:
            return value
        known = ", ".join(map(str, parameters))
        hint = did_you_mean(value, [str(p) for p in parameters])
        report(path, f"is {_shown(value)}; possible: {known}.{hint}")
        return _WRONG
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type, kind), value, path, report)
    if is_pairs(kind):
        return _pairs(parameters[0], value, path, report, limits)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]  # one value is a list of one
        if value is None:
            report(path, "is empty; possible: a value or a list. Give one, or leave the field out.")
            return _WRONG
        if len(items) > limits.get("most", math.inf):
            report(path, f"has {len(items):,} items; possible: up to {limits['most']:,}. Leave some out.")
            return _WRONG
        read = [
            _value(parameters[0], item, (*path, index) if isinstance(value, list) else path, report, limits)
            for index, item in enumerate(items)
        ]
        return _WRONG if any(item is _WRONG for item in read) else tuple(read)
    if origin is not None and issubclass(origin, Mapping):
        if isinstance(value, dict):
            return value
        report(path, f"is {_shown(value)}; possible: a mapping (name: value).")
        return _WRONG
    return _scalar(kind, value, path, report, limits)


def _scalar(kind: type, value: Any, path: FieldPath, report: _Report, limits: Mapping[str, Any]) -> Any:
    fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        report(path, f"is {_shown(value)}; possible: {limits.get('form', _kind_name(kind))}.")
        return _WRONG
    if kind is str and "pattern" in limits and not re.search(limits["pattern"], value):
        form = limits.get("form", f"text of the form {limits['pattern']}")
        report(path, f"is {_shown(value)}; possible: {form}.")
        return _WRONG
    if kind not in (int, float):
        return value
    for name, holds in (
        ("low", lambda bound: value >= bound),
        ("high", lambda bound: value <= bound),
        ("above", lambda bound: value > bound),
    ):
        if name in limits and not holds(limits[name]):  # NaN fails every comparison
            report(path, f"is {_shown(value)}; possible: {_kind_name(kind)} {_bounds(limits)}.")
            return _WRONG
    if kind is float and abs(value) > sys.float_info.max and isinstance(value, int):
        report(path, f"is {_shown(value)}; possible: a number up to {sys.float_info.max:.3g}.")
        return _WRONG
    return float(value) if kind is float else value


def _union(kinds: tuple[Any, ...], value: Any, path: FieldPath, report: _Report, limits: Mapping[str, Any]) -> Any:
    """Convert `value` to the member of a union that fits its kind (None, mapping, list or scalar)."""
    kinds = tuple(kind for kind in kinds if kind is not type(None)) if value is not None else kinds
    if value is None and type(None) in kinds:
        return None
    mappings = [kind for kind in kinds if dataclasses.is_dataclass(kind) or is_mapping(kind)]
    others = [kind for kind in kinds if kind not in mappings]
    if isinstance(value, dict) and mappings:
        return _value(mappings[0], value, path, report)
    if all(kind in (bool, int, float, str) for kind in others) and type(value) in others:
        return _value(type(value), value, path, report, limits)  # Scalar: keep what YAML made of it
    if others:
        return _value(others[0], value, path, report, limits)
    return _value(mappings[0], value, path, report)


def _dataclass(kind: type, value: Any, path: FieldPath, report: _Report) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(value, dict):
        report(path, f"is {_shown(value)}; possible: a mapping with the fields {', '.join(fields)}.")
        return _WRONG
    for name, field in fields.items():
        if name in value and "expand" in field.metadata:  # a word that stands for other fields
            value = field.metadata["expand"](value)
    unknown = [name for name in value if name not in fields]
    for name in unknown[:MOST_UNKNOWN]:
        report((*path, name), f"unknown field. Known: {', '.join(fields)}.{did_you_mean(name, fields)}")
    if len(unknown) > MOST_UNKNOWN:
        report(path, f"has {len(unknown) - MOST_UNKNOWN} more unknown fields. Correct these first.")
    hints, read = hints_of(kind), {}
    for name, field in fields.items():
        if name in value:
            read[name] = _value(hints[name], value[name], (*path, name), report, field.metadata)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            report((*path, name), f"missing. {field.metadata.get('text', 'It is required')}.")
            read[name] = _WRONG
    if any(item is _WRONG for item in read.values()):
        return _WRONG
    try:
        made = kind(**read)
    except ScheduleError as error:
        for problem in error.problems:
            report(path, problem)
        return _WRONG
    return made


def _pairs(pair: Any, value: Any, path: FieldPath, report: _Report, limits: Mapping[str, Any]) -> Any:
    """Convert a mapping to sorted pairs, which are hashable."""
    if not isinstance(value, dict):
        report(path, f"is {_shown(value)}; possible: a mapping (name: value).")
        return _WRONG
    if len(value) > limits.get("most", math.inf):
        report(path, f"has {len(value):,} names; possible: up to {limits['most']:,}. Leave some out.")
        return _WRONG
    kind = get_args(pair)[1]
    named = sorted(((str(name), item) for name, item in value.items()), key=lambda pair: pair[0])
    read = [(name, _value(kind, item, (*path, name), report, limits)) for name, item in named]
    return _WRONG if any(item is _WRONG for _, item in read) else tuple(read)


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass. Cached, because Python takes a millisecond to evaluate them."""
    return typing.get_type_hints(kind)


def is_pairs(kind: Any) -> bool:
    """Whether an annotation is tuple[tuple[str, X], ...], which files write as a mapping."""
    parameters = get_args(kind)
    if get_origin(kind) is not tuple or len(parameters) != 2 or parameters[1] is not ...:
        return False
    return get_origin(parameters[0]) is tuple and get_args(parameters[0])[0] is str


def is_mapping(kind: Any) -> bool:
    origin = get_origin(kind)
    return is_pairs(kind) or (isinstance(origin, type) and issubclass(origin, Mapping))


def dotted(path: FieldPath) -> str:
    """("space", "blocks", 1) as space.blocks[1]."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 1024:  # beyond any float; Python refuses to print very long ones
        return "a number of more than 300 digits"
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def _kind_name(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, kind.__name__)


def _bounds(limits: Mapping[str, Any]) -> str:
    words = {"low": "from", "above": "above", "high": "up to"}
    return " ".join(f"{word} {_number(limits[name])}" for name, word in words.items() if name in limits)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _is_absent(value: Any, field: dataclasses.Field[Any], defaults: bool) -> bool:
    """Whether a field is left out of a file, because its default means the same."""
    if field.default is dataclasses.MISSING or value != field.default:
        return False
    return not defaults or value is None or value == ()


def _pairs_or_list(value: Any, kind: Any, defaults: bool) -> Any:
    if is_pairs(kind):
        return {name: to_mapping(item, defaults=defaults) for name, item in value}
    return to_mapping(value, defaults=defaults)
