"""`item_aggregates`: what is counted about items by the hour, and what they come together with.

No hour depends on what became available after it.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from feature_store.columns import counts_column, history_column, value_type
from feature_store.days import add_days
from feature_store.spec import Dataset, IdType
from feature_store.tables import contract
from feature_store.tables.item_aggregates import co_occurrence_columns
from jobs import item_features
from jobs.build_sequences import load_before
from jobs.frames import (
    conform,
    empty,
    hour_of,
    is_id,
    last,
    missing,
    publish,
    read,
    spark_type,
    values,
)

if TYPE_CHECKING:
    from jobs.context import JobContext


def transform(
    events: DataFrame, earlier: DataFrame, state: DataFrame | None, dataset: Dataset, ds: str
) -> DataFrame:
    """Events on each item by the hour in which they became available, and when it was first seen.

    Args:
        events: partition `ds` of `events`.
        earlier: partitions of `item_aggregates` of the `item_features.SEEN_DAYS` days before `ds`. An item keeps
            its `first_seen` as long as somebody touches it every so many days.
        state: one row per user, the sequences at the end of the day before (`frames.newest`), with
            which co-occurrence begins; None where the spec has no co-occurrence.
    """
    assert dataset.item_features is not None
    streams = dataset.item_features.streams
    kind = spark_type(contract(dataset, "item_aggregates").schema.field("item_id").type)
    items = [
        F.when(
            (F.col("stream") == stream) & is_id(F.col(attribute), dataset.item_id_type),
            F.struct(F.col(attribute).cast(kind).alias("item_id"), F.lit(stream).alias("of")),
        )
        for stream, attribute in streams
    ]
    touched = events.select(
        "available_time",
        F.explode(F.filter(F.array(*items), lambda e: e.isNotNull())).alias("entry"),
    ).select("available_time", "entry.*")
    hours = touched.groupBy("item_id", hour_of(F.col("available_time")).alias("hour")).agg(
        *(F.count(F.when(F.col("of") == s, 1)).alias(f"events__{s}") for s, _ in streams),
        F.min("available_time").alias("seen"),
    )
    seen = earlier.select("item_id", F.col("first_seen").alias("seen")).unionByName(
        hours.select("item_id", "seen")
    )
    first = seen.groupBy("item_id").agg(F.min("seen").alias("first_seen"))
    rows = hours.join(first, "item_id")
    together = co_occurrence_columns(dataset)
    if together:
        assert state is not None
        rows = rows.join(_together(events, state, dataset), ["item_id", "hour"], "left")
        kinds = {f.name: spark_type(f.type) for f in contract(dataset, "item_aggregates").schema}
        packed = [c for name in together for c in (name, counts_column(name))]
        rows = rows.select(
            "item_id", "hour", *(f"events__{s}" for s, _ in streams), "first_seen",
            *(F.coalesce(F.col(n), empty(kinds[n])).alias(n) for n in packed),
        )  # fmt: skip
    return conform(rows, contract(dataset, "item_aggregates"), ds)


def _together(events: DataFrame, state: DataFrame, dataset: Dataset) -> DataFrame:
    """Per (item_id, hour) of the day: the co-occurrence columns, values in ascending order."""
    pairs = dataset.co_occurrence
    assert pairs is not None
    stream = dataset.stream(pairs.stream)
    together = co_occurrence_columns(dataset)
    new = _with_predecessors(events, state, dataset).where(
        is_id(F.col("item_id"), dataset.item_id_type)
    )

    def entry(kind: int, name: str, value: Column) -> Column:
        """A pair; whole numbers and texts in columns of their own, so that all kinds are one array."""
        id_type = stream.attribute(name).id_type
        other = stream.attribute(name).vocabulary == "item"
        good = is_id(value, id_type) & (value != F.col("item_id") if other else F.lit(True))
        whole = id_type is IdType.INT64
        number = value if whole else F.lit(None).cast("bigint")
        text = F.lit(None).cast("string") if whole else value
        pair = F.struct(F.lit(kind).alias("kind"), number.alias("number"), text.alias("text"))
        return F.when(good, pair)

    entries = F.array(*(entry(k, n, F.col(f"own__{n}")) for k, n in enumerate(pairs.beside)))
    for k, (name, lags) in enumerate(product(pairs.before, pairs.lags), start=len(pairs.beside)):
        one = partial(entry, k, name)
        entries = F.concat(entries, F.transform(last(F.col(f"before__{name}"), lags), one))
    counted = (
        new.select(
            "item_id", "hour", F.explode(F.filter(entries, lambda e: e.isNotNull())).alias("e")
        )
        .select("item_id", "hour", "e.*")
        .groupBy("item_id", "hour", "kind", "number", "text")
        .agg(F.count(F.lit(1)).cast("int").alias("count"))
    )
    pair = F.struct("number", "text", "count")
    by_kind = [
        F.sort_array(F.collect_list(F.when(F.col("kind") == k, pair))).alias(f"pairs__{k}")
        for k in range(len(together))
    ]
    packed = counted.groupBy("item_id", "hour").agg(*by_kind)
    columns = []
    for k, (column, attribute) in enumerate(together.items()):
        field = "number" if attribute.id_type is IdType.INT64 else "text"
        columns.append(values(F.col(f"pairs__{k}"), field).alias(column))
        columns.append(values(F.col(f"pairs__{k}"), "count").alias(counts_column(column)))
    return packed.select("item_id", "hour", *columns)


def _with_predecessors(events: DataFrame, state: DataFrame, dataset: Dataset) -> DataFrame:
    """Events of the co-occurrence's stream that came for the first time: `item_id`, `hour`, `own__<name>`
    of attributes that are counted beside it, and `before__<name>`, the values of the last `max(lags)`
    events before it: those of the state, and then the day's.
    """
    pairs = dataset.co_occurrence
    assert pairs is not None
    stream, most = dataset.stream(pairs.stream), max(pairs.lags)
    known = state.select(
        "user_id",
        F.col(history_column(stream.name, "event_id")).alias("held"),
        *(last(F.col(history_column(stream.name, n)), most).alias(f"held__{n}") for n in pairs.before),
    )  # fmt: skip
    day = events.where(F.col("stream") == stream.name).select(
        "user_id",
        "event_id",
        "available_time",
        F.col(pairs.attribute).alias("item_id"),
        *(F.col(n).alias(f"own__{n}") for n in pairs.beside),
        *(F.coalesce(F.col(n), missing(stream.attribute(n))).alias(f"of__{n}") for n in pairs.before),
    )  # fmt: skip
    again = F.coalesce(F.array_contains("held", F.col("event_id")), F.lit(False))
    first_time = day.join(known, "user_id", "left").where(~again)
    timeline = Window.partitionBy("user_id").orderBy("available_time", "event_id")
    earlier = timeline.rowsBetween(-most, -1)

    def before(name: str) -> Column:
        none = empty(f"array<{spark_type(value_type(stream.attribute(name)))}>")
        today = F.coalesce(F.collect_list(f"of__{name}").over(earlier), none)
        return last(F.concat(F.coalesce(F.col(f"held__{name}"), none), today), most)

    return first_time.select(
        "item_id",
        hour_of(F.col("available_time")).alias("hour"),
        *(f"own__{n}" for n in pairs.beside),
        *(before(n).alias(f"before__{n}") for n in pairs.before),
    )


def run(context: JobContext) -> None:
    """Build `item_aggregates` of the context's day, where the spec has item features.

    Raises:
        MissingPartitionError: the day's events, or item counts or histories of a day before, are
            missing.
    """
    dataset, ds = context.dataset, context.ds
    if dataset.item_features is None:
        return
    inputs: dict[str, int] = {}
    events = read(context, "events", [ds], inputs)
    earlier = item_features.load(context, add_days(ds, -1), inputs)
    state = None if dataset.co_occurrence is None else load_before(context, inputs)
    frame = transform(events, earlier, state, dataset, ds)
    publish(context, "item_aggregates", frame, inputs)


if __name__ == "__main__":
    from jobs.context import main

    main("build_item_aggregates")
