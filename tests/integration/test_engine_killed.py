"""An engine that is killed in the middle of a job: the job fails at once, and the next one works."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import grpc
import psutil
import pytest

from feature_store import datasets
from jobs import context as shell
from jobs import spark
from jobs.context import JobContext
from jobs.retries import Patience
from jobs.settings import EngineChoice, Settings
from jobs.spark import Engine, EngineLost, Server
from tests.synthetic import dataset

SPEC = dataset()
NOTICED_SECONDS = 15


@pytest.fixture
def settings(
    engine: str,
    settings_of: Callable[[str], Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Settings]:
    """Settings with an engine of their own, as that of other tests must live."""
    own = replace(settings_of(engine), home=tmp_path)
    monkeypatch.setattr(Settings, "from_env", classmethod(lambda cls, env=None: own))
    monkeypatch.setattr(datasets, "get", lambda name: SPEC)
    yield own
    spark.stop(own)


def run(job: Callable[[JobContext], None], monkeypatch: pytest.MonkeyPatch) -> int:
    module = ModuleType("jobs.ingest")
    module.run = job  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jobs.ingest", module)
    with pytest.raises(SystemExit) as ended:
        shell.main("ingest", ["--dataset", SPEC.name, "--ds", SPEC.first_day])
    return int(ended.value.code or 0)


def kill(settings: Settings) -> None:
    server = spark._read(settings)
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)


@pytest.mark.parametrize("engine", ["sail", "spark"], indirect=True)
def test_a_job_whose_engine_is_killed_in_a_write_fails_at_once_and_can_be_run_again(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out, killed = tmp_path / "out", list[float]()

    def kill_in_the_middle() -> None:
        for _ in range(600):  # half a minute at most
            if any(out.rglob("*.parquet*")):
                break
            time.sleep(0.05)
        kill(settings)
        killed.append(time.monotonic())

    def writes(context: JobContext) -> None:
        frame = context.spark.range(10**12).selectExpr("id", "id * 3 AS x")
        threading.Thread(target=kill_in_the_middle, daemon=True).start()
        frame.write.parquet(str(out))

    assert run(writes, monkeypatch) == 1
    assert time.monotonic() - killed[0] < NOTICED_SECONDS
    said = capsys.readouterr().err
    assert said.startswith(f"error: the engine ({settings.engine}, process ")
    assert said.count("\n") == 1 and "run the same command again" in said

    if settings.engine is EngineChoice.SPARK:
        return  # a second JVM shows nothing more
    counted: list[int] = []
    assert run(lambda context: counted.append(context.spark.range(5).count()), monkeypatch) == 0
    assert counted == [5]


@pytest.mark.parametrize("call", ["read", "analyse", "small"])
def test_whatever_the_client_was_doing_the_end_of_its_engine_ends_it(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: str,
) -> None:
    def job(context: JobContext) -> None:
        frame = context.spark.range(10**8)
        # closed here: the collector may close it while the client holds the lock that this takes
        with closing(frame.toLocalIterator()) as rows:
            next(rows)
            kill(settings)
            if call == "read":
                list(rows)
            elif call == "analyse":
                print(frame.selectExpr("id + 1").schema)
            else:
                frame.limit(1).collect()

    assert run(job, monkeypatch) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the engine (sail, process ") and said.count("\n") == 1


class Unavailable(grpc.RpcError):
    """What a client gets from an address at which nobody answers."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def trailing_metadata(self) -> None:
        return None

    def details(self) -> str:
        return "Connection refused"


def test_a_cluster_that_does_not_answer_is_asked_for_about_a_minute() -> None:
    policy = Patience(None)
    assert policy.can_retry(Unavailable())
    state = policy.to_state()
    waits_ms = []
    while (wait_ms := state.next_attempt()) is not None:
        waits_ms.append(wait_ms)
    assert 45_000 < sum(waits_ms) < 75_000
    assert waits_ms[0] < 1_000, "a short fault costs little"


def test_a_living_server_is_asked_again_and_a_dead_one_is_not() -> None:
    me = psutil.Process()
    alive = Server(engine=Engine.SAIL, url="sc://127.0.0.1:1", pid=me.pid, started=me.create_time())
    assert Patience(alive).can_retry(Unavailable())
    assert not Patience(alive).can_retry(ValueError("ours"))
    with pytest.raises(EngineLost, match="run the same command again"):
        Patience(replace(alive, started=0.0)).can_retry(Unavailable())
