"""A spec that changes in the middle of a run of days, and goes back: the tables are those of a clean build,
and what the change does not touch stays as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from feature_store.errors import StalePartitionError
from feature_store.spec import Aggregate, Attribute, Dataset, DenseFeature, EventLabel
from feature_store.tables import feature_tables
from jobs import (
    build_aggregates,
    build_examples,
    build_item_aggregates,
    build_labels,
    build_sequences,
)
from jobs.context import JobContext, is_current
from jobs.training.loader import labelled_day
from tests.frames import assert_same, want_all
from tests.tiny import DAYS, TINY, World, arrow, make_world

JOBS = {
    "build_sequences": build_sequences,
    "build_aggregates": build_aggregates,
    "build_item_aggregates": build_item_aggregates,
    "build_examples": build_examples,
    "build_labels": build_labels,
}
BUILT = DAYS[:3]
CLICK, VIEW = TINY.streams

Make = Callable[[Dataset, str], JobContext]


def _world(dataset: Dataset) -> World:
    """What the source holds, of the streams that a spec names."""
    world = make_world(seed=5, users=4, events=70, targets=50)
    streams = [s.name for s in dataset.streams]
    for day, rows in world.events.items():
        world.events[day] = [
            row | {"mood": int(row["event_id"]) % 3} for row in rows if row["stream"] in streams
        ]
    for row in (r for rows in world.impressions.values() for r in rows if r["target"] == "ad"):
        row["item_id"] = row["item_id"] or 1
    return world


@pytest.fixture
def make(tmp_path, spark, settings_of, engine) -> Make:
    def context(dataset: Dataset, ds: str) -> JobContext:
        settings = dataclasses.replace(settings_of(engine), lake_root=str(tmp_path / "lake"))
        made = JobContext(dataset=dataset, ds=ds, settings=settings)
        made.__dict__["spark"] = spark
        return made

    return context


def bring_up_to_date(make: Make, dataset: Dataset, days: list[str]) -> set[str]:
    """What `make run` does of the feature tables: the tables that were written."""
    world, written = _world(dataset), set()
    for ds in days:
        context = make(dataset, ds)
        lineage = context.lake.lineage()
        for table, rows in (("events", world.events), ("impressions", world.impressions)):
            if lineage.get(table, ds) is None or lineage.stale(table, ds):
                data = arrow(rows[ds], table, dataset)
                context.lake.publish_arrow(table, ds, data, inputs={}, code_version="test")
                written.add(table)
        for name, job in JOBS.items():
            if not is_current(name, context):
                before = {t: context.lake.lineage().get(t, ds) for t in feature_tables(dataset)}
                job.run(context)
                after = context.lake.lineage()
                written |= {t for t, p in before.items() if after.get(t, ds) != p}
    return written


def assert_clean(make: Make, dataset: Dataset, days: list[str]) -> None:
    lake = make(dataset, days[-1]).lake
    for table, want in want_all(_world(dataset), days, dataset).items():
        lake.require(table, days)
        assert want, f"{table}: the world is too small to prove anything"
        assert_same(lake.read(table, days=days).to_pylist(), want, table, dataset)


MORE = replace(  # a feature added, one swapped for another of its name and another type, one removed
    TINY,
    dense_features=(
        DenseFeature(name="views_2d", stream="view", aggregate=Aggregate.COUNT, window_days=2),
        *TINY.dense_features[:-1],
    ),
    sparse_features=(
        replace(TINY.sparse_features[1], name=TINY.sparse_features[0].name),
        *TINY.sparse_features[2:],
    ),
)
OTHER_ANSWER = replace(  # a label
    MORE,
    tasks=tuple(
        replace(t, label=EventLabel(stream="click", within=timedelta(hours=9)))
        if t.name == "click_6h"
        else t
        for t in TINY.tasks
    ),
)
ONE_STREAM = replace(  # a stream removed, an attribute swapped for another
    TINY,
    streams=(replace(CLICK, attributes=(*CLICK.attributes[:3], Attribute(name="mood"))),),
    tasks=TINY.tasks[:3],
    user_attributes=TINY.user_attributes[1:],
    sparse_features=TINY.sparse_features[:2],
    dense_features=TINY.dense_features[1:2],
    item_features=replace(TINY.item_features, streams=(("click", "article"),)),
)


@pytest.mark.parametrize("engine", ["sail"], indirect=True)
def test_a_spec_changes_between_two_days_and_goes_back(make: Make) -> None:
    everything = {"events", "impressions", *feature_tables(TINY)}
    assert bring_up_to_date(make, TINY, BUILT[:2]) == everything
    assert bring_up_to_date(make, TINY, BUILT[:2]) == set()

    with pytest.raises(StalePartitionError, match=r"made under definition .* -m jobs build_"):
        build_examples.run(make(MORE, BUILT[1]))
    assert bring_up_to_date(make, MORE, BUILT[:2]) == {"aggregates", "examples", "labels"}
    assert_clean(make, MORE, BUILT[:2])

    with pytest.raises(StalePartitionError, match=r"tiny\.labels"):  # of the old and new definition
        labelled_day(make(OTHER_ANSWER, BUILT[1]).lake, OTHER_ANSWER, BUILT[1])
    assert bring_up_to_date(make, OTHER_ANSWER, BUILT[:2]) == {"labels"}

    assert bring_up_to_date(make, ONE_STREAM, BUILT[:2]) == everything - {"impressions"}
    assert_clean(make, ONE_STREAM, BUILT[:2])
    assert bring_up_to_date(make, TINY, BUILT) == everything
    assert_clean(make, TINY, BUILT)
