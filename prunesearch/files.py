"""Read and write studies, schedules and presets as YAML: reading is strict, writing is atomic.

The only library this needs is PyYAML, so that a deployed model can load its schedule. `strict.py` turns what was read
into dataclasses.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from prunesearch.config import (
    LARGEST,
    MODULE_NAME,
    MOST_BLOCKS,
    MOST_GMACS,
    MOST_NAMES,
    MOST_TOKENS,
    TARGETS,
    Options,
    StudyConfig,
    as_options,
    bounded,
    study_name_problem,
)
from prunesearch.errors import FileError, UserError
from prunesearch.plugins import import_plugins, missing_plugins
from prunesearch.printable import counted, printable
from prunesearch.profile import MOST_MS, Profile, ProfileFile, profile_problems
from prunesearch.recipes import RecipeName
from prunesearch.registry import did_you_mean
from prunesearch.schedule import Place, Schedule, Stage, options_of, stage_problems, unknown_words, without_defaults
from prunesearch.strict import FieldPath, dotted, read, to_mapping
from prunesearch.strict import from_mapping as from_mapping
from prunesearch.yaml_text import MOST_BYTES, Dumper, Text, read_yaml_text, too_large

logger = logging.getLogger(__name__)

T = TypeVar("T")
PRESETS = Path(__file__).parent / "presets"
SCHEDULE_HEADER = 'prunesearch schedule. Use:  apply_schedule(model, "{name}")'


@dataclass(frozen=True)
class ScheduleFile:
    """A schedule as it is written to a file: the stages, and where they come from.

    weights: name of the file with fine-tuned weights, in the same folder. None: the model's own weights belong to it.
    plugins: modules that register those of its scores and verbs that prunesearch does not bring.
    """

    version: Literal[1]
    stages: tuple[Stage, ...] = bounded("where tokens go, in the order of the blocks", most=MOST_BLOCKS)
    target_gmacs: float | None = bounded(
        "mean GMACs of an image, towards which thresholds are trained", None, above=0, high=MOST_GMACS
    )
    target_predicted_latency_ms: float | None = bounded(
        "the same in milliseconds of a batch, by a device's profile", None, above=0, high=MOST_MS
    )
    model: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    weights: str | None = None
    measured: Mapping[str, Any] | None = None
    made_by: Mapping[str, Any] | None = None
    plugins: tuple[str, ...] = bounded("modules to import", (), most=MOST_NAMES, pattern=MODULE_NAME)

    @property
    def schedule(self) -> Schedule:
        """The schedule alone. A file writes options at their default; here they are left out."""
        targets = {field: getattr(self, field) for field in TARGETS}
        return without_defaults(Schedule(self.stages, **targets))


@dataclass(frozen=True)
class PresetStage:
    """A stage of a preset. Its block and amount are rules; its other fields mean the same as those of `Stage`.

    block: for a model of the preset's `depth`; scaled to the depth of the model at hand. None: every block.
    Exactly one of these amounts is given:
    keep: share of the tokens present, rounded up.
    keep_of_original: share of the tokens at the input, rounded down.
    tokens: one count, or one for each block. Where it is not below the tokens present, there is no stage.
    remove: number of tokens that go, at most as many as the verb can remove. remove_last: that number in the last
    block; from the first block to the last it changes linearly and is truncated.
    threshold: for a model with the preset's `patch_tokens`. Thresholds on scores that are shares of a sum over the
    tokens are scaled to the model at hand.
    every: from the block on there is a stage in each so many-th block. blocks_away: the tokens that left are back after
    so many blocks; neither is scaled.
    """

    block: int | None = bounded("0-based block index", None, low=0, high=MOST_BLOCKS)
    at: Place = "mid"
    score: str = ""
    keep: float | None = bounded("of the tokens present", None, above=0, high=1)
    keep_of_original: float | None = bounded("of the tokens at the input", None, above=0, high=1)
    tokens: tuple[int, ...] | None = bounded("counts", None, low=1, high=MOST_TOKENS, most=MOST_BLOCKS)
    remove: int | None = bounded("how many tokens go", None, low=0, high=MOST_TOKENS)
    remove_last: int | None = bounded("how many go in the last block", None, low=0, high=MOST_TOKENS)
    threshold: float | None = bounded("in units of the score", None, low=-LARGEST, high=LARGEST)
    reduce: str = "drop"
    options: Options = bounded("of the score and the verb", (), low=-LARGEST, high=LARGEST, most=MOST_NAMES)
    until: Literal["next", "end"] | None = None
    every: int | None = bounded("blocks from a stage to the next", None, low=1, high=MOST_BLOCKS)
    blocks_away: int | None = bounded("blocks without the tokens that left", None, low=1, high=MOST_BLOCKS)


@dataclass(frozen=True)
class PresetFile:
    """A published schedule as a rule, and what its paper reports (rows with model, gmacs, top1, trained).

    depth, patch_tokens: size of the model that blocks, thresholds and lists of counts are written for.
    target: share of the dense model's MACs towards which thresholds are trained.
    recipe: how the method trains, as a name for `finetune.recipe`. A study that starts from the preset does not use it.
    """

    version: Literal[1]
    summary: str
    source: str
    stages: tuple[PresetStage, ...] = bounded("rules", most=MOST_BLOCKS)
    depth: int = bounded("blocks of the model that the numbers are for", 12, low=1, high=MOST_BLOCKS)
    patch_tokens: int = bounded("patch tokens of that model", 196, low=1, high=MOST_TOKENS)
    target: float | None = bounded("share of the dense model's MACs", None, above=0, high=1)
    recipe: RecipeName | None = None
    published: tuple[Mapping[str, Any], ...] = bounded("what the paper reports", (), most=MOST_NAMES)


def load_schedule(path: str | Path, plugins: Sequence[str] = ()) -> Schedule:
    """Read a schedule file. Raises FileError with all mistakes. `apply_schedule` checks whether it fits a model.

    Warns when fine-tuned weights belong to the schedule: `apply_schedule` loads them when it is given the path.

    plugins: modules to import first. The modules that the file names are not imported by themselves, because a file
    from a stranger would then run code here.
    """
    file = load_schedule_file(path, plugins)
    if file.weights is not None:
        logger.warning(
            "%s: only the schedule is loaded, without its fine-tuned weights (%s). Possible: both, by "
            "apply_schedule(model, PATH), or apply_schedule(model, schedule, weights=PATH).",
            path,
            file.weights,
        )
    return file.schedule


def is_schedule_file(path: str | Path) -> bool:
    """True when a file has `stages`, as a schedule has; otherwise it can only be a study. Raises FileError."""
    return _has_stages(_read_yaml(path))


def _has_stages(text: Text) -> bool:
    return isinstance(text.content, dict) and "stages" in text.content


def plugins_named_in(path: str | Path) -> tuple[str, ...]:
    """The plug-ins that a schedule file names. Nothing else is checked. Raises FileError when it cannot be read."""
    return _plugins_named(_read_yaml(path).content)


def load_preset_file(path: str | Path) -> PresetFile:
    """Read one of the package's presets."""
    return _load(PresetFile, path)


