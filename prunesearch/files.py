"""YAML and JSON <-> dataclass, strictly: every mistake at once, each with its field, line and remedy.

The annotations of the dataclasses are the only description of the format: the reader, the writer and `json_schema.py`
all follow them. It needs PyYAML and nothing else, so that a deployed model can load its schedule.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from prunesearch.config import StudyConfig
from prunesearch.errors import FileError, ScheduleError
from prunesearch.registry import did_you_mean
from prunesearch.schedule import Schedule, Stage, stage_problems

T = TypeVar("T")
FieldPath = tuple[str | int, ...]
SCHEDULE_HEADER = 'prunesearch schedule. Use:  apply_schedule(model, load_schedule("{name}"))'


@dataclass(frozen=True)
class ScheduleFile:
    """A schedule as it is written to a file: the stages, and where they come from."""

    version: Literal[1]
    stages: tuple[Stage, ...]
    model: Mapping[str, Any] | None = None
    weights: str | None = None
    measured: Mapping[str, Any] | None = None
    made_by: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PresetFile:
    """A published schedule as a rule: stages written for `depth` blocks, or a number of token pairs that merge in
    every block (`merge_per_block`); and what its paper reports."""

    version: Literal[1]
    summary: str
    source: str
    depth: int = 12
    stages: tuple[Stage, ...] = ()
    merge_per_block: int | None = None
    published: tuple[Mapping[str, Any], ...] = ()


def load_schedule(path: str | Path) -> Schedule:
    """Read a schedule file. Raises FileError with all mistakes; whether it fits a model is seen when it is applied."""
    return Schedule(load_schedule_file(path).stages)


def load_any(path: str | Path) -> Schedule | StudyConfig:
    """Read a file that is either a study (it has a space) or a schedule. Raises FileError."""
    content, _, _ = _read_yaml(path)
    is_schedule = isinstance(content, dict) and "stages" in content
    return load_schedule(path) if is_schedule else load_study(path)


def load_preset_file(path: str | Path) -> PresetFile:
    """Read one of the package's presets."""
    return _load(PresetFile, path)


def load_schedule_file(path: str | Path) -> ScheduleFile:
    """Read a schedule file with what it says about its origin. Raises FileError."""
    return _load(ScheduleFile, path)


def save_schedule(schedule: Schedule, path: str | Path, **about: Any) -> None:
    """Write a schedule file; `about` are the other fields of `ScheduleFile` (model, weights, measured, made_by)."""
    mapping = to_mapping(ScheduleFile(version=1, stages=schedule.stages, **about))
    mapping["stages"] = [_Row(to_mapping(stage, defaults=True)) for stage in schedule.stages]
    write_yaml(mapping, path, header=SCHEDULE_HEADER.format(name=Path(path).name))


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study file; `overrides` such as "stop.trials=20" replace single values. Raises FileError."""
    return _load(StudyConfig, path, overrides)


def from_mapping(kind: type[T], mapping: Any, place: str) -> T:
    """Make a dataclass from what YAML or JSON gave. `place` names the source in errors. Raises FileError."""
    return _read(kind, mapping, place, lines={})


def to_mapping(value: Any, *, defaults: bool = False) -> Any:
    """A dataclass as plain dicts, lists and scalars. Fields at their default are left out unless `defaults`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
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


