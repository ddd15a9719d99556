"""The shell around a job: its arguments, its settings, the lake and the engine, and its exit code.

    python -m jobs <job> [<job> ...] --dataset D --ds DAY [--source DIR] [--model M] [--task T] [--full]
                                     [--stale-only]

Several jobs of one call run in order in one process, so that one session and one heavy import serve
them. Exit codes: 0 done; 2 an error that a user can mend (`feature_store.errors`, printed as one
line; trying again would not help); 1 anything else (`jobs.failures`: a sentence where the ground
gave way, a traceback for a fault of the code).
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store import damage, datasets
from feature_store.days import parse_day
from feature_store.errors import DataError, SpecError
from feature_store.pipeline import JOBS
from feature_store.spec import Dataset, Task
from feature_store.tables import KINDS, feature_tables
from jobs import failures, spark
from jobs.failures import DONE, INTERRUPTED
from jobs.settings import REPOSITORY, Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from feature_store.lake import Lake


@cache
def code_version() -> str:
    """`git describe` of the checkout, "-dirty" where it was changed.

    An image holds no git history: there it is `HEADWATER_CODE_VERSION`, or "unknown".
    """
    fallback = os.environ.get("HEADWATER_CODE_VERSION") or "unknown"
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return fallback
    return found.stdout.strip() or fallback


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """What a job's `run` is given.

    Args:
        dataset: the spec.
        ds: the day to build.
        settings: where to read and write.
        source: folder of raw logs, for `ingest`.
        model: the upstream model, for jobs that are about one.
        task: the downstream task, for jobs that are about one.
        full: rebuild from all events instead of from the day before.

    Raises:
        DataError: `ds` is no day (a run without a partition key), or before the data begin.
        SpecError: the dataset has no such model or task.
    """

    dataset: Dataset
    ds: str
    settings: Settings
    source: Path | None = None
    model: str | None = None
    task: str | None = None
    full: bool = False

    def __post_init__(self) -> None:
        parse_day(self.ds)
        if self.ds < self.dataset.first_day:
            raise DataError(
                f"day is {self.ds}: {self.dataset.name} begins on {self.dataset.first_day}, "
                "choose that day or a later one"
            )
        if self.model is not None and self.model not in self.dataset.models:
            raise SpecError(
                f"model is {self.model!r}: {self.dataset.name} has {', '.join(self.dataset.models)}"
            )
        if self.task is not None:
            self.dataset.task(self.task)

    @cached_property
    def lake(self) -> Lake:
        """The dataset's tables.

        Raises:
            DamageError: a table's log is gone, or a commit of it is empty.
        """
        from feature_store.lake import Lake  # noqa: PLC0415 it imports pandas

        damage.check_commits(f"{self.settings.lake_root}/{self.dataset.name}", self.dataset)
        docs_root = self.settings.quality_dir(self.dataset.name)
        return Lake(self.settings.lake_root, self.dataset, docs_root=docs_root)

    @cached_property
    def spark(self) -> SparkSession:
        """A session of the engine, started on first use."""
        print(f"engine: {spark.describe(self.settings)}", flush=True)
        return spark.session(self.settings)

    @cached_property
    def engine(self) -> str:
        """The engine's short name, for the ledger."""
        return spark.engine_name(self.settings)

    @property
    def code_version(self) -> str:
        """The checkout's version, for the ledger and MLflow."""
        return code_version()

    def require_model(self) -> str:
        """The model that this job is about.

        Raises:
            SpecError: none was given.
        """
        if self.model is None:
            raise SpecError(
                f"model is missing: pass --model {' or --model '.join(self.dataset.models)}"
            )
        return self.model

    def require_task(self) -> Task:
        """The task that this job is about.

        Raises:
            SpecError: none was given.
        """
        if self.task is None:
            names = [t.name for t in self.dataset.tasks]
            raise SpecError(f"task is missing: pass --task {' or --task '.join(names)}")
        return self.dataset.task(self.task)

    def close(self) -> None:
        """End the engine's session, if there is one; the server stays for the next task."""
        if "spark" in self.__dict__:
            from jobs import retries  # noqa: PLC0415 it imports the engine's client

            retries.end(self.spark)


def parser(job: str | None = None) -> argparse.ArgumentParser:
    """The command line: of one job, or of `python -m jobs` where `job` is None."""
    result = argparse.ArgumentParser(
        prog="python -m jobs" + (f".{job}" if job else ""),
        description="Build one day of a dataset.",
    )
    if job is None:
        result.add_argument("jobs", nargs="+", choices=JOBS, metavar="job", help=", ".join(JOBS))
        result.add_argument(
            "--stale-only",
            action="store_true",
            help="leave out a feature job whose tables are current",
        )
    result.add_argument("--dataset", required=True, help="a file of feature_store/datasets/")
    result.add_argument("--ds", required=True, help="the day, YYYY-MM-DD in the dataset's zone")
    result.add_argument(
        "--source", type=Path, help="folder of the raw logs (default: HEADWATER_SOURCE)"
    )
    result.add_argument("--model", help="the upstream model")
    result.add_argument("--task", help="the downstream task")
    result.add_argument(
        "--full", action="store_true", help="rebuild from all events, not from the day before"
    )
    return result


def main(job: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run the job(s) that the command line names, and exit with the code that tells how it went."""
    args = parser(job).parse_args(argv)
    sys.exit(run([job] if job else args.jobs, args))


def run(jobs: Sequence[str], args: argparse.Namespace) -> int:
    """Run `jobs` in order; the exit code."""
    settings, context = None, None
    try:
        settings = Settings.from_env()
        _keep_scratch_inside(settings)
        context = JobContext(
            dataset=datasets.get(args.dataset),
            ds=args.ds,
            settings=settings,
            source=args.source.expanduser().resolve() if args.source else settings.source,
            model=args.model,
            task=args.task,
            full=args.full,
        )
        for job in jobs:
            if getattr(args, "stale_only", False) and is_current(job, context):
                print(f"{_title(job, context)}: is current, not built again", flush=True)
                continue
            started = time.monotonic()
            importlib.import_module(f"jobs.{job}").run(context)
            print(f"{_title(job, context)}: done in {time.monotonic() - started:.1f} s", flush=True)
    except KeyboardInterrupt:
        print("stopped: start it again and it goes on where it was", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as error:
        return failures.report(error, settings, context.dataset if context else None)
    finally:
        if context is not None:
            context.close()
    return DONE


def is_current(job: str, context: JobContext) -> bool:
    """Whether every table that a feature job writes of the context's day is there and current."""
    lineage, ds = context.lake.lineage(), context.ds
    tables = [t for t in feature_tables(context.dataset) if KINDS[t].job == job]
    written = all(lineage.get(t, ds) for t in tables)
    return bool(tables) and written and not any(lineage.stale(t, ds) for t in tables)


def _keep_scratch_inside(settings: Settings) -> None:
    """Libraries' temporary files under the home as well: a run writes nowhere else."""
    settings.make_folders()
    scratch = settings.home / "tmp"
    scratch.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)


def _title(job: str, context: JobContext) -> str:
    about = [x for x in (context.model, context.task) if x]
    return " ".join([job, context.dataset.name, context.ds, *about])