def load_schedule_file(path: str | Path, plugins: Sequence[str] = ()) -> ScheduleFile:
    """Read a schedule file with all its fields. plugins: as for `load_schedule`. Raises FileError."""
    import_plugins(plugins)
    text = _read_yaml(path)
    text.problems += _unusable_stages(text.content, text.lines)
    return _override_and_read(ScheduleFile, text, str(path), ())


def save_schedule(schedule: Schedule, path: str | Path, **about: Any) -> None:
    """Write a schedule file. about: the other fields of `ScheduleFile` (model, weights, measured, ...).

    Options at their default are written too. The defaults of a score or verb that is not registered are unknown and
    left out.
    """
    write_atomically(path, schedule_text(schedule, Path(path).name, **about).encode())


def schedule_text(schedule: Schedule, name: str, **about: Any) -> str:
    """The text of a schedule file with this name. about: as for `save_schedule`."""
    stages = tuple(replace(stage, options=as_options(options_of(stage))) for stage in schedule.stages)
    targets = {field: getattr(schedule, field) for field in TARGETS}
    mapping = to_mapping(ScheduleFile(1, stages, **targets, **about))
    mapping["stages"] = [_Row(to_mapping(stage, defaults=True)) for stage in stages]
    return _yaml_text(mapping, header=SCHEDULE_HEADER.format(name=printable(name)))


def save_profiles(profiles: Sequence[Profile], path: str | Path) -> None:
    """Write a profile file (JSON), atomically."""
    mapping = to_mapping(ProfileFile(1, tuple(profiles)), defaults=True)
    write_atomically(path, (json.dumps(mapping, indent=1) + "\n").encode())


