"""Files in and out: studies, schedules and presets as YAML, written atomically, read strictly.

It needs PyYAML and nothing else, so that a deployed model can load its schedule. What the fields mean is read by
`strict.py` from the dataclasses.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from prunesearch.config import Options, StudyConfig
from prunesearch.errors import FileError
from prunesearch.recipes import RecipeName
from prunesearch.schedule import Place, Schedule, Stage
from prunesearch.strict import FieldPath, dotted, read, to_mapping
from prunesearch.strict import from_mapping as from_mapping

T = TypeVar("T")
SCHEDULE_HEADER = 'prunesearch schedule. Use:  apply_schedule(model, load_schedule("{name}"))'


@dataclass(frozen=True)
class ScheduleFile:
    """A schedule as it is written to a file: the stages, and where they come from.

    weights: file name of fine-tuned weights beside it; without one, the model's own weights belong to it.
    """

    version: Literal[1]
    stages: tuple[Stage, ...]
    target_gmacs: float | None = None
    model: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    weights: str | None = None
    measured: Mapping[str, Any] | None = None
    made_by: Mapping[str, Any] | None = None

    @property
    def schedule(self) -> Schedule:
        """What it says to do."""
        return Schedule(self.stages, self.target_gmacs)


@dataclass(frozen=True)
class PresetStage:
    """A stage whose place and amount are rules. The fields it shares with `Stage` mean the same.

    block: written for the preset's `depth`, scaled to the model's; left out: every block. Exactly one amount:
    keep (of the tokens present, rounded up), keep_of_original (of those at the input, rounded down), tokens (one
    count, or one for each block; a count that is not below what arrives is no stage), remove (how many go, but never
    more than the verb can take) and threshold (written for the preset's `patch_tokens`; scores that are shares of a
    sum over the tokens scale with it). remove_last: `remove` goes linearly to this in the last block, truncated.
    """

    block: int | None = None
    at: Place = "mid"
    score: str = ""
    keep: float | None = None
    keep_of_original: float | None = None
    tokens: tuple[int, ...] | None = None
    remove: int | None = None
    remove_last: int | None = None
    threshold: float | None = None
    reduce: str = "drop"
    options: Options = ()


@dataclass(frozen=True)
class PresetFile:
    """A published schedule as a rule, and what its paper reports (rows with model, gmacs, top1, trained).

    depth, patch_tokens: of the model that blocks, thresholds and lists of counts are written for. target: share of
    the dense model's MACs towards which thresholds are trained. recipe: how the method trains it, as a study's
    `finetune.recipe` says it; a study that starts from the preset trains it by its own fine-tune.
    """

    version: Literal[1]
    summary: str
    source: str
    stages: tuple[PresetStage, ...]
    depth: int = 12
    patch_tokens: int = 196
    target: float | None = None
    recipe: RecipeName | None = None
    published: tuple[Mapping[str, Any], ...] = ()


def load_schedule(path: str | Path) -> Schedule:
    """Read a schedule file. Raises FileError with all mistakes; whether it fits a model is seen when it is applied."""
    return load_schedule_file(path).schedule


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
    mapping = to_mapping(ScheduleFile(1, schedule.stages, schedule.target_gmacs, **about))
    mapping["stages"] = [_Row(to_mapping(stage, defaults=True)) for stage in schedule.stages]
    write_yaml(mapping, path, header=SCHEDULE_HEADER.format(name=Path(path).name))


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study file; `overrides` such as "stop.trials=20" replace single values. Raises FileError."""
    return _load(StudyConfig, path, overrides)


def override_study(config: StudyConfig, overrides: Sequence[str]) -> StudyConfig:
    """A study with single values replaced, as `load_study` does it. Raises FileError."""
    content = to_mapping(config)
    for override in overrides:
        _override(content, override, {})
    return from_mapping(StudyConfig, content, f"study {config.name}")


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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _plain(node: yaml.Node, path: FieldPath, lines: dict[FieldPath, int], problems: list[str]) -> Any:
    """A YAML node as dicts, lists and scalars, noting lines; a key given twice is a problem, not a silent choice."""
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            field = (*path, key)
            if key in mapping:
                problems.append(f"{dotted(field)} (line {key_node.start_mark.line + 1}): given twice. Keep one.")
            mapping[key] = _plain(value_node, field, lines, problems)
            lines[field] = key_node.start_mark.line + 1
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, index), lines, problems) for index, item in enumerate(node.value)]
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _load(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    content, lines, problems = _read_yaml(path)
    for override in overrides:
        _override(content, override, lines)
    return read(kind, content, str(path), lines, problems)


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


# --- writing -----------------------------------------------------------------------------------------------------


class _Row(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that knows `_Row`."""


_Dumper.add_representer(
    _Row, lambda dumper, row: dumper.represent_mapping("tag:yaml.org,2002:map", row, flow_style=True)
)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
