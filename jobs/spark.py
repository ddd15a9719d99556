"""The engine: one Spark Connect session, whatever answers it. No line outside this file knows which.

1. `SPARK_REMOTE` set: that cluster.
2. Java 17+ and the Delta JARs here: a local Apache Spark Connect server.
3. Otherwise: Sail, which speaks the same protocol and needs no JVM.

`HEADWATER_ENGINE=spark|sail` chooses between the last two. A local server is started by the first
task that finds none, in a process of its own, and shared by all tasks through `server.json` in its
scratch folder; one that died is replaced. It runs until `stop`:

    python -m jobs.spark start|stop|status|jars
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock

from feature_store.errors import HeadwaterError, TransientError
from jobs import failures, jvm
from jobs.settings import EngineChoice, Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

START_SECONDS = 300  # a cold JVM on a busy laptop takes 10 to 40
_ATTEMPTS = 3  # a free port may be taken between choosing and binding it


class EngineError(HeadwaterError):
    """The engine that was asked for cannot run here."""


class EngineLost(TransientError):
    """The local server ended while it was used, or did not start."""


class Engine(StrEnum):
    """What answers a session."""

    REMOTE = "remote"
    SPARK = "spark"
    SAIL = "sail"


@dataclass(frozen=True, kw_only=True)
class Server:
    """A local server, as `server.json` holds it. `started` tells its pid from a reused one."""

    engine: Engine
    url: str
    pid: int
    started: float

    def ended(self) -> bool:
        """Whether its process is gone; also while nobody has asked for its exit code."""
        try:
            process = psutil.Process(self.pid)
            again = abs(process.create_time() - self.started) > 1
            return again or process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return True

    def alive(self) -> bool:
        """Whether its process runs and its port answers."""
        return not self.ended() and _answers(int(self.url.rsplit(":", 1)[1]))


def choose(settings: Settings) -> Engine:
    """Which engine these settings lead to here.

    Raises:
        EngineError: `HEADWATER_ENGINE=spark` without Java 17+ or without the Delta JARs.
    """
    if settings.spark_remote:
        return Engine.REMOTE
    if settings.engine is EngineChoice.SAIL:
        return Engine.SAIL
    problem = _spark_problem(settings)
    if settings.engine is EngineChoice.SPARK and problem:
        raise EngineError(f"HEADWATER_ENGINE is 'spark', but {problem}; or choose auto or sail")
    return Engine.SAIL if problem else Engine.SPARK


def _spark_problem(settings: Settings) -> str:
    java = jvm.java_version()
    if java is None:
        return f"there is no Java on PATH or in JAVA_HOME: install {jvm.MIN_JAVA} or newer"
    if java < jvm.MIN_JAVA:
        return f"Java is {java}: Apache Spark needs {jvm.MIN_JAVA} or newer"
    if not jvm.delta_jars(settings.jars):
        return f"the Delta JARs are not in {settings.jars}: run `python -m jobs.spark jars` with a network"
    return ""


def engine_name(settings: Settings) -> str:
    """Short name with versions, for the ledger: `spark-4.1.4+delta-4.4.0`, `sail-0.7.2`, `remote`."""
    engine = choose(settings)
    if engine is Engine.REMOTE:
        return "remote"
    if engine is Engine.SPARK:
        return f"spark-{version('pyspark')}+delta-{version('delta-spark')}"
    return f"sail-{version('pysail')}"


def describe(settings: Settings) -> str:
    """The engine and why it is this one, for a run's first line."""
    engine = choose(settings)
    if engine is Engine.REMOTE:
        return f"Spark Connect at {settings.spark_remote} (SPARK_REMOTE)"
    if engine is Engine.SPARK:
        return (
            f"Apache Spark {version('pyspark')} with delta-spark {version('delta-spark')}, a local Connect server "
            f"(Java {jvm.java_version()})"
        )
    why = (
        "HEADWATER_ENGINE=sail"
        if settings.engine is EngineChoice.SAIL
        else _spark_problem(settings)
    )
    return f"Sail {version('pysail')}, a local Connect server ({why.split(':')[0]})"


def session(settings: Settings) -> SparkSession:
    """A new session of the engine: UTC, ANSI on. A local server is started where none lives.

    Raises:
        EngineError: the engine asked for cannot run here.
        EngineLost: the server did not start; the message holds the end of its log.
    """
    server = None if settings.spark_remote else start(settings)
    from pyspark.sql import SparkSession

    from jobs.retries import Patience  # noqa: PLC0415 it imports the engine's client

    spark = SparkSession.builder.remote(server.url if server else settings.spark_remote).create()
    spark.client.set_retry_policies([Patience(server)])
    spark.conf.set("spark.sql.session.timeZone", "UTC")
    spark.conf.set("spark.sql.ansi.enabled", "true")
    return spark


