"""The sections of a study file: one frozen dataclass each, which holds names and numbers only.

`_field(...)` gives a field its description and bounds. The JSON schema that editors use shows them. `files.py` and
`strict.py` read and check the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prunesearch import tasks
from prunesearch.errors import UserError
from prunesearch.profile import MOST_MS, Profile
from prunesearch.recipes import RecipeName, expanded
from prunesearch.tasks import TaskName

DEFAULT_SCORE = "class_attention"
"""Score of a stage that names none and whose verb ranks tokens."""
Scalar = bool | int | float | str
Options = tuple[tuple[str, Scalar], ...]
"""Named values as pairs sorted by name, so that they are hashable. YAML writes them as a mapping."""


def as_options(mapping: Mapping[str, Scalar] | Options) -> Options:
    """Convert a dict, or a tuple of pairs, to pairs sorted by name."""
    pairs = mapping.items() if isinstance(mapping, Mapping) else mapping
    return tuple(sorted((str(name), value) for name, value in pairs))


MODULE_NAME = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"
MOST_BLOCKS = 1000
MOST_TOKENS = 1_000_000
MOST_GMACS = 1e6
TARGETS = {"target_gmacs": "GMACs", "target_predicted_latency_ms": "ms"}
"""Fields that say what images shall cost on average, each with its unit. A schedule or a space has at most one."""
MOST_IMAGES = 10**12
MOST_VALUES = 200
"""Most values of one parameter of a search."""
MOST_NAMES = 100
SHARE = r"^[0-9]{1,6}(\.[0-9]{1,6})? ?%$"
"""Form of a share of the dense model's value, such as 70%."""
NUMBER_OR_SHARE = "a number, or a share of the dense model's value such as 70%"
LARGEST = 1e6
"""Bound on thresholds, loss weights and options, in their own units: beyond any sensible value, far from overflow."""


def bounded(text: str, default: Any = ..., **bounds: float | str) -> Any:
    """Make a dataclass field with a description, bounds and an optional default.

    low, high: inclusive bounds. above: exclusive lower bound. For a tuple they hold for each number in it.
    most: largest length of a tuple. pattern: regular expression that a text must match. form: what is possible, for
    the message about another kind of value.
    Reading a file checks the bounds. For sections that were made in Python, `study_problems` does.
    """
    metadata = {"text": text, **bounds}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


_field = bounded


@dataclass(frozen=True)
class ModelConfig:
    """Which model: a timm name, with pretrained weights or a local checkpoint."""

    name: str = _field("timm model name, for example deit_small_patch16_224.fb_in1k")
    pretrained: bool = _field("load timm's pretrained weights (downloads them once)", False)
    checkpoint: str | None = _field("local weights (.safetensors, or .pth read with weights_only)", None)
    image_size: int | None = _field("input size in pixels; the model's own when absent", None, low=1, high=4096)
    num_classes: int | None = _field(
        "number of classes; the model's own when absent; 0 = without a classifier, for its features",
        None,
        low=0,
        high=1_000_000,
    )
    options: Options = _field(
        "further keywords of timm.create_model, for example {depth: 9}", (), low=-LARGEST, high=LARGEST, most=MOST_NAMES
    )
    head: Literal["linear", "conv"] | None = _field(
        "a head that gives num_classes classes to each patch, for segmentation: linear, or conv (a 3 x 3 convolution "
        "before it); absent = the model's own head",
        None,
    )


@dataclass(frozen=True)
class Target:
    """What arithmetic computes costs for: a model, and a device's profile of it if there is one."""

    model: ModelConfig
    profile: Profile | None = None


RuntimeName = Literal["torch", "compile", "onnxruntime", "openvino"]
Precision = Literal["float32", "bfloat16", "float16"]
IN_ANY_PRECISION: tuple[RuntimeName, ...] = ("torch", "compile")
"""Runtimes that are profiled in other precisions than float32 too."""


@dataclass(frozen=True)
class DeviceConfig:
    """The device that the pruned model is for, by a profile of it. Where candidates are trained is `workers.device`."""

    profile: str | None = _field(
        "file that prunesearch profile made on the device; measured on this machine when the search starts, if absent",
        None,
    )
    runtime: RuntimeName | None = _field("what runs the model there; torch if nothing says so", None)
    batch: int | None = _field("images in a batch; the profile's, or 16", None, low=1, high=65_536)
    threads: int | None = _field("CPU threads; the profile's, or all cores", None, low=1, high=1024)
    precision: Precision | None = _field("the profile's, or float32", None)
    seconds: float = _field("of measuring, if there is no profile", 60.0, above=0, high=86_400)
    table: Profile | None = _field("what the profile says; the study stores it", None)


