"""Start a temporary PostgreSQL server from the installed binaries, for tests."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Unavailable(Exception):
    """No server can be started here. The message says why."""


class Server:
    """A server that can be stopped and started again."""

    def __init__(self, binaries: Path, place: Path, port: int, user: str | None) -> None:
        self.binaries, self.data, self.port, self.user = binaries, place / "data", port, user
        self.url = f"postgresql+psycopg://searcher@127.0.0.1:{port}/postgres"
        self._call("initdb", "-D", str(self.data), "-U", "searcher", "-A", "trust", "--no-sync")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._call("pg_ctl", "-D", str(self.data), "-w", "-o", options, "-l", str(self.data / "log"), "start")

    def stop(self) -> None:
        self._call("pg_ctl", "-D", str(self.data), "-w", "-m", "immediate", "stop")

    def _call(self, program: str, *arguments: str) -> None:
        command = [str(self.binaries / program), *arguments]
        # not as root; no pipes, because the server would keep them open
        subprocess.run(
            command, check=True, user=self.user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
        )


@contextmanager
def postgres() -> Iterator[Server]:
    """A new server, stopped at the end of the block. Raises Unavailable."""
    binaries = _binaries()
    if binaries is None:
        raise Unavailable("no PostgreSQL server is installed (no initdb on the PATH or in /usr/lib/postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        raise Unavailable("no driver for PostgreSQL is installed (pip install 'psycopg[binary]')")
    user = None
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        user = next((name for name in ("postgres", "nobody") if _exists(name)), None)
        if user is None:
            raise Unavailable("PostgreSQL does not run as root, and there is no user postgres or nobody")
    with tempfile.TemporaryDirectory(prefix="prunesearch-postgres-") as place:
        if user is not None:
            shutil.chown(place, user)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = Server(binaries, Path(place), port, user)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _binaries() -> Path | None:
    on_path = shutil.which("initdb")
    found = [Path(on_path)] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].resolve().parent if found else None


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
