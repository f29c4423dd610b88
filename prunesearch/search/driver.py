"""`run_study`: run a study from its configuration to its end, or continue it.

This file checks the study, opens the storage and starts the workers. Before the search it trains the shared weights
(`shared_weights.py`) and measures the dense siblings (`siblings.py`). It runs the search (`loop.py`) and confirms the
front after it (`confirm.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prunesearch.config import ModelConfig, StudyConfig
from prunesearch.errors import RunError
from prunesearch.evaluate.shapes import model_shape
from prunesearch.extras import need
from prunesearch.relative_limits import dense_problem, dense_record
from prunesearch.search.confirm import confirm, missing, take_up_confirmations
from prunesearch.search.events import Checked, Done, Event, Finished, LookingAtData, Timing, Waiting
from prunesearch.search.interrupt import Interrupt
from prunesearch.search.loop import STOPPED_BY_HAND, Search
from prunesearch.search.once import Crew
from prunesearch.search.others import NoOthers, OtherDrivers, Others
from prunesearch.search.problems import check_study, start_schedules
from prunesearch.search.recovery import Recovery
from prunesearch.search.shared_weights import prepare_supernet
from prunesearch.search.siblings import measure_siblings, take_up_siblings, unmeasured
from prunesearch.search.speed import take_up_speeds, time_schedules
from prunesearch.search.state import SearchState
from prunesearch.search.target_device import save_profile, timing_notes, with_known_profile, with_measured_profile
from prunesearch.space.vocabulary import vocabulary_of
from prunesearch.study.opened import opened_study, url_and_drivers
from prunesearch.study.reader import has_study
from prunesearch.study.team import NoTeam, Team, outboxes_of
from prunesearch.workers.child import ChildWorker
from prunesearch.workers.protocol import EVALUATE, TIME, LateWorkers, NoWorkers, Workers
from prunesearch.workers.serial import SerialWorkers

if TYPE_CHECKING:
    from prunesearch.evaluate.inputs import Inputs
    from prunesearch.evaluate.task import Evaluation
    from prunesearch.record import Record

logger = logging.getLogger(__name__)


def run_study(
    config: StudyConfig,
    folder: Path,
    *,
    storage: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    evaluate: str = EVALUATE,
    make_workers: Callable[[StudyConfig, Path, str], Workers] | None = None,
    lease: float | None = None,
    search: bool = True,
    timer: str = TIME,
) -> Done:
    """Search until `config.stop` is reached, Ctrl-C (or SIGTERM) is received, or no candidate is left.

    folder: the study folder; it is created if missing. storage: an Optuna URL, journal:FILE or memory:; default: a
    SQLite file in the folder. Several drivers may run a study in the same database, each with its own folder, or all
    with one folder on a shared disk. evaluate: "module:function" of Task -> Evaluation. make_workers: called with
    (config, folder, evaluate) in place of what `config.workers` describes. lease: seconds without a sign of life after
    which another driver counts as dead. search: False only confirms the front. timer: as `evaluate`, for the task that
    times schedules after the confirmation.

    Raises UserErrors before anything runs, RunError when every candidate fails, the storage is lost or the disk is
    full.
    """
    folder = folder.absolute()  # workers may have another working directory
    url, alone = url_and_drivers(folder, storage)
    config = with_known_profile(config, url)
    problems = []
    if config.evaluation == "supernet" and not alone:
        problems = ["evaluation: supernet has one driver. Possible: no --storage, or journal:FILE. Leave it out."]
    check_study(config, starts=not has_study(url, config.name), problems=problems)
    on_event(Checked())
    for note in timing_notes(config):
        logger.warning("%s", note)
    just_measured = config.device is not None and config.device.table is None
    if just_measured:
        config = with_measured_profile(config, folder, url)
        check_study(config, starts=not has_study(url, config.name), problems=problems)
    with Interrupt() as interrupt, ExitStack() as stack:
        if make_workers is None:
            on_event = _suspicious(config.model, _look(config, folder, on_event), on_event)
        elif config.workers.address is None:  # otherwise the workers are on other machines
            from prunesearch.evaluate.inputs import check_files

            check_files(config.model, config.data)
        (folder / "outbox").mkdir(parents=True, exist_ok=True)

        def wait_for_storage(why: str, waited: float) -> bool:
            on_event(Waiting(why, waited))
            return interrupt.count == 0

        opening = opened_study(config, folder, url, alone, wait_for_storage, just_measured)
        store, place = stack.enter_context(opening)
        config = store.config  # it may have the profile of a driver that began the study at the same moment
        if just_measured:
            save_profile(config, folder)  # again, as it may be another
        team: Team | NoTeam = NoTeam()
        if not alone:
            team = stack.enter_context(closing(Team(store, place, lease)))
        shape = model_shape(config.model)
        starts = store.starts(lambda: start_schedules(config, shape, folder))
        store.define(lambda: vocabulary_of(config.space, [schedule for _, schedule in starts], shape))
        outbox = folder / "outbox" if alone else folder / "outbox" / store.owner
        left = [outbox]
        if alone:  # other drivers may have run the study before, in folders of their own
            elsewhere = [place for name in store.beats() for place in outboxes_of(name, store, folder)]
            left += [place for place in elsewhere if place.parent != outbox]  # its subfolders are read with it
        state = SearchState(config, shape, starts, store.records())
        weights = config.model.checkpoint
        if weights is not None and Path(weights).is_file():  # workers may be on other machines, which have it
            results = [one for record in state.records.values() for one in record.evaluations]
            store.hold_weights(weights, any(one.status == "complete" for one in results))
        recovery = Recovery(state, store, folder, left)
        others: Others = NoOthers()
        if isinstance(team, Team):
            others = OtherDrivers(state, store, recovery, team, outbox, on_event)
        on_event = _comparing_data(state.records.values(), on_event)
        run = Search(state, store, recovery, others, outbox, interrupt, on_event)
        never_judged = dense_problem(config, dense_record(state.records.values()))
        if never_judged is not None:  # an earlier run ended with it
            raise RunError(never_judged)
        take_up_siblings(config, left, store, folder)
        take_up_speeds(config, folder, left, store)
        take_up_confirmations(config, folder, left, store)
        workers: Workers = NoWorkers()
        pool = stack.enter_context(ExitStack())
        make = make_workers or (lambda *given: _start_workers(outbox, *given))
        if (search and (run.has_work() or unmeasured(store))) or missing(config, folder, store.records()):
            workers = pool.enter_context(closing(make(config, folder, evaluate)))
        interrupt.listen()  # after Ray has started, because Ray installs its own signal handlers
        is_stopped = partial(_is_interrupted, interrupt)
        crew = Crew(folder, outbox, store, workers, team, is_stopped)
        try:
            if not isinstance(workers, NoWorkers):
                prepare_supernet(config, folder, outbox, workers, on_event, is_stopped)
                if search:
                    measure_siblings(config, crew, on_event)
        except KeyboardInterrupt:
            search = False
        done = run.run(workers) if search else run.look(workers)
        if done.reason not in STOPPED_BY_HAND and not interrupt.count:
            if search:
                measure_siblings(config, crew, on_event, after=True)
            confirm(config, crew, on_event)
            if config.confirm.seeds and not is_stopped():
                pool.close()  # nothing else of this driver may run while schedules are timed

                def begin_timing() -> Workers:
                    on_event(Timing())
                    one = replace(config, workers=replace(config.workers, count=1))
                    workers = make(one, folder, timer)
                    interrupt.listen()  # Ray has installed its own signal handlers again
                    return workers

                timers = stack.enter_context(closing(LateWorkers(begin_timing)))
                time_schedules(config, replace(crew, workers=timers), on_event)
            done = replace(done, seconds=run.seconds())
        if interrupt.count and done.reason not in STOPPED_BY_HAND:
            done = replace(done, reason="interrupted")
        on_event(done)
        return done


def _look(config: StudyConfig, folder: Path, on_event: Callable[[Event], None]) -> Inputs:
    """Check the files and data that the workers will read. Raises the UserErrors of `check_inputs`."""
    from prunesearch.evaluate.inputs import check_inputs

    inputs = check_inputs(
        config.model,
        config.data,
        config.workers.device,
        here=config.workers.address is None,
        keep=config.workers.kind == "serial",
        memory=folder,
        report=lambda split, done, total: on_event(LookingAtData(split, done, total)),
    )
    if inputs.unseen:
        logger.warning("not looked at, as workers are on a cluster: %s", ", ".join(inputs.unseen))
    return inputs


def _suspicious(model: ModelConfig, inputs: Inputs, on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """Wrap `on_event`: warn when the dense model scores as if its classes were in another order than the data's."""

    def pass_on(event: Event) -> None:
        on_event(event)
        if isinstance(event, Finished) and event.record.origin == "dense":
            from prunesearch.evaluate.inputs import suspicion

            why = suspicion(inputs, model, event.evaluation)
            if why is not None:
                logger.warning("%s", why)

    return pass_on


