"""A home and a source whose paths hold whatever a file system allows: the same day comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from pyarrow import csv

from feature_store import datasets
from feature_store.spec import Dataset
from jobs import (
    build_aggregates,
    build_examples,
    build_item_aggregates,
    build_labels,
    build_sequences,
    context,
    ingest,
    publish_embeddings,
    sources,
    train_upstream,
)
from jobs import spark as engines
from jobs.context import JobContext
from jobs.settings import Settings
from jobs.sources import SourceDay, simulated
from jobs.sources.csv_files import read_csv
from jobs.sources.simulated_world import World

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SPEC = dataclasses.replace(datasets.get("simulated"), models=("sum",))
DAY = SPEC.first_day
NAME = "a b é#1 100% *{x,y}?w\"q'$HOME;&"


def _write(folder: Path) -> None:
    events, impressions, _ = simulated.tables(World.parse("users=60,seed=5"), DAY, SPEC)
    for name, rows in {**events, "shown": impressions}.items():
        csv.write_csv(rows, folder / f"{name}-{DAY}.csv")
        (folder / f"{name}-{DAY}.csv.bak").write_text("no,csv\n1\n")


def _read(spark: SparkSession, source: str, day: str, dataset: Dataset) -> SourceDay:
    events, impressions, _ = simulated.tables(World.parse("users=10"), day, dataset)

    def frame(name: str, columns: list[str]):
        return read_csv(spark, source, f"{name}-{day}.csv*", {c: c for c in columns})

    return SourceDay(
        events={name: frame(name, rows.column_names) for name, rows in events.items()},
        impressions=frame("shown", impressions.column_names),
    )


@pytest.fixture
def made(
    engine: str, settings_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[JobContext]:
    """The first day, from CSV files in such a folder, into such a home with an engine of its own."""
    settings_of(engine)  # skips where there is none
    home, source = tmp_path / NAME / "home", tmp_path / f"{NAME}[1]%41"
    source.mkdir()
    _write(source)
    settings = Settings.from_env({"HEADWATER_HOME": str(home), "HEADWATER_ENGINE": engine})
    found = SimpleNamespace(NEEDS_SOURCE=True, read=_read)
    monkeypatch.setattr(sources, "get", lambda name: found)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    context._keep_scratch_inside(settings)
    made = JobContext(dataset=SPEC, ds=DAY, settings=settings, source=source, model="sum")
    yield made
    made.close()
    engines.stop(settings)


@pytest.mark.parametrize("engine", ["spark"], indirect=True)
def test_the_engine_reads_and_writes_files_and_tables(made: JobContext, tmp_path: Path) -> None:
    _, _, truth = simulated.tables(World.parse("users=60,seed=5"), DAY, SPEC)
    truth = truth.append_column("ds", pa.array([DAY] * len(truth)))
    made.lake.publish_arrow("truth", DAY, truth, inputs={}, code_version="test")
    assert made.lake.frame(made.spark, "truth", [DAY]).count() == len(truth)
    shown = read_csv(made.spark, str(made.source), f"shown-{DAY}.csv*", {"target_id": "id"})
    with made.lake.scratch("test", DAY) as folder:
        shown.write.parquet(folder)
        assert made.spark.read.parquet(folder).count() * len(SPEC.tasks) == len(truth)
    assert (tmp_path / NAME / "home" / "lake").is_dir()


@pytest.mark.filterwarnings("ignore")
def test_a_day_goes_from_csv_to_embeddings(made: JobContext, tmp_path: Path) -> None:
    jobs = (
        ingest,
        build_sequences,
        build_aggregates,
        build_item_aggregates,
        build_examples,
        build_labels,
    )
    for job in (*jobs, train_upstream, publish_embeddings):
        job.run(made)
    assert made.lake.read("user_embeddings", model="sum").num_rows > 0
    assert (tmp_path / NAME / "home" / "mlflow" / "mlflow.db").is_file()
