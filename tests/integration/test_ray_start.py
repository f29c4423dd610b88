"""Starting Ray takes a bounded time, and a failure is a clear message. No test needs a cluster."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prunesearch.errors import ResourceError
from prunesearch.workers import ray_pool as ray_workers
from prunesearch.workers.ray_pool import _start_ray


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:{port}", "refused"),
        ("ray://127.0.0.1:{port}", "refused"),
        ("nobody.invalid:6379", "known|resolution"),
        ("127.0.0.1", "HOST:PORT"),
        ("nonsense", "HOST:PORT"),
        ("127.0.0.1:port", "integer|Port"),
        ("", "HOST:PORT"),
    ],
)
def test_an_address_where_nobody_answers_is_a_sentence_at_once(address: str, says: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ResourceError, match=rf"workers.address: no Ray cluster at .*({says}).*Possible: "):
        _start_ray(address.format(port=closed_port()))
    assert time.monotonic() - begun < 20


def test_a_host_that_drops_everything_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket with a full queue of connections, to which the kernel does not answer."""
    monkeypatch.setattr(ray_workers, "ANSWER_SECONDS", 2.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        with pytest.raises(ResourceError, match="timed out"):
            _start_ray(f"127.0.0.1:{server.getsockname()[1]}")
        for one in waiting:
            one.close()


@pytest.mark.parametrize("source", ["RAY_ADDRESS", "the last cluster of this machine"])
def test_auto_of_a_cluster_that_is_gone_is_a_sentence(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{closed_port()}"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # other tests may run a cluster now
    if source == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    with pytest.raises(ResourceError, match=r"workers.address: no Ray cluster at 'auto': .*refused"):
        _start_ray("auto")


def test_auto_without_a_cluster_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # other users may run a cluster
    with pytest.raises(ResourceError, match="no Ray cluster at 'auto': Could not find any running Ray instance"):
        _start_ray("auto")


@pytest.mark.slow
def test_a_folder_too_deep_for_sockets_is_a_sentence(tmp_path: Path) -> None:
    """In a new process, because Ray reads the environment when it is imported."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    code = (
        "from prunesearch.workers.ray_pool import _start_ray, ray\n"
        "from prunesearch.errors import ResourceError\n"
        "try: _start_ray(None)\n"
        "except ResourceError as error: print(error)\n"
        "assert not ray.is_initialized()\n"
    )
    environment = {**os.environ, "TMPDIR": str(deep), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=250)
    assert f"workers: Ray's folder {deep}/ray has too long a path" in done.stdout, done.stderr
    assert "Set RAY_TMPDIR to a short path" in done.stdout and done.returncode == 0


def test_ray_address_alone_does_not_join_a_cluster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A study without workers.address runs on this machine, and says so."""
    asked: list[object] = []
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port()}")
    monkeypatch.setattr(ray_workers.ray, "init", lambda **options: asked.append(options["address"]))
    with caplog.at_level(logging.WARNING):
        _start_ray(None)
    assert asked == ["local"] and "write workers.address: auto" in caplog.text