def write_yaml(mapping: Any, path: str | Path, header: str = "") -> None:
    """Write YAML with a comment on top, atomically: readers see the old file or the new one, never half of one."""
    text = "".join(f"# {line}\n" for line in header.splitlines())
    text += yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    write_atomically(path, text.encode())


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, also across a crash."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_yaml(path: str | Path) -> tuple[Any, dict[FieldPath, int], list[str]]:
    """The content of a YAML file, the line each field starts at, and keys given twice. Raises FileError."""
    place = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(place, [f"there is no such file (looked in {Path.cwd()}). Check the path."]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(place, [f"cannot be read as text: {error}. Give a readable UTF-8 file."]) from None
    lines: dict[FieldPath, int] = {}
    problems: list[str] = []
    try:
        node = yaml.compose(text, Loader=_Loader)
        content = None if node is None else _plain(node, (), lines, problems)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise FileError(place, [f"{where}this is not YAML: {what}. Mend the syntax there."]) from None
    return content, lines, problems


# --- reading -----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that also knows 2e-5 (without a dot) as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _plain(node: yaml.Node, path: FieldPath, lines: dict[FieldPath, int], problems: list[str]) -> Any:
    """A YAML node as dicts, lists and scalars, noting lines; a key given twice is a problem, not a silent choice."""
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in mapping:
                problems.append(
                    f"{_dotted((*path, key))} (line {key_node.start_mark.line + 1}): given twice. Keep one."
                )
            mapping[key] = _plain(value_node, (*path, key), lines, problems)
            lines[(*path, key)] = key_node.start_mark.line + 1
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, index), lines, problems) for index, item in enumerate(node.value)]
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)  # type: ignore[no-untyped-call]
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def _load(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    content, lines, problems = _read_yaml(path)
    for override in overrides:
        _override(content, override, lines)
    return _read(kind, content, str(path), lines, problems)


def _override(content: Any, override: str, lines: dict[FieldPath, int]) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise FileError(f"--set {override}", ["not of the form field=value. Write for example --set stop.trials=20."])
    path: list[str | int] = [int(part) if part.isdigit() else part for part in dotted.split(".")]
    here = content
    try:
        for part in path[:-1]:
            here = here.setdefault(part, {}) if isinstance(here, dict) else here[part]
        here[path[-1]] = yaml.load(text, Loader=_Loader)
    except (TypeError, IndexError, AttributeError, yaml.YAMLError):
        raise FileError(
            f"--set {override}", ["the file has no such place. Name a field as in the study file."]
        ) from None
    lines.pop(tuple(path), None)


def _read(
    kind: type[T], content: Any, place: str, lines: Mapping[FieldPath, int], problems_so_far: Sequence[str] = ()
) -> T:
    problems = list(problems_so_far)

    def report(path: FieldPath, text: str) -> None:
        where = _dotted(path) + (f" (line {lines[path]})" if path in lines else "")
        problems.append(f"{where}: {text}" if path else text)

    value = _value(kind, content, (), report)
    if problems:
        raise FileError(place, problems)
    return typing.cast(T, value)


class _Report(typing.Protocol):
    def __call__(self, path: FieldPath, text: str) -> None: ...


_WRONG = object()  # a value that could not be read; its problem has been reported


def _value(kind: Any, value: Any, path: FieldPath, report: _Report, limits: Mapping[str, Any] = {}) -> Any:
    """`value` as the annotation `kind`, or _WRONG after reporting why not."""
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
        report(path, f"is {value!r}; possible: {known}.{hint}")
        return _WRONG
    if dataclasses.is_dataclass(kind):
        return _dataclass(typing.cast(type, kind), value, path, report)
    if is_pairs(kind):
        return _pairs(parameters[0], value, path, report)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]  # one value is a list of one
        if value is None:
            report(path, "is empty; possible: a value or a list. Give one, or leave the field out.")
            return _WRONG
        read = [
            _value(parameters[0], item, (*path, index) if isinstance(value, list) else path, report)
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
        report(path, f"is {_shown(value)}; possible: {_kind_name(kind)}.")
        return _WRONG
    for name, holds in (
        ("low", lambda bound: value >= bound),
        ("high", lambda bound: value <= bound),
        ("above", lambda bound: value > bound),
    ):
        if name in limits and not holds(limits[name]):
            report(path, f"is {value!r}; possible: {_kind_name(kind)} {_bounds(limits)}.")
            return _WRONG
    return float(value) if kind is float else value


def _union(kinds: tuple[Any, ...], value: Any, path: FieldPath, report: _Report, limits: Mapping[str, Any]) -> Any:
    """The member of a union that the value's own shape (nothing, mapping, list, scalar) asks for."""
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
    for name in value:
        if name not in fields:
            report((*path, name), f"unknown field. Known: {', '.join(fields)}.{did_you_mean(name, fields)}")
    hints, read = typing.get_type_hints(kind), {}
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
    if isinstance(made, Stage):
        for problem in stage_problems(made):
            report(path, problem)
    return made


def _pairs(pair: Any, value: Any, path: FieldPath, report: _Report) -> Any:
    """Named values, given as a mapping, kept as sorted pairs (hashable)."""
    if not isinstance(value, dict):
        report(path, f"is {_shown(value)}; possible: a mapping (name: value).")
        return _WRONG
    kind = get_args(pair)[1]
    read = [
        (str(name), _value(kind, item, (*path, str(name)), report)) for name, item in sorted(value.items(), key=str)
    ]
    return _WRONG if any(item is _WRONG for _, item in read) else tuple(read)


def is_pairs(kind: Any) -> bool:
    """Whether an annotation is tuple[tuple[str, X], ...], which files write as a mapping."""
    parameters = get_args(kind)
    if get_origin(kind) is not tuple or len(parameters) != 2 or parameters[1] is not ...:
        return False
    return get_origin(parameters[0]) is tuple and get_args(parameters[0])[0] is str


def is_mapping(kind: Any) -> bool:
    origin = get_origin(kind)
    return is_pairs(kind) or (isinstance(origin, type) and issubclass(origin, Mapping))


def _dotted(path: FieldPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else repr(value)


def _kind_name(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, kind.__name__)


def _bounds(limits: Mapping[str, Any]) -> str:
    words = {"low": "from", "above": "above", "high": "up to"}
    return " ".join(f"{word} {limits[name]}" for name, word in words.items() if name in limits)


# --- writing -----------------------------------------------------------------------------------------------------


class _Row(dict):  # type: ignore[type-arg]
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that knows `_Row`."""


_Dumper.add_representer(  # type: ignore[no-untyped-call]
    _Row, lambda dumper, row: dumper.represent_mapping("tag:yaml.org,2002:map", row, flow_style=True)
)


def _is_absent(value: Any, field: dataclasses.Field[Any], defaults: bool) -> bool:
    if value is None or value == ():
        return True
    return not defaults and field.default is not dataclasses.MISSING and value == field.default


def _pairs_or_list(value: Any, kind: Any, defaults: bool) -> Any:
    if is_pairs(kind):
        return {name: to_mapping(item, defaults=defaults) for name, item in value}
    return to_mapping(value, defaults=defaults)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
