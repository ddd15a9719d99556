"""What `make run` refuses before it starts anything: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.local import run as command
from jobs.settings import REPOSITORY

GLOBO = ["--dataset", "globo", "--last", "2017-10-03"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dataset", "shop"], "dataset is 'shop': known are globo, simulated"),
        (["--dataset", "globo", "--source", "."], "TO is missing"),
        (["--dataset", "simulated", "--first", "2024-13-01"], "day is '2024-13-01', expected YYYY-MM-DD"),
        (["--dataset", "simulated", "--first", "2020-01-01"], "FROM is 2020-01-01"),
        (["--dataset", "simulated", "--first", "2024-03-02", "--last", "2024-03-01"], "TO is 2024-03-01"),
        (GLOBO, "SOURCE is missing"),
        ([*GLOBO, "--source", "/no/such/folder"], "SOURCE is '/no/such/folder': there is no such folder"),
        ([*GLOBO, "--source", __file__], "there is no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_in_one_sentence(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HEADWATER_HOME", str(home))
    monkeypatch.setattr(sys, "argv", ["jobs.local.run", *arguments])
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert says in said.err
    assert said.out == ""
    assert not home.exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_make_hands_a_source_on_whatever_its_name_holds(how: str) -> None:
    source = '/logs/it\'s "here" é#%41[1]*;&'
    given = [f"SOURCE={source}"] if how == "argument" else []
    done = subprocess.run(
        ["make", "--silent", "--assume-old=install", "run", "PY=printf '<%s>'", *given],
        cwd=REPOSITORY,
        env={**os.environ, "SOURCE": source if how == "environment" else ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"<--source><{source}>" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_a_checkout_that_mlflow_cannot_run_from_is_refused_before_anything_is_installed(
    tmp_path: Path,
) -> None:
    checkout = tmp_path / "100% sure"
    checkout.mkdir()
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(REPOSITORY / name, checkout)
    command = ["make", "install", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "the checkout's path holds '%'" in done.stdout
    assert not (checkout / ".venv").exists()
