"""Optuna storages: opened so that several processes can write, and asked again while they are away."""

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
"""How long a search waits for a storage that is away or full."""
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
"""What each database driver calls the seconds that connecting may take."""
T = TypeVar("T")
_PASSWORD = re.compile(r"(://[^/:@?]*:).*@|^([^/:@?]*:)(?!//).*@", re.DOTALL)
_NO_PORT = re.compile(r"(://[^/:@?]*:)(?!\d*(?:[/?]|$))[^@]*$", re.DOTALL)
"""What stands where a port should, when the host was forgotten: the password."""
_SECRET = re.compile(r"([?&][^=&]*(?:pass|pwd|secret|token)[^=&]*=)[^&]*", re.IGNORECASE)


def storage_url(folder: Path) -> str:
    """The URL of the SQLite file in a study folder. What a URL gives a meaning (%, ?, #, spaces) is escaped."""
    return f"sqlite:///{quote(os.fsencode(folder.absolute() / 'study.db'))}"


def check_url(url: str) -> None:
    """Raises StudyError when no storage can be opened by this URL, whatever is there. Nothing is opened or made."""
    if url.startswith("journal:"):
        if url == "journal:" or "\0" in url:
            raise StudyError(f"storage {url}: it names no file. Possible: journal:FILE. Name the file.")
        return
    if url == "memory:" or sqlite_file(url) is not None:
        return
    place = f"storage {shown(url)}"
    try:
        parsed = make_url(url)
    except ArgumentError:  # neither error is shown: it may hold the password
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
    """An Optuna storage by URL: a database, journal:FILE, or memory:. Raises StudyError when it cannot be opened.

    Without `writing` no file is made or changed.
    """
    check_url(url)
    if url == "memory:":  # for searches that are replayed: nothing stays
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
        # pool_pre_ping: a connection that broke while the database was away is noticed and made anew
        rdb = _connect(url, _server_options(url) if file is None else _sqlite_options(file, writing), writing)
        if file is not None:
            _careful_sqlite(rdb.engine, writing=writing)
    except PruneSearchError:
        raise
    except Exception as error:  # what a damaged file makes SQLite, JSON and Optuna raise is not to be foreseen
        where = shown(url) if file is None else file
        raise StudyError(f"storage {where} cannot be opened: {_reason(error)}. {_advice(error, file)}") from error
    return optuna.storages.get_storage(rdb)


def database_of(storage: BaseStorage) -> RDBStorage | None:
    """The database behind a storage, or None for a journal and for memory."""
    backend = getattr(storage, "_backend", None)  # of Optuna's cache around it
    return backend if isinstance(backend, RDBStorage) else None


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL, relative as it is written; None for every other storage.

    Raises StudyError when an SQLite URL names no file. SQLAlchemy is not asked: its versions differ in what they make
    of a % in a path.
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
    """Give back its connections."""
    storage.remove_session()
    database = database_of(storage)
    if database is not None:
        database.engine.dispose()


class Patience:
    """Calls an operation on a storage again and again while the storage is away, locked or full.

    on_wait: told why and for how many seconds so far; False gives up. Raises RunError when it gives up, when
    `seconds` are over, and at once for errors that do not pass. Operations must be harmless when done twice.
    file: of the storage, where it is one.
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
    """A storage that went away or is damaged is a failed run, not a traceback of its library. file: of the storage,
    where it is one. Only for calls of the storage: whatever they raise counts as its error."""
    try:
        yield
    except (PruneSearchError, optuna.exceptions.DuplicatedStudyError):
        raise
    except Exception as error:  # what damaged rows make Optuna raise is not to be foreseen
        raise _lost(error, file) from error


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


def _server_options(url: str) -> dict[str, Any]:
    """Keywords of the engine for a database server."""
    parsed = make_url(url)
    name = _CONNECT_TIMEOUT.get(parsed.get_dialect().driver)
    timeout = {} if name is None or name in parsed.query else {name: CONNECT_SECONDS}
    return {"pool_pre_ping": True, "connect_args": timeout}


def _sqlite_options(file: Path, writing: bool) -> dict[str, Any]:
    """Keywords of the engine for an SQLite file: connections to exactly this path, however a URL would read it."""
    if not writing:
        # a new connection for each transaction, as the way to look depends on who writes at the moment
        return {"creator": partial(_look_at, file), "poolclass": NullPool}
    creator = partial(sqlite3.connect, file, timeout=BUSY_SECONDS, check_same_thread=False)
    return {"creator": creator, "poolclass": QueuePool}


def _look_at(file: Path) -> sqlite3.Connection:
    """A connection that changes nothing and makes no file, so that it also works where nothing can be written.

    In WAL mode what was committed last is in FILE-wal, and SQLite wants FILE-shm beside it, which it would make.
    """
    wal = file.with_name(f"{file.name}-wal")
    has_wal = _is_wal(file) and wal.exists() and wal.stat().st_size > 0
    if has_wal and not file.with_name(f"{file.name}-shm").exists():
        return _look_at_copy(file, wal)
    # without a log the file is whole, and a writer that begins now writes to a log of its own first
    way = "mode=ro&immutable=1" if _is_wal(file) and not has_wal else "mode=ro"
    where = f"file:{quote(os.fsencode(file.absolute()))}?{way}"
    return sqlite3.connect(where, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)


def _look_at_copy(file: Path, wal: Path) -> sqlite3.Connection:
    """A database and its log, read in another folder and kept in memory."""
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


# --- what an error says ------------------------------------------------------------------------------------------

_STAYS = ("no such table", "no such column", "does not exist", "readonly", "malformed", "not a database")
"""What errors say that do not pass by themselves."""
_NO_DAMAGE = ("readonly", "locked", "unable to open", "full", "disk I/O", "Permission", "directory", "denied")
"""What errors of SQLite files say whose content is not to blame."""


def _may_pass(error: BaseException) -> bool:
    """Whether waiting may help: a server that is away, a full disk, a lock; not a table that is not there."""
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
    """What went wrong, without the words of the libraries around it: the first line of the innermost error."""
    while isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    is_bare = isinstance(error, (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError))
    return f"{type(error).__name__}: {_first_line(error)}" if is_bare else _first_line(error)


def _advice(error: BaseException, file: Path | None) -> str:
    """What is possible and what to do after an error of a storage."""
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
