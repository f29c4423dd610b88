"""Open Optuna storages by URL, safely for several writing processes, and retry while a storage is unavailable."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote_to_bytes

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import NullPool, QueuePool

from prunesearch.errors import PruneSearchError, RunError, StudyError

BUSY_SECONDS = 60
"""How long SQLite waits for another process to finish writing."""
CONNECT_SECONDS = 10
"""How long a database server may take to answer when a connection is made."""
PATIENCE_SECONDS = 600.0
"""How long a search waits for a storage that is unavailable or full."""
PAUSE_SECONDS = 2.0
POSSIBLE = "sqlite:///FILE, postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, mysql://..., journal:FILE"
_CONNECT_TIMEOUT = {
    "psycopg": "connect_timeout",
    "psycopg2": "connect_timeout",
    "pymysql": "connect_timeout",
    "mysqldb": "connect_timeout",
    "mysqlconnector": "connection_timeout",
    "pg8000": "timeout",
}
"""Name of the connection timeout (seconds) in each database driver."""
T = TypeVar("T")
_PASSWORD = re.compile(r"(://[^/:@?]*:).*@|^([^/:@?]*:)(?!//).*@", re.DOTALL)
_NO_PORT = re.compile(r"(://[^/:@?]*:)(?!\d*(?:[/?]|$))[^@]*$", re.DOTALL)
"""A password in the place of the port, as in a URL whose host was forgotten."""
_SECRET = re.compile(r"([?&][^=&]*(?:pass|pwd|secret|token)[^=&]*=)[^&]*", re.IGNORECASE)


def storage_url(folder: Path) -> str:
    """The URL of the SQLite file in a study folder. Special characters of URLs (%, ?, #, spaces) are escaped."""
    return f"sqlite:///{quote(os.fsencode(folder.absolute() / 'study.db'))}"


def check_url(url: str) -> None:
    """Raise StudyError for a URL that is invalid or whose database driver is missing. Opens and creates nothing."""
    if url.startswith("journal:"):
        if url == "journal:" or "\0" in url:
            raise StudyError(f"storage {url}: it names no file. Possible: journal:FILE. Name the file.")
        return
    if url == "memory:" or sqlite_file(url) is not None:
        return
    place = f"storage {shown(url)}"
    try:
        parsed = make_url(url)
    except ArgumentError:  # the error is hidden, because it may contain the password
        raise StudyError(f"{place} cannot be opened: it is not a URL. Possible: {POSSIBLE}. Correct it.") from None
    except ValueError:
        raise StudyError(
            f"{place} cannot be opened: its port is not a number. Possible: {POSSIBLE}, with HOST:PORT for a port, and "
            f"with : / @ written as %3A %2F %40 in passwords. Correct it."
        ) from None
    try:
        dialect = parsed.get_dialect()()
        dialect.import_dbapi()
    except ImportError as error:
        raise StudyError(
            f"{place} cannot be opened: the Python package {error.name} that its driver needs is not installed. "
            f"Possible: an installed driver, or sqlite:///FILE and journal:FILE, which need none. Install it (for "
            f"PostgreSQL: pip install 'prunesearch[postgres]', with a URL that begins with postgresql+psycopg://)."
        ) from error
    except SQLAlchemyError as error:
        raise StudyError(
            f"{place} cannot be opened: {parsed.drivername} is no database or driver that SQLAlchemy knows. "
            f"Possible: {POSSIBLE}. Correct it."
        ) from error
    if dialect.is_async:
        raise StudyError(
            f"{place} cannot be opened: {parsed.drivername} is an asynchronous driver. Possible: {POSSIBLE}. Name "
            f"another one."
        )


def open_storage(url: str, *, writing: bool) -> BaseStorage:
    """Open an Optuna storage: a database, journal:FILE or memory:. Raises StudyError when it cannot be opened.

    writing: False creates and changes no file.
    """
    check_url(url)
    if url == "memory:":  # for replayed searches; nothing is kept
        return optuna.storages.InMemoryStorage()
    file = file_of(url)
    try:
        if file is not None:
            if not writing and not file.exists():
                raise StudyError(
                    f"{file}: there is no such file. Possible: the folder of a study that was run, or "
                    f"--storage URL. Check the path, or run the study first."
                )
            if writing:
                file.parent.mkdir(parents=True, exist_ok=True)
        if url.startswith("journal:"):
            return JournalStorage(JournalFileBackend(str(file)))
        rdb = _connect(url, _server_options(url) if file is None else _sqlite_options(file, writing), writing)
        if file is not None:
            _careful_sqlite(rdb.engine, writing=writing)
    except PruneSearchError:
        raise
    except Exception as error:  # damaged files make SQLite, JSON and Optuna raise anything
        where = shown(url) if file is None else file
        raise StudyError(f"storage {where} cannot be opened: {_reason(error)}. {_advice(error, file)}") from error
    return optuna.storages.get_storage(rdb)


def database_of(storage: BaseStorage) -> RDBStorage | None:
    """The database behind a storage, or None for a journal and for memory."""
    backend = getattr(storage, "_backend", None)  # Optuna wraps databases in a cache
    return backend if isinstance(backend, RDBStorage) else None


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL, as written (it may be relative); None for every other storage.

    Raises StudyError when an SQLite URL names no file. This does not use SQLAlchemy, whose versions treat a % in a path
    differently.
    """
    scheme, _, rest = url.partition(":")
    if scheme.partition("+")[0] != "sqlite":
        return None
    path, _, query = rest.removeprefix("///").partition("?")
    if scheme not in ("sqlite", "sqlite+pysqlite") or not rest.startswith("///") or query:
        why = "has options, or a ? that is not escaped as %3F" if query else "is not of the form sqlite:///FILE"
    elif path in ("", ":memory:"):
        why = "is a database in memory, which ends with this process"
    elif "%00" in path or "\0" in path:
        why = "holds a NUL character, which no path can"
    else:
        return Path(os.fsdecode(unquote_to_bytes(os.fsencode(path))))
    raise StudyError(
        f"storage {shown(url)}: it {why}. Possible: sqlite:///FILE (four slashes for an absolute path; %20, %25, %3F "
        f"for a space, % and ?). Name a file, or leave --storage out: then the study folder has one."
    )


def file_of(url: str) -> Path | None:
    """The SQLite or journal file of a URL; None for servers and memory."""
    return journal_file(url) or sqlite_file(url)


def journal_file(url: str) -> Path | None:
    """The file of a journal URL; None for every other storage."""
    return Path(url.removeprefix("journal:")) if url.startswith("journal:") else None


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a storage."""
    storage.remove_session()
    database = database_of(storage)
    if database is not None:
        database.engine.dispose()


class Patience:
    """Repeat an operation on a storage while the storage is unavailable, locked or full.

    Operations must be safe to repeat. Raises RunError after `seconds`, when `on_wait` returns False, and at once for
    errors that waiting cannot solve.

    seconds: default PATIENCE_SECONDS. on_wait: called with the reason and the seconds waited so far. file: of the
    storage, if it is a file.
    """

    def __init__(
        self,
        seconds: float | None = None,
        on_wait: Callable[[str, float], bool] = lambda why, waited: True,
        file: Path | None = None,
    ) -> None:
        self.seconds, self.on_wait, self.file = seconds, on_wait, file

    def __call__(self, operation: Callable[[], T]) -> T:
        begun = time.monotonic()
        seconds = PATIENCE_SECONDS if self.seconds is None else self.seconds
        while True:
            try:
                return operation()
            except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
                waited = time.monotonic() - begun
                if not _may_pass(error) or waited >= seconds or not self.on_wait(_reason(error), waited):
                    raise _lost(error, self.file) from error
            time.sleep(min(PAUSE_SECONDS, seconds))


@contextmanager
def storage_errors(file: Path | None = None) -> Iterator[None]:
    """Turn any exception of a storage into a RunError.

    Wrap calls of the storage only: whatever the block raises counts as an error of the storage. file: of the storage,
    if it is a file.
    """
    try:
        yield
    except (PruneSearchError, optuna.exceptions.DuplicatedStudyError):
        raise
    except Exception as error:  # damaged rows make Optuna raise anything
        raise _lost(error, file) from error


def shown(url: str) -> str:
    """The URL with passwords replaced by ***. Use it wherever a URL is printed.

    It uses patterns and not a parser, because passwords may contain any character and the URL may be invalid.
    """
    if url.startswith(("journal:", "memory:")):
        return url
    return _SECRET.sub(r"\1***", _NO_PORT.sub(r"\1***", _PASSWORD.sub(r"\1\2***@", url)))


def _connect(url: str, options: dict[str, Any], writing: bool) -> RDBStorage:
    """Open Optuna's database. Retries when another driver creates the tables at the same moment."""
    for attempt in range(10):
        try:
            return RDBStorage(url, engine_kwargs=options, skip_table_creation=not writing)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            collided = "already exists" in str(error) or "UNIQUE" in str(error).upper() or "locked" in str(error)
            if not collided or attempt == 9:
                raise
            time.sleep(0.3)
    raise AssertionError("the last attempt returns or raises")


def _server_options(url: str) -> dict[str, Any]:
    """Keyword arguments of SQLAlchemy's engine for a database server.

    pool_pre_ping replaces connections that broke while the server was away.
    """
    parsed = make_url(url)
    name = _CONNECT_TIMEOUT.get(parsed.get_dialect().driver)
    timeout = {} if name is None or name in parsed.query else {name: CONNECT_SECONDS}
    return {"pool_pre_ping": True, "connect_args": timeout}


def _sqlite_options(file: Path, writing: bool) -> dict[str, Any]:
    """Keyword arguments of SQLAlchemy's engine for an SQLite file: connect to this exact path, without a URL."""
    if not writing:
        # a new connection per transaction: how to open the file depends on whether someone writes now
        return {"creator": partial(_look_at, file), "poolclass": NullPool}
    creator = partial(sqlite3.connect, file, timeout=BUSY_SECONDS, check_same_thread=False)
    return {"creator": creator, "poolclass": QueuePool}


def _look_at(file: Path) -> sqlite3.Connection:
    """A read-only connection that creates no file, so it works in a read-only folder.

    In WAL mode the newest commits are in FILE-wal. To read it SQLite needs FILE-shm and would create it; when it is
    missing, a copy is read instead.
    """
    wal = file.with_name(f"{file.name}-wal")
    has_wal = _is_wal(file) and wal.exists() and wal.stat().st_size > 0
    if has_wal and not file.with_name(f"{file.name}-shm").exists():
        return _look_at_copy(file, wal)
    # without a WAL the file is complete, and a new writer would write to a new WAL first
    way = "mode=ro&immutable=1" if _is_wal(file) and not has_wal else "mode=ro"
    where = f"file:{quote(os.fsencode(file.absolute()))}?{way}"
    return sqlite3.connect(where, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)


def _look_at_copy(file: Path, wal: Path) -> sqlite3.Connection:
    """Copy a database and its WAL to a temporary folder and load them into memory."""
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    with tempfile.TemporaryDirectory() as folder:
        for source, name in ((file, "copy"), (wal, "copy-wal")):
            shutil.copyfile(source, Path(folder, name))
        with closing(sqlite3.connect(Path(folder, "copy"))) as copy:
            copy.backup(memory)
    return memory


def _is_wal(file: Path) -> bool:
    """Whether an SQLite file is in WAL mode (bytes 18 and 19 of its header)."""
    with file.open("rb") as opened:
        return opened.read(20)[18:] == b"\2\2"


def _careful_sqlite(engine: Engine, *, writing: bool) -> None:
    """Set up every connection: durable commits, WAL mode (readers are not blocked), and waiting for the write lock.

    Transactions of a writer take the write lock at the start. With SQLite's default, two processes that read and then
    write would both fail, or would both take the same trial.
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


# --- what an error says ------------------------------------------------------------------------------------------

_STAYS = ("no such table", "no such column", "does not exist", "readonly", "malformed", "not a database")
"""Texts of errors that waiting cannot solve."""
_NO_DAMAGE = ("readonly", "locked", "unable to open", "full", "disk I/O", "Permission", "directory", "denied")
"""Texts of errors that do not mean a damaged SQLite file."""


def _may_pass(error: BaseException) -> bool:
    """Whether waiting may help: for an unavailable server, a full disk or a lock, but not for a missing table."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    if isinstance(cause, DBAPIError) and cause.connection_invalidated:
        return True
    stays = any(words in str(cause) for words in _STAYS)
    return isinstance(cause, (OperationalError, InterfaceError, PoolTimeoutError)) and not stays


def _lost(error: BaseException, file: Path | None = None) -> RunError:
    where = "" if file is None else f"{file}: "
    mend = "Mend the storage and run the study again to continue." if file is None else _advice(error, file)
    return RunError(
        f"storage: {where}{_reason(error)}. What was written stays; finished evaluations are in the outbox. {mend}"
    )


def _reason(error: BaseException) -> str:
    """The first line of the innermost error, without the messages that Optuna and SQLAlchemy wrap around it."""
    while isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    is_bare = isinstance(error, (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError))
    return f"{type(error).__name__}: {_first_line(error)}" if is_bare else _first_line(error)


def _advice(error: BaseException, file: Path | None) -> str:
    """The second part of an error message: what is possible, and what to do."""
    if file is None:
        return f"Possible: {POSSIBLE}. Check the URL, and whether its server runs."
    reason = str(error.__cause__ or error)
    if "optuna storage upgrade" in reason or "optuna version" in reason:
        return "Possible: the Optuna version that made it, or a newer one after the upgrade. Install that."
    if any(words in reason for words in _NO_DAMAGE):
        return (
            "Possible: status, front and export of what can be read; for a run a file and a folder that can be "
            "written, on a disk with space, while no other program holds the file. Mend that, and run the study again "
            "to continue."
        )
    left = ", ".join(name for name in ("outbox", "weights", "study.yaml") if (file.parent / name).exists())
    return (
        f"The file is damaged, or not the storage of a study. Beside it there is {left or 'nothing'}. Possible: "
        f"a copy of the file from before, or what `sqlite3 FILE .recover` saves of a database. Put that in its place "
        f"and run the study again, or move {file.parent} away to start over."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
