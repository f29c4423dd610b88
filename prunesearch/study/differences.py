"""Compare the settings of a study file with those of the stored study, and refuse differences that matter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from prunesearch.config import StudyConfig
from prunesearch.errors import StudyError
from prunesearch.strict import from_mapping, to_mapping

_DATA = ("data.root", "data.val_root", "data.test_root", "data.test_split", "data.loaders", "data.in_memory")
MAY_CHANGE = (
    "workers",
    "stop",
    "confirm",
    "siblings",
    "metrics",
    "plugins",
    "device.profile",
    "device.seconds",
    *_DATA,
)
"""Settings that may differ when a study is continued. All others affect its results. The data settings may differ
because the same images may have another path on another machine, and because test images do not affect the search. The
profile of a device may be another file, but not with other times."""
MAY_MEND = (
    "model.checkpoint",
    "model.pretrained",
    "model.num_classes",
    "data.name",
    "data.train_split",
    "data.val_split",
)
"""Settings that may also differ as long as no evaluation is complete: names and places of weights and images, which are
often wrong at first. The space and the objectives may never differ."""


def differences(old: StudyConfig, new: StudyConfig) -> dict[str, str]:
    """The differing settings that are not in MAY_CHANGE: field -> "field: old -> new"."""
    before, after = _flat(_brief(old)), _flat(_brief(new))
    return {
        name: f"{name}: {_as_json(before, name)} -> {_as_json(after, name)}"
        for name in sorted(before.keys() | after.keys())
        if _as_json(before, name) != _as_json(after, name) and not _is_among(name, MAY_CHANGE)
    }


def refuse_other_settings(config: StudyConfig, saved: Mapping[str, Any], may_mend: bool) -> bool:
    """Raise StudyError with all differences between `config` and the `saved` one that are not allowed.

    may_mend: no evaluation is complete, so settings in MAY_MEND may differ. Returns whether one of them does.
    """
    place = f"study {config.name!r}"
    changed = differences(from_mapping(StudyConfig, saved, place), config)
    refused = [line for name, line in changed.items() if not (may_mend and _is_among(name, MAY_MEND))]
    if refused:
        lines = "\n".join(f"  - {line}" for line in refused)
        if "device.table" in changed:
            lines += "\n    (a profile may be another file, but with the same times: the study goes on with its own)"
        raise StudyError(
            f"{place} exists with other settings:\n{lines}\n"
            f"Possible to change in a study: {', '.join(MAY_CHANGE)}; until something is evaluated also "
            f"{', '.join(MAY_MEND)}. "
            f"Give the new search another name (--set name=...), undo the change, or delete the study if its "
            f"results are not wanted."
        )
    return bool(changed)


def refuse_other_weights(name: str, checkpoint: str, now: str, then: str) -> None:
    """Raise StudyError when a checkpoint has changed. now, then: its `digest_of_file`; then: when the study began."""
    if now != then:
        raise StudyError(
            f"study {name!r}: model.checkpoint: {checkpoint} has other weights now ({now}) than those that candidates "
            f"were evaluated with ({then}). Possible: the file as it was. Put it back, or give the new search another "
            f"name (--set name=...)."
        )


def digest_of_file(path: str) -> str:
    """A short hash of the content of a file."""
    digest = blake2b(digest_size=8)
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _brief(config: StudyConfig) -> dict[str, Any]:
    """The settings as a mapping, with a summary in place of the numbers of a profile."""
    mapping: dict[str, Any] = to_mapping(config, defaults=True)
    table = None if config.device is None else config.device.table
    if table is not None:
        text = f"{table.runtime} on {table.device}, batch {table.batch}, dense {table.dense_ms:.4g} ms"
        numbers = json.dumps(to_mapping(table), sort_keys=True)  # the order of its parts does not matter
        mapping["device"]["table"] = f"{text} ({blake2b(numbers.encode(), digest_size=4).hexdigest()})"
    return mapping


def _is_among(name: str, settings: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in settings)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names. Lists are kept whole."""
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{name}.{key}" if name else key))
    return flat


def _as_json(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "absent"
