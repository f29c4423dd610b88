#!/usr/bin/env python
"""Fuzz `prunesearch check` with thousands of broken study and schedule files, in one process.

    python scripts/fuzz_check.py --files 3000 --seed 0

Files are mutations of those that ship: a third are changed as text, the others as values, so they remain valid YAML.
`check` must end with exit code 0 or 2, within 5 seconds of CPU time and 1 GB of additional memory. An accepted study
must then propose candidates when it is told made-up results. The script exits with 1 when a file fails, and keeps that
file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm  # noqa: F401 - its memory and time are not those of a check

from prunesearch.cli import main as prunesearch
from prunesearch.config import ModelConfig, StudyConfig
from prunesearch.errors import ScheduleError, UserError
from prunesearch.evaluate import METRICS, model_shape
from prunesearch.evaluate.sections import OPTIONS, Bounds
from prunesearch.evaluate.task import Evaluation
from prunesearch.files import (
    ScheduleFile,
    is_schedule_file,
    load_schedule_file,
    load_study,
    save_schedule,
    write_yaml,
)
from prunesearch.presets import load_preset, presets
from prunesearch.record import Record, with_evaluation
from prunesearch.samplers import SAMPLERS
from prunesearch.samplers.propose import propose, seed_of
from prunesearch.samplers.sampler_state import SamplerState
from prunesearch.samplers.token_gp import features
from prunesearch.space.choices import dimensions, uid_of
from prunesearch.space.problems import AMOUNTS
from prunesearch.strict import is_pairs, to_mapping
from prunesearch.tokens import REDUCERS, SCORERS
from prunesearch.yaml_text import read_yaml_text

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 5.0
MOST_MEGABYTES = 1000.0
CANDIDATES = 10
MOST_PARAMETERS = 60
"""Candidates are only proposed for spaces with at most this many parameters; larger ones take too long."""
DIGITS = ModelConfig("vit_digits_patch1_8", options=(("depth", 8),))
HOSTILE = [
    "!!python/object/apply:os.system ['true']", "&a [*a]", "*a", "2024-13-45", "0b", "1:60:60", "=", "<<", ".nan",
    "-.inf", "1e999", "9" * 400, "-" + "9" * 400, "\t", "\0", "\x1b[31m", "\ufeff", "\u2028", '"\\ud800"', "[" * 200,
    "{" * 200, "- " * 200, "? [a]: b", "{a: 1, a: 2}", "~", "''", "yes", "0x" + "f" * 300, "a" * 5000, "%YAML 9.9",
    "---", "...", "#", "|", ">", "@", "`", "null", "[]", "{}", "[[[]]]", "-1", "0", "1.5", "true", "1e-320", "-0.0",
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The result for one file.

    where: the step that refused it (yaml, form, meaning), "accepted", or the kind of failure. trouble: its text.
    """

    where: str
    seconds: float
    proposed: int | None = None
    trouble: str = ""


