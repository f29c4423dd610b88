"""Whether a study may be continued with these settings, and if not, what is different."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prunesearch.config import StudyConfig
from prunesearch.errors import StudyError
from prunesearch.strict import from_mapping, to_mapping

_DATA = ("data.root", "data.val_root", "data.test_root", "data.test_split", "data.loaders", "data.in_memory")
MAY_CHANGE = ("workers", "stop", "confirm", "metrics", "plugins", *_DATA)
"""Settings that a continued study may have different; all others decide what its numbers mean. The same images may lie
elsewhere on another machine, and those for the test have no part in the search."""
MAY_MEND = (
    "model.checkpoint",
    "model.pretrained",
    "model.num_classes",
    "data.name",
    "data.train_split",
    "data.val_split",
)
"""Settings that may also differ as long as nothing was evaluated: where weights and images are, which people get wrong
at first. What is searched, and how candidates are judged, is no such setting."""


def differences(old: StudyConfig, new: StudyConfig) -> dict[str, str]:
    """Settings that decide what the numbers of a study mean and are not the same: field -> "field: old -> new"."""
    before, after = _flat(to_mapping(old, defaults=True)), _flat(to_mapping(new, defaults=True))
    return {
        name: f"{name}: {_said(before, name)} -> {_said(after, name)}"
        for name in sorted(before.keys() | after.keys())
        if _said(before, name) != _said(after, name) and not _is_among(name, MAY_CHANGE)
    }


def refuse_other_settings(config: StudyConfig, saved: Mapping[str, Any], may_mend: bool) -> bool:
    """Raises StudyError with all differences that matter between a study file and what the study was made with.

    may_mend: nothing was evaluated, so that settings of `MAY_MEND` may differ. Returns whether one does.
    """
    place = f"study {config.name!r}"
    changed = differences(from_mapping(StudyConfig, saved, place), config)
    refused = [line for name, line in changed.items() if not (may_mend and _is_among(name, MAY_MEND))]
    if refused:
        lines = "\n".join(f"  - {line}" for line in refused)
        raise StudyError(
            f"{place} exists with other settings:\n{lines}\n"
            f"Possible to change in a study: {', '.join(MAY_CHANGE)}; until something is evaluated also "
            f"{', '.join(MAY_MEND)}. "
            f"Give the new search another name (--set name=...), undo the change, or delete the study if its "
            f"results are not wanted."
        )
    return bool(changed)


def _is_among(name: str, settings: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in settings)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names; lists stay whole."""
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{name}.{key}" if name else key))
    return flat


def _said(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "absent"
