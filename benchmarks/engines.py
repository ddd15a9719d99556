"""The same days on Apache Spark and on Sail: every table compared row by row, and the time of each job.

    python -m benchmarks.engines --dataset simulated --first 2024-03-01 --last 2024-03-02
    python -m benchmarks.engines --dataset globo --source <folder> --first 2017-10-02 --last 2017-10-02

Each engine builds the days into a home of its own, with its server already started. Prints a line
per job with the ratio Spark / Sail, and per table whether the rows are the same. Exit code 1: they
are not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.compare_homes import tables_differ
from feature_store import datasets
from feature_store.days import day_range
from jobs.settings import REPOSITORY

ENGINES = ("spark", "sail")
JOBS = (
    "ingest",
    "build_sequences",
    "build_aggregates",
    "build_item_aggregates",
    "build_examples",
    "build_labels",
)
TABLES = (
    "events",
    "impressions",
    "sequences",
    "aggregates",
    "item_aggregates",
    "examples",
    "labels",
)


def build(home: Path, engine: str, args: argparse.Namespace, days: list[str]) -> dict[str, float]:
    """Seconds of each job, all days together; a process per job and day, as in a run."""
    environment = {**os.environ, "HEADWATER_HOME": str(home), "HEADWATER_ENGINE": engine}

    def python(*command: str) -> None:
        subprocess.run(
            [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    seconds = dict.fromkeys(JOBS, 0.0)
    python("jobs.spark", "start")
    try:
        for day in days:
            for job in JOBS:
                begun = time.monotonic()
                source = ["--source", args.source] if args.source else []
                python("jobs", job, "--dataset", args.dataset, "--ds", day, *source)
                seconds[job] += time.monotonic() - begun
    finally:
        python("jobs.spark", "stop")
    return seconds


def main() -> None:
    """Build, compare, print."""
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--dataset", required=True)
    cli.add_argument("--source")
    cli.add_argument("--first", required=True)
    cli.add_argument("--last", required=True)
    args = cli.parse_args()
    dataset, days = datasets.get(args.dataset), day_range(args.first, args.last)
    with tempfile.TemporaryDirectory(prefix="engines-") as scratch:
        homes = {engine: Path(scratch) / engine for engine in ENGINES}
        seconds = {engine: build(homes[engine], engine, args, days) for engine in ENGINES}
        print(f"{args.dataset}, {days[0]} to {days[-1]}, seconds of whole processes")
        for job in JOBS:
            spark, sail = (seconds[engine][job] for engine in ENGINES)
            print(f"{job:18} spark {spark:7.1f}   sail {sail:7.1f}   ratio {spark / sail:5.2f}")
        differ = tables_differ((homes["spark"], homes["sail"]), dataset, days, list(TABLES))
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