def corpus() -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """(text, content) of the shipped studies and of the presets as schedule files.

    All are for the digits model where that is possible.
    """
    studies, schedules = [], []
    for path in sorted((ROOT / "search_spaces").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        content = read_yaml_text(text).content
        is_large = "convnext" not in path.stem and content["model"]["name"] != DIGITS.name
        studies.append((text, {**content, "model": to_mapping(DIGITS)} if is_large else content))
    shape = model_shape(DIGITS)
    with tempfile.TemporaryDirectory() as folder:
        for name in presets():
            with contextlib.suppress(ScheduleError):
                path = Path(folder) / "schedule.yaml"
                save_schedule(load_preset(name, shape), path, model=to_mapping(DIGITS))
                text = path.read_text(encoding="utf-8")
                schedules.append((text, read_yaml_text(text).content))
    return studies, schedules


# --- mutation ----------------------------------------------------------------------------------------------------


def mutated_text(text: str, generator: random.Random) -> str:
    """The text with one to three random edits."""
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(len(text) + 1)
        end = min(len(text), place + generator.randint(1, 30))
        lines = text.split("\n")
        line = generator.randrange(len(lines))
        kind = generator.randrange(7)
        if kind == 0:
            text = text[:place] + text[end:]
        elif kind == 1:
            text = text[:place] + generator.choice(HOSTILE) + text[place:]
        elif kind == 2:
            text = (
                text[:place]
                + chr(generator.choice([*range(32, 127), 0, 9, 27, 0x85, 0xE9, 0x2028]))
                + text[place + 1 :]
            )
        elif kind == 3:
            text = "\n".join([*lines[: line + 1], *lines[line:]])
        elif kind == 4:
            text = "\n".join([*lines[:line], " " * generator.randint(0, 4) + lines[line].lstrip(), *lines[line + 1 :]])
        elif kind == 5 and ": " in lines[line]:
            name = lines[line].partition(": ")[0]
            text = "\n".join([*lines[:line], f"{name}: {generator.choice(HOSTILE)}", *lines[line + 1 :]])
        else:
            text = text[:place] if generator.random() < 0.2 else text + text[place:end]
    return text


SHARES = ["70%", "60 %", "100%", "130%", "99.5%", "0%", "1e2%", "-5%"]
"""Shares of the dense model's value. The last three are mistakes."""
WORDS: dict[str, Sequence[str]] = {
    "score": [*SCORERS, "none"],
    "reduce": [*REDUCERS],
    "at": ["mid", "pre"],
    "amount": AMOUNTS,
    "same": ["at", "score", "reduce", "keep", "amount", "threshold", "merge_threshold", "tokens"],
    "start_from": [
        "sensitivity",
        "evit-0.7",
        "tome-r8",
        "asvit-0.65",
        "ltmp-0.6",
        "patchmerger-8",
        "dynswin-0.7",
        "x.yaml",
    ],
    "metric": [*METRICS],
    "metrics": [*METRICS],
    "limits": [*METRICS],
    "Limit.at_most": SHARES,
    "Limit.at_least": SHARES,
    "IsoBudget.gmacs": SHARES,
    "IsoBudget.predicted_latency_ms": SHARES,
    "siblings": ["auto", "deit_tiny_patch16_224", "test_vit", "resnet18"],
    "SamplerConfig.name": [*SAMPLERS],
    "ModelConfig.name": [
        "vit_digits_patch1_8",
        "test_vit",
        "deit_tiny_patch16_224",
        "hf-hub:a/b",
        "resnet18",
        "convnext_atto",
    ],
}
"""Meaningful text values, by field."""


def mutated_content(content: Any, generator: random.Random) -> Any:
    """The content with one to three values changed, mostly to valid values of their fields."""
    content = copied(content)
    kind = ScheduleFile if "stages" in content else StudyConfig
    for _ in range(generator.randint(1, 3)):
        _mutate(content, kind, generator)
    return content


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def _mutate(content: Any, kind: type, generator: random.Random) -> None:
    fields = [field for field in dataclasses.fields(kind) if field.name not in ("plugins", "table", "profile")]
    field = generator.choice(fields)
    hint = typing.get_type_hints(kind)[field.name]
    inner = [part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)]
    given = content.get(field.name)
    if inner and isinstance(given, dict) and generator.random() < 0.9:
        _mutate(given, typing.cast(type, inner[0]), generator)
    elif inner and isinstance(given, list) and given and isinstance(given[0], dict) and generator.random() < 0.9:
        _mutate(generator.choice(given), typing.cast(type, inner[0]), generator)
    elif generator.random() < 0.1:
        content.pop(field.name, None)
    elif generator.random() < 0.04:
        content[field.name + generator.choice("xs")] = 1
    else:
        content[field.name] = value_of(hint, field.metadata, f"{kind.__name__}.{field.name}", generator)


