"""The one operator: a task is a command about one day, run as a process of its own.

Environment, read when a task starts:
    HEADWATER_WARM  socket of `headwater_warm.py`, whose forks have loaded the libraries of jobs; where
                    nothing listens there, a fresh interpreter loads them
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException, AirflowTaskTimeout
from headwater_warm import Forked, die_with_parent

from feature_store.days import parse_day
from feature_store.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
USER_ERROR = 2  # exit code of a job that met a HeadwaterError: running it again would not help
STOP_SECONDS = 15.0  # between asking a command to end and ending it


class Fresh:
    """A command in a process of its own; as `headwater_warm.Forked` is one in a fork."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=die_with_parent,
        )

    @property
    def stdout(self) -> Iterator[str]:
        """The lines that it prints, to its end."""
        assert self.process.stdout is not None
        return iter(self.process.stdout)

    def wait(self) -> int:
        """Its exit code, negative for a signal, once it has ended."""
        return self.process.wait()

    def end(self) -> None:
        """End it, and wait until it has ended."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:  # it hangs where no signal reaches Python
            self.process.kill()
            self.process.wait()


def start(command: Sequence[str], environment: Mapping[str, str]) -> Fresh | Forked:
    """Start a command: in a fork of the warm process that `HEADWATER_WARM` names, where one listens."""
    warm = environment.get("HEADWATER_WARM")
    if warm and Forked.can_run(command):
        with contextlib.suppress(OSError):
            return Forked(
                Path(warm), command, environment=environment, folder=ROOT, stop_seconds=STOP_SECONDS
            )
    return Fresh(command, environment=environment)


class JobFailed(RuntimeError):
    """The command failed in a way that may pass; Airflow tries it again."""


class JobOperator(BaseOperator):
    """Run a command for the day that the run's partition key names.

    Exit code 0 is success. 2 is an error that a person has to mend: the task fails at once with the
    command's last `error:` line. Anything else is tried again as the task's `retries` say.

    Args:
        command: program and arguments; each is a template.
        day: the day, a template; the default is the run's partition key.
    """

    template_fields: Sequence[str] = ("command", "day")
    ui_color = "#d7e8f7"

    def __init__(
        self,
        *,
        command: Sequence[str],
        day: str = "{{ dag_run.partition_key }}",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.command = list(command)
        self.day = day
        self._process: Fresh | Forked | None = None

    def execute(self, context: Any) -> None:
        """Run the command to its end, its output in the task's log.

        Raises:
            AirflowFailException: the run has no day as its partition key, or the command exited
                with `USER_ERROR`.
            JobFailed: the command failed otherwise, or took longer than the task may.
        """
        try:
            parse_day(self.day)
        except DataError as error:
            raise AirflowFailException(str(error)) from None
        last_error, tail = "", deque[str](maxlen=1)
        self._process = start(self.command, os.environ)
        try:
            for line in self._process.stdout:
                text = line.rstrip()
                if not text:
                    continue
                self.log.info("%s", text)
                tail.append(text)
                if text.startswith("error:"):
                    last_error = text
            code = self._process.wait()
        except ConnectionError as error:
            raise JobFailed(f"{error}; last output: {tail[-1] if tail else 'none'}") from None
        except AirflowTaskTimeout:
            self.on_kill()
            raise JobFailed(
                f"took longer than {self.execution_timeout} and was ended; last output: "
                f"{tail[-1] if tail else 'none'}; where it needs longer set HEADWATER_TASK_HOURS"
            ) from None
        if code == 0:
            return
        message = last_error or (tail[-1] if tail else "no output")
        if code == USER_ERROR:
            raise AirflowFailException(message)
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            raise JobFailed(f"killed by {name}{hint}; last output: {message}")
        raise JobFailed(f"exit code {code}; last output: {message}")

    def on_kill(self) -> None:
        """End the command when the task is ended."""
        if self._process is not None:
            self._process.end()


class Announce(BaseOperator):
    """Does nothing itself: its outlets say that everything before it is done."""

    ui_color = "#eeeeee"

    def execute(self, context: Any) -> None:
        """Succeed."""