def start(settings: Settings) -> Server:
    """The live local server of these settings, started where there is none; safe to call at once by many."""
    engine = choose(settings)
    if engine is Engine.REMOTE:
        raise EngineError(
            f"SPARK_REMOTE is {settings.spark_remote}: a remote cluster is not ours to start"
        )
    settings.spark_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.spark_dir / "server.lock"):
        server = _read(settings)
        if server is not None and server.engine is engine and server.alive():
            return server
        if server is not None:
            _end(server)
        server = _launch(settings, engine)
        partial = _state(settings).with_suffix(".partial")
        partial.write_text(json.dumps(asdict(server)))
        partial.replace(_state(settings))
        return server


def stop(settings: Settings) -> bool:
    """End the local server; whether there was one."""
    if not _state(settings).exists():
        return False
    with FileLock(settings.spark_dir / "server.lock"):
        server = _read(settings)
        _state(settings).unlink(missing_ok=True)
        return server is not None and _end(server)


def status(settings: Settings) -> str:
    """One line: the engine, and whether a local server lives."""
    server = _read(settings)
    if server is None or settings.spark_remote:
        return describe(settings)
    state = "alive" if server.alive() else "dead"
    return f"{describe(settings)}: {state}, pid {server.pid}, {server.url}"


def _state(settings: Settings) -> Path:
    return settings.spark_dir / "server.json"


def _read(settings: Settings) -> Server | None:
    try:
        held = json.loads(_state(settings).read_text())
        return Server(**{**held, "engine": Engine(held["engine"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _launch(settings: Settings, engine: Engine) -> Server:
    log = settings.spark_dir / f"{engine}.log"
    for attempt in range(_ATTEMPTS):
        port = _free_port()
        if engine is Engine.SPARK:
            command, env = jvm.server_command(
                settings, port=port, cores=len(os.sched_getaffinity(0))
            )
        else:
            command, env = _sail_command(settings, port)
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=env, cwd=settings.spark_dir, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,  # it outlives the task that started it, and its Ctrl-C
            )  # fmt: skip
        try:
            if _wait(process, port):
                started = psutil.Process(process.pid).create_time()
                return Server(
                    engine=engine, url=f"sc://127.0.0.1:{port}", pid=process.pid, started=started
                )
        except BaseException:
            process.kill()
            raise
        if b"bind" not in log.read_bytes().lower() or attempt == _ATTEMPTS - 1:
            break
    tail = " / ".join(log.read_text(errors="replace").strip().splitlines()[-8:])
    raise EngineLost(
        f"the engine ({engine}) did not start: see {log}, which ends with: {tail or 'nothing'}"
    )


def _sail_command(settings: Settings, port: int) -> tuple[list[str], dict[str, str]]:
    env = jvm.java_env(settings.spark_dir / "tmp") | {"RUST_LOG": "warn", "TZ": "UTC"}
    command = [
        sys.executable,
        "-m",
        "pysail",
        "spark",
        "server",
        "--ip",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    return command, env


def _wait(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the server answers on `port` before it ends or the time is up."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _answers(port):
            return True
        time.sleep(0.1)
    if process.poll() is None:
        process.kill()
        process.wait()
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def _end(server: Server) -> bool:
    """End the server's process, gently first; whether it was there."""
    if server.ended():
        return False
    try:
        process = psutil.Process(server.pid)
        process.terminate()
        try:
            process.wait(timeout=20)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(timeout=20)
        return True
    except psutil.Error:
        return False


def main() -> None:
    """`python -m jobs.spark start|stop|status|jars`."""
    cli = argparse.ArgumentParser(prog="python -m jobs.spark", description="The local engine.")
    cli.add_argument("action", choices=("start", "stop", "status", "jars"))
    action = cli.parse_args().action
    settings = None
    try:
        settings = Settings.from_env()
        if action == "start":
            settings.make_folders()
            print(f"engine: {describe(settings)}")
            print(start(settings).url)
        elif action == "stop":
            print("stopped" if stop(settings) else "no server was running")
        elif action == "status":
            print(status(settings))
        else:
            begun = time.monotonic()
            print(jvm.resolve_jars(settings.jars), f"{time.monotonic() - begun:.0f} s", sep=", ")
    except Exception as error:
        sys.exit(failures.report(error, settings))


if __name__ == "__main__":
    main()