def value_of(kind: Any, limits: Mapping[str, Any], field: str, generator: random.Random) -> Any:
    """A random value for an annotation, as in YAML: mostly a valid one, bounds included."""
    origin, parameters = get_origin(kind), get_args(kind)
    if generator.random() < 0.02:
        return generator.choice(
            [None, [], {}, "text", -1, 0, 1.5, True, float("nan"), float("inf"), 10**400, [[1]], "a\nb"]
        )
    if origin in (Union, types.UnionType):
        return value_of(generator.choice(parameters), limits, field, generator)
    if origin is Literal:
        return generator.choice(parameters)
    if kind is type(None) or kind is Any:
        return None
    if kind is bool:
        return generator.random() < 0.5
    if kind in (int, float):
        return _number(kind, limits, generator)
    if kind is str:
        words = WORDS.get(field) or WORDS.get(field.rpartition(".")[2]) or ["text", "auto", "cpu", "none", "1", ""]
        return generator.choice(words)
    if dataclasses.is_dataclass(kind):
        return _section(typing.cast(type, kind), generator)
    if is_pairs(kind):
        part = get_args(parameters[0])[1]
        if field == "ModelConfig.options":
            return {name: _option(name, generator) for name in generator.sample(list(OPTIONS), generator.randint(1, 3))}
        names = WORDS.get(field.rpartition(".")[2], ["scaled", "temperature", "seed"])
        return {
            generator.choice(names): value_of(part, limits, field, generator) for _ in range(generator.randint(1, 2))
        }
    if origin is tuple:
        count = generator.choice([1, 1, 2, 3, 5, 8]) if generator.random() < 0.97 else limits.get("most", 50)
        return [value_of(parameters[0], limits, field, generator) for _ in range(count)]
    return {"name": generator.choice([1, "text", None])}


def _number(kind: type, limits: Mapping[str, Any], generator: random.Random) -> float:
    low, high = limits.get("low", limits.get("above", 0)), limits.get("high", 100)
    if generator.random() < 0.15:
        value = generator.choice([low, high, low - 1, high * 2, high + 1, 0])
    elif generator.random() < 0.7 and high > 12 >= low:
        value = low + generator.choice([0, 1, 2, 3, 5, 8, 0.5, 0.01]) if generator.random() < 0.8 else 11
    else:
        value = generator.uniform(low, high)
    return int(value) if kind is int else round(float(value), 4)


def _option(name: str, generator: random.Random) -> Any:
    possible = OPTIONS[name]
    if not isinstance(possible, Bounds):
        return generator.choice(possible)
    limits = {"low": possible.low, "high": possible.high}
    return _number(possible.kind, limits, generator)


def _section(kind: type, generator: random.Random) -> dict[str, Any]:
    hints, made = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING
        if required or generator.random() < 0.3:
            made[field.name] = value_of(hints[field.name], field.metadata, f"{kind.__name__}.{field.name}", generator)
    return made


# --- what becomes of them ----------------------------------------------------------------------------------------


def check(path: Path) -> Outcome:
    """Run `check` on a file. If it is an accepted study with a small space, also propose CANDIDATES candidates."""
    output, errors = io.StringIO(), io.StringIO()
    begin = time.process_time()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = prunesearch(["check", str(path)])
    except BaseException:  # no exception may leave the command
        return Outcome("traceback", time.process_time() - begin, trouble=traceback.format_exc())
    seconds = time.process_time() - begin
    said = errors.getvalue()
    refused = any(not line.startswith("note: ") for line in said.splitlines())
    if code not in (0, 2) or "Traceback" in said or (code == 2) != refused:
        return Outcome(f"exit {code}", seconds, trouble=said)
    if seconds > MOST_SECONDS:
        return Outcome("slow", seconds, trouble=said)
    if code == 2:
        return Outcome(_refused_by(path), seconds)
    if "stages" in read_yaml_text(_text(path)).content or "fine as far as" in output.getvalue():
        return Outcome("accepted", seconds)
    content = load_study(path)
    if len(dimensions(content.space)) > MOST_PARAMETERS:
        return Outcome("accepted", seconds)
    try:
        return Outcome("accepted", seconds, proposed=proposals(content, CANDIDATES))
    except Exception:
        return Outcome("does not run", seconds, trouble=traceback.format_exc())


