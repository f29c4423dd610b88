"""Class indices: the names of class folders, in the order that `data.class_order` asks for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from prunesearch.config import DataConfig
from prunesearch.errors import DataError
from prunesearch.registry import did_you_mean

ORDERS = ("natural", "ascii")


def natural_key(name: str) -> list[str | int]:
    """Sorts 2 before 10 and ignores case, as timm does."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name.lower()))]


def class_of_folders(config: DataConfig, folders: Iterable[str], field: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The class of each folder that holds pictures, and the classes in the order of their indices.

    folders: paths from the root. A class has the name of the last folder of its path, as in timm. When two paths end in
    the same name, `data.class_order` must list whole paths. field: name of the root in errors. Raises DataError.
    """
    found = sorted(set(folders))
    if "" in found:
        raise DataError(
            f"data.{field}: there are images that are not in class folders. Possible: files named class/image. "
            f"Put each image in a folder named after its class, or move it away."
        )
    names = {folder: folder.rsplit("/", 1)[-1] for folder in found}
    listed = listed_classes(config)
    if listed is not None and set(listed) == set(found):
        return {folder: folder for folder in found}, listed
    alike = defaultdict(list)
    for folder, name in names.items():
        alike[name].append(folder)
    several = {name: those for name, those in alike.items() if len(those) > 1}
    if several:
        first = next(iter(several.values()))
        raise DataError(
            f"data.{field}: {first[0]!r} and {first[1]!r} end in the same name, and might be one class or two "
            f"({len(several)} of {len(alike)} names are in several folders). Possible: one folder for each class; a "
            f"data.class_order that lists whole paths, each a class; or name: torch/folder, where the first folder is "
            f"the class. Choose one."
        )
    if listed is not None:
        _refuse_differences(listed, set(alike), field)
        return names, listed
    return names, in_order(alike, order_of(config))


def in_order(classes: Iterable[str], order: str) -> tuple[str, ...]:
    """Class names sorted in `natural` or `ascii` order."""
    return tuple(sorted(classes, key=lambda name: ((natural_key(name) if order == "natural" else []), name)))


def order_of(config: DataConfig) -> str:
    """`ascii` when the study asks for it, else `natural`."""
    return "ascii" if config.class_order == ("ascii",) else "natural"


def listed_classes(config: DataConfig) -> tuple[str, ...] | None:
    """The classes that `data.class_order` lists, or the text file that it names; None without a list.

    Raises DataError.
    """
    order = config.class_order
    if order is None or order in [(word,) for word in ORDERS]:
        return None
    names = order if len(order) > 1 else _read(order[0]) if order else ()
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if not names or twice:
        came = f"names {', '.join(map(repr, twice[:5]))} more than once" if twice else "names no class"
        raise DataError(f"data.class_order: {came}. Possible: each class once, in the order of its index. Correct it.")
    return tuple(names)


def _read(path: str) -> tuple[str, ...]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.class_order: {path!r} is neither natural nor ascii, nor a text file that can be read: {error}. "
            f"Possible: natural, ascii, a list of class names, or the path of a text file with one name in each line."
            f"{did_you_mean(path, ORDERS)} Correct it."
        ) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _refuse_differences(listed: Sequence[str], found: set[str], field: str) -> None:
    missing = [name for name in listed if name not in found]
    unknown = sorted(found - set(listed))
    if missing or unknown:
        parts = [f"there is no folder {_some(missing)}"] if missing else []
        parts += [f"it does not name {_some(unknown)}"] if unknown else []
        raise DataError(
            f"data.class_order: it lists {len(listed)} classes, {field} has {len(found)}: {'; '.join(parts)}. "
            f"Possible: exactly the class folders, in the order of their indices. Correct the list or the folders."
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
