"""Features of a target's item, from what `item_aggregates` counted in the hours that had closed.

Counts, totals and when the item was first seen are the same for all targets of one hour, and are computed
once per (item, hour) that is asked for. `age_h` alone is to the microsecond: it runs up to the target's
own `as_of`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from feature_store.columns import item_feature_column
from feature_store.days import HOUR_US, add_days, start_us
from feature_store.spec import Dataset
from jobs.frames import days_from, read

if TYPE_CHECKING:
    from jobs.context import JobContext

SEEN_DAYS = 30  # how long an item is remembered that nobody touches


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
    `inputs`; an empty frame where there were no events yet.

    Raises:
        MissingPartitionError: a day that has events has no counts.
    """
    if not any(day <= last_day for day in context.lake.partitions("events")):
        return context.lake.frame(context.spark, "item_aggregates", [last_day])
    days = days_from(context.lake, "events", add_days(context.ds, -SEEN_DAYS), last_day)
    return read(context, "item_aggregates", days, inputs)