def _comparing_data(records: Iterable[Record], on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """Wrap `on_event`: warn once when a result is of other images than those before it."""

    def images_of(evaluation: Evaluation) -> str | None:
        return dict(evaluation.versions).get("data") if evaluation.status == "complete" else None

    known = next((images for record in records for one in record.evaluations if (images := images_of(one))), None)
    is_said = False

    def pass_on(event: Event) -> None:
        nonlocal known, is_said
        on_event(event)
        if is_said or not isinstance(event, Finished):
            return
        now = images_of(event.evaluation)
        known = known or now
        if now not in (None, known):
            is_said = True
            logger.warning(
                "data: trial %d was measured with other images than those before it, or they were decoded otherwise "
                "(count:hash of training and validation images %s, before %s). Such results do not compare. Restore "
                "the images, or give the new search another name (--set name=...).",
                event.record.number,
                now,
                known,
            )

    return pass_on


def _is_interrupted(interrupt: Interrupt) -> bool:
    return interrupt.count > 0


def _start_workers(outbox: Path, config: StudyConfig, folder: Path, evaluate: str) -> Workers:
    if config.workers.kind == "serial":
        if config.plugins or config.workers.timeout is not None:  # needs a process that can be killed
            return ChildWorker(config.workers, folder, outbox, evaluate)
        return SerialWorkers(config.workers, outbox, evaluate)
    need("workers.kind: ray", "search", "ray")
    from prunesearch.workers.ray_pool import RayWorkers

    return RayWorkers(config.workers, folder, outbox, evaluate)
