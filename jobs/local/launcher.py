"""From a plan to runs: what is missing is started, watched, and told when it fails.

Airflow runs what follows from an asset. That a person wants a range of days, which of it is missing,
when all of it is done or cannot come any more, and what to print of it, it does not know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from feature_store.days import add_days
from jobs.local.client import ACTIVE, AirflowClient, AirflowError, DagRun
from jobs.local.plan import DONE, Pair, Plan
from jobs.local.progress import Progress
from jobs.local.services import AirflowServices
from jobs.text import headline

POLL_SECONDS = 2.0
STALLED_SECONDS = 120  # nothing active, nothing changed for so long: the rest will not come
RECENT = timedelta(seconds=15)
FULL_LOOK_SECONDS = 60


class Launcher:
    """Starts what a plan needs and waits for it.

    Args:
        report: where the figures of the report are, once there is one.
        since: of pairs that are built again, only runs made since then (ISO instant) count; "": all.
        stale: pairs whose runs that succeeded before this moment do not count.
        backwards: ingest the last day first.
    """

    def __init__(
        self,
        plan: Plan,
        client: AirflowClient,
        services: AirflowServices,
        since: str,
        *,
        report: Path,
        stale: Collection[Pair] = (),
        backwards: bool = False,
    ) -> None:
        self.plan = plan
        self.client = client
        self.services = services
        self.since = since
        self.report = report
        self.told_of: set[Pair] = set()  # reports
        self.stale = frozenset(stale)
        self.begun = instant()
        self.backwards = backwards
        self.runs: dict[Pair, DagRun] = {}
        self.done_before: set[Pair] = set()  # stale ones
        self.days: dict[tuple[str, str], str] = {}  # (DAG, run) -> day, of runs that count
        self.told: set[tuple[str, str | None]] = set()

    @property
    def states(self) -> dict[Pair, str]:
        """State of each pair's newest run."""
        return {pair: run.state for pair, run in self.runs.items()}

    def run(self) -> bool:
        """Whether every pair is done in the end. Failures are told when they are seen."""
        progress = Progress(self.plan)
        try:
            self.end_those_before()
            self.services.clear_up(self.client, self.plan.dag_ids)
            self.look()
            self.told_of = self._reports()
            done = sum(s == DONE for s in self.states.values())
            again = len({p for p in self.done_before if p in self.stale})
            if again:
                progress.say(
                    f"{again} of {len(self.plan.pairs)} were done from sources, or under a spec, that are "
                    "not those of now: they are done again"
                )
            if done:
                progress.say(f"{done} of {len(self.plan.pairs)} stages were done before")
            for pair in self.plan.failed(self.states):
                progress.say(f"{pair[1]}  {pair[0]}  failed before: its failed tasks run again")
                self.client.restart(self.runs[pair])
            if not self.plan.over(self.states) or self.plan.failed(self.states):
                self.services.start_scheduler(self.client, self.plan.dag_ids)
                self.begin()
                self.look()
                self.wait(progress)
            return self.summary(progress)
        finally:
            progress.close()

    def end_those_before(self) -> None:
        """End runs that were going on when all days began to be built again: they would hand on a day of
        before."""
        for run in self.client.runs(self.plan.dag_ids, states=ACTIVE):
            if run.day in self.plan.days and run.created < self.since:
                self.client.end(run)

    def begin(self) -> None:
        """Start what nothing else starts: backfills, pairs with all they wait for, and announcements."""
        states = self.states
        for first, last in _ranges(self.plan.by_clock(states)):
            dag_id = self.plan.stages[0].dag_id
            try:
                again = bool(self.since or self.stale)
                self.client.backfill(dag_id, first, last, again=again, backwards=self.backwards)
            except AirflowError as error:
                if error.status != 409:  # a backfill of a run before is still active
                    raise
                for day in self.plan.by_clock(states):
                    if first <= day <= last:
                        self.client.trigger(dag_id, day)
        for dag_id, day in self.plan.ready(states):
            self.client.trigger(dag_id, day)
        for asset, day in self.plan.announcements(states):
            self.client.post_event(asset, day)

    def look(self, ended_since: datetime | None = None) -> bool:
        """Read the runs (all, or those active or ended since then); whether anything changed."""
        if ended_since is None:
            found = self.client.runs(self.plan.dag_ids)
        else:
            found = self.client.runs(self.plan.dag_ids, states=ACTIVE)
            found += self.client.runs(self.plan.dag_ids, ended_since=ended_since)
        changed = False
        for run in found:
            pair = (run.dag_id, run.day)
            if run.day not in self.plan.days or run.created < self.since:
                continue
            self.days[run.dag_id, run.run_id] = run.day
            if pair in self.stale and run.state == DONE and (run.ended or "") < self.begun:
                self.done_before.add(pair)
                continue
            known = self.runs.get(pair)
            if (
                known is None
                or run.created > known.created
                or (run.run_id == known.run_id and run != known)
            ):
                changed = (
                    changed
                    or known is None
                    or run.state != known.state
                    or run.run_id != known.run_id
                )
                self.runs[pair] = run
        return changed

    def wait(self, progress: Progress) -> None:
        """Poll until every pair is done, failed or cannot come, or nothing happens any more."""
        last_change = last_full = time.monotonic()
        while True:
            self.services.check()
            now = time.monotonic()
            full = now - last_full > FULL_LOOK_SECONDS
            changed = self.look(None if full else datetime.now(UTC) - RECENT)
            last_full = now if full else last_full
            self._tasks(progress)
            states = self.states
            progress.pairs(states, {p: r.seconds for p, r in self.runs.items() if r.seconds})
            for pair in self.plan.failed(states):
                self._tell(progress, self.runs[pair])
            self._headlines(progress)
            if changed or any(s in ACTIVE for s in states.values()):
                last_change = now
            if self.plan.over(states) or now - last_change > STALLED_SECONDS:
                return
            time.sleep(POLL_SECONDS)

    def _tasks(self, progress: Progress) -> None:
        tasks = self.client.tasks(self.plan.dag_ids, states=("running", "up_for_retry"))
        tasks += self.client.tasks(self.plan.dag_ids, ended_since=datetime.now(UTC) - RECENT)
        for task in tasks:
            day = self.days.get((task.dag_id, task.run_id))
            if day is not None:
                progress.task(day, task)

    def _reports(self) -> set[Pair]:
        """The reports that are written."""
        last = self.plan.stages[-1].dag_id
        return {pair for pair, state in self.states.items() if pair[0] == last and state == DONE}

    def _headlines(self, progress: Progress) -> None:
        """Say what a report has found that was written since."""
        reports = self._reports()
        if reports - self.told_of and self.report.exists():
            for task in json.loads(self.report.read_text())["tasks"]:
                if headline(task):
                    progress.say(headline(task))
        self.told_of = reports

    def _tell(self, progress: Progress, run: DagRun) -> None:
        """Say once why a run failed, and where its log is."""
        if (run.run_id, run.ended) in self.told:
            return
        self.told.add((run.run_id, run.ended))
        for task in self.client.tasks([run.dag_id], states=("failed",)):
            if task.run_id == run.run_id:
                log = self.services.task_log(task)
                progress.say(
                    f"{run.day}  {run.dag_id}/{task.task_id} FAILED: {last_error(log)}\n          log: {log}"
                )

    def summary(self, progress: Progress) -> bool:
        """Say what is missing; whether nothing is."""
        states = self.states
        missing = [p for p in self.plan.pairs if states.get(p) != DONE]
        if not missing:
            return True
        blocked, failed = self.plan.blocked(states), self.plan.failed(states)
        lost = [p for p in missing if p not in blocked and p not in failed]

        def named(pairs: list[Pair]) -> str:
            shown = ", ".join(f"{dag_id} {day}" for dag_id, day in pairs[:8])
            return shown + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")

        if failed:
            progress.say(f"failed: {named(failed)}")
        if blocked:
            progress.say(
                f"could not come, as what they wait for failed: {named([p for p in missing if p in blocked])}"
            )
        if lost:
            progress.say(f"did not come although nothing failed: {named(lost)}")
        progress.say("mend the cause and give the same command again: it goes on from here")
        return False


def instant() -> str:
    """This moment as Airflow writes it, comparable as text."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def last_error(log: Path) -> str:
    """The message that a task's log (one JSON object a line) ends in."""
    found = "no message"
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return "there is no log"
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        text = str(record.get("event", ""))
        if text.startswith("error:"):
            found = text
        for detail in record.get("error_detail") or ():
            found = str(detail.get("exc_value") or found)
    return found


def _ranges(days: list[str]) -> Iterator[tuple[str, str]]:
    """Consecutive days as (first, last)."""
    start = previous = ""
    for day in days:
        if not previous or add_days(previous, 1) != day:
            if previous:
                yield start, previous
            start = day
        previous = day
    if previous:
        yield start, previous
