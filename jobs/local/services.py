"""Airflow's services on this machine: api-server, scheduler and DAG processor, on loopback only.

SQLite, tasks as local processes, and everything that they write in one folder. `airflow standalone`
starts them too, but on every interface, with a login and a triggerer that nothing here uses, and it
does not end what a killed run left behind. Here whoever comes next ends that: processes are found by
a mark in their environment that names the folder, so that neither another checkout's nor a person's
own are touched.
"""

from __future__ import annotations

import contextlib
import errno
import json
import operator
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO

import psutil
from filelock import FileLock, Timeout
from tenacity import RetryError, Retrying, retry_if_result, stop_after_delay, wait_fixed

from feature_store.errors import HeadwaterError
from jobs import failures
from jobs.local.client import ACTIVE, AirflowClient, TaskRun
from jobs.paths import own
from jobs.settings import REPOSITORY

START_SECONDS = 180
STOP_SECONDS = 15
_MARK = "HEADWATER_SERVICES_OF"  # in the environment of every process that is started here
_WEB_PORT = 8080  # taken where it is free, so that the address is the usual one


class ServiceError(HeadwaterError):
    """Airflow does not run here; the message says where to look."""


@dataclass(kw_only=True)
class AirflowServices:
    """Airflow in a folder of its own.

    Args:
        home: folder of the database, logs and state.
        dags: folder of DAG files.
        plugins: folder of plugins.
        environment: what tasks see besides the process's own environment.
        parallelism: tasks at once.
        keep_waits: what waits for a second input since a launch before goes on waiting; who does not announce
            again what is done has to leave it so.
    """

    home: Path
    dags: Path = REPOSITORY / "dags"
    plugins: Path = REPOSITORY / "dags" / "plugins"
    environment: Mapping[str, str] = field(default_factory=dict)
    parallelism: int = 4
    keep_waits: bool = False
    port: int = 0
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _lock: FileLock | None = None
    _held: socket.socket | None = None
    _env: dict[str, str] = field(default_factory=dict)
    _started: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def url(self) -> str:
        """Address of the user interface and the API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def logs(self) -> Path:
        """Folder of task logs."""
        return self.home / "logs"

    def task_log(self, task: TaskRun) -> Path:
        """Where the log of a task's newest attempt is."""
        run = f"dag_id={task.dag_id}/run_id={task.run_id}/task_id={task.task_id}"
        return self.logs / run / f"attempt={task.attempt}.log"

    def acquire(self) -> None:
        """Take the folder for this process and end what a dead run left in it.

        Raises:
            ServiceError: another run uses it.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.home / "run.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            self._lock = None
            holder = read_state(self.home).get("pid", "unknown")
            raise ServiceError(
                f"HEADWATER_HOME is {self.home.parent}: process {holder} is using its Airflow; wait for it, "
                "stop it, or set HEADWATER_HOME to another folder"
            ) from None
        end_processes(self.home)
        self._write_state(url="")

    def migrate(self) -> None:
        """Create or upgrade the database; nothing to do for the version that last did.

        Raises:
            ServiceError: the migration failed.
        """
        self._env = self._environment()
        marker = self.home / "database-version"
        current = version("apache-airflow-core")
        if self._database.exists() and marker.exists() and marker.read_text() == current:
            return
        with self._log("migrate") as out:
            code = subprocess.run(
                [sys.executable, "-m", "airflow", "db", "migrate"],
                env=self._env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False,
            ).returncode  # fmt: skip
        if code:
            self._check_ground("migrate")
            raise ServiceError(
                f"airflow db migrate exited with {code}: see {self._log_path('migrate')}"
            )
        marker.write_text(current)

    def start_api(self) -> AirflowClient:
        """Start the api-server and the DAG processor; a client once the first answers.

        Raises:
            ServiceError: one of them ended, or did not answer in time.
        """
        self._started = datetime.now(UTC)
        self._spawn("api-server", "api-server")
        self._spawn("dag-processor", "dag-processor")
        client = AirflowClient(self.url, self._explain_silence)
        self._until(client.healthy, "the api-server does not answer", "api-server")
        client.warm_up_execution()  # tasks that meet it cold fail without having run
        self._write_state(url=self.url)
        return client

    def wait_parsed(self, client: AirflowClient, dag_ids: Iterable[str]) -> None:
        """Wait until every one of `dag_ids` is parsed and unpaused, as others lose events for ever.

        Raises:
            ServiceError: a DAG file does not import, or the time is up.
        """
        wanted = set(dag_ids)
        for dag_id in wanted - client.parsed(wanted, datetime.fromtimestamp(0, UTC)):
            with contextlib.suppress(Exception):  # not there yet: it will be created unpaused
                client.unpause(dag_id)

        def ready() -> bool:
            errors = client.import_errors(self._started)
            if errors:
                raise ServiceError("a DAG file does not import: " + "; ".join(errors))
            return client.parsed(wanted, self._started) == wanted

        self._until(ready, f"DAGs {', '.join(sorted(wanted))} are not parsed", "dag-processor")

    def clear_up(self, client: AirflowClient, dag_ids: Iterable[str]) -> None:
        """Clear up what a dead scheduler left in runs of `dag_ids`; nothing to do where one runs.

        An interrupted task is cleared: it runs again at once and no retry is used up. (To notice by
        itself the scheduler would need a short timeout, and then take a busy machine for a dead one.)
        """
        if "scheduler" not in self._processes:
            for run in client.runs(list(dag_ids), states=ACTIVE):
                client.clear_interrupted(run)

    def start_scheduler(self, client: AirflowClient, dag_ids: Iterable[str]) -> None:
        """Start what starts tasks, after `clear_up`; nothing to do where it runs.

        What waited for its second input under another launch is dropped by the scheduler itself, see
        `DayMapper`; who starts runs waits for that, and announces again what is done.

        Raises:
            ServiceError: it ended, or did not drop them in time.
        """
        if "scheduler" in self._processes:
            return
        ids = list(dag_ids)
        # It would serve task logs on every interface; the api-server reads them from the folder.
        self._spawn("scheduler", "scheduler", "--skip-serve-logs")
        if self.keep_waits:
            return
        self._until(
            lambda: not client.waits(ids, until=self._started),
            "what waited under another launch is not dropped",
            "scheduler",
        )

    def start_warm(self) -> None:
        """Start what jobs are forked from; where it ends, or is none, they start afresh."""
        if sys.platform == "linux":
            program = str(self.plugins / "headwater_warm.py")
            self._popen("warm", program, self._env["HEADWATER_WARM"])

    def check(self) -> None:
        """Raise ServiceError if a service has ended."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is not None:
                self._check_ground(name)
                raise ServiceError(
                    f"airflow {name} ended with {code}: see {self._log_path(name)}; start again to go on"
                )

    def stop(self) -> None:
        """End the services and their tasks at once.

        A task that is told to end reports itself failed; one that vanishes is started again by the
        next scheduler without using up a retry. The database is made for that.
        """
        if self._lock is None:
            return
        for process in self._processes.values():
            process.kill()
            process.wait()
        end_processes(self.home)
        self._processes.clear()
        (self.home / "services.json").unlink(missing_ok=True)
        shutil.rmtree(self.home / "tmp", ignore_errors=True)
        if self._held is not None:
            self._held.close()
            self._held = None
        self._lock.release()
        self._lock = None

    @property
    def _database(self) -> Path:
        return self.home / "airflow.db"

    def _environment(self) -> dict[str, str]:
        self._held = self._held or held_port(_WEB_PORT)
        self.port = self._held.getsockname()[1]
        scratch = self.home / "tmp"
        scratch.mkdir(exist_ok=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("AIRFLOW")}
        settings = {
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__DAGS_FOLDER": str(self.dags),
            "CORE__PLUGINS_FOLDER": str(self.plugins),
            "CORE__PARALLELISM": str(self.parallelism),
            "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "0",  # DAGs are of this launch from their first parse
            "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",  # REST without a token: loopback only
            "CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{self._database}",
            "API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "API__SECRET_KEY": secrets.token_hex(32),
            "API__HOST": "127.0.0.1",
            "API__PORT": str(self.port),
            "API__BASE_URL": self.url,
            "API__WORKERS": "1",
            "LOGGING__BASE_LOG_FOLDER": str(self.logs),
            "LOGGING__DAG_PROCESSOR_CHILD_PROCESS_LOG_DIRECTORY": str(self.logs / "dag_processor"),
            "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "30",
            "DAG_PROCESSOR__REFRESH_INTERVAL": "30",
            "DAG_PROCESSOR__PARSING_PROCESSES": "1",
            "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
            # A busy machine is not a dead scheduler: it would start its running tasks a second time.
            "SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "300",
            # Also how long a worker may take to see that its task has ended.
            "WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
            "USAGE_DATA_COLLECTION__ENABLED": "False",
        }
        path = os.pathsep.join(p for p in (str(REPOSITORY), os.environ.get("PYTHONPATH")) if p)
        return {
            **inherited,
            **{f"AIRFLOW__{k}": v for k, v in settings.items()},
            "AIRFLOW_HOME": str(self.home),
            _MARK: str(self.home),
            "SPT_NOENV": "1",  # a process that sets its title would overwrite its environment, and the mark
            "PYTHONPATH": path,
            "TMPDIR": str(scratch),
            "HEADWATER_LAUNCH": self._launch(),
            "HEADWATER_WARM": str(self.home / "warm.sock"),
            **self.environment,
        }

    def _launch(self) -> str:
        path = self.home / "launch"
        if not (self.keep_waits and path.exists()):
            path.write_text(secrets.token_hex(8))
        return path.read_text()

    def _spawn(self, name: str, *arguments: str) -> None:
        self._processes[name] = self._popen(name, "-m", "airflow", *arguments)

    def _popen(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self._log(name) as out:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env=self._env, cwd=self.home, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,  # Ctrl-C is for the launcher, which ends them in order
            )  # fmt: skip

    def _until(self, ready: Callable[[], bool], problem: str, name: str) -> None:
        def ended_or_ready() -> bool:
            self.check()
            return ready()

        waiting = Retrying(
            retry=retry_if_result(operator.not_),
            wait=wait_fixed(0.5),
            stop=stop_after_delay(START_SECONDS),
        )
        try:
            waiting(ended_or_ready)
        except RetryError:
            raise ServiceError(
                f"{problem} after {START_SECONDS} s: see {self._log_path(name)}"
            ) from None

    def _explain_silence(self) -> None:
        self.check()  # a service that ended says why
        self._check_ground("api-server")

    def _check_ground(self, name: str) -> None:
        """Raise what lies under the end or the silence of a service, as far as its log shows it.

        Raises:
            OSError: the disk is full.
            ServiceError: the database is locked or damaged.
        """
        said = ""
        with contextlib.suppress(OSError):  # a full disk may have left no log
            said = self._log_path(name).read_text(errors="replace")[-200_000:]
        if failures.is_full(self.home) or failures.FULL_DISK.search(said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.home))
        if failures.DAMAGED_SQLITE.search(said):
            raise ServiceError(
                f"Airflow's database {self._database} is damaged: move it away and run the same "
                "command again; what is built is kept, days that were done are built once more"
            )
        if "database is locked" in said:
            raise ServiceError(
                f"Airflow's database {self._database} is locked: end what holds it (`fuser "
                f"{shlex.quote(own(str(self._database)))}` names it) and run the same command again"
            )

    def _log_path(self, name: str) -> Path:
        return self.home / "services" / f"{name}.log"

    def _log(self, name: str) -> IO[bytes]:
        path = self._log_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")

    def _write_state(self, url: str) -> None:
        state = {"pid": os.getpid(), "url": url}
        (self.home / "services.json").write_text(json.dumps(state))


def read_state(home: Path) -> dict[str, object]:
    """Who runs the services in `home` and where: `pid` and `url`; empty where nobody does."""
    try:
        return dict(json.loads((home / "services.json").read_text()))
    except (OSError, ValueError):
        return {}


def end_processes(home: Path) -> None:
    """Kill what was started for the Airflow in `home`: services, workers and jobs."""
    ours = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_MARK) == str(home):
                ours.append(process)
    for process in ours:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(ours, timeout=STOP_SECONDS)


def free_port(wanted: int = 0) -> int:
    """`wanted` where it is free, otherwise any port that is."""
    with held_port(wanted) as held:
        return int(held.getsockname()[1])


def held_port(wanted: int = 0) -> socket.socket:
    """A socket that keeps a port for a server that is still to start: `wanted` where it is free,
    otherwise any port that is.

    It is bound and never listens, so a server that reuses addresses, as asyncio's do, can listen there,
    and nobody else finds the port free. A run that took another's for its own would talk to it.
    """
    for port in (wanted, 0):
        held = socket.socket()
        try:
            held.bind(("127.0.0.1", port))
        except OSError:
            held.close()
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return held
    raise ServiceError("there is no free port on 127.0.0.1")