def load_profiles(path: str | Path) -> tuple[Profile, ...]:
    """Read a profile file. Raises FileError with all mistakes."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        missing = f"there is no such file (looked in {Path.cwd()})"
        why = error.strerror if isinstance(error, OSError) else f"cannot be read as JSON: {error}"
        why = missing if isinstance(error, FileNotFoundError) else why
        problem = f"{why}. Possible: what prunesearch profile -o wrote. Correct the path."
        raise FileError(str(path), [problem]) from None
    found = read(ProfileFile, content, str(path)).profiles
    problems = [problem for profile in found for problem in profile_problems(profile)]
    if problems or not found:
        raise FileError(str(path), problems or ["it has no profile. Possible: one or more. Profile again."])
    return found


def load_study(path: str | Path, overrides: Sequence[str] = (), *, read_profile: bool = True) -> StudyConfig:
    """Read a study file; `overrides` such as "stop.trials=20" replace single values. Raises FileError.

    read_profile: also read the device's profile, which the study names. It may not have been made yet.
    """
    text = _read_yaml(path)
    if _has_stages(text) and "space" not in text.content:
        raise FileError(
            str(path),
            ["it is a schedule (it has stages), not a study. Possible: a file with a space. Use check or evaluate."],
        )
    config = _named_well(_override_and_read(StudyConfig, text, str(path), overrides), str(path))
    return with_profile(config) if read_profile else config


def places_in_file(path: str | Path, overrides: Sequence[str], problems: Sequence[str]) -> list[str]:
    """Problems of a study with the line of the field that each names. Fields that overrides replaced have no line."""
    text = _read_yaml(path)
    for one in overrides:
        override(text, one)
    lines = {dotted(field): line for field, line in text.lines.items()}
    found = []
    for problem in problems:
        place, colon, said = problem.partition(":")
        found.append(f"{place} (line {lines[place]}){colon}{said}" if place in lines else problem)
    return found


def override_study(config: StudyConfig, overrides: Sequence[str]) -> StudyConfig:
    """The study with single values replaced; `overrides` as for `load_study`. Raises FileError."""
    place = f"study {config.name}"
    if config.device is not None and any(one.startswith("device.") for one in overrides):
        config = replace(config, device=replace(config.device, table=None))  # it belongs to the values before
    return with_profile(_named_well(_override_and_read(StudyConfig, Text(to_mapping(config)), place, overrides), place))


def _named_well(config: StudyConfig, place: str) -> StudyConfig:
    """Return the study. Raises FileError when a folder cannot have its name; only studies in a storage may have any."""
    problem = study_name_problem(config.name)
    if problem is not None:
        raise FileError(place, [problem])
    return config


def with_profile(config: StudyConfig) -> StudyConfig:
    """The study with the profile that the file of its `device` section has. Raises FileError."""
    device = config.device
    if device is None or device.profile is None or device.table is not None:
        return config
    found = load_profiles(device.profile)
    asked = {name: getattr(device, name) for name in ("runtime", "batch", "threads", "precision")}
    asked = {name: value for name, value in asked.items() if value is not None}
    fitting = [one for one in found if all(getattr(one, name) == value for name, value in asked.items())]
    if len(fitting) != 1:
        there = "; ".join(
            f"{one.runtime}, batch {one.batch}, {counted(one.threads, 'thread')}, {one.precision}" for one in found
        )
        wanted = ", ".join(f"{name} {value}" for name, value in asked.items()) or "nothing in particular"
        problem = f"device: {len(fitting)} of its profiles fit what is asked for ({wanted}). Possible: {there}."
        raise FileError(device.profile, [f"{problem} Write device.batch and the like so that one fits."])
    return replace(config, device=replace(device, table=fitting[0]))


def write_yaml(mapping: Any, path: str | Path, header: str = "") -> None:
    """Write YAML atomically, with `header` as a comment on top."""
    write_atomically(path, _yaml_text(mapping, header).encode())


def _yaml_text(mapping: Any, header: str) -> str:
    text = "".join(f"# {line}\n" for line in header.splitlines())
    return text + yaml.dump(
        mapping, Dumper=_RowDumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True
    )


def refuse_no_file(path: str | Path) -> None:
    """Raise UserError when a file cannot be written to this path: it is a folder, a pipe or a device."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: it is a folder. Possible: the name of a file. Write for example {path / 'best'}.")
    if path.exists() and not path.is_file():
        raise UserError(
            f"{path}: it is a pipe or a device, which a file would replace. Possible: the name of a file. Change it."
        )


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file atomically: readers see the old file or the whole new one, also after a crash.

    A symbolic link stays a link; the file that it points to is written. Raises UserError as `refuse_no_file`.
    """
    refuse_no_file(path)
    path = Path(os.path.realpath(path))
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


# --- reading -----------------------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    """The names of all presets, in alphabetical order. Opens none."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _no_such_file(place: str) -> str:
    """Why there is nothing to read at this path. It may have been meant as the name of a preset."""
    presets = preset_names()
    if place in presets:
        return f"is a preset, not a file. In Python: apply_schedule(model, {place!r}). In a study: space.start_from."
    why, stem = f"there is no such file (looked in {Path.cwd()})", place.removesuffix(".yaml")
    if stem in presets:
        return f"{why}. Did you mean the preset {stem!r}? Check the path."
    meant = "" if stem != place else did_you_mean(place.lower(), presets)
    return f"{why}, nor a preset of that name.{meant} Check the name." if meant else f"{why}. Check the path."


