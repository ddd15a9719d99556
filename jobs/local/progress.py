"""What a person sees while the scheduler works: a table on a terminal, lines anywhere else.

Airflow shows runs on its pages; a terminal gets the log lines of its services.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime

from rich.console import Console
from rich.live import Live
from rich.table import Table

from jobs.local.client import TaskRun
from jobs.local.plan import DONE, FAILED, Pair, Plan
from jobs.paths import own

HEARTBEAT_SECONDS = 30
_FINAL = {DONE: "done", FAILED: "failed", "up_for_retry": "failed, will be tried again"}
_STYLE = {"done": "green", "failed": "bold red", "running": "yellow", "cannot come": "red"}


class Progress:
    """Shows tasks as they change, and once in a while what is running.

    Args:
        plan: rows and columns.
        terminal: draw a live table instead of printing lines; by default where there is a terminal.
    """

    def __init__(self, plan: Plan, *, terminal: bool | None = None) -> None:
        self._plan = plan
        self._terminal = sys.stdout.isatty() if terminal is None else terminal
        self._seen: dict[tuple[str, str, str], str] = {}
        self._running: dict[tuple[str, str, str], float] = {}
        self._states: dict[Pair, str] = {}
        self._seconds: dict[Pair, float] = {}
        self._said = time.monotonic()
        self._live: Live | None = None
        if self._terminal:
            self._live = Live(console=Console(), refresh_per_second=2, get_renderable=self._table)
            self._live.start()

    def close(self) -> None:
        """Leave the table as it is and stop drawing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line, with the time, and folders by the names that people gave them."""
        self._said = time.monotonic()
        line = f"{datetime.now():%H:%M:%S}  {own(text)}"
        if self._live is not None:
            self._live.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def task(self, day: str, task: TaskRun) -> None:
        """A task's state, as often as it is seen; only changes are shown."""
        key = (task.dag_id, day, task.task_id)
        state = "running" if task.state == "running" else _FINAL.get(task.state, "")
        if task.state == "running":
            self._running.setdefault(key, time.monotonic())
        else:
            self._running.pop(key, None)
        mark = f"{state}/{task.attempt}"
        if not state or self._seen.get(key) == mark:
            return
        self._seen[key] = mark
        if self._live is not None and state in ("running", "done"):
            return  # the table shows it
        seconds = f"{task.seconds:7.1f} s" if task.seconds and state != "running" else ""
        again = f"  (attempt {task.attempt})" if task.attempt > 1 else ""
        self.say(f"{day}  {self._name(task.dag_id, task.task_id):36}  {state:8}{seconds}{again}")

    def pairs(self, states: Mapping[Pair, str], seconds: Mapping[Pair, float]) -> None:
        """The newest states; prints what is running when there was nothing to say for a while."""
        self._states, self._seconds = dict(states), dict(seconds)
        if time.monotonic() - self._said >= HEARTBEAT_SECONDS and self._live is None:
            now = time.monotonic()
            running = ", ".join(
                f"{day} {self._name(dag_id, task)} for {now - since:.0f} s"
                for (dag_id, day, task), since in sorted(self._running.items(), key=lambda x: x[1])
            )
            done, tasks = self._done()
            self.say(f"running: {running or 'nothing'}; {done} of {tasks} tasks done")

    def _done(self) -> tuple[int, int]:
        """How many tasks are done, those of runs before too, and how many there are."""
        steps = {stage.dag_id: len(stage.steps) for stage in self._plan.stages}
        seen = Counter(key[:2] for key, mark in self._seen.items() if mark.startswith("done/"))
        done = sum(
            steps[pair[0]] if self._states.get(pair) == DONE else seen[pair]
            for pair in self._plan.pairs
        )
        return done, sum(steps[dag_id] for dag_id, _ in self._plan.pairs)

    def _name(self, dag_id: str, task_id: str) -> str:
        return f"{dag_id.removeprefix(self._plan.dataset.name + '_')}/{task_id}"

    def _table(self) -> Table:
        table = Table(
            title=f"{self._plan.dataset.name}{' (simulated)' if self._plan.dataset.simulated else ''}"
        )
        table.add_column("day")
        for stage in self._plan.stages:
            table.add_column(stage.name)
        blocked = self._plan.blocked(self._states)
        for day in self._plan.days:
            cells = []
            for stage in self._plan.stages:
                pair = (stage.dag_id, day)
                state = "cannot come" if pair in blocked else self._states.get(pair, "")
                state = {DONE: "done", "queued": "", FAILED: "failed"}.get(state, state)
                text = (
                    f"{state} {self._seconds[pair]:.0f} s"
                    if state == "done" and pair in self._seconds
                    else state
                )
                if state == "running":
                    steps = [t for d, on, t in self._running if (d, on) == pair]
                    text = ", ".join(steps) or "running"
                style = _STYLE.get(state)
                cells.append(f"[{style}]{text}[/{style}]" if style else text)
            table.add_row(day, *cells)
        return table
