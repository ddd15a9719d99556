"""Frames from rows of a tiny world and back, and a day's tables straight from a world's events."""

from __future__ import annotations

from collections import defaultdict

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from feature_store.days import add_days
from feature_store.spec import Dataset
from feature_store.tables import contract
from jobs import build_aggregates, build_examples, build_item_aggregates, build_sequences
from tests import oracle, oracle_tables
from tests.differential import compare
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
    """Two tables hold the same rows, to the bit, whatever their order."""
    compare(got, want, table, ("ds", *contract(dataset, table).key))


def typed(days: dict[str, list[Row]], dataset: Dataset = TINY) -> oracle.ByDay:
    """`days` with values as `ingest` leaves them: floats of float32, and null for what is missing."""
    attributes = {a.name: a for a in (*dataset.event_attributes, *dataset.context_features)}

    def value(name: str, given: object) -> object:
        if name not in attributes or given in (None, "", -1) or given != given:
            return None if name in attributes else given
        return oracle.typed(attributes[name], given)

    return {ds: [{k: value(k, v) for k, v in r.items()} for r in rows] for ds, rows in days.items()}


def want(world: World, table: str, ds: str, *, base: bool = True) -> list[Row]:
    """The partition `ds` of a table by the oracle."""
    days, shown = typed(world.events), typed(world.impressions)
    if table == "sequences":
        return oracle_tables.sequences(TINY, days, ds, base=base)
    if table == "aggregates":
        return oracle_tables.aggregates(TINY, days, ds)
    if table == "item_aggregates":
        return oracle_tables.item_aggregates(TINY, days, ds)
    if table == "examples":
        return oracle_tables.examples(TINY, days, shown, ds)
    return oracle_tables.labels(TINY, days, shown, ds)


def want_all(world: World, days: list[str], dataset: Dataset = TINY) -> dict[str, list[Row]]:
    """The feature tables of a lake that holds `days` and nothing before them, by the oracle."""
    events, shown = (
        typed({ds: of[ds] for ds in days}, dataset) for of in (world.events, world.impressions)
    )
    found: dict[str, list[Row]] = defaultdict(list)
    for ds in days:
        base = ds == days[0] or build_sequences.is_base_day(dataset, ds)
        for table, rows in oracle_tables.feature_tables(
            dataset, events, shown, ds, base=base
        ).items():
            found[table] += rows
    return found


def items_before(world: World, ds: str) -> list[Row]:
    """Partitions of `item_aggregates` before `ds`, by the oracle."""
    return [r for d in DAYS if d < ds for r in want(world, "item_aggregates", d)]


def build_items_of(spark: SparkSession, world: World, ds: str) -> DataFrame:
    """The partition `ds` of `item_aggregates`, the days before it by the oracle."""
    held = want(world, "sequences", add_days(ds, -1))
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
    come from the oracle, since a chain of days would make the query grow.

    Args:
        look_first: find out what is unusual about the day, as the job does.
    """
    yesterday = add_days(ds, -1)
    before = frame(spark, until(world.events, yesterday), "events")
    state = build_sequences.rebuild(before, TINY, yesterday, base=True)
    items = [*items_before(world, ds), *want(world, "item_aggregates", ds)]
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
