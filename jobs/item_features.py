"""`item_aggregates`, what is counted about items by the hour, and the features of a target's item.

A target sees the hours that closed before its `as_of`; an item's features are the same for all
targets of one hour, so that they are computed once per (item, hour) that is asked for.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from feature_store.days import HOUR_US, shift, start_us
from feature_store.spec import Dataset, IdType
from feature_store.tables import (
    co_occurrence_columns,
    contract,
    counts_column,
    history_column,
    item_feature_column,
    value_type,
)
from jobs.frames import (
    conform,
    days_from,
    empty,
    hour_of,
    is_id,
    last,
    missing,
    read,
    spark_type,
    values,
)

if TYPE_CHECKING:
    from jobs.context import JobContext

SEEN_DAYS = 30  # how long an item is remembered that nobody touches


def transform(
    events: DataFrame, earlier: DataFrame, state: DataFrame | None, dataset: Dataset, ds: str
) -> DataFrame:
    """Events on each item by the hour in which they became available, and when it was first seen.

    No hour depends on what became available after it.

    Args:
        events: partition `ds` of `events`.
        earlier: partitions of `item_aggregates` of the `SEEN_DAYS` days before `ds`. An item keeps
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


def counts_before(
    targets: DataFrame, item_aggregates: DataFrame, dataset: Dataset, ds: str
) -> DataFrame:
    """Counts of each (`item_id`, `_hour`) among `targets` over the hours that closed before it.

    A window over the union of counted hours and those of targets, instead of a range join. To be joined
    with impressions, whose context may have any name: all columns but `item_id` begin with an underscore.
    """
    assert dataset.item_features is not None
    windows = dataset.item_features.windows_hours
    streams = [s for s, _ in dataset.item_features.streams]
    counts = [f"events__{s}" for s in streams]
    wanted = targets.select("item_id", F.col("_hour").alias("hour")).distinct()
    nothing = [F.lit(None).cast("bigint").alias(c) for c in (*counts, "first_seen")]
    by_item = item_aggregates.select(
        "item_id", "hour", *counts, "first_seen", F.lit(0).alias("wanted")
    )
    by_item = by_item.unionByName(
        wanted.select("item_id", "hour", *nothing, F.lit(1).alias("wanted"))
    )
    per_item = Window.partitionBy("item_id").orderBy("hour")
    item_sums = [
        F.sum(f"events__{s}").over(per_item.rangeBetween(-w, -1)).alias(_count(s, w))
        for s in streams
        for w in windows
    ]
    seen = F.min("first_seen").over(per_item.rangeBetween(Window.unboundedPreceding, -1))
    items = by_item.select(
        "item_id", F.col("hour").alias("_hour"), "wanted", *item_sums, seen.alias("_seen")
    )
    items = items.where(F.col("wanted") == 1).drop("wanted")
    if not windows:
        return items
    first_hour = start_us(ds, dataset.utc_offset) // HOUR_US - max(windows)
    recent = item_aggregates.where(F.col("hour") >= first_hour)
    hours = recent.groupBy("hour").agg(*(F.sum(c).alias(c) for c in counts))
    last_hour = first_hour + max(windows) + 25
    every_hour = F.sequence(F.lit(first_hour), F.lit(last_hour)).cast("array<bigint>")
    calendar = item_aggregates.sparkSession.range(1).select(F.explode(every_hour).alias("hour"))
    over_hours = Window.partitionBy(F.lit(0)).orderBy("hour")
    totals = calendar.join(hours, "hour", "left").select(
        F.col("hour").alias("_hour"),
        *(
            F.sum(f"events__{s}").over(over_hours.rangeBetween(-w, -1)).alias(_total(s, w))
            for s in streams
            for w in windows
        ),
    )
    return items.join(totals, "_hour", "left")


def _count(stream: str, hours: int) -> str:
    return f"_count__{stream}__{hours}"


def _total(stream: str, hours: int) -> str:
    return f"_total__{stream}__{hours}"


def features(dataset: Dataset) -> list[Column]:
    """The `targets__item__` columns of a target that is joined with what `counts_before` gave."""
    assert dataset.item_features is not None
    columns = []
    for stream, _ in dataset.item_features.streams:
        for hours in dataset.item_features.windows_hours:
            count = F.coalesce(F.col(_count(stream, hours)), F.lit(0)).cast("double")
            total = F.greatest(F.coalesce(F.col(_total(stream, hours)), F.lit(0)), F.lit(1))
            columns += [F.log1p(count), F.log1p(F.lit(1e4) * count / total.cast("double"))]
    age = (F.col("as_of") - F.col("_seen")).cast("double") / F.lit(float(HOUR_US))
    columns.append(F.coalesce(F.log1p(age), F.lit(-1.0).cast("double")))
    names = [item_feature_column(n) for n in dataset.item_features.names]
    return [c.cast("float").alias(n) for c, n in zip(columns, names, strict=True)]


def load(context: JobContext, last_day: str, inputs: dict[str, int]) -> DataFrame:
    """Partitions of `item_aggregates` from `SEEN_DAYS` before the context's day to `last_day`, noted in
    `inputs`; an empty frame where there is none yet."""
    known = context.lake.partitions("item_aggregates")
    if not any(day <= last_day for day in known):
        return context.lake.frame(context.spark, "item_aggregates", [last_day])
    days = days_from(context.lake, "item_aggregates", shift(context.ds, -SEEN_DAYS), last_day)
    return read(context, "item_aggregates", days, inputs)
