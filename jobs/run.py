"""`make run`: Airflow's scheduler takes a dataset through a range of days, and a report ends it.

    python -m jobs.run [--dataset D] [--first DAY] [--last DAY] [--source DIR] [--again]

Starts the engine and Airflow (SQLite, local processes, loopback), backfills the ingest DAG, lets the
asset-driven DAGs follow, and stops everything at the end. Stopped at any point, even by a kill, the
same command goes on where it was: days that are done stay done, failed tasks run again. `--again`
builds the days again although they are done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from feature_store import datasets
from feature_store.days import parse_day
from feature_store.errors import DataError, HeadwaterError
from feature_store.spec import Dataset
from jobs.airflow_client import ACTIVE, AirflowClient, AirflowError, DagRun
from jobs.airflow_services import AirflowServices
from jobs.progress import Progress
from jobs.run_plan import Pair, Plan, check_history, choose_days
from jobs.settings import REPOSITORY, Settings

DEVICES_POOL = "devices"
POLL_SECONDS = 2.0
STALLED_SECONDS = 120  # nothing active and nothing changed for so long: what is missing will not come
RECENT = timedelta(seconds=15)
FULL_LOOK_SECONDS = 60
DEFAULT_DATASET = "simulated"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(prog="python -m jobs.run", description="Build days of a dataset, to the report.")
    cli.add_argument("--dataset", default=DEFAULT_DATASET, help="a file of feature_store/datasets/ (%(default)s)")
    cli.add_argument("--first", metavar="DAY", help="first day (default: where the data begin)")
    cli.add_argument("--last", metavar="DAY", help="last day (simulated data: ten days by default)")
    cli.add_argument("--source", type=Path, help="folder of the raw logs (default: HEADWATER_SOURCE)")
    cli.add_argument("--again", action="store_true", help="build the days again although they are done")
    return cli


def main() -> None:
    """Run, and exit with 0 when every day is done, 2 for a user's error, 1 for days that failed."""
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        sys.exit(run(args))
    except HeadwaterError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def run(args: argparse.Namespace) -> int:
    """Build the days that `args` name; the exit code.

    Raises:
        HeadwaterError: the arguments, the source or the history do not allow it.
    """
    settings = Settings.from_env()
    dataset = datasets.get(args.dataset)
    for day in (args.first, args.last):
        if day:
            parse_day(day)
    days = choose_days(dataset, args.first or None, args.last or None)
    source = args.source.expanduser().resolve() if args.source else settings.source
    if source is not None and not source.is_dir():
        raise DataError(f"SOURCE is {str(source)!r}: there is no such folder; name the folder of the raw logs")
    if source is None and not dataset.simulated:
        raise DataError(f"SOURCE is missing: name the folder of {dataset.name}'s raw logs, as in SOURCE=/data/logs")
    check_history(dataset, days[0], _built(settings, dataset))

    from jobs import spark

    print(f"engine: {spark.describe(settings)}", flush=True)
    print(
        f"{dataset.name}{' (simulated data)' if dataset.simulated else ''}: {days[0]} to {days[-1]}, "
        f"{len(days)} days, into {settings.home}",
        flush=True,
    )
    plan = Plan(dataset, tuple(days))
    services = services_for(settings, dataset, source)
    services.acquire()
    started = time.monotonic()
    ok = False
    try:
        if not settings.spark_remote:
            spark.start(settings)
        services.migrate()
        services.settle(plan.dag_ids)
        client = services.start_api()
        client.set_pool(DEVICES_POOL, device_slots(), "one slot per device: training and inference tasks")
        services.wait_parsed(client, plan.dag_ids)
        print(f"Airflow: {services.url} (ready after {time.monotonic() - started:.0f} s)", flush=True)
        since = _again_since(settings, plan, again=args.again)
        ok = Launcher(plan, client, services, since).run()
        if ok:
            _again_file(settings, dataset).unlink(missing_ok=True)
    finally:
        with _undisturbed():
            services.stop()
            if not settings.spark_remote and not ok:
                spark.stop(settings)
    print(f"{len(days)} days in {time.monotonic() - started:.0f} s", flush=True)
    code = 1
    if ok:
        command = [sys.executable, "-m", "jobs", "report", "--dataset", dataset.name, "--ds", days[-1]]
        code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    if not settings.spark_remote:
        spark.stop(settings)
    return code


