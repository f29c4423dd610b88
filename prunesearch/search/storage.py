"""Optuna storages: opened so that several processes can write, and asked again while they are away."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import URL, Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from prunesearch.errors import RunError, StudyError

BUSY_SECONDS = 60
"""How long SQLite waits for another process to finish writing."""
PATIENCE_SECONDS = 600.0
"""How long a search waits for a storage that is away or full."""
PAUSE_SECONDS = 2.0
T = TypeVar("T")
_PASSWORD = re.compile(r"(://[^/:@?]*:).*@|^([^/:@?]*:)(?!//).*@", re.DOTALL)
_NO_PORT = re.compile(r"(://[^/:@?]*:)(?!\d*(?:[/?]|$))[^@]*$", re.DOTALL)
"""What stands where a port should, when the host was forgotten: the password."""
_SECRET = re.compile(r"([?&][^=&]*(?:pass|pwd|secret|token)[^=&]*=)[^&]*", re.IGNORECASE)


def storage_url(folder: Path) -> str:
    """The SQLite file of a study folder."""
    return f"sqlite:///{(folder / 'study.db').absolute()}"


def open_storage(url: str, *, writing: bool) -> BaseStorage:
    """An Optuna storage by URL: a database, journal:FILE, or memory:. Raises StudyError when it cannot be opened."""
    if url == "memory:":  # for searches that are replayed: nothing stays
        return optuna.storages.InMemoryStorage()
    if url.startswith("journal:"):
        path = Path(url.removeprefix("journal:"))
        if not writing and not path.exists():
            raise StudyError(f"{url}: there is no such file. Possible: the storage of a study that was run. Check it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path)))
    try:
        file = sqlite_file(url)
        if file is not None:
            if not writing and not file.exists():
                raise StudyError(
                    f"{file}: there is no such file. Possible: the folder of a study that was run, or "
                    f"--storage URL. Check the path, or run the study first."
                )
            file.parent.mkdir(parents=True, exist_ok=True)
        is_sqlite = _parsed(url).get_backend_name() == "sqlite"
        # pool_pre_ping: a connection that broke while the database was away is noticed and made anew
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}} if is_sqlite else {"pool_pre_ping": True}
        rdb = _connect(url, options, writing)
        if is_sqlite:
            _careful_sqlite(rdb.engine, writing=writing)
    except (SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        raise StudyError(
            f"storage {shown(url)} cannot be opened: {_first_line(error)}. Possible: sqlite:///FILE, "
            f"postgresql://USER:PASSWORD@HOST/DATABASE, mysql://..., journal:FILE. Check the URL and its driver."
        ) from error
    return optuna.storages.get_storage(rdb)


def database_of(storage: BaseStorage) -> RDBStorage | None:
    """The database behind a storage, or None for a journal and for memory."""
    backend = getattr(storage, "_backend", None)  # of Optuna's cache around it
    return backend if isinstance(backend, RDBStorage) else None


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL; None for every other storage."""
    if ":" not in url or url.startswith(("journal:", "memory:")):
        return None
    parsed = _parsed(url)
    is_file = parsed.get_backend_name() == "sqlite" and parsed.database
    return Path(parsed.database) if is_file and parsed.database else None


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except (SQLAlchemyError, ValueError):  # their texts may hold a part of the password
        raise StudyError(
            f"storage {shown(url)} cannot be opened: it is no URL. Possible: sqlite:///FILE, "
            f"postgresql://USER:PASSWORD@HOST:PORT/DATABASE, mysql://..., journal:FILE, with %40, %3A and %2F for @, : "
            f"and / in the password. Correct the URL."
        ) from None


def close_storage(storage: BaseStorage) -> None:
    """Give back its connections."""
    storage.remove_session()
    database = database_of(storage)
    if database is not None:
        database.engine.dispose()


class Patience:
    """Calls an operation on a storage again and again while the storage is away, locked or full.

    on_wait: told why and for how many seconds so far; False gives up. Raises RunError when it gives up, when
    `seconds` are over, and at once for errors that do not pass. Operations must be harmless when done twice.
    """

    def __init__(
        self, seconds: float | None = None, on_wait: Callable[[str, float], bool] = lambda why, waited: True
    ) -> None:
        self.seconds, self.on_wait = seconds, on_wait

    def __call__(self, operation: Callable[[], T]) -> T:
        begun = time.monotonic()
        seconds = PATIENCE_SECONDS if self.seconds is None else self.seconds
        while True:
            try:
                return operation()
            except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
                waited = time.monotonic() - begun
                if not _may_pass(error) or waited >= seconds or not self.on_wait(_reason(error), waited):
                    raise _lost(error) from error
            time.sleep(min(PAUSE_SECONDS, seconds))


@contextmanager
def storage_errors() -> Iterator[None]:
    """A storage that went away is a failed run, not a traceback of its library."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        raise _lost(error) from error


def shown(url: str) -> str:
    """The URL with *** in the place of passwords. Whatever prints a URL prints this.

    By patterns and not by parsing: a password may hold any character, and the URL may be wrong.
    """
    if url.startswith(("journal:", "memory:")):
        return url
    return _SECRET.sub(r"\1***", _NO_PORT.sub(r"\1***", _PASSWORD.sub(r"\1\2***@", url)))


def _connect(url: str, options: dict[str, Any], writing: bool) -> RDBStorage:
    """Optuna's database; when another driver makes its tables at the same moment, those."""
    for attempt in range(10):
        try:
            return RDBStorage(url, engine_kwargs=options, skip_table_creation=not writing)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            collided = "already exists" in str(error) or "UNIQUE" in str(error).upper() or "locked" in str(error)
            if not collided or attempt == 9:
                raise
            time.sleep(0.3)
    raise AssertionError("the last attempt returns or raises")


def _careful_sqlite(engine: Engine, *, writing: bool) -> None:
    """Every connection: survive power loss, let others read, wait for others who write.

    A transaction of a writer takes the write lock before it reads. With SQLite's own way, two processes that read
    and then write both fail, or both take the same trial.
    """
    engine.dispose()

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # no hidden BEGIN
        if writing:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA busy_timeout={1000 * BUSY_SECONDS}")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _may_pass(error: BaseException) -> bool:
    """Whether waiting may help: a server that is away, a full disk, a lock; not a table that is not there."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    if isinstance(cause, DBAPIError) and cause.connection_invalidated:
        return True
    text = str(cause)
    is_crooked = "no such table" in text or "no such column" in text or "does not exist" in text
    return isinstance(cause, (OperationalError, InterfaceError, PoolTimeoutError)) and not is_crooked


def _lost(error: BaseException) -> RunError:
    return RunError(
        f"storage: {_reason(error)}. What was written stays; finished evaluations are in the outbox. Mend the storage "
        f"and run the study again to continue."
    )


def _reason(error: BaseException) -> str:
    return _first_line(error.__cause__ or error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
