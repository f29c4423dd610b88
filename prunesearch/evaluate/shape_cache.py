"""Shapes of models that were computed before, so that arithmetic needs no timm.

Two files hold them. `timm_shapes.json` comes with this package (made by scripts/record_shapes.py) and has every name
of one version of timm that a schedule can be applied to. The other is in the user's cache folder, and has what was
computed here: names with options, image sizes or numbers of classes, and names of other versions of timm. Both are used
for the installed version of timm only. A file that is missing or damaged counts as empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prunesearch.config import ModelConfig
from prunesearch.errors import FileError, UserError
from prunesearch.files import write_atomically
from prunesearch.shape import ModelShape
from prunesearch.strict import from_mapping, to_mapping

PACKAGE = Path(__file__).parents[1]
SHIPPED = Path(__file__).with_name("timm_shapes.json")
COMPUTED_BY = ("shape.py", "evaluate/build.py", "models/*.py")
"""Files of this package that say what the shape of a model is. What older ones computed is not used."""


@dataclass(frozen=True)
class Facts:
    """What arithmetic needs to know of a model. channels: of the images that it takes."""

    shape: ModelShape
    channels: int


def find(config: ModelConfig) -> Facts | None:
    """What a cache holds of a model, or None. Weights do not matter."""
    if ":" in config.name:
        return None
    if config.options or config.image_size is not None or config.num_classes is not None:
        return _read(_user()["shapes"].get(_key(config)))
    return _read(shipped().get(config.name)) or _read(_user()["shapes"].get(_key(config)))


def keep(facts: Mapping[ModelConfig, Facts], *, all_models: bool = False) -> None:
    """Put what was computed into the user's file. Where that cannot be written, nothing happens.

    all_models: these are all names of timm that a schedule can be applied to, in timm's order.
    """
    path = user_file()
    if path is None:
        return
    content = _content(path)
    if not _is_ours(content):
        content = {"timm": timm_version(), "code": _code(), "shapes": {}, "models": []}
    content["shapes"].update({_key(config): _mapping(one) for config, one in facts.items()})
    if all_models:
        content["models"] = [config.name for config in facts]
    with contextlib.suppress(OSError, UserError):
        write_atomically(path, (json.dumps(content, indent=0) + "\n").encode())
    _user.cache_clear()


def knows(name: str) -> bool:
    """Whether timm has a model of this name, as far as the caches tell. A tag of weights after a dot may be any, as in
    `timm.is_model`."""
    architecture = name.partition(".")[0]
    return architecture in shipped() or any(_name(key).partition(".")[0] == architecture for key in _user()["shapes"])


def all_models() -> Iterator[tuple[str, Facts]]:
    """All names of timm that a schedule can be applied to, without tags of weights, in timm's order; nothing when no
    cache has them for this version."""
    names = [name for name in shipped() if "." not in name] or _user()["models"]
    for name in names:
        facts = find(ModelConfig(name))
        if facts is not None:
            yield name, facts


def ship(facts: Mapping[str, Facts]) -> None:
    """Write the file that comes with this package."""
    texts = {name: json.dumps(_mapping(one)) for name, one in facts.items()}
    shapes = sorted(set(texts.values()))
    models = ",\n".join(f"{json.dumps(name)}: {shapes.index(text)}" for name, text in texts.items())
    rows = ",\n".join(shapes)
    content = f'{{"timm": "{timm_version()}",\n"shapes": [\n{rows}\n],\n"models": {{\n{models}\n}}}}\n'
    write_atomically(SHIPPED, content.encode())


@cache
def timm_version() -> str:
    """Of the installed timm, which is not imported; empty when there is none."""
    from importlib.metadata import PackageNotFoundError, version  # which takes as long as all of this package

    try:
        return version("timm")
    except PackageNotFoundError:
        return ""


def user_file() -> Path | None:
    """Where the shapes of this user are kept; None for a user without a home."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):
        folder = os.path.expanduser("~/.cache")
    return Path(folder, "prunesearch", "shapes.json") if os.path.isabs(folder) else None


@cache
def shipped() -> Mapping[str, Any]:
    """The shipped file by name; empty for other versions of timm."""
    content = _content(SHIPPED)
    if content.get("timm") != timm_version():
        return {}
    return {name: content["shapes"][index] for name, index in content["models"].items()}


@cache
def _user() -> Mapping[str, Any]:
    """The user's file: "shapes" by key, and "models", names. Empty for other versions, and when it is damaged."""
    path = user_file()
    content = {} if path is None else _content(path)
    return content if _is_ours(content) else {"shapes": {}, "models": []}


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # missing or damaged
        return {}
    return content if isinstance(content, dict) else {}


def _is_ours(content: Mapping[str, Any]) -> bool:
    """Whether the user's file was written with this timm and this code."""
    if (content.get("timm"), content.get("code")) != (timm_version(), _code()):
        return False
    models = content.get("models")
    is_list = isinstance(models, list) and all(isinstance(name, str) for name in models)
    return is_list and isinstance(content.get("shapes"), dict)


def _key(config: ModelConfig) -> str:
    return f"{config.name} {json.dumps([config.image_size, config.num_classes, config.options])}"


def _name(key: str) -> str:
    return key.partition(" ")[0]


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for pattern in COMPUTED_BY:
        for path in sorted(PACKAGE.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _mapping(facts: Facts) -> dict[str, Any]:
    return {**to_mapping(facts.shape), "channels": facts.channels}


def _read(content: Any) -> Facts | None:
    if not isinstance(content, dict) or not isinstance(content.get("channels"), int):
        return None
    rest = {name: value for name, value in content.items() if name != "channels"}
    try:
        return Facts(from_mapping(ModelShape, rest, "cache"), content["channels"])
    except FileError:
        return None