class Launcher:
    """Starts what a plan needs and waits for it.

    Args:
        since: of pairs that are built again, only runs made since then (ISO instant) count; "": all.
    """

    def __init__(self, plan: Plan, client: AirflowClient, services: AirflowServices, since: str) -> None:
        self.plan = plan
        self.client = client
        self.services = services
        self.since = since
        self.runs: dict[Pair, DagRun] = {}
        self.days: dict[tuple[str, str], str] = {}  # (DAG, run) -> day
        self.told: set[tuple[str, str | None]] = set()

    @property
    def states(self) -> dict[Pair, str]:
        """State of each pair's newest run."""
        return {pair: run.state for pair, run in self.runs.items()}

    def run(self) -> bool:
        """Whether every pair is done in the end. Failures are told when they are seen."""
        progress = Progress(self.plan)
        try:
            self.look()
            done = sum(s == "success" for s in self.states.values())
            if done:
                progress.say(f"{done} of {len(self.plan.pairs)} were done before")
            for pair in self.plan.failed(self.states):
                progress.say(f"{pair[1]}  {pair[0]}  failed before: its failed tasks run again")
                self.client.restart(self.runs[pair])
            if not self.plan.over(self.states) or self.plan.failed(self.states):
                self.begin()
                self.services.start_scheduler()
                self.look()
                self.wait(progress)
            return self.summary(progress)
        finally:
            progress.close()

    def begin(self) -> None:
        """Start what nothing else starts: backfills, pairs with all they wait for, and announcements."""
        states = self.states
        for first, last in _ranges(self.plan.by_clock(states)):
            dag_id = self.plan.stages[0].dag_id
            try:
                self.client.backfill(dag_id, first, last, again=bool(self.since))
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
            self.days[run.dag_id, run.run_id] = run.day
            pair = (run.dag_id, run.day)
            if run.day not in self.plan.days or run.created < self.since:
                continue
            known = self.runs.get(pair)
            if known is None or run.created > known.created or (run.run_id == known.run_id and run != known):
                changed = changed or known is None or run.state != known.state or run.run_id != known.run_id
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
            if day in self.plan.days:
                progress.task(day, task)

    def _tell(self, progress: Progress, run: DagRun) -> None:
        """Say once why a run failed, and where its log is."""
        if (run.run_id, run.ended) in self.told:
            return
        self.told.add((run.run_id, run.ended))
        for task in self.client.tasks([run.dag_id], states=("failed",)):
            if task.run_id == run.run_id:
                log = self.services.task_log(task)
                progress.say(f"{run.day}  {run.dag_id}/{task.task_id} FAILED: {last_error(log)}\n          log: {log}")

    def summary(self, progress: Progress) -> bool:
        """Say what is missing; whether nothing is."""
        states = self.states
        missing = [p for p in self.plan.pairs if states.get(p) != "success"]
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
            progress.say(f"could not come, as what they wait for failed: {named([p for p in missing if p in blocked])}")
        if lost:
            progress.say(f"did not come although nothing failed: {named(lost)}")
        progress.say("mend the cause and give the same command again: it goes on from here")
        return False


def services_for(settings: Settings, dataset: Dataset | None, source: Path | None) -> AirflowServices:
    """Airflow's services for one dataset's DAGs (None: every dataset's), with what tasks need to know."""
    environment = {"HEADWATER_HOME": str(settings.home), "HEADWATER_SCHEDULED": "0"}
    environment["HEADWATER_DATASETS"] = dataset.name if dataset else ""
    if source is not None:
        environment["HEADWATER_SOURCE"] = str(source)
    cores = os.cpu_count() or 2
    return AirflowServices(
        home=settings.airflow_home, environment=environment, parallelism=max(2, min(8, cores))
    )


def device_slots() -> int:
    """GPUs that are there; without any, the machine itself is one device."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return 1
    return max(1, sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))


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


def _built(settings: Settings, dataset: Dataset) -> set[str]:
    from feature_store.lake import Lake

    return set(Lake(settings.lake_root, dataset).partitions("sequences"))


def _again_file(settings: Settings, dataset: Dataset) -> Path:
    return settings.airflow_home / f"again-{dataset.name}.json"


def _again_since(settings: Settings, plan: Plan, *, again: bool) -> str:
    """From when on runs count: a run with --again that was stopped goes on by the same command."""
    path = _again_file(settings, plan.dataset)
    wanted = {"first": plan.days[0], "last": plan.days[-1]}
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        held = {}
    if {k: held.get(k) for k in wanted} == wanted:
        return str(held["since"])
    if not again:
        return ""
    since = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    path.write_text(json.dumps(wanted | {"since": since}))
    return since


def _ranges(days: list[str]) -> Iterator[tuple[str, str]]:
    """Consecutive days as (first, last)."""
    from feature_store.days import shift

    start = previous = ""
    for day in days:
        if not previous or shift(previous, 1) != day:
            if previous:
                yield start, previous
            start = day
        previous = day
    if previous:
        yield start, previous


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not interrupt the clearing up."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
