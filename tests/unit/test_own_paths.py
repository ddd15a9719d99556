"""A home of any name is reached by a link, and people read the name that they gave it."""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from feature_store import datasets
from feature_store.errors import HeadwaterError
from jobs import failures, report
from jobs.context import JobContext
from jobs.local import run as command
from jobs.local import ui
from jobs.local.plan import Plan
from jobs.local.progress import Progress
from jobs.paths import own
from jobs.settings import Settings
from jobs.training.checkpoints import Checkpoints

SPEC = datasets.get("simulated")
DAY = SPEC.first_day

Patch = pytest.MonkeyPatch


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    found = Settings.from_env({"HEADWATER_HOME": str(tmp_path / "a b é")})
    assert str(found.home).isascii()
    return found


def test_every_link_in_a_text_is_replaced_and_nothing_else(
    settings: Settings, tmp_path: Path
) -> None:
    text = f"see {settings.home}/lake, or '{settings.home}': /tmp/headwater-0/x, {tmp_path}"
    home = tmp_path / "a b é"
    assert own(text) == f"see {home}/lake, or '{home}': /tmp/headwater-0/x, {tmp_path}"
    gone = f"{settings.home.parent}/{'0' * 12}/lake"
    assert own(gone) == gone


def error(settings: Settings, monkeypatch: Patch) -> None:
    failures.report(HeadwaterError(f"{settings.lake_root}/x.parquet is gone"), settings)


def locked(settings: Settings, monkeypatch: Patch) -> None:
    failures.report(sqlite3.OperationalError("database is locked"), settings)


def progress(settings: Settings, monkeypatch: Patch) -> None:
    Progress(Plan(SPEC, (DAY,)), terminal=False).say(f"log: {settings.airflow_home}")


def checkpoint(settings: Settings, monkeypatch: Patch) -> None:
    day = settings.snapshot_dir(SPEC.name, "sum", DAY)
    day.mkdir(parents=True)
    (day / "progress.pt").write_bytes(b"garbage")
    Checkpoints(day.parent).load_progress(DAY, "")


def pages(settings: Settings, monkeypatch: Patch) -> None:
    print(ui.index(settings.home))


def written(settings: Settings, monkeypatch: Patch) -> None:
    monkeypatch.setattr(report, "assemble", lambda context: {})
    monkeypatch.setattr(report, "_log", lambda *_: None)
    monkeypatch.setattr(report, "html", lambda _: "")
    monkeypatch.setattr(report, "terminal", lambda _: ())
    report.run(JobContext(dataset=SPEC, ds=DAY, settings=settings))


def begun(settings: Settings, monkeypatch: Patch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("HEADWATER_HOME", str(settings.home))
    monkeypatch.setattr(command, "services_for", lambda *_, **__: SimpleNamespace(acquire=stop))
    days = {"first": DAY, "last": DAY}
    with pytest.raises(KeyboardInterrupt):
        command.run(argparse.Namespace(dataset=SPEC.name, **days, source=None, again=False))


@pytest.mark.parametrize("say", [error, locked, progress, checkpoint, pages, written, begun])
def test_what_is_said_names_the_home_as_it_was_given(
    say: Callable[[Settings, Patch], None],
    settings: Settings,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(settings, monkeypatch)
    said = "".join(capsys.readouterr())
    assert str(settings.home.resolve()) in said
    assert str(settings.home) not in said
    if say is locked:
        assert f"`fuser '{settings.home.resolve()}/mlflow/mlflow.db'`" in said
