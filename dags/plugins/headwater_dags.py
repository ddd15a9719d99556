"""From a stage of the spec to an Airflow DAG. The DAG files choose stages and document them.

Environment, read once when this module is loaded:
    HEADWATER_DATASETS   comma-separated names: only these have DAGs here (default: every dataset)
    HEADWATER_SCHEDULED  0: the clock starts nothing, only backfills and people do (default: 1)
    HEADWATER_AGAIN      1: feature tables are built also where they are current (default: 0)
    HEADWATER_LAUNCH     what started this scheduler; waits that began under another are dropped (default: "")
    HEADWATER_TASK_HOURS how long any task may take before it is ended and tried again (default: its
                         step's own hours, 6 to 24; `feature_store/pipeline.py`)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import pendulum
from airflow.sdk import DAG, Asset, BaseOperator, CronPartitionTimetable, PartitionedAssetTimetable
from headwater_job import Announce, JobOperator
from headwater_plugin import DayMapper

from feature_store import datasets
from feature_store.errors import SpecError
from feature_store.pipeline import Stage, Step, stages
from feature_store.spec import Dataset

DEVICES_POOL = "devices"
RETRIES = 2
RETRY_DELAY = timedelta(seconds=10)
_MAX_HOURS = 24 * 365
MAX_INGESTS = 2  # days read at once; features go one day at a time

_CHOSEN = tuple(n.strip() for n in os.environ.get("HEADWATER_DATASETS", "").split(",") if n.strip())
_AGAIN = os.environ.get("HEADWATER_AGAIN", "0") != "0"
_LAUNCH = os.environ.get("HEADWATER_LAUNCH", "")
_SCHEDULED = os.environ.get("HEADWATER_SCHEDULED", "1") != "0"


def task_hours(text: str) -> float | None:
    """The hours that `HEADWATER_TASK_HOURS` says; None where it says nothing.

    Raises:
        SpecError: it is no number above 0.
    """
    if not text:
        return None
    try:
        hours = float(text)
        if 0 < hours < _MAX_HOURS:
            return hours
    except ValueError:
        pass
    raise SpecError(f"HEADWATER_TASK_HOURS is {text!r}: use a number of hours above 0, such as 6")


_HOURS = task_hours(os.environ.get("HEADWATER_TASK_HOURS", ""))


def chosen_stages(*prefixes: str) -> Iterator[tuple[Dataset, Stage]]:
    """Stages whose name starts with one of `prefixes`, of every dataset that has DAGs here."""
    for name in _CHOSEN or datasets.names():
        dataset = datasets.get(name)
        for stage in stages(dataset):
            if stage.name.startswith(prefixes):
                yield dataset, stage


def command(dataset: Dataset, step: Step) -> list[str]:
    """The command line of a step; the day is a template."""
    limits = [
        *(() if _AGAIN else ("--stale-only",)),
        *(("--model", step.model) if step.model else ()),
        *(("--task", step.task) if step.task else ()),
    ]
    day = ["--ds", "{{ dag_run.partition_key }}"]
    return [sys.executable, "-m", "jobs", *step.jobs, "--dataset", dataset.name, *day, *limits]


def timetable(dataset: Dataset, stage: Stage) -> CronPartitionTimetable | PartitionedAssetTimetable:
    """Midnight of the dataset's zone for the day that ended, or the assets that the stage waits for."""
    if not stage.waits:
        # Midnight, as backfill drops its last day at any other hour; the offset names the day that
        # ended. A fixed offset of 0 has to be called UTC to survive serialization.
        offset = int(dataset.utc_offset.total_seconds())
        zone = pendulum.FixedTimezone(offset) if offset else "UTC"
        return CronPartitionTimetable(
            "0 0 * * *", timezone=zone, run_offset=-1, key_format="%Y-%m-%d"
        )
    condition = None
    mappers = {}
    for wait in stage.waits:
        asset = Asset(name=wait.asset)
        condition = asset if condition is None else condition & asset
        mappers[asset] = DayMapper(wait.days_before, _LAUNCH)
    return PartitionedAssetTimetable(assets=condition, partition_mapper_config=mappers)


def build(
    dataset: Dataset,
    stage: Stage,
    doc_md: str | None,
    *,
    command: Callable[[Dataset, Step], list[str]] = command,
) -> DAG:
    """The DAG of `stage`. Its assets are emitted by its last task, when every step is done.

    Args:
        doc_md: the page that the user interface shows.
        command: the command line of a step.
    """
    by_clock = not stage.waits
    first_day = pendulum.parse(dataset.first_day)
    with DAG(
        dag_id=stage.dag_id,
        description=f"{stage.name} of {dataset.name}{' (simulated data)' if dataset.simulated else ''}",
        schedule=timetable(dataset, stage),
        start_date=first_day,
        # The clock starts no run after the end date; backfills and people do not mind it.
        end_date=first_day if by_clock and not _SCHEDULED else None,
        catchup=False,
        max_active_runs=MAX_INGESTS if by_clock else 1,
        default_args={"retries": RETRIES, "retry_delay": RETRY_DELAY},
        tags=[dataset.name, stage.name.split("_")[0]],
        doc_md=doc_md,
    ) as dag:
        tasks: dict[str, BaseOperator] = {}
        for step in stage.steps:
            tasks[step.name] = JobOperator(
                task_id=step.name,
                command=command(dataset, step),
                priority_weight=stage.priority,
                weight_rule="absolute",
                execution_timeout=timedelta(hours=_HOURS or step.hours),
                **({"pool": DEVICES_POOL} if step.on_device else {}),
            )
            for before in step.after:
                tasks[before] >> tasks[step.name]
        last = [t for t in tasks.values() if not t.downstream_task_ids]
        outlets = [Asset(name=name) for name in stage.emits]
        if outlets and len(last) > 1:
            announce = Announce(
                task_id="publish", priority_weight=stage.priority, weight_rule="absolute"
            )
            last >> announce
            last = [announce]
        if outlets:
            last[0].outlets = outlets
    return dag
