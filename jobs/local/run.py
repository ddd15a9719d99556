"""`make run`: Airflow's scheduler takes a dataset through a range of days, and a report ends it.

    python -m jobs.local.run --dataset D [--first DAY] [--last DAY] [--source DIR] [--again]
                       [--backwards]

Starts the engine and Airflow (SQLite, local processes, loopback), backfills the ingest DAG, lets the
asset-driven DAGs follow, and stops everything at the end. Stopped at any point, even by a kill, the
same command goes on where it was: days that are done stay done, failed tasks run again, and what was
made from a source that was replaced, or under a spec that has changed, is made again. `--again` builds
every day again.

Airflow starts neither the engine nor a range of days over several DAGs, and ends when somebody stops it;
one command from raw logs to a report is what this adds.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from feature_store import datasets
from feature_store.days import parse_day
from feature_store.errors import DataError
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs import failures, spark
from jobs.local.launcher import Launcher, instant
from jobs.local.plan import Plan, check_current, check_history, choose_days
from jobs.local.services import AirflowServices
from jobs.local.stale import not_current, stale_days
from jobs.paths import own
from jobs.settings import REPOSITORY, Settings

DEVICES_POOL = "devices"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(
        prog="python -m jobs.local.run", description="Build days of a dataset, to the report."
    )
    cli.add_argument("--dataset", required=True, help="a file of feature_store/datasets/")
    cli.add_argument("--first", metavar="DAY", help="first day (default: where the data begin)")
    cli.add_argument("--last", metavar="DAY", help="last day (simulated data: ten days by default)")
    cli.add_argument(
        "--source", type=Path, help="folder of the raw logs (default: HEADWATER_SOURCE)"
    )
    cli.add_argument(
        "--again", action="store_true", help="build the days again although they are done"
    )
    cli.add_argument(
        "--backwards", action="store_true", help="ingest the last day first; the result is the same"
    )
    return cli


def main() -> None:
    """Run, and exit with 0 when every day is done, 2 for a user's error, 1 for days that failed."""
    args = parser().parse_args()
    # not by way of SIGINT, which a shell's background job is started with ignored
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings, dataset = None, None
    try:
        settings, dataset = Settings.from_env(), datasets.get(args.dataset)
        sys.exit(run(args))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(failures.INTERRUPTED)
    except Exception as error:
        sys.exit(failures.report(error, settings, dataset))


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
    if source is not None and not dataset.simulated and not source.is_dir():
        raise DataError(
            f"SOURCE is {str(source)!r}: there is no such folder; name the folder of the raw logs"
        )
    if source is None and not dataset.simulated:
        raise DataError(
            f"SOURCE is missing: name the folder of {dataset.name}'s raw logs, as in SOURCE=/data/logs"
        )
    settings.make_folders()
    check_history(dataset, days[0], _built(settings, dataset))
    check_current(dataset, days[0], stale_days(dataset, settings))

    print(f"engine: {spark.describe(settings)}", flush=True)
    print(
        f"{dataset.name}{' (simulated data)' if dataset.simulated else ''}: {days[0]} to {days[-1]}, "
        f"{len(days)} days, into {own(str(settings.home))}",
        flush=True,
    )
    plan = Plan(dataset, tuple(days))
    again = args.again or _again_file(settings, dataset).exists()
    services = services_for(settings, dataset, source, again=again)
    services.acquire()
    started = time.monotonic()
    ok = False
    pool = ThreadPoolExecutor(max_workers=1)  # the engine starts while Airflow does
    try:
        engine = None if settings.spark_remote else pool.submit(spark.start, settings)
        services.migrate()
        services.start_warm()
        client = services.start_api()
        client.set_pool(
            DEVICES_POOL, device_slots(), "one slot per device: training and inference tasks"
        )
        services.wait_parsed(client, plan.dag_ids)
        if engine is not None:
            engine.result()
        print(
            f"Airflow: {services.url} (ready after {time.monotonic() - started:.0f} s)", flush=True
        )
        since = _again_since(settings, plan, again=args.again)
        stale = not_current(plan, settings)
        launcher = Launcher(
            plan,
            client,
            services,
            since,
            report=settings.report_json(dataset.name),
            stale=stale,
            backwards=args.backwards,
        )
        ok = launcher.run()
        if ok:
            _again_file(settings, dataset).unlink(missing_ok=True)
    finally:
        with _undisturbed():
            pool.shutdown()
            services.stop()
            if not settings.spark_remote and not ok:
                spark.stop(settings)
    print(f"{len(days)} days in {time.monotonic() - started:.0f} s", flush=True)
    later = [day for day in stale_days(dataset, settings) if day > days[-1]]
    if later:
        print(
            f"days up to {later[-1]} were built on what was replaced: "
            f"make run DATASET={dataset.name} TO={later[-1]} builds them again",
            flush=True,
        )
    code = 1
    if ok:
        command = [
            sys.executable,
            "-m",
            "jobs",
            "report",
            "--dataset",
            dataset.name,
            "--ds",
            days[-1],
        ]
        code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    if not settings.spark_remote:
        spark.stop(settings)
    return code


def services_for(
    settings: Settings,
    dataset: Dataset | None,
    source: Path | None,
    *,
    again: bool = False,
    keep_waits: bool = False,
) -> AirflowServices:
    """Airflow's services for one dataset's DAGs (None: every dataset's), with what tasks need to know."""
    environment = {"HEADWATER_HOME": str(settings.home), "HEADWATER_SCHEDULED": "0"}
    environment["HEADWATER_AGAIN"] = str(int(again))
    environment["HEADWATER_DATASETS"] = dataset.name if dataset else ""
    if source is not None:
        environment["HEADWATER_SOURCE"] = str(source)
    return AirflowServices(
        home=settings.airflow_home,
        environment=environment,
        parallelism=parallel_tasks(),
        keep_waits=keep_waits,
    )


def device_slots() -> int:
    """GPUs that are there; without any, each core is one device, as a training on a CPU has one thread."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return parallel_tasks()
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) or parallel_tasks()


def parallel_tasks() -> int:
    """Tasks that run at once: one on each core, within what memory bears (a training takes 1.4 GB)."""
    return max(2, min(8, os.cpu_count() or 2))


def _built(settings: Settings, dataset: Dataset) -> set[str]:
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
    since = instant()
    path.write_text(json.dumps(wanted | {"since": since}))
    return since


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C or SIGTERM does not interrupt the clearing up."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, signal.SIG_IGN) for s in signals]
    try:
        yield
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)


if __name__ == "__main__":
    main()
