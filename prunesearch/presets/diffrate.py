"""Read DiffRate's own file, compression_rate.json: for each model and target, two lists with a count per block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunesearch.errors import FileError
from prunesearch.files import PresetStage
from prunesearch.presets.rule import expand
from prunesearch.registry import did_you_mean
from prunesearch.schedule import Schedule

LISTS = ("prune_kept_num", "merge_kept_num")
DEPTHS = {"ViT-T-DeiT": 12, "ViT-S-DeiT": 12, "ViT-B-DeiT": 12, "ViT-B-MAE": 12, "ViT-L-MAE": 24, "ViT-H-MAE": 32}
"""Blocks of the models in the released file. For other models the two lists must only have the same length."""


def load_diffrate(path: str | Path, model: str, target: str) -> Schedule:
    """The schedule of one model and target. Raises FileError.

    In each block tokens are first dropped to the count of the first list, then absorbed to that of the second, both by
    class attention. Counts in the file include the class token. Where a count is not below the tokens present, there
    is no stage. DiffRate never removes tokens in block 0, so the first counts give the model's number of tokens.
    """
    place = str(path)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(place, [f"there is no such file (looked in {Path.cwd()}). Check the path."]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(place, [f"cannot be read as text: {error}. Give a readable UTF-8 file."]) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise FileError(place, [f"{where}: this is not JSON: {error.msg}. Mend the syntax there."]) from None
    targets = _entry(content, model, "model", place)
    entry = _entry(targets, target, f"target of {model}", place)
    problems: list[str] = []
    lists = [_counts(entry, name, problems) for name in LISTS]
    if not problems:
        problems = _misfits(lists, model)
    if problems:
        raise FileError(f"{place}: {model} {target}", problems)
    rows = [
        PresetStage(score="class_attention", tokens=tuple(count - 1 for count in counts), reduce=verb)
        for counts, verb in zip(lists, ("drop", "absorb"), strict=True)
    ]
    return Schedule(expand(rows, len(lists[0]), max(counts[0] for counts in lists) - 1))


def _entry(content: Any, name: str, what: str, place: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise FileError(
            place,
            [
                "is not of DiffRate's form. Possible: {model: {target: {prune_kept_num: ..., merge_kept_num: ...}}}. "
                "Give the compression_rate.json of its repository, or one written like it."
            ],
        )
    if name not in content:
        known = ", ".join(content) or "none"
        raise FileError(place, [f"unknown {what} {name!r}. Known: {known}.{did_you_mean(name, content)}"])
    found: dict[str, Any] = content[name]
    return found


def _counts(entry: dict[str, Any], name: str, problems: list[str]) -> list[int]:
    """Read one list of counts, which the file holds as text."""
    written = entry.get(name)
    if written in (None, "None"):
        problems.append(
            f"{name} is {'missing' if name not in entry else written!r}: a model that only merges (CAFormer) is not "
            f"supported. Possible: entries with both lists ({', '.join(LISTS)}). Choose a plain ViT."
        )
        return []
    try:
        counts = json.loads(written) if isinstance(written, str) else written
    except json.JSONDecodeError:
        counts = None
    if not isinstance(counts, list) or not counts or not all(type(count) is int and count >= 2 for count in counts):
        problems.append(
            f"{name} is {written!r}; possible: a list of whole numbers from 2 (class token and 1 patch token), such as "
            f'"[197, 190]". Mend the list.'
        )
        return []
    return counts


def _misfits(lists: list[list[int]], model: str) -> list[str]:
    depth = DEPTHS.get(model, len(lists[0]))
    return [
        f"{name} has {len(counts)} entries, but there are {depth} blocks. Possible: one entry for each block. "
        f"Mend the list."
        for name, counts in zip(LISTS, lists, strict=True)
        if len(counts) != depth
    ]
