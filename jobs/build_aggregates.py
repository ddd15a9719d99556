"""`aggregates`: the legacy sparse and dense features of each user, and `item_aggregates`.

What is served in batch has to be finished by midnight, so that the features of a day are computed
from what was available before its end less `serve_delay`, the cutoff; a window of W days is
`[cutoff - W days, cutoff)` in `available_time`. An event delivered again on a later day counts
again here: its own history drops it, but going through a window's events by id would cost more
than all of these features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from feature_store.columns import dense_column, scores_column, sparse_column, user_attribute_column
from feature_store.days import DAY_US, HOUR_US
from feature_store.spec import Aggregate, Dataset, DenseFeature, IdType, SparseFeature
from feature_store.spec_parts import MAX_FLOAT32
from feature_store.tables import contract
from feature_store.tables.aggregates import cutoff_us, event_days
from jobs.frames import (
    conform,
    days_from,
    empty,
    is_id,
    missing,
    publish,
    read,
    spark_type,
    values,
)

if TYPE_CHECKING:
    from jobs.context import JobContext


def transform(events: DataFrame, dataset: Dataset, ds: str) -> DataFrame:
    """The user features as of `cutoff_us(dataset, ds)`.

    Args:
        events: partitions `event_days(dataset, ds)` of `events`.

    Returns:
        One row per user with an event in the longest window.
    """
    cutoff = cutoff_us(dataset, ds)
    start = cutoff - dataset.window_days * DAY_US
    events = events.where((F.col("available_time") >= start) & (F.col("available_time") < cutoff))
    found = [
        *_user_attributes(dataset),
        *(_dense(f, cutoff).alias(f"d__{f.name}") for f in dataset.dense_features),
    ]
    by_user = events.groupBy("user_id")
    users = by_user.agg(*found) if found else events.select("user_id").distinct()
    if dataset.sparse_features:
        users = users.join(_sparse(events, dataset, cutoff), "user_id", "left")
    table = contract(dataset, "aggregates")
    columns = [F.col("user_id")]
    for user_attribute in dataset.user_attributes:
        attribute = dataset.stream(user_attribute.stream).attribute(user_attribute.attribute)
        name = user_attribute_column(user_attribute.name)
        columns.append(F.coalesce(F.col(f"{name}.value"), missing(attribute)).alias(name))
    for sparse in dataset.sparse_features:
        kind = spark_type(table.schema.field(sparse_column(sparse.name)).type)
        entries = F.col(f"s__{sparse.name}")
        ids = values(entries, _id_field(dataset, sparse))
        columns.append(F.coalesce(ids.cast(kind), empty(kind)).alias(sparse_column(sparse.name)))
        if sparse.scored:
            scores = F.transform(entries, lambda e: (-e["rank"]).cast("float"))
            columns.append(
                F.coalesce(scores, empty("array<float>")).alias(scores_column(sparse.name))
            )
    for dense in dataset.dense_features:
        columns.append(_dense_value(dense).alias(dense_column(dense.name)))
    return conform(users.select(*columns), table, ds)


def _of(stream: str, since: int) -> Column:
    return (F.col("stream") == stream) & (F.col("available_time") >= since)


def _user_attributes(dataset: Dataset) -> list[Column]:
    columns = []
    for user_attribute in dataset.user_attributes:
        attribute = dataset.stream(user_attribute.stream).attribute(user_attribute.attribute)
        value = F.col(attribute.name)
        known = (F.col("stream") == user_attribute.stream) & is_id(value, attribute.id_type)
        newest = F.struct("available_time", "event_id", value.alias("value"))
        # on Sail `max` of structs takes several times as long as sorting a user's list of them
        ranked = F.sort_array(F.collect_list(F.when(known, newest)), asc=False)
        columns.append(F.get(ranked, F.lit(0)).alias(user_attribute_column(user_attribute.name)))
    return columns


def _dense(feature: DenseFeature, cutoff: int) -> Column:
    since = cutoff - feature.window_days * DAY_US
    ours = _of(feature.stream, since)
    if feature.aggregate is Aggregate.SUM:
        value = F.col(feature.attribute).cast("double")
        return F.sort_array(F.collect_list(F.when(ours & ~F.isnan(value), value)))
    if feature.aggregate is Aggregate.RECENCY:
        newest = F.max(F.when(ours, F.col("available_time")))
        return F.lit(cutoff) - F.coalesce(newest, F.lit(since))
    if feature.aggregate is Aggregate.RATE:
        assert feature.per is not None
        return F.struct(
            F.count(F.when(ours, 1)).alias("events"),
            F.count(F.when(_of(feature.per, since), 1)).alias("per"),
        )
    return F.count(F.when(ours, 1))


def _dense_value(feature: DenseFeature) -> Column:
    column = F.col(f"d__{feature.name}")
    if feature.aggregate is Aggregate.SUM:
        # In a fixed order: a sum of floats in the order that rows happen to come in does not repeat.
        total = F.aggregate(column, F.lit(0.0).cast("double"), lambda total, value: total + value)
        # float32 ends before a double does
        return F.greatest(F.least(total, F.lit(MAX_FLOAT32)), F.lit(-MAX_FLOAT32))
    if feature.aggregate is Aggregate.RECENCY:
        return column.cast("double") / F.lit(float(HOUR_US))
    if feature.aggregate is Aggregate.RATE:
        events, per = column["events"].cast("double"), column["per"].cast("double")
        return F.when(per > 0, events / per).otherwise(F.lit(0.0).cast("double"))
    return column


def _kind(dataset: Dataset, feature: SparseFeature) -> IdType:
    return dataset.stream(feature.stream).attribute(feature.attribute).id_type


def _id_field(dataset: Dataset, feature: SparseFeature) -> str:
    return "number" if _kind(dataset, feature) is IdType.INT64 else "text"


def _sparse(events: DataFrame, dataset: Dataset, cutoff: int) -> DataFrame:
    """Per user `s__<feature>`: structs (rank, id), newest or most frequent first, the best `max_ids`.

    Features of one attribute over several windows are counted together, as one `source`.
    """
    sources: dict[tuple[str, str], list[SparseFeature]] = {}
    for feature in dataset.sparse_features:
        sources.setdefault((feature.stream, feature.attribute), []).append(feature)
    entries: dict[str, list[Column]] = {}
    reach: dict[str, int] = {}
    for index, ((stream, name), features) in enumerate(sources.items()):
        number, text = F.lit(None).cast("bigint"), F.lit(None).cast("string")
        if _kind(dataset, features[0]) is IdType.INT64:
            number = F.when(is_id(F.col(name), IdType.INT64), F.col(name))
        else:
            text = F.when(is_id(F.col(name), IdType.STRING), F.col(name))
        entry = F.struct(F.lit(index).alias("source"), number.alias("number"), text.alias("text"))
        entries.setdefault(stream, []).append(entry)
        reach[stream] = max(reach.get(stream, 1), *(f.window_days for f in features))
    found = F.coalesce(
        *(F.when(_of(s, cutoff - reach[s] * DAY_US), F.array(*e)) for s, e in entries.items())
    )
    windows = sorted({f.window_days for f in dataset.sparse_features if f.scored})
    ids = (
        events.select("user_id", "available_time", F.explode(found).alias("entry"))
        .select("user_id", "available_time", "entry.*")
        .where(F.col("number").isNotNull() | F.col("text").isNotNull())
        .groupBy("user_id", "source", "number", "text")
        .agg(
            F.max("available_time").alias("newest"),
            *(
                F.count(F.when(F.col("available_time") >= cutoff - days * DAY_US, 1)).alias(
                    f"events_{days}d"
                )
                for days in windows
            ),
        )
    )
    lists = []
    for index, features in enumerate(sources.values()):
        for feature in features:
            rank = -F.col(f"events_{feature.window_days}d" if feature.scored else "newest")
            ours = (F.col("source") == index) & (
                F.col("newest") >= cutoff - feature.window_days * DAY_US
            )
            entry = F.struct(rank.alias("rank"), _id_field(dataset, feature))
            ranked = F.sort_array(F.collect_list(F.when(ours, entry)))
            lists.append(F.slice(ranked, 1, feature.max_ids).alias(f"s__{feature.name}"))
    return ids.groupBy("user_id").agg(*lists)


def run(context: JobContext) -> None:
    """Build `aggregates` of the context's day.

    Raises:
        MissingPartitionError: events in the longest window are missing.
    """
    dataset, ds = context.dataset, context.ds
    inputs: dict[str, int] = {}
    days = days_from(context.lake, "events", event_days(dataset, ds)[0], ds)
    frame = transform(read(context, "events", days, inputs), dataset, ds)
    publish(context, "aggregates", frame, inputs)


if __name__ == "__main__":
    from jobs.context import main

    main("build_aggregates")
