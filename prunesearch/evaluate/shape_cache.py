"""Cached shapes of models, so that token counts and MACs can be computed without importing timm.

There are two files. `timm_shapes.json` comes with this package (made by scripts/record_shapes.py). For one version of
timm it has every name to which a schedule can be applied. The other file is in the user's cache folder. It has the
shapes that were computed on this machine: names with options, image sizes or numbers of classes, and names of other
versions of timm. A file is used only when it was made with the installed version of timm. A missing or damaged file
counts as empty.
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
"""Files of this package that compute shapes. The user's file is not used when one of them has changed since."""


@dataclass(frozen=True)
class Facts:
    """The shape of a model, the number of channels of its images, and the timm class that it is of."""

    shape: ModelShape
    channels: int
    family: str


def find(config: ModelConfig) -> Facts | None:
    """The cached facts of a model, or None. They do not depend on its weights."""
    if ":" in config.name:
        return None
    if config.options or config.head or config.image_size is not None or config.num_classes is not None:
        return _read(_user()["shapes"].get(_key(config)))
    return _read(shipped().get(config.name)) or _read(_user()["shapes"].get(_key(config)))


def keep(facts: Mapping[ModelConfig, Facts], *, all_models: bool = False) -> None:
    """Write computed facts to the user's file. When it cannot be written, nothing happens.

    all_models: `facts` has all names of timm to which a schedule can be applied, in timm's order.
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
    """Whether a cache has a model of this architecture. The tag of weights after a dot is ignored, as in
    `timm.is_model`."""
    architecture = name.partition(".")[0]
    return architecture in shipped() or any(_name(key).partition(".")[0] == architecture for key in _user()["shapes"])


def all_models() -> Iterator[tuple[str, Facts]]:
    """All names of timm to which a schedule can be applied, without tags of weights, in timm's order.

    Empty when no cache has them for the installed version.
    """
    names = [name for name in shipped() if "." not in name] or _user()["models"]
    for name in names:
        facts = find(ModelConfig(name))
        if facts is not None:
            yield name, facts


def ship(facts: Mapping[str, Facts]) -> None:
    """Write `timm_shapes.json`. Models of the same shape share one row of it."""
    texts = {name: json.dumps(_mapping(one)) for name, one in facts.items()}
    shapes = sorted(set(texts.values()))
    models = ",\n".join(f"{json.dumps(name)}: {shapes.index(text)}" for name, text in texts.items())
    rows = ",\n".join(shapes)
    content = f'{{"timm": "{timm_version()}",\n"shapes": [\n{rows}\n],\n"models": {{\n{models}\n}}}}\n'
    write_atomically(SHIPPED, content.encode())


@cache
def timm_version() -> str:
    """The version of the installed timm, which is not imported; "" when there is none."""
    from importlib.metadata import PackageNotFoundError, version  # importing this is as slow as this whole package

    try:
        return version("timm")
    except PackageNotFoundError:
        return ""


def user_file() -> Path | None:
    """Path of the user's file; None for a user without a home folder."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):
        folder = os.path.expanduser("~/.cache")
    return Path(folder, "prunesearch", "shapes.json") if os.path.isabs(folder) else None


@cache
def shipped() -> Mapping[str, Any]:
    """Content of `timm_shapes.json` by model name; empty for other versions of timm."""
    content = _content(SHIPPED)
    if content.get("timm") != timm_version():
        return {}
    return {name: content["shapes"][index] for name, index in content["models"].items()}


@cache
def _user() -> Mapping[str, Any]:
    """Content of the user's file: "shapes" by key, and "models", a list of names.

    Both are empty when it was written with other versions, or is damaged.
    """
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
    return f"{config.name} {json.dumps([config.image_size, config.num_classes, config.head, config.options])}"


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
    return {**to_mapping(facts.shape), "channels": facts.channels, "family": facts.family}


def _read(content: Any) -> Facts | None:
    if not isinstance(content, dict):
        return None
    channels, family = content.get("channels"), content.get("family")
    if not isinstance(channels, int) or not isinstance(family, str):
        return None
    rest = {name: value for name, value in content.items() if name not in ("channels", "family")}
    try:
        return Facts(from_mapping(ModelShape, rest, "cache"), channels, family)
    except FileError:
        return None
