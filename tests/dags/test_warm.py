"""Jobs in forks of a process that has loaded their libraries: to the operator they are as fresh ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

PLUGINS = Path(__file__).resolve().parents[2] / "dags" / "plugins"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are kept by Linux's rules")


@pytest.fixture
def warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A warm process that the operator finds; it has loaded `xml.dom` and nothing of use."""
    folder = tmp_path / ("a folder of a long name" * 5)
    folder.mkdir()
    path = folder / "warm.sock"
    program = [sys.executable, str(PLUGINS / "headwater_warm.py"), str(path), "xml.dom"]
    process = subprocess.Popen(program, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    monkeypatch.setenv("HEADWATER_WARM", str(path))
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes an operator of a module with that code."""
    import headwater_job

    monkeypatch.setattr(headwater_job, "ROOT", tmp_path)

    def make(code: str, *arguments: str) -> Any:
        (tmp_path / "a_job.py").write_text(code)
        command = [sys.executable, "-m", "a_job", *arguments]
        return headwater_job.JobOperator(task_id="job", command=command, day="2024-05-01")

    return make


STATE = """
import json, os, sys
def state():
    return {"argv": sys.argv[1:], "folder": os.getcwd(), "name": __name__, "loaded": "xml.dom" in sys.modules,
            "environment": {k: v for k, v in os.environ.items() if k != "LC_CTYPE"}}
with open("state.json", "w") as out:
    json.dump(state(), out)
"""


def test_a_job_sees_what_a_fresh_one_sees(
    warm: object, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THIS_TASK", "a b é")
    job(STATE, "one", "two words").execute({})
    forked = json.loads((tmp_path / "state.json").read_text())
    socket = os.environ["HEADWATER_WARM"]
    monkeypatch.setenv("HEADWATER_WARM", str(tmp_path / "nobody"))
    job(STATE, "one", "two words").execute({})
    fresh = json.loads((tmp_path / "state.json").read_text())
    assert (forked.pop("loaded"), fresh.pop("loaded")) == (True, False)
    assert forked["environment"].pop("HEADWATER_WARM") == socket
    for made in (forked, fresh):
        made["environment"].pop("HEADWATER_WARM", None)
        made["environment"].pop("PYTHONUNBUFFERED", None)
    assert forked == fresh and forked["name"] == "__main__"


def test_each_job_reads_the_code_as_it_is_then(warm: object, job: Any, tmp_path: Path) -> None:
    for word in ("first", "second"):
        job(f"open('word', 'w').write({word!r})").execute({})
        assert (tmp_path / "word").read_text() == word


def test_a_job_ends_as_a_program_does(warm: object, job: Any, tmp_path: Path) -> None:
    code = (
        "import atexit, threading, time\n"
        "atexit.register(lambda: open('ended', 'w').close())\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), open('waited', 'w').close())).start()\n"
    )
    job(code).execute({})
    assert (tmp_path / "ended").exists() and (tmp_path / "waited").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('boom')", "exit code 1; last output: ValueError: boom"),
        ("import sys; print('error: x'); sys.exit(7)", "exit code 7; last output: error: x"),
        ("import os; os.kill(os.getpid(), 9)", r"SIGKILL \(out of memory\?\)"),
        ("import os; print('no end', end='', flush=True); os.abort()", "SIGABRT; .*no end"),
    ],
)
def test_how_a_job_ends_is_how_the_task_does(
    warm: object, job: Any, code: str, message: str
) -> None:
    from airflow.sdk.exceptions import AirflowFailException
    from headwater_job import JobFailed

    with pytest.raises(JobFailed, match=message) as caught:
        job(code).execute({})
    assert not isinstance(caught.value, AirflowFailException)


def test_a_user_error_fails_at_once(warm: object, job: Any) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match=r"^error: mend this$"):
        job("import sys; print('error: mend this'); sys.exit(2)").execute({})


SLEEPS = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"


def gone(pid: int) -> bool:
    """Whether the process ends within ten seconds."""
    try:
        process = psutil.Process(pid)
        process.wait(10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_job_that_takes_too_long_is_ended(
    warm: object, job: Any, stubborn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import headwater_job
    from airflow.sdk.execution_time.timeout import timeout

    monkeypatch.setattr(headwater_job, "STOP_SECONDS", 0.1)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
    with pytest.raises(headwater_job.JobFailed, match="took longer than"), timeout(2):
        job(deaf + SLEEPS).execute({})
    assert gone(int((tmp_path / "pid").read_text()))


def started(tmp_path: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A task in a process of its own, and the process of its job."""
    (tmp_path / "a_job.py").write_text(SLEEPS)
    code = (
        f"import sys, headwater_job; from pathlib import Path; headwater_job.ROOT = Path({str(tmp_path)!r})\n"
        "headwater_job.JobOperator(task_id='job', command=[sys.executable, '-m', 'a_job'],"
        " day='2024-05-01').execute({})"
    )
    path = os.pathsep.join([str(PLUGINS), str(PLUGINS.parents[1])])
    task = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    pid, deadline = tmp_path / "pid", time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return task, int(pid.read_text())


def test_a_task_that_is_killed_takes_its_job_with_it(warm: object, tmp_path: Path) -> None:
    task, pid = started(tmp_path)
    task.kill()
    task.wait()
    assert gone(pid)


def test_a_job_outlives_the_warm_process_and_the_next_starts_afresh(
    warm: subprocess.Popen[bytes], job: Any, tmp_path: Path
) -> None:
    task, pid = started(tmp_path)
    keeper = psutil.Process(pid).parent()
    warm.kill()
    warm.wait()
    time.sleep(0.5)
    assert task.poll() is None and psutil.pid_exists(pid)
    assert keeper is not None
    keeper.kill()  # whoever waits for a job takes it along, and the task fails
    assert gone(pid) and task.wait(30) == 1
    job(STATE).execute({})
    assert not json.loads((tmp_path / "state.json").read_text())["loaded"]
