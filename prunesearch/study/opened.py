"""Open a study for writing: lock it, open its storage and write study.yaml to its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prunesearch.config import StudyConfig
from prunesearch.files import write_yaml
from prunesearch.strict import to_mapping
from prunesearch.study.lock import Place, one_of_several, only_driver
from prunesearch.study.lost_database import refuse_lost_database
from prunesearch.study.reader import knows_study
from prunesearch.study.storage import check_url, journal_file, shown, sqlite_file, storage_url
from prunesearch.study.store import Store, open_store


def url_and_drivers(folder: Path, storage: str | None) -> tuple[str, bool]:
    """The storage URL of a study, and whether only one driver may use it. Raises StudyError for an invalid URL.

    A database given by `storage` may have several drivers. The database in the folder, a journal and memory have one.
    """
    url = storage_url(folder) if storage is None else storage
    check_url(url)
    return url, storage is None or storage.startswith(("journal:", "memory:"))


@contextmanager
def opened_study(
    config: StudyConfig,
    folder: Path,
    url: str,
    alone: bool,
    on_wait: Callable[[str, float], bool] = lambda why, waited: True,
    just_measured: bool = False,
) -> Iterator[tuple[Store, Place]]:
    """Create or continue a study, and close it at the end of the block.

    folder: absolute. url, alone: as `url_and_drivers` gives them. on_wait, just_measured: see `open_store`.
    Raises StudyError when another driver has locked it, its database is lost, or its stored settings differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = only_driver(folder, journal_file(url)) if alone else one_of_several(folder, sqlite_file(url))
        place = stack.enter_context(lock)
        refuse_lost_database(config.name, folder, shown(url), lambda: knows_study(url, config.name))
        store = open_store(config, url, owner=place.name, alone=alone, on_wait=on_wait, just_measured=just_measured)
        stack.callback(store.close)
        write_yaml(to_mapping(store.config), folder / "study.yaml", header="prunesearch study, as it was run")
        yield store, place
