"""Time whole models in turns with the dense one: measured latency as the truth at the end.

What is compared is a ratio within a round, in which every model runs the same images, so that the present speed of the
machine divides out. With thresholds an image decides how many tokens it keeps, hence real images and trained weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from prunesearch.cost import total_cost
from prunesearch.device.profiles import cores, engine_and_settings, processor
from prunesearch.device.runtimes import DTYPES, Run, Runtime, Settings, threads_set
from prunesearch.device.timing import Ratio, ratios_in_turns
from prunesearch.errors import DeviceError
from prunesearch.evaluate.build import build_model
from prunesearch.evaluate.data import open_split
from prunesearch.evaluate.images import ImageSet
from prunesearch.evaluate.measures import SPEED_BATCHES
from prunesearch.evaluate.predict import autocast, half_precision
from prunesearch.evaluate.run import Findings, carried_out
from prunesearch.evaluate.schedule_loss import cost_by_counts
from prunesearch.evaluate.speed import synchronise
from prunesearch.evaluate.task import Conditions, Evaluation, Speed, Task, TimingWork, ToTime
from prunesearch.models import apply_schedule, shape_of, steps_of, trace
from prunesearch.models.parts import sharing_copy
from prunesearch.plugins import import_plugins
from prunesearch.profile import Profile
from prunesearch.schedule import Schedule

FEWEST_IMAGES = 32
"""Images that are timed, in batches that rounds take in turn; at least `measures.SPEED_BATCHES` batches."""
DENSE = ""


def evaluate(task: Task, *, raise_user_errors: bool = False) -> Evaluation:
    """Carry out `Task.timing`: the speeds of its schedules, the dense model's first, on images of the task's split.

    Errors as of `evaluate.run.evaluate`. A schedule that the runtime cannot run fails alone: its speed has a problem.
    """
    return carried_out(task, _time, raise_user_errors=raise_user_errors)


def _time(task: Task, found: Findings) -> None:
    import_plugins(task.plugins)
    work = task.timing
    assert work is not None, "the task times schedules"
    engine, settings = engine_and_settings(work.runtime, task.device, _threads(task), work.precision or "float32")
    amp = work.precision is None and task.finetune.amp
    with found.phase("load"):
        dtype = DTYPES[settings.precision]
        dense = build_model(task.model, settings.device).to(dtype)
        images = open_split(task.data, dense, task.split)
        models, problems = {DENSE: dense}, dict[str, str]()
        for one in work.schedules:
            problem = _problem(one, engine)
            if problem:
                problems[one.name] = problem
            else:
                models[one.name] = _with_schedule(task, one, dense)
        batches = [batch.to(dtype) for batch in chosen_batches(images, work.batch, settings.device)]
        guesses = {} if task.profile is None else _guesses(work, models, task.profile, batches)
    with found.phase("measure"):
        ratios, refused = models_in_turns(models, batches, engine, settings, work.seconds, amp)
    problems |= refused
    half, here = half_precision(settings.device, amp), processor(settings.device)
    conditions = Conditions(
        runtime=engine.name,
        batch=work.batch,
        device=here,
        threads=settings.threads,
        precision=settings.precision if half is None else f"mixed {str(half).removeprefix('torch.')}",
        rounds=ratios[DENSE].rounds,
        profiled="" if task.profile is None or task.profile.device == here else task.profile.device,
    )
    found.device = here
    dense_ms = 1e3 * ratios[DENSE].seconds
    for name in (DENSE, *(one.name for one in work.schedules)):
        speed = Speed(name, problem=problems.get(name, ""))
        if name in ratios:
            ratio, low, high, seconds, _ = ratios[name]
            speed = Speed(name, ratio, low, high, 1e3 * seconds, dense_ms, guesses.get(name), conditions)
        found.speeds = (*found.speeds, speed)


def models_in_turns(
    models: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
    engine: Runtime,
    settings: Settings,
    seconds: float,
    amp: bool = False,
) -> tuple[dict[str, Ratio], dict[str, str]]:
    """Speeds of models as ratios to the model named DENSE, and the reasons why others cannot run in the runtime.

    models: in eval mode, on the device and in the precision of the settings, as are the batches: normalised images
    (B, C, H, W). seconds: of measuring; exporting and compiling come on top. amp: with mixed precision, where
    `half_precision` gives one. Raises DeviceError when DENSE cannot run.
    """
    work: dict[str, list[Run]] = {}
    problems: dict[str, str] = {}
    device = settings.device
    with threads_set(settings):
        for name, model in models.items():
            try:
                runs = engine.prepare((model,), [(batch,) for batch in batches], (), settings)
            except Exception as error:  # exporters and compilers raise anything
                why = next(iter(str(error).strip().splitlines()), "no reason given")
                problems[name] = f"{engine.name} cannot run it: {type(error).__name__}: {why}"
                continue
            work[name] = [partial(_run, run, device, amp) for run in runs] if half_precision(device, amp) else runs
        if DENSE not in work:
            raise DeviceError(
                f"runtime {engine.name}: the dense model cannot be timed, and so nothing beside it: {problems[DENSE]}. "
                f"Possible: another runtime. Choose one."
            )
        return ratios_in_turns(work, DENSE, seconds, partial(synchronise, device)), problems


def chosen_batches(images: ImageSet, batch: int, device: torch.device) -> list[Tensor]:
    """Batches of a set to time models on, normalised, float32: images from the whole set, evenly spread.

    A set that is too small is used several times.
    """
    count = batch * max(SPEED_BATCHES, FEWEST_IMAGES // batch)
    distinct = min(count, len(images))
    chosen = (torch.arange(distinct) * len(images) // distinct)[torch.arange(count) % distinct]
    return [pixels for pixels, _ in images.batches(chosen.split(batch), device)]


def _threads(task: Task) -> int | None:
    """CPU threads, as of `Task`. Without a profile no more than there are cores: a study may reserve more of them than
    this machine has. Raises DeviceError when the profile was measured with more."""
    if task.threads is None or task.threads <= cores():
        return task.threads
    if task.profile is None:
        return cores()
    raise DeviceError(
        f"the profile was measured with {task.threads} threads. Possible here: 1 to {cores()}, the cores of this "
        f"process. Time the schedules on a machine that has as many, or with a profile of this one."
    )


def _problem(one: ToTime, engine: Runtime) -> str:
    """Why a schedule is not timed; "" if it is."""
    if not one.schedule.is_adaptive:
        return ""
    if not engine.counts_may_differ:
        return (
            f"it has thresholds, and {engine.name} runs fixed counts; time what prunesearch freeze makes of it, with "
            f"evaluate --speed"
        )
    missing = [path for path in (one.weights, one.start) if path is not None and not Path(path).is_file()]
    return f"its thresholds need its weights, and {missing[0]} is not there" if missing else ""


def _with_schedule(task: Task, one: ToTime, dense: nn.Module) -> nn.Module:
    """A model with a schedule; it shares the weights of the dense model where they do not matter."""
    if not one.schedule.is_adaptive:
        return apply_schedule(sharing_copy(dense), one.schedule, seed=task.seed, untrained=True).eval()
    own = build_model(task.model, start=one.start).to(next(dense.parameters()))
    return apply_schedule(own, one.schedule, weights=one.weights, seed=task.seed, untrained=True).eval()


@torch.inference_mode()
def _guesses(
    work: TimingWork, models: Mapping[str, nn.Module], profile: Profile, batches: Sequence[Tensor]
) -> dict[str, float]:
    """What a profile predicts: how many times as fast as the dense model. With thresholds for the timed images."""
    dense_ms, found = total_cost(profile.shape, Schedule(), profile), {DENSE: 1.0}
    for one in work.schedules:
        if one.name not in models:
            continue
        model = models[one.name]
        if one.schedule.is_adaptive:
            steps, shape = steps_of(model), shape_of(model)
            counts = [trace(model, batch).counts for batch in batches]
            costs = [cost_by_counts(some, steps, shape, work.batch, profile) for some in counts]
            found[one.name] = dense_ms / torch.cat(costs).mean().item()
        else:
            found[one.name] = dense_ms / total_cost(profile.shape, one.schedule, profile)
    return found


def _run(run: Run, device: torch.device, amp: bool) -> object:
    with autocast(device, amp):
        return run()