UNLABELLED = "images"
"""`data.name` of pictures without classes."""
MASKED = ("scenes", "masks")
"""`data.name` of pictures with a class for each pixel."""


@dataclass(frozen=True)
class DataConfig:
    """Which images: scikit-learn's digits, files in a folder or tar with or without classes, or what timm opens."""

    name: str = _field(
        '"digits", "folder" (a folder or .tar of class/image files), "images" (pictures in any folders, without '
        'classes), "scenes" (digits on a canvas, with a class for each pixel), "masks" (pictures and masks of classes '
        "in two folders), or a timm name: torch/..., hfds/..., wds/...",
        "digits",
    )
    root: str | None = _field("folder or tar file of the training images, or the data set's root", None)
    val_root: str | None = _field("folder or tar file of the validation images, when they are not under root", None)
    train_split: str = _field("name of the training split", "train")
    val_split: str = _field("name of the validation split", "validation")
    test_root: str | None = _field("folder or tar file of test images, which the search never sees", None)
    test_split: str | None = _field("name of the test split; there is none when this and test_root are absent", None)
    train_images: int | None = _field(
        "use only this many training images (a fixed random subset)", None, low=1, high=MOST_IMAGES
    )
    val_images: int | None = _field(
        "use only this many validation images (a fixed random subset)", None, low=1, high=MOST_IMAGES
    )
    mean: tuple[float, ...] | None = _field(
        "mean of each channel, of pixels in [0, 1]; the model's own when absent", None, low=-10, high=10, most=64
    )
    std: tuple[float, ...] | None = _field(
        "standard deviation of each channel; the model's own when absent", None, low=0.001, high=10, most=64
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = _field(
        "how images are resized; the model's own when absent", None
    )
    crop_pct: float | None = _field(
        "share of the resized image's side that the centre crop keeps; when absent the model's own, but a model built "
        "at another size than timm's default for it takes images that already have this size uncropped",
        None,
        low=0.05,
        high=1,
    )
    class_order: tuple[str, ...] | None = _field(
        "which class folder has which index: natural (2 before 10, as timm; the default), ascii (10 before 2, as "
        "torchvision's ImageFolder), a list of class names, or a text file with one name in each line",
        None,
        most=1000,
    )
    allow_unreadable: float = _field(
        "share of the training pictures that may be unreadable; they are left out, counted and named. Pictures for "
        "validation and test must all be readable",
        0.01,
        low=0,
        high=1,
    )
    in_memory: bool = _field("decode once and keep uint8 images in memory; false decodes them each time", True)
    loaders: int = _field("processes that decode images; 0 decodes in the worker itself", 2, low=0, high=256)

    @property
    def has_test(self) -> bool:
        """Whether there are test images besides those for validation."""
        return self.test_root is not None or self.test_split is not None


@dataclass(frozen=True)
class Range:
    """A range of keep ratios to search over."""

    low: float = _field("smallest keep ratio", above=0, high=1)
    high: float = _field("largest keep ratio; 1.0 means no stage", above=0, high=1)
    step: float | None = _field("distance between values; continuous when absent", None, low=0.001, high=1)


@dataclass(frozen=True)
class ThresholdRange:
    """A range of thresholds, or of targets, to search over; continuous."""

    low: float = _field("smallest value", low=-LARGEST, high=LARGEST)
    high: float = _field("largest value", low=-LARGEST, high=LARGEST)
    log: bool = _field("look at ratios, not at distances; low must be above 0", False)


@dataclass(frozen=True)
class BlockSpace:
    """The space of one block. Fields that are absent are taken from the whole space."""

    block: int = _field("0-based block index", low=0, high=MOST_BLOCKS)
    keep: tuple[float, ...] | Range | None = _field(
        "keep ratios to choose from; 1.0 = no stage here", None, above=0, high=1, most=MOST_VALUES
    )
    at: tuple[str, ...] | None = _field("places to choose from: mid, pre", None, most=MOST_NAMES)
    score: tuple[str, ...] | None = _field("scores to choose from", None, most=MOST_NAMES)
    reduce: tuple[str, ...] | None = _field("reduce verbs to choose from", None, most=MOST_NAMES)
    amount: tuple[str, ...] | None = _field("keep, threshold, none", None, most=MOST_NAMES)
    threshold: tuple[float, ...] | ThresholdRange | None = _field(
        "thresholds of scores to choose from", None, low=0, high=LARGEST, most=MOST_VALUES
    )
    merge_threshold: tuple[float, ...] | ThresholdRange | None = _field(
        "thresholds of cosines to choose from", None, low=-1, high=1, most=MOST_VALUES
    )
    tokens: tuple[int, ...] | None = _field(
        "counts to choose from, for verbs that pool", None, low=1, high=MOST_TOKENS, most=MOST_VALUES
    )
    until: tuple[Literal["never", "next", "end"], ...] | None = _field(
        "when tokens are back: never, next, end", None, most=MOST_NAMES
    )


@dataclass(frozen=True)
class SpaceConfig:
    """What the search may choose. A single value is fixed, a list is searched."""

    blocks: tuple[int | BlockSpace, ...] = _field(
        "blocks that may hold a stage; a mapping narrows one block", low=0, high=MOST_BLOCKS, most=MOST_BLOCKS
    )
    keep: tuple[float, ...] | Range = _field(
        "keep ratios to choose from; 1.0 = no stage at this block",
        (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        above=0,
        high=1,
        most=MOST_VALUES,
    )
    at: tuple[str, ...] = _field(
        "places to choose from: mid (after attention), pre (before the block)", ("mid",), most=MOST_NAMES
    )
    score: tuple[str, ...] = _field("scores to choose from", (DEFAULT_SCORE,), most=MOST_NAMES)
    reduce: tuple[str, ...] = _field("reduce verbs to choose from", ("drop",), most=MOST_NAMES)
    amount: tuple[str, ...] = _field(
        "how a stage says how many tokens stay: keep (a ratio), threshold (each image its own number), none (no stage)",
        ("keep",),
        most=MOST_NAMES,
    )
    threshold: tuple[float, ...] | ThresholdRange | None = _field(
        "thresholds of scores to choose from; scores are shares, so 1/patch tokens is a typical one",
        None,
        low=0,
        high=LARGEST,
        most=MOST_VALUES,
    )
    merge_threshold: tuple[float, ...] | ThresholdRange | None = _field(
        "thresholds of the cosine of a pair to choose from, for merge", None, low=-1, high=1, most=MOST_VALUES
    )
    tokens: tuple[int, ...] | None = _field(
        "counts of patch tokens to choose from, for verbs that pool; when absent they take keep as the others do",
        None,
        low=1,
        high=MOST_TOKENS,
        most=MOST_VALUES,
    )
    until: tuple[Literal["never", "next", "end"], ...] = _field(
        "when the tokens that left are back: never, next (before the next stage's block), end (after the last block)",
        ("never",),
        most=MOST_NAMES,
    )
    target_gmacs: tuple[float, ...] | ThresholdRange | None = _field(
        "mean GMACs towards which a schedule's thresholds are trained and calibrated; when absent they stay",
        None,
        above=0,
        high=MOST_GMACS,
        most=MOST_VALUES,
    )
    target_predicted_latency_ms: tuple[float, ...] | ThresholdRange | None = _field(
        "the same in milliseconds: of a batch on the device, by its profile, mean over images",
        None,
        above=0,
        high=MOST_MS,
        most=MOST_VALUES,
    )
    same: tuple[
        Literal["at", "score", "reduce", "keep", "amount", "threshold", "merge_threshold", "tokens", "until"], ...
    ] = _field("choices that all stages of a schedule share", (), most=MOST_NAMES)
    max_stages: int | None = _field("most stages a schedule may have", None, low=1, high=MOST_BLOCKS)
    start_from: tuple[str, ...] = _field(
        "schedules evaluated first: preset names, YAML files, or sensitivity: what the effects of all stages, each "
        "measured alone without training, predict to be good",
        (),
        most=MOST_NAMES,
    )

    @property
    def targets(self) -> dict[str, tuple[float, ...] | ThresholdRange]:
        """The targets that are given, by field; a space has at most one."""
        return {field: values for field in TARGETS if (values := getattr(self, field)) is not None}


@dataclass(frozen=True)
class Objective:
    """A metric and which way is better."""

    metric: str = _field("metric name; see `prunesearch list metrics`")
    goal: Literal["maximize", "minimize"] = _field("which way is better")


@dataclass(frozen=True)
class Limit:
    """Bounds on one metric. Candidates over a limit on a computed metric are rejected before any training.

    A measured metric is compared with the dense model's value at the same rung. `evaluate/limits.py` turns the bounds
    into numbers.
    """

    at_most: float | str | None = _field(
        "upper bound: a number, or a share of the dense model's value such as 70%",
        None,
        low=-1e12,
        high=1e12,
        pattern=SHARE,
        form=NUMBER_OR_SHARE,
    )
    at_least: float | str | None = _field(
        "lower bound: a number, or a share of the dense model's value such as 130%",
        None,
        low=-1e12,
        high=1e12,
        pattern=SHARE,
        form=NUMBER_OR_SHARE,
    )
    drop_at_most: float | None = _field(
        "by how much a measured metric may be worse than the dense model's value, in its unit (points for top1)",
        None,
        low=0,
        high=1e12,
    )


@dataclass(frozen=True)
class FinetuneConfig:
    """How a candidate is trained for its budget.

    recipe: for files only. The reader replaces it by the fields it stands for, so it is None in every object.
    The constructor refuses it, because it cannot know which of the other fields were given.
    """

    learning_rate: float = _field("peak learning rate of AdamW", 2.0e-5, low=0, high=10)
    weight_decay: float = _field("weight decay of AdamW", 1.0e-6, low=0, high=10)
    batch_size: int = _field("images per training step", 128, low=1, high=65_536)
    warmup: float = _field("fraction of the budget spent in linear warm-up", 0.0, low=0, high=1)
    label_smoothing: float = _field("label smoothing of the cross entropy", 0.0, low=0, high=1)
    distill: bool = _field("soft distillation from the dense model", True)
    distill_weight: float = _field("weight of the distillation loss, 0 to 1", 0.5, low=0, high=1)
    cross_entropy_weight: float | None = _field(
        "weight of the cross entropy; when absent 1 - distill_weight, or 1 without distillation",
        None,
        low=0,
        high=LARGEST,
    )
    temperature: float = _field("softmax temperature of the distillation", 1.0, low=0.01, high=1000)
    clip_grad: float | None = _field("largest gradient norm", 1.0, above=0, high=LARGEST)
    augment: Literal["none", "flip"] = _field("none, or random horizontal flips", "none")
    amp: bool = _field("automatic mixed precision on GPUs", True)
    learned_learning_rate: float = _field(
        "peak learning rate of what a schedule learns: predictors, queries", 1.0e-3, low=0, high=10
    )
    threshold_learning_rate: float = _field(
        "peak learning rate of thresholds, in units of a typical score (1/patch tokens; 1 for cosines)",
        0.005,
        low=0,
        high=10,
    )
    freeze_backbone: float = _field(
        "share of the budget, from its start, during which only what a schedule learns is trained; 1 = all of it",
        0.0,
        low=0,
        high=1,
    )
    ratio_weight: float = _field(
        "weight of the loss that holds a predictor to its stage's keep (DynamicViT)", 2.0, low=0, high=LARGEST
    )
    budget_weight: float = _field("weight of the loss that holds thresholds to their target", 10.0, low=0, high=LARGEST)
    budget_loss: Literal["absolute", "squared", "absolute_gmacs"] = _field(
        "distance from the target: as a share of the dense model's cost, its square (LTMP), or in GMACs (AS-ViT) or ms",
        "absolute",
    )
    distill_features_loss: Literal["cosine", "squared"] = _field(
        "distance of features from the dense model's, for models without a classifier: 1 - cosine, or mean squared",
        "cosine",
    )
    distill_patches_weight: float = _field(
        "weight of that distance between the patch tokens of both, where all are back at the end",
        0.0,
        low=0,
        high=LARGEST,
    )
    distill_tokens_weight: float = _field(
        "weight of the distance between kept tokens and the dense model's, for schedules with a predictor (DynamicViT)",
        0.5,
        low=0,
        high=LARGEST,
    )
    distill_tokens_loss: Literal["squared", "kl"] = _field(
        "that distance: mean squared (DynamicViT), or KL divergence of the softmax over channels (TPS)", "squared"
    )
    calibration_images: int = _field(
        "training images on which thresholds are moved onto their target after training; 0 = leave them as trained",
        1024,
        low=0,
        high=MOST_IMAGES,
    )
    recipe: RecipeName | None = field(
        default=None,
        metadata={
            "text": "a published training recipe, which stands for other fields of this section; those written beside "
            "it win; see `prunesearch list recipes`",
            "expand": lambda section: expanded(section, FinetuneConfig.learning_rate),
        },
    )

    def __post_init__(self) -> None:
        """Raises UserError for a recipe."""
        if self.recipe is not None:
            raise UserError(
                f"FinetuneConfig(recipe={self.recipe!r}): a recipe is replaced by its fields when a section is read. "
                f'Possible: study files, and from_mapping(FinetuneConfig, {{"recipe": {self.recipe!r}, ...}}, "here"). '
                f"Use that."
            )


@dataclass(frozen=True)
class Budget:
    """What one fine-tune may spend. It ends at the first bound that is reached; 0 images = no training."""

    images: int | None = _field("training images seen (0 = no training)", None, low=0, high=MOST_IMAGES)
    seconds: float | None = _field("seconds of training", None, low=0, high=1e8)


@dataclass(frozen=True)
class SupernetConfig:
    """How shared weights are trained before the search; learning rate, batch size and loss are those of `finetune`."""

    images: int = _field("training images seen, each of them by every schedule of its step", low=1, high=MOST_IMAGES)
    schedules: int = _field(
        "random schedules in each step, beside the dense model and the cheapest schedule", 2, low=0, high=1000
    )


@dataclass(frozen=True)
class IsoBudget:
    """The cost of every candidate of the sampler. Its keep ratios are changed until it has this cost."""

    gmacs: float | str | None = _field(
        "GMACs of one image: a number, or a share of the dense model's such as 60%",
        None,
        above=0,
        high=MOST_GMACS,
        pattern=SHARE,
        form=NUMBER_OR_SHARE,
    )
    predicted_latency_ms: float | str | None = _field(
        "milliseconds of a batch on the device: a number, or a share of the dense model's such as 60%",
        None,
        above=0,
        high=1e9,
        pattern=SHARE,
        form=NUMBER_OR_SHARE,
    )

    @property
    def written(self) -> dict[str, float | str]:
        """The budgets that are given, by metric; a study has exactly one."""
        both = {"gmacs": self.gmacs, "predicted_latency_ms": self.predicted_latency_ms}
        return {name: value for name, value in both.items() if value is not None}


@dataclass(frozen=True)
class MeasureConfig:
    """How speed and accuracy are measured."""

    batch_size: int = _field("images per evaluation batch", 128, low=1, high=65_536)
    speed_batch_size: int = _field("images per batch when throughput is measured", 64, low=1, high=65_536)
    speed_seconds: float = _field("seconds spent on each speed measurement", 1.0, above=0, high=3600)


@dataclass(frozen=True)
class SamplerConfig:
    """Who proposes candidates."""

    name: str = _field("auto, token_gp, tpe, nsga2, gp or random; see `prunesearch list samplers`", "auto")
    seed: int = _field("seed of the whole study: proposals and training", 0, low=0, high=2**63 - 1)
    startup: int | None = _field(
        "candidates before the model takes over; with nsga2 the population", None, low=0, high=10_000
    )


@dataclass(frozen=True)
class WorkersConfig:
    """Where candidates are evaluated."""

    kind: Literal["serial", "ray"] = _field(
        "ray: one actor per slot; serial: one by one in this process, with plug-ins or a timeout in a child process",
        "ray",
    )
    count: int | None = _field("number of workers; as many as fit when absent", None, low=1, high=10_000)
    gpus_each: float = _field("GPUs per worker; a fraction shares one", 0.0, low=0, high=64)
    cpus_each: float = _field("CPUs per worker", 1.0, above=0, high=1024)
    address: str | None = _field(
        'Ray cluster address, "auto" for a running one; a local one is started when absent', None
    )
    device: str = _field("auto, cpu, cuda or mps", "auto")
    timeout: float | None = _field("seconds after which a candidate counts as hung", None, above=0, high=1e8)
    retries: int = _field("how often a candidate is tried again after its worker died", 1, low=0, high=100)


@dataclass(frozen=True)
class StopConfig:
    """When the search is done. The first bound reached ends it."""

    trials: int | None = _field("candidates in the whole study, start schedules included", 100, low=1, high=1_000_000)
    hours: float | None = _field("hours of search in this run", None, above=0, high=1e5)


@dataclass(frozen=True)
class ConfirmConfig:
    """How the final front is measured again. The search's own values are too good: the best of many noisy ones."""

    seeds: int = _field(
        "fresh seeds with which each schedule of the final front is trained and measured again; 0 = none",
        0,
        low=0,
        high=1000,
    )
    speed_seconds: float = _field(
        "seconds in which the front, the start schedules and the dense model are timed in turns then, alone; 0 = not",
        30.0,
        low=0,
        high=86_400,
    )


NAME_BYTES = 200
"""Longest name of a study in UTF-8. File systems allow 255 bytes for a file name."""


def study_name_problem(name: str) -> str | None:
    """Why a study cannot have this name (its folder has the same one); None when it can."""
    is_component = name not in ("", ".", "..") and "/" not in name
    is_plain = name.isprintable() and name == name.strip() and not name.startswith("-")
    if is_component and is_plain and len(name.encode()) <= NAME_BYTES:
        return None
    return (
        f"name: {name[:60]!r}{'...' * (len(name) > 60)} cannot be a study's name, which is also that of its folder. "
        f"Possible: up to {NAME_BYTES} bytes of letters, digits, spaces and other characters that can be printed, but "
        f"no /, no - at the start, no space at the ends, and not . or .. alone. Give it another one."
    )


@dataclass(frozen=True)
class StudyConfig:
    """One study file."""

    version: Literal[1] = _field("version of this file format")
    name: str = _field("study name, without /; results go to outputs/NAME")
    model: ModelConfig = _field("the model to prune")
    space: SpaceConfig = _field("what the search may choose")
    data: DataConfig = _field("the images", DataConfig())
    device: DeviceConfig | None = _field("the device that the pruned model is for", None)
    objectives: tuple[Objective, ...] = _field(
        "what the front trades off", (Objective("top1", "maximize"), Objective("gmacs", "minimize")), most=4
    )
    limits: tuple[tuple[str, Limit], ...] = _field(
        "bounds per metric, for example {gmacs: {at_most: 70%}, top1: {drop_at_most: 1.0}}", (), most=MOST_NAMES
    )
    budget: IsoBudget | None = _field(
        "what all candidates of the sampler cost: their keep ratios are moved until they do", None
    )
    metrics: tuple[str, ...] = _field("further metrics to record", (), most=MOST_NAMES)
    finetune: FinetuneConfig = _field("how candidates are trained", FinetuneConfig())
    evaluation: Literal["finetune", "supernet"] = _field(
        "where candidates start: finetune: from the model's own weights, supernet: from weights that are trained once "
        "for all schedules of the space, and then shared",
        "finetune",
    )
    supernet: SupernetConfig | None = _field("how the shared weights of evaluation: supernet are trained", None)
    measure: MeasureConfig = _field("how candidates are measured", MeasureConfig())
    rungs: tuple[Budget, ...] = _field(
        "budgets, the smallest first: all candidates get the first one, the best of a rung go on to the next, and the "
        "front is that of the last; several rungs are in images",
        (Budget(images=0),),
        most=20,
    )
    promote: int = _field("one in so many candidates of a rung goes on to the next", 3, low=2, high=1000)
    sampler: SamplerConfig = _field("who proposes candidates", SamplerConfig())
    workers: WorkersConfig = _field("where candidates are evaluated", WorkersConfig())
    stop: StopConfig = _field("when the search is done", StopConfig())
    confirm: ConfirmConfig = _field("how the final front is measured again", ConfirmConfig())
    siblings: tuple[str | ModelConfig, ...] = _field(
        "smaller dense models to compare the front with, measured once with weights of their own: auto (the next "
        "smaller sizes that timm has with weights from the same training), timm names, or entries as in model",
        (),
        most=10,
    )
    plugins: tuple[str, ...] = _field(
        "modules to import first; they may register scores, metrics, ...",
        (),
        most=MOST_NAMES,
        pattern=MODULE_NAME,
    )
    task: TaskName | None = field(
        default=None,
        metadata={
            "text": "classification, features or segmentation; stands for the fields that suit it (num_classes: 0, "
            "head: linear, until, objectives); those written beside it win",
            "expand": tasks.expanded,
        },
    )

    def __post_init__(self) -> None:
        """Raises UserError for a task."""
        if self.task is not None:
            raise UserError(
                f"StudyConfig(task={self.task!r}): a task is replaced by its fields when a file is read. Possible: "
                f"study files, and from_mapping(StudyConfig, ...). Use that, or write the fields."
            )

    @property
    def target(self) -> Target:
        """What costs are computed for."""
        return Target(self.model, None if self.device is None else self.device.table)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Every metric an evaluation must report, objectives first, each once."""
        return tuple(dict.fromkeys((*self.deciding_metrics, *self.metrics)))

    @property
    def deciding_metrics(self) -> tuple[str, ...]:
        """The metrics of objectives and limits. An evaluation that lacks one of them counts as failed."""
        return (*(objective.metric for objective in self.objectives), *(name for name, _ in self.limits))
