"""The same days on Apache Spark and on Sail: every table compared row by row, and the time of each job.

    python -m benchmarks.engines --dataset simulated --first 2024-03-01 --last 2024-03-02
    python -m benchmarks.engines --dataset globo --source <folder> --first 2017-10-02 --last 2017-10-02

Each engine builds the days into a home of its own, with its server already started. Prints a line
per job with the ratio Spark / Sail, and per table whether the rows are the same to the bit. Exit code 1:
they are not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.flags import parser
from feature_store import datasets
from feature_store.days import day_range
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.settings import REPOSITORY

ENGINES = ("spark", "sail")
TABLES = {
    "ingest": ("events", "impressions"),
    "build_sequences": ("sequences",),
    "build_aggregates": ("aggregates",),
    "build_item_aggregates": ("item_aggregates",),
    "build_examples": ("examples",),
    "build_labels": ("labels",),
}  # by job


def build(home: Path, engine: str, args: argparse.Namespace, days: list[str]) -> dict[str, float]:
    """Seconds of each job, all days together; a process per job and day, as in a run."""
    environment = {**os.environ, "HEADWATER_HOME": str(home), "HEADWATER_ENGINE": engine}

    def python(*command: str) -> None:
        subprocess.run(
            [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

    seconds = dict.fromkeys(TABLES, 0.0)
    python("jobs.spark", "start")
    try:
        for day in days:
            for job in TABLES:
                begun = time.monotonic()
                source = ["--source", args.source] if args.source else []
                python("jobs", job, "--dataset", args.dataset, "--ds", day, *source)
                seconds[job] += time.monotonic() - begun
    finally:
        python("jobs.spark", "stop")
    return seconds


def rows(home: Path, dataset: Dataset, table: str, days: list[str]) -> pa.Table:
    """The rows of `days` in the order of the table's key."""
    lake = Lake(home / "lake", dataset)
    contract = lake.contract(table)
    key = dict.fromkeys((*contract.partitioned_by, *contract.key))
    return lake.read(table, days=days).sort_by([(k, "ascending") for k in key])


def same(one: pa.Array, other: pa.Array) -> bool:
    """Whether two columns hold the same bits; missing numbers, which are NaN, count as equal."""
    if isinstance(one, pa.ChunkedArray):
        one, other = one.combine_chunks(), other.combine_chunks()
    if one.equals(other):
        return True
    if len(one) != len(other) or one.null_count != other.null_count:
        return False
    if pa.types.is_list(one.type):
        lengths = one.value_lengths().equals(other.value_lengths())
        return lengths and same(one.flatten(), other.flatten())
    if pa.types.is_floating(one.type):
        mine, theirs = (x.to_numpy(zero_copy_only=False) for x in (one, other))
        return np.array_equal(mine, theirs, equal_nan=True)
    return False


def tables_differ(homes: Sequence[Path], dataset: Dataset, days: list[str]) -> bool:
    """Whether any table of two homes differs; prints a line for each."""
    differ = False
    for table in (t for of_job in TABLES.values() for t in of_job):
        one, other = (rows(home, dataset, table, days) for home in homes)
        unlike = [c for c in one.column_names if not same(one[c], other[c])]
        differ |= bool(unlike)
        verdict = f"DIFFER in {', '.join(unlike)}" if unlike else "the same"
        print(f"{table:18} {one.num_rows:>10,} rows   {verdict}", flush=True)
    return differ


def main(argv: Sequence[str] | None = None) -> None:
    """Build, compare, print."""
    cli = parser("engines", __doc__)
    cli.add_argument("--dataset", required=True)
    cli.add_argument("--source")
    cli.add_argument("--first", required=True)
    cli.add_argument("--last", required=True)
    args = cli.parse_args(argv)
    dataset, days = datasets.get(args.dataset), day_range(args.first, args.last)
    with tempfile.TemporaryDirectory(prefix="engines-") as scratch:
        homes = [Path(scratch) / engine for engine in ENGINES]
        seconds = [build(home, e, args, days) for home, e in zip(homes, ENGINES, strict=True)]
        print(f"{args.dataset}, {days[0]} to {days[-1]}, seconds of whole processes")
        for job in TABLES:
            spark, sail = (of_engine[job] for of_engine in seconds)
            print(f"{job:21} spark {spark:7.1f}   sail {sail:7.1f}   ratio {spark / sail:5.2f}")
        differ = tables_differ(homes, dataset, days)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
