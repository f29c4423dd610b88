"""Dense siblings: smaller dense models that a study measures once, as they come, beside its pruned candidates.

No weights are opened here. timm and PyTorch are imported only when siblings are looked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from string import digits

from prunesearch.config import ModelConfig, StudyConfig, as_options
from prunesearch.cost import estimate_cost
from prunesearch.errors import ModelError
from prunesearch.evaluate.sections import is_remote, model_problems
from prunesearch.evaluate.shapes import model_shape

AUTO = "auto"
MOST = 2
"""Most siblings that `auto` finds."""
SIZES = (
    "zepto", "atto", "femto", "pico", "nano", "wee", "tiny", "xsmall", "little", "small", "medium", "betwixt", "base",
    "so150m", "so150m2", "so400m", "large", "xlarge", "huge", "xxlarge", "giant", "gigantic",
)  # fmt: skip
"""Words for sizes in timm's names. What is smaller, arithmetic says."""
INHERITED = ("in_chans", "img_size")
"""Options of the study's model that its siblings get too, beside `image_size` and `num_classes`."""


@dataclass(frozen=True)
class Siblings:
    """models: what to measure, each once. notes: why something that was asked for is not measured."""

    models: tuple[ModelConfig, ...] = ()
    notes: tuple[str, ...] = ()


def sibling_problems(config: StudyConfig) -> list[str]:
    """Mistakes in the siblings of a study. Nothing is built, opened or downloaded."""
    problems = []
    for index, entry in enumerate(config.siblings):
        if entry == AUTO:
            continue
        place, sibling = f"siblings[{index}]", _with_sizes(entry, config.model)
        problems += [problem.replace("model", place, 1) for problem in model_problems(sibling)]
        if not sibling.pretrained and sibling.checkpoint is None:
            problems.append(
                f"{place}: {sibling.name} has no weights, so that there is nothing to compare with. Possible: "
                f"pretrained: true, or a checkpoint. Write one of them."
            )
    return problems


def find_siblings(config: StudyConfig, offline: bool = False) -> Siblings:
    """The siblings of a study that fit its model, in the order of the file; those of `auto` with the largest first.

    offline: models that are described in the hub or in a folder are not looked up; they count as fitting.
    """
    models: list[ModelConfig] = []
    notes: list[str] = []
    for entry in config.siblings:
        if entry != AUTO:
            models.append(_with_sizes(entry, config.model))
            continue
        found, why_none = _smaller(config.model)
        models += [_with_sizes(name, config.model) for name in found]
        if not found:
            notes.append(
                f"siblings: auto finds none for {config.model.name}: {why_none}. Possible: timm names, or entries "
                f"with a checkpoint of their own. List them, or leave siblings out."
            )
    from prunesearch.evaluate.build import skeleton

    fitting: list[ModelConfig] = []
    outputs = int(skeleton(config.model).num_classes) if models else 0  # type: ignore[arg-type]
    for sibling in dict.fromkeys(models):
        why = None if offline and is_remote(sibling) else _misfit(sibling, outputs)
        if why is None:
            fitting.append(sibling)
        else:
            notes.append(f"siblings: {sibling.name} is not measured: {why}")
    return Siblings(tuple(fitting), tuple(notes))


def _with_sizes(entry: str | ModelConfig, model: ModelConfig) -> ModelConfig:
    """The model of an entry. Input size, channels and number of classes are those of `model` when it names none."""
    sibling = ModelConfig(entry, pretrained=True) if isinstance(entry, str) else entry
    inherited = {name: value for name, value in model.options if name in INHERITED}
    return replace(
        sibling,
        image_size=sibling.image_size or model.image_size,
        num_classes=sibling.num_classes or model.num_classes,
        options=as_options({**inherited, **dict(sibling.options)}),
    )


def _smaller(model: ModelConfig) -> tuple[list[str], str]:
    """Up to MOST names of timm with the next smaller sizes, the largest first; and why there is none.

    They differ from the model's name in the word for the size, and have weights from the same training data, of the
    same number of classes and size of images.
    """
    if is_remote(model):
        return [], "its name does not say what its family is"
    if not model.pretrained:
        return [], "its weights are not timm's, and timm's other sizes were not trained as they were"
    import timm

    own = timm.get_pretrained_cfg(model.name)
    parts = model.name.partition(".")[0].split("_")
    places = [place for place, part in enumerate(parts) if part in SIZES]
    if own is None or len(places) != 1:
        return [], "its name has no word for its size"
    before, after = parts[: places[0]], parts[places[0] + 1 :]
    costs: dict[str, float] = {}
    for size in SIZES:
        name = _trained_alike("_".join([*before, size, *after]), str(own.tag))
        weights = None if name is None else timm.get_pretrained_cfg(name)
        if name is None or weights is None:
            continue
        if (weights.num_classes, weights.input_size) == (own.num_classes, own.input_size):
            costs[name] = _gmacs(_with_sizes(name, model))
    most = _gmacs(model)
    found = sorted((name for name, cost in costs.items() if cost < most), key=lambda name: -costs[name])
    return found[:MOST], "timm has no smaller size of it with weights from the same training"


def _trained_alike(architecture: str, tag: str) -> str | None:
    """The weights of an architecture with this tag, or with one that differs in the version of the recipe only.

    augreg2_in21k_ft_in1k and augreg_in21k_ft_in1k are such tags. None when timm has no such weights.
    """
    import timm

    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    alike = [one for one in tags if _recipe_and_data(one) == _recipe_and_data(tag)]
    chosen = tag if tag in tags else max(alike, default=None)
    return None if chosen is None else f"{architecture}.{chosen}"


def _recipe_and_data(tag: str) -> tuple[str, str]:
    recipe, _, data = tag.partition("_")
    return recipe.rstrip(digits), data


def _gmacs(model: ModelConfig) -> float:
    """Infinite for a model whose cost is not known, so that it is never smaller than another one."""
    try:
        return estimate_cost(model_shape(model)).gmacs
    except ModelError:
        return float("inf")


def _misfit(sibling: ModelConfig, outputs: int) -> str | None:
    """Why a sibling cannot be measured beside a model with so many outputs; None when nothing is known against it."""
    import timm

    from prunesearch.evaluate.build import skeleton

    try:
        model_shape(sibling)
        classes = int(skeleton(sibling).num_classes)  # type: ignore[arg-type]
    except ModelError as error:
        return str(error)
    if classes != outputs:
        return f"it has {classes} classes, the model has {outputs}"
    if not sibling.pretrained or is_remote(sibling):
        return None
    weights = timm.get_pretrained_cfg(sibling.name)
    if weights is None or not weights.has_weights:
        return "timm has no weights of it"
    if weights.num_classes != outputs:
        return f"its pretrained weights have {weights.num_classes} classes, the model has {outputs}"
    return None
