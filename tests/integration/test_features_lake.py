"""The feature jobs on a lake: any order of ingestion, reruns and both engines give the same tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from feature_store.errors import MissingPartitionError
from feature_store.spec import Dataset
from jobs import (
    build_aggregates,
    build_examples,
    build_item_aggregates,
    build_labels,
    build_sequences,
)
from jobs.context import JobContext
from jobs.settings import Settings
from tests import oracle_tables
from tests.frames import assert_same, typed, want_all
from tests.tiny import DAYS, TINY, Row, World, arrow, make_world

JOBS = (
    build_sequences,
    build_aggregates,
    build_item_aggregates,
    build_examples,
    build_labels,
)
BUILT = ("sequences", "aggregates", "item_aggregates", "examples", "labels")
WORLD = make_world(seed=11, users=4, events=90, targets=60)
for row in (r for rows in WORLD.impressions.values() for r in rows if r["target"] == "ad"):
    row["item_id"] = row["item_id"] or 1  # what the quality gate lets through

Make = Callable[..., JobContext]


@pytest.fixture
def make(tmp_path, spark, settings_of, engine) -> Make:
    """A context of the tiny dataset on a lake of the test's own."""

    def context(
        ds: str, *, lake: str = "lake", dataset: Dataset = TINY, full: bool = False
    ) -> JobContext:
        settings: Settings = dataclasses.replace(
            settings_of(engine), lake_root=str(tmp_path / lake)
        )
        made = JobContext(dataset=dataset, ds=ds, settings=settings, full=full)
        made.__dict__["spark"] = spark  # the session that the tests share
        return made

    return context


def _ingest(context: JobContext, world: World = WORLD) -> None:
    for table, days in (("events", world.events), ("impressions", world.impressions)):
        rows = arrow(days[context.ds], table, context.dataset)
        context.lake.publish_arrow(table, context.ds, rows, inputs={}, code_version="test")


def _build(context: JobContext) -> None:
    for job in JOBS:
        job.run(context)


def _tables(context: JobContext) -> dict[str, list[Row]]:
    return {t: context.lake.read(t).to_pylist() for t in BUILT}


@pytest.mark.parametrize("engine", ["sail", "spark"], indirect=True)
def test_two_days_on_either_engine_are_those_of_the_oracle(make):
    days = DAYS[1:3]
    for day in days:
        _ingest(make(day))
        _build(make(day))
    got, rows = _tables(make(days[-1])), want_all(WORLD, days)
    for table in BUILT:
        assert rows[table], f"{table}: the world is too small to prove anything"
        assert_same(got[table], rows[table], table)


def test_ingested_backwards_and_built_twice_the_tables_are_the_same(make):
    for day in reversed(DAYS):
        _ingest(make(day))
    for day in DAYS:
        _build(make(day))
    rows = want_all(WORLD, DAYS)
    once = _tables(make(DAYS[-1]))
    for table in BUILT:
        assert_same(once[table], rows[table], table)
    for day in (DAYS[3], DAYS[1]):  # an earlier day again, after later ones were built
        _ingest(make(day))
        _build(make(day))
    again = _tables(make(DAYS[-1]))
    for table in BUILT:
        assert_same(again[table], once[table], table)


def test_a_full_rebuild_replaces_a_day_by_the_same_rows_and_says_so(make):
    for day in DAYS[:3]:
        _ingest(make(day))
        build_sequences.run(make(day))
    before = make(DAYS[2]).lake.read("sequences").to_pylist()
    assert make(DAYS[2]).lake.partitions("sequences")[DAYS[2]].notes["rebuilt"] is False
    build_sequences.run(make(DAYS[2], full=True))
    partition = make(DAYS[2]).lake.partitions("sequences")[DAYS[2]]
    assert partition.notes["rebuilt"] is True
    assert sorted(partition.inputs) == [f"events/{d}" for d in DAYS[:3]]
    assert_same(make(DAYS[2]).lake.read("sequences").to_pylist(), before, "sequences")


def test_a_missing_day_before_stops_the_jobs_that_build_on_it(make):
    for day in DAYS[:3]:
        _ingest(make(day))
    _build(make(DAYS[0]))
    for job in (build_sequences, build_examples):
        with pytest.raises(MissingPartitionError, match=DAYS[1]):
            job.run(make(DAYS[2]))


def test_a_day_without_events_ingested_is_refused(make):
    for job in JOBS:
        with pytest.raises(MissingPartitionError, match=DAYS[0]):
            job.run(make(DAYS[0]))


def test_sequences_made_under_another_spec_are_rebuilt_not_merged(make):
    longer = dataclasses.replace(
        TINY, streams=tuple(dataclasses.replace(s, max_events=6) for s in TINY.streams)
    )
    for day in DAYS[:3]:
        _ingest(make(day))
    for day in DAYS[:2]:
        build_sequences.run(make(day))
    build_sequences.run(make(DAYS[2], dataset=longer))
    lake = make(DAYS[2], dataset=longer).lake
    rows = oracle_tables.sequences(longer, typed(WORLD.events), DAYS[2], base=True)
    assert_same(lake.read("sequences", days=[DAYS[2]]).to_pylist(), rows, "sequences")
    assert lake.partitions("sequences")[DAYS[2]].notes["base"] is True
