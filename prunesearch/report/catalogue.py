"""Tables of `prunesearch list`: scores, verbs, presets, recipes, models, metrics, samplers and spaces."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.table import Table

from prunesearch.cost import estimate_cost
from prunesearch.errors import UserError
from prunesearch.evaluate import METRICS
from prunesearch.evaluate.shapes import prunable_models
from prunesearch.presets import presets
from prunesearch.printable import printable
from prunesearch.recipes import RECIPES
from prunesearch.registry import did_you_mean
from prunesearch.samplers import SAMPLERS
from prunesearch.tokens import REDUCERS, SCORERS, Reducer, Scorer

Row = tuple[str, ...]


def table(what: str, pattern: str = "*") -> Table:
    """The table of one catalogue. pattern: shell pattern for the names to show, or a part of them; of models, their
    class too. Raises UserError when it fits none.
    """
    columns, rows = CATALOGUES[what]
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        shown.add_column(column, overflow="fold", no_wrap=index == 0)  # never wrap names, which users type
    everything, names = list(rows()), 2 if what == "models" else 1
    fitting = [row for row in everything if any(_fits(name, pattern) for name in row[:names])]
    if not fitting:
        why = " `prunesearch check STUDY.yaml --set model.name=NAME` says why a model of timm is not among them."
        raise UserError(
            f"list {what}: nothing fits {pattern!r}. Possible: a part of a name, or a pattern with *, ? and []."
            f"{did_you_mean(pattern, [row[0] for row in everything])}{why if what == 'models' else ''}"
        )
    for row in fitting:
        shown.add_row(printable(row[0]), *row[1:])
    return shown


def _fits(name: str, pattern: str) -> bool:
    """Whether a name fits a shell pattern, or has it as a part. Capitals do not count, nor does a tag of weights."""
    name, pattern = name.lower(), pattern.lower()
    return fnmatch(name, pattern) or pattern in name or ("." in pattern and name == pattern.partition(".")[0])


def _scores() -> Iterator[Row]:
    for name, entry in SCORERS.items():
        needs = "yes" if entry.needs_class_token else "no"
        yield name, needs, _options(entry), entry.summary, entry.source


def _reduces() -> Iterator[Row]:
    for name, entry in REDUCERS.items():
        options = _options(entry)
        yield name, "yes" if entry.ranks else "no", options, entry.summary, entry.source


def _options(entry: Scorer | Reducer) -> str:
    """Each option with its default and its other values, such as "parity=patches (or all)"."""
    texts = []
    for name, default in entry.options.items():
        others = ", ".join(value for value in entry.choices.get(name, ()) if value != default)
        if name in entry.bounds:
            others = "{} to {}".format(*entry.bounds[name])
        texts.append(f"{name}={default}" + (f" ({'or ' if name in entry.choices else ''}{others})" if others else ""))
    return ", ".join(texts)


def _presets() -> Iterator[Row]:
    for name, preset in presets().items():
        yield name, preset.summary, "\n".join(_reported(row) for row in preset.published)


def _reported(row: Mapping[str, Any]) -> str:
    """A published result, such as "deit_small 79.4 @ 3.0 G"."""
    model = str(row["model"]).removesuffix("_patch16_224")
    cost = f" @ {row['gmacs']} G" if "gmacs" in row else ""
    return f"{model} {row['top1']}{cost}"


def _recipes() -> Iterator[Row]:
    for name, recipe in RECIPES.items():
        fields = [f"{field}: {str(value).lower()}" for field, value in recipe.fields.items()]
        if recipe.learned_rate is not None:
            fields.append(f"learned_learning_rate: {recipe.learned_rate:g} x learning_rate")
        of = ", ".join(preset for preset, file in presets().items() if file.recipe == name)
        yield name, recipe.summary, "\n".join(fields), of, recipe.source


def _models() -> Iterator[Row]:
    for name, facts in prunable_models(lambda text: print(f"note: {text}", file=sys.stderr)).items():
        shape = facts.shape
        yield (
            name,
            facts.family,
            str(shape.depth),
            str(shape.dim),
            str(shape.patch_tokens),
            _three_digits(estimate_cost(shape).gmacs),
        )


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _metrics() -> Iterator[Row]:
    for name, entry in METRICS.items():
        yield name, entry.unit, entry.goal, "arithmetic" if entry.computed else "measured", entry.summary


def _samplers() -> Iterator[Row]:
    for name, entry in SAMPLERS.items():
        yield name, entry.summary


def _spaces() -> Iterator[Row]:
    for path in sorted(Path("search_spaces").glob("*.yaml")):
        lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        about = " ".join(line.lstrip("# ") for line in lines)
        yield str(path), re.split(r"(?<=[.?!])\s", about, maxsplit=1)[0]  # the first sentence


CATALOGUES: dict[str, tuple[Row, Callable[[], Iterator[Row]]]] = {
    "scores": (("score", "class token", "options", "what it is", "source"), _scores),
    "reduces": (("reduce", "score", "options", "what it does", "source"), _reduces),
    "presets": (("preset", "what it is", "published top-1 @ MACs"), _presets),
    "recipes": (("recipe", "what is trained", "fields of finetune", "presets", "source"), _recipes),
    "models": (("model", "class", "blocks", "width", "patch tokens", "GMACs"), _models),
    "metrics": (("metric", "unit", "goal", "how", "what it is"), _metrics),
    "samplers": (("sampler", "what it is"), _samplers),
    "spaces": (("file", "what it explores"), _spaces),
}