def _read_yaml(path: str | Path) -> Text:
    """The content of a YAML file with the line of each field. Raises FileError when it cannot be read at all."""
    place = str(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)  # no more: the path may be a device or a huge file
        text = data.decode("utf-8-sig") if len(data) <= MOST_BYTES else None
    except FileNotFoundError:
        raise FileError(place, [_no_such_file(place)]) from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError and a NUL in the path are a ValueError
        raise FileError(place, [f"cannot be read as text: {error}. Give a readable UTF-8 file."]) from None
    if text is None:
        raise FileError(place, [too_large()])
    return read_yaml_text(text)


def _load(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    return _override_and_read(kind, _read_yaml(path), str(path), overrides)


def _override_and_read(kind: type[T], text: Text, place: str, overrides: Sequence[str]) -> T:
    """Apply the overrides and read the result as `kind`. For text that is no YAML, only its problems are reported."""
    if text.problems and text.content is None:
        raise FileError(place, text.problems)
    for one in overrides:
        override(text, one)
    return read(kind, text.content, place, text.lines, text.problems)


def override(text: Text, assignment: str) -> None:
    """Replace one value in `text`, by an assignment such as "stop.trials=20".

    Raises FileError when the file has no such place, or the value is not YAML.
    """
    name, equals, written = assignment.partition("=")
    short = assignment if len(assignment) <= 100 else f"{assignment[:97]}..."
    shown = f"--set {short if short.isprintable() else repr(short)}"
    if not equals or not name:
        raise FileError(shown, ["not of the form field=value. Write for example --set stop.trials=20."])
    value = read_yaml_text(written)
    if value.problems:
        raise FileError(shown, [re.sub(r"^line 1(, column \d+)?: | \(line 1\)", "", text) for text in value.problems])
    here: Any = text.content
    path: list[str | int] = []
    *above, last = name.split(".")
    for part in above:
        key = _place_of(here, part, shown)
        path.append(key)
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here[key]
    key = _place_of(here, last, shown)
    here[key] = value.content
    replaced = (*path, key)
    for field in [field for field in text.lines if field[: len(replaced)] == replaced]:
        del text.lines[field]


def _place_of(content: Any, part: str, shown: str) -> str | int:
    """The key or index that a part of a dotted name means. Raises FileError."""
    if isinstance(content, dict):
        return part
    if isinstance(content, list) and re.fullmatch("[0-9]{1,9}", part) and int(part) < len(content):
        return int(part)
    what = "a single value" if not isinstance(content, list) else f"a list of {len(content)}, counted from 0"
    raise FileError(
        shown, [f"the file has no such place: {part!r} is looked for in {what}. Name a field as in the study file."]
    )


def _unusable_stages(content: Any, lines: Mapping[FieldPath, int]) -> list[str]:
    """Mistakes in the scores, verbs and options of a schedule's stages.

    Stages that cannot be read are skipped here; `read` reports them.
    """
    given = content.get("stages") if isinstance(content, dict) else None
    rows: list[tuple[FieldPath, Any]] = [(("stages",), given)]
    if isinstance(given, list):
        rows = [(("stages", index), row) for index, row in enumerate(given)]
    problems, has_unknown = [], False
    for path, row in rows:
        try:
            stage = from_mapping(Stage, row, "")
        except FileError:
            continue
        where = dotted(path) + (f" (line {lines[path]})" if path in lines else "")
        found = stage_problems(stage)
        problems += [f"{where}: {problem}" for problem in found]
        has_unknown = has_unknown or bool(found and unknown_words(stage))
    missing = missing_plugins(_plugins_named(content)) if has_unknown else []
    if missing:
        names, first = ", ".join(missing), missing[0]
        problem = (
            f"plugins: this schedule needs the plug-ins {names}, which are not imported by themselves, because a file "
            f"from a stranger would then run code here. Possible, if you trust them: in Python `import {first}` first, "
            f"or load_schedule(path, plugins={tuple(missing)!r}); on the command line --plugin {first} or "
            f"--trust-plugins; in a study file plugins: [{names}]. Do one of these."
        )
        problems = [problem, *problems]
    return problems


def _plugins_named(content: Any) -> tuple[str, ...]:
    named = content.get("plugins") if isinstance(content, dict) else None
    return tuple(name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str))


# --- writing -----------------------------------------------------------------------------------------------------


class _Row(dict[str, Any]):
    """A mapping that is written on one line."""


class _RowDumper(Dumper):
    """Dumper that knows `_Row`."""


_RowDumper.add_representer(
    _Row, lambda dumper, row: dumper.represent_mapping("tag:yaml.org,2002:map", row, flow_style=True)
)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
