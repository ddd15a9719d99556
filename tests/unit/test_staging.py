"""A partition's lock: who waits says for whom, and nobody waits for the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from feature_store import staging
from feature_store.staging import Staging

REPOSITORY = Path(__file__).resolve().parents[2]
DAY = {"ds": "2024-05-01"}
# A writer with a child of each kind: started, as engines are, and forked.
_HOLDER = """
    import os, subprocess, sys
    import pyarrow.fs as pafs
    from feature_store.staging import Staging
    staging = Staging(filesystem=pafs.LocalFileSystem(), base={base!r}, remote=False)
    with staging.open("events", {day!r}) as folder:
        os.mkdir(folder)
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        forked = os.fork()
        if not forked:
            os.execvp("sleep", ["sleep", "600"])
        print(child.pid, forked, flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def area(tmp_path: Path) -> Staging:
    return Staging(filesystem=pafs.LocalFileSystem(), base=str(tmp_path), remote=False)


def test_a_killed_holders_lock_is_taken_though_its_children_live(area: Staging) -> None:
    script = textwrap.dedent(_HOLDER.format(base=area.base, day=DAY))
    holder = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    children = [int(pid) for pid in holder.stdout.readline().split()]
    try:
        home = Path(area.base, "_staging", "events", "ds=2024-05-01")
        assert json.loads((home / ".holder").read_text())["pid"] == holder.pid
        holder.kill()
        holder.wait()
        with area.open("events", DAY) as folder:
            assert json.loads((home / ".holder").read_text())["pid"] == os.getpid()
            assert not Path(folder).exists()
            assert {p.name for p in home.iterdir()} == {".lock", ".holder"}, "its folder is gone"
        assert {p.name for p in home.iterdir()} == {".lock"}
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_who_waits_says_for_whom_and_for_how_long(
    area: Staging, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(staging, "_FIRST_NOTICE_SECONDS", 0)
    monkeypatch.setattr(staging, "_NEXT_NOTICE_SECONDS", 0.01)
    held, told = threading.Event(), threading.Event()
    says: list[str] = []

    def told_print(text: str, **_: object) -> None:
        says.append(text)
        told.set()

    monkeypatch.setattr(staging, "print", told_print, raising=False)

    def hold() -> None:
        with area.open("events", DAY):
            held.set()
            told.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    with area.open("events", DAY):
        assert told.is_set()
    thread.join()
    assert says[0].startswith(f"waiting for events/ds=2024-05-01: process {os.getpid()} on ")
    assert "has it for 0.0 min (python " in says[0]


@pytest.mark.parametrize("note", ["", "{", "[]", '{"pid": 1}', None])
def test_a_holder_without_a_note_is_another_process(note: str | None, tmp_path: Path) -> None:
    path = tmp_path / ".holder"
    if note is not None:
        path.write_text(note)
    assert staging._holder(path) == "another process has it"
