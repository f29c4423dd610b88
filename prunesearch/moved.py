"""Old and new paths of modules that moved. Importing an old path raises an error that names the new one.

`prunesearch/__init__.py` appends `Signpost` to `sys.meta_path`. Python asks it only when no other finder has found the
module.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "catalogue": "report.catalogue",
    "freeze": "export.freeze",
    "plot": "report.plot",
    "plot_sensitivity": "report.plot_sensitivity",
    "sources": "export.sources",
    "space_problems": "space.problems",
    "terminal": "report.terminal",
    "evaluate.draw": "evaluate.sampling",
    "report.rungs": "report.rung_tables",
    "report.sensitivity": "report.sensitivity_tables",
    "search.again": "confirmation",
    "search.child_worker": "workers.child",
    "search.differences": "study.differences",
    "search.iso_budget": "samplers.iso_budget",
    "search.lessons": "samplers.sampler_state",
    "search.limits": "evaluate.limits",
    "search.lock": "study.lock",
    "search.lost_database": "study.lost_database",
    "search.outbox": "workers.outbox",
    "search.propose": "samplers.propose",
    "search.quasi_random": "samplers.quasi_random",
    "search.ray_workers": "workers.ray_pool",
    "search.record": "record",
    "search.rows": "study.rows",
    "search.samplers": "samplers",
    "search.serial_workers": "workers.serial",
    "search.simulate": "replay.workers",
    "search.storage": "study.storage",
    "search.study": "study.reader",
    "search.supernet": "search.shared_weights",
    "search.surrogate": "replay.surrogate",
    "search.table": "replay.table",
    "search.team": "study.team",
    "search.token_gp": "samplers.token_gp",
    "search.tune": "tune.trainable",
    "search.tune_results": "tune.results",
    "search.verdict": "evaluate.outcome",
    "search.vocabulary": "space.vocabulary",
    "search.workers": "workers.protocol",
    "study.vocabulary": "space.vocabulary",
    "tokens.masked": "models.masked_step",
    "tokens.regroup": "models.step",
}
"""Old path -> new path, both below `prunesearch`."""


class Signpost(MetaPathFinder):
    """Import finder that raises ModuleNotFoundError for an old path and names the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for a name that is no old path."""
        new = MOVED.get(fullname.removeprefix("prunesearch."))
        if new is None or not fullname.startswith("prunesearch."):
            return None
        raise ModuleNotFoundError(f"{fullname} is prunesearch.{new} now. Import that instead.", name=fullname)
