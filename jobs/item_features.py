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
    before_column,
    co_occurrence_columns,
    contract,
    counts_column,
    history_column,
    item_feature_column,
)
from jobs.frames import conform, days_from, empty, hour_of, is_id, read, spark_type, values

if TYPE_CHECKING:
    from jobs.context import JobContext

SEEN_DAYS = 30  # how long an item is remembered that nobody touches


def transform(
    events: DataFrame, earlier: DataFrame, sequences: DataFrame | None, dataset: Dataset, ds: str
) -> DataFrame:
    """Events on each item by the hour in which they became available, and when it was first seen.

    Args:
        events: partition `ds` of `events`.
        earlier: partitions of `item_aggregates` of the `SEEN_DAYS` days before `ds`. An item keeps
            its `first_seen` as long as somebody touches it every so many days.
        sequences: partition `ds` of `sequences`, from which co-occurrence is counted: of a user's
            events of the day the last `max_events`; None where the spec has no co-occurrence.
    """
    assert dataset.item_features is not None
    streams = dataset.item_features.streams
    kind = spark_type(contract(dataset, "item_aggregates").schema.field("item_id").type)
    found = [
        F.when(
            (F.col("stream") == stream) & is_id(F.col(attribute), dataset.item_id_type),
            F.struct(F.col(attribute).cast(kind).alias("item_id"), F.lit(stream).alias("counted")),
        )
        for stream, attribute in streams
    ]
    items = events.select(
        "available_time",
        F.explode(F.filter(F.array(*found), lambda e: e.isNotNull())).alias("entry"),
    ).select("available_time", "entry.*")
    hours = items.groupBy("item_id", hour_of(F.col("available_time")).alias("hour")).agg(
        *(F.count(F.when(F.col("counted") == s, 1)).alias(f"events__{s}") for s in dict(streams)),
        F.min("available_time").alias("seen"),
    )
    seen = earlier.select("item_id", F.col("first_seen").alias("seen")).unionByName(
        hours.select("item_id", "seen")
    )
    first = seen.groupBy("item_id").agg(F.min("seen").alias("first_seen"))
    found = hours.join(first, "item_id")
    together = co_occurrence_columns(dataset)
    if together:
        assert sequences is not None
        found = found.join(_together(sequences, dataset, ds), ["item_id", "hour"], "left")
        kinds = {f.name: spark_type(f.type) for f in contract(dataset, "item_aggregates").schema}
        packed = [c for name in together for c in (name, counts_column(name))]
        found = found.select(
            "item_id", "hour", *(f"events__{s}" for s in dict(streams)), "first_seen",
            *(F.coalesce(F.col(n), empty(kinds[n])).alias(n) for n in packed),
        )  # fmt: skip
    return conform(found, contract(dataset, "item_aggregates"), ds)


def _together(sequences: DataFrame, dataset: Dataset, ds: str) -> DataFrame:
    """Per (item_id, hour) of the day: the co-occurrence columns, values in ascending order."""
    pairs = dataset.co_occurrence
    assert pairs is not None
    stream = dataset.stream(pairs.stream)
    together = co_occurrence_columns(dataset)

    def held(name: str) -> Column:
        return F.col(history_column(pairs.stream, name))

    index = F.col("index")  # of the event in its history, from 0
    named = {pairs.attribute: "item_id"} | {n: f"own__{n}" for n in pairs.beside}
    new = sequences.select(
        *(history_column(pairs.stream, n) for n in {*named, *pairs.before}),
        F.posexplode(held("available_time")).alias("index", "available_time"),
    ).where(F.col("available_time") >= start_us(ds, dataset.utc_offset))
    new = new.select(
        hour_of(F.col("available_time")).alias("hour"),
        *(F.get(held(n), index).alias(alias) for n, alias in named.items()),
        *(
            F.slice(
                held(n), F.greatest(index - lags, F.lit(0)) + 1, F.least(index, F.lit(lags))
            ).alias(before_column(n, lags))
            for n, lags in product(pairs.before, pairs.lags)
        ),
    ).where(is_id(F.col("item_id"), dataset.item_id_type))

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
        entries = F.concat(entries, F.transform(before_column(name, lags), one))
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


def asked(targets: DataFrame, item_aggregates: DataFrame, dataset: Dataset, ds: str) -> DataFrame:
    """Counts of each (item_id, hour) among `targets` over the hours that closed before `hour`.

    A window over the union of counted hours and asked hours, instead of a range join.
    """
    assert dataset.item_features is not None
    streams, windows = dict(dataset.item_features.streams), dataset.item_features.windows_hours
    counts = [f"events__{s}" for s in streams]
    probes = targets.select("item_id", "hour").distinct()
    nothing = [F.lit(None).cast("bigint").alias(c) for c in (*counts, "first_seen")]
    by_item = item_aggregates.select(
        "item_id", "hour", *counts, "first_seen", F.lit(0).alias("asked")
    )
    by_item = by_item.unionByName(
        probes.select("item_id", "hour", *nothing, F.lit(1).alias("asked"))
    )
    per_item = Window.partitionBy("item_id").orderBy("hour")
    item_sums = [
        F.sum(f"events__{s}").over(per_item.rangeBetween(-w, -1)).alias(f"{s}_{w}h")
        for s in streams
        for w in windows
    ]
    seen = (
        F.min("first_seen").over(per_item.rangeBetween(Window.unboundedPreceding, -1)).alias("seen")
    )
    items = by_item.select("item_id", "hour", "asked", *item_sums, seen).where(F.col("asked") == 1)
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
        "hour",
        *(
            F.sum(f"events__{s}").over(over_hours.rangeBetween(-w, -1)).alias(f"{s}_all_{w}h")
            for s in streams
            for w in windows
        ),
    )
    return items.join(totals, "hour", "left")


def features(dataset: Dataset) -> list[Column]:
    """The `targets__item__` columns of a target that is joined with what `asked` counted."""
    assert dataset.item_features is not None
    columns = []
    for stream, _ in dataset.item_features.streams:
        for hours in dataset.item_features.windows_hours:
            count = F.coalesce(F.col(f"{stream}_{hours}h"), F.lit(0)).cast("double")
            total = F.greatest(
                F.coalesce(F.col(f"{stream}_all_{hours}h"), F.lit(0)), F.lit(1)
            ).cast("double")
            columns += [F.log1p(count), F.log1p(F.lit(1e4) * count / total)]
    age = (F.col("as_of") - F.col("seen")).cast("double") / F.lit(float(HOUR_US))
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
