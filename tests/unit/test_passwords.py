"""A password in a storage URL is never printed, and the printed next command works with it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from fake_search import study

from prunesearch import cli
from prunesearch.cli import main
from prunesearch.files import write_yaml
from prunesearch.search.events import Done, Started
from prunesearch.strict import to_mapping
from prunesearch.study.storage import shown

SECRET = "hunter2"
URLS = [
    f"nodialect://me:{SECRET}@localhost:1/db",
    f"nodialect://me:x@{SECRET}@localhost:1/db",
    f"nodialect://me:{SECRET}/{SECRET}@localhost:1/db",
    f"nodialect://me:{SECRET}:{SECRET}@localhost:1/db",
    f"nodialect://me:{SECRET}#?&@localhost/db",
    f"nodialect://:{SECRET}@localhost/db",
    f"nodialect://me:{SECRET}@localhost:port/db",
    f"nodialect://me:{SECRET}",
    f"nodialect://me@localhost/db?password={SECRET}",
    f"nodialect://me@localhost/db?sslmode=x&sslPassword={SECRET}&a=b",
    f"me:{SECRET}@localhost/db",
]
HARMLESS = [
    "sqlite:////tmp/a@b:c/study.db",
    "journal:/tmp/a:b@c.log",
    "memory:",
    "postgresql+psycopg://me@localhost:5432/db?sslmode=require",
    "postgresql://localhost:5432/db",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_shown_without_its_password(url: str) -> None:
    assert SECRET not in shown(url) and "***" in shown(url)


@pytest.mark.parametrize("url", HARMLESS)
def test_a_url_without_a_password_is_shown_whole(url: str) -> None:
    assert shown(url) == url


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_yaml(to_mapping(study()), tmp_path / "study.yaml")
    return tmp_path / "study.yaml"


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("verb", ["run", "resume", "confirm", "status", "front", "export"])
def test_no_verb_prints_it_when_the_storage_cannot_be_opened(
    verb: str,
    url: str,
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = [verb, str(file)] if verb == "run" else [verb, "--study", "fake"]
    folder = ["--output", str(tmp_path)] if verb in ("run", "resume", "confirm") else []
    assert main([*arguments, "--storage", url, *folder]) == 2
    said = capsys.readouterr()
    assert "prunesearch: " in said.err and SECRET not in said.out + said.err + caplog.text


def test_neither_the_live_view_nor_the_next_command_has_it(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql+psycopg://me:{SECRET}@localhost/my db?sslmode=require&connect_timeout=3"
    done = Done("trials", complete=3, failed=0, running=0, rejected=0, seconds=1.0)

    def run_study(config, folder, *, storage, on_event, search):
        assert storage == url  # the search gets the full URL
        on_event(Started([], 3, 0, 0, 0, "this process"))
        on_event(done)
        return done

    monkeypatch.setattr("prunesearch.search.driver.run_study", run_study)
    monkeypatch.setattr(cli, "_check_folder", lambda folder: None)
    for live in ([], ["--no-progress"]):
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert main(["run", str(file), "--storage", url, *live]) == 0
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err and "me:***@localhost" in said.out
    (line,) = [line for line in said.out.splitlines() if line.startswith("Next: ")]
    command, _, hint = line.removeprefix("Next: prunesearch ").partition("   (")
    assert hint == "*** is your password)"
    parsed = cli._parser().parse_args(shlex.split(command.replace("***", SECRET)))
    assert (parsed.storage, parsed.study, parsed.verb) == (url, "fake", cli._front)