def _refused_by(path: Path) -> str:
    """The step that refuses a file: reading its YAML, its form (fields and their values), or what it means."""
    try:
        load_schedule_file(path) if is_schedule_file(path) else load_study(path)
    except UserError:
        return "yaml" if read_yaml_text(_text(path)).problems else "form"
    return "meaning"


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig", errors="replace")


def proposals(config: StudyConfig, count: int) -> int:
    """Propose at most `count` candidates, each told a made-up result; returns how many there were."""
    shape = model_shape(config.model)
    state, records = SamplerState(config), dict[str, Record]()
    for index in range(count):
        draws = SAMPLERS[config.sampler.name].draws
        proposal = propose(config, shape, state.draw, draws, state.known, records, index)
        if proposal.schedule is None:
            break
        features(proposal.schedule, shape)
        uid = uid_of(proposal.schedule, shape)
        record = Record(index, uid, proposal.schedule, "running", "sampler", 0, parameters=proposal.parameters)
        records[uid] = record
        state.begin(record)
        generator = random.Random(seed_of(uid))
        metrics = tuple((name, generator.uniform(0.001, 100)) for name in config.metric_names)
        evaluation = Evaluation(uid, "complete", metrics=metrics)
        records[uid] = with_evaluation(record, evaluation, index, len(config.rungs) - 1)
        state.finish(records[uid], evaluation, records)
    return len(records)


def run(files: int, seed: int, folder: Path, most_failures: int = 20) -> list[Outcome]:
    """Check many files. Files that fail stay in the folder."""
    generator = random.Random(seed)
    known, outcomes = corpus(), list[Outcome]()
    for index in range(files):
        text, content = generator.choice(known[generator.random() < 0.3])
        path = folder / f"{seed}-{index}.yaml"
        if index % 3 == 0:
            path.write_bytes(mutated_text(text, generator).encode("utf-8", errors="replace"))
        else:
            write_yaml(mutated_content(content, generator), path)
        outcome = check(path)
        outcomes.append(outcome)
        if outcome.trouble:
            print(f"{path}: {outcome.where}, {outcome.seconds:.1f} s\n{outcome.trouble}")
            if sum(bool(one.trouble) for one in outcomes) >= most_failures:
                break
        else:
            path.unlink()
    return outcomes


def peak_megabytes() -> float:
    """Peak memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz_check-"))
    with contextlib.redirect_stdout(io.StringIO()):
        prunesearch(["check", str(ROOT / "search_spaces" / "digits.yaml")])  # excludes the imports
    before = peak_megabytes()
    outcomes = run(arguments.files, arguments.seed, folder)
    grown = peak_megabytes() - before
    counts = Counter(outcome.where for outcome in outcomes)
    meant = counts["meaning"] + counts["accepted"]
    proposed = [outcome.proposed for outcome in outcomes if outcome.proposed is not None]
    full, slowest = proposed.count(CANDIDATES), max(outcome.seconds for outcome in outcomes)
    named = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    print(f"seed {arguments.seed}, {len(outcomes)} files: {named}")
    print(
        f"{meant / len(outcomes):.0%} came to the checks of meaning; {len(proposed)} accepted studies made proposals,"
    )
    print(f"{full} of them {CANDIDATES}, the others all that their spaces have")
    print(f"slowest {slowest:.2f} s, {grown:.0f} MB of further memory at the peak")
    failed = any(outcome.trouble for outcome in outcomes) or grown > MOST_MEGABYTES or meant < len(outcomes) / 2
    if failed:
        print(f"FAILED; the files are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
