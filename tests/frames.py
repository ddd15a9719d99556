"""Frames from rows of a tiny world and back, and a day's tables straight from a world's events."""

from __future__ import annotations

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from feature_store.days import shift
from feature_store.spec import Dataset
from feature_store.tables import contract
from jobs import build_aggregates, build_examples, build_item_aggregates, build_sequences
from tests import reference
from tests.tiny import DAYS, TINY, Row, World, arrow


def frame(spark: SparkSession, rows: list[Row], table: str, dataset: Dataset = TINY) -> DataFrame:
    """`rows` as a frame of the table's contract."""
    if not rows:
        return spark.createDataFrame([], from_arrow_schema(contract(dataset, table).schema))
    return spark.createDataFrame(arrow(rows, table, dataset))


def rows_of(data: DataFrame) -> list[Row]:
    """A frame's rows."""
    return data.toArrow().to_pylist()


def until(days: dict[str, list[Row]], last_day: str) -> list[Row]:
    """The rows of all days up to `last_day`."""
    return [row for day in sorted(days) if day <= last_day for row in days[day]]


def assert_same(got: list[Row], want: list[Row], table: str, dataset: Dataset = TINY) -> None:
    """Two tables hold the same rows, floats to the bit, whatever their order."""
    key = ("ds", *contract(dataset, table).key)
    ours, theirs = reference.keyed(got, *key), reference.keyed(want, *key)
    assert sorted(ours, key=str) == sorted(theirs, key=str), f"{table}: other rows"
    for name, row in theirs.items():
        for column in sorted(row.keys() | ours[name].keys()):
            assert ours[name][column] == row[column], f"{table} {name}: {column}"


def items_before(world: World, ds: str) -> list[Row]:
    """Partitions of `item_aggregates` before `ds`, by the reference."""
    return [r for d in DAYS if d < ds for r in reference.item_aggregates(world.events, TINY, d)]


def build_items_of(spark: SparkSession, world: World, ds: str) -> DataFrame:
    """The partition `ds` of `item_aggregates`, the days before it by the reference."""
    held = reference.sequences(world.events, TINY, shift(ds, -1), base=True)
    return build_item_aggregates.transform(
        frame(spark, world.events[ds], "events"),
        frame(spark, items_before(world, ds), "item_aggregates"),
        frame(spark, held, "sequences").drop("ds"),
        TINY,
        ds,
    )


def build_examples_of(
    spark: SparkSession, world: World, ds: str, *, look_first: bool = False
) -> list[Row]:
    """The partition `ds` of `examples` and what it is built from, in one query; only the item counts
    come from the reference, since a chain of days would make the query grow.

    Args:
        look_first: find out what is unusual about the day, as the job does.
    """
    yesterday = shift(ds, -1)
    before = frame(spark, until(world.events, yesterday), "events")
    state = build_sequences.rebuild(before, TINY, yesterday, base=True)
    items = [*items_before(world, ds), *reference.item_aggregates(world.events, TINY, ds)]
    served = build_aggregates.transform(before, TINY, yesterday)
    events = frame(spark, world.events[ds], "events")
    impressions = frame(spark, world.impressions[ds], "impressions")
    state = state.drop("ds")
    unusual = build_examples.unusual_of(events, impressions, state, TINY) if look_first else None
    examples = build_examples.transform(
        events=events,
        impressions=impressions,
        state=state,
        aggregates=served if ds > DAYS[0] else frame(spark, [], "aggregates"),
        item_aggregates=frame(spark, items, "item_aggregates"),
        dataset=TINY,
        ds=ds,
        unusual=unusual,
    )
    return rows_of(examples)
