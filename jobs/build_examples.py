"""`examples`: one row per user-day, the history once and every target of the day with what it may see.

A user's events and targets of the day are put into one timeline, ordered by (availability or
`as_of`, targets first, streams as the spec lists them, id, kind of target), so that running counts say
how many events are available before each target: point in time without a join per target. One
grouping then packs both, behind the history as of the evening before. A user-day of more than
`max_part_rows` events and targets is cut into consecutive parts, counted from 0: each starts from the
last `max_events` of each stream before its own first moment, so that no row grows without bound and
no target loses an event. Parts without targets are left out.

What each target is joined with was known at its `as_of`: user features of the evening before, and
item features of the hours that had closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from feature_store.columns import context_column, history_column, history_end_column
from feature_store.days import add_days
from feature_store.spec import Dataset, EventStream
from feature_store.tables import contract
from jobs import item_features
from jobs.build_sequences import load_before
from jobs.frames import (
    conform,
    empty,
    event_struct,
    history_types,
    hour_of,
    is_id,
    missing,
    publish,
    read,
    spark_type,
    values,
)

if TYPE_CHECKING:
    from jobs.context import JobContext

_TARGET = -1  # in place of a stream's index
_MOST_NAMED = 1000  # users, or events, in a predicate


@dataclass(frozen=True, kw_only=True)
class Unusual:
    """What only few users of a day have, and what so costs little where it is known beforehand.

    Args:
        busy_users: who has more than `max_part_rows` events and targets, the only ones that are cut
            into parts. None: not known.
        delivered_again: ids of the day's events that their user's state holds. None: not known.
    """

    busy_users: Sequence[int | str] | None = None
    delivered_again: Sequence[int] | None = None


def transform(
    *,
    events: DataFrame,
    impressions: DataFrame,
    state: DataFrame,
    aggregates: DataFrame,
    item_aggregates: DataFrame | None,
    dataset: Dataset,
    ds: str,
    unusual: Unusual | None = None,
) -> DataFrame:
    """The examples of one day.

    Args:
        events, impressions: partition `ds` of each.
        state: one row per user, the sequences at the end of the day before (`frames.newest`).
        aggregates: the partition of the day before; empty on the first day.
        item_aggregates: partitions of the days that it reaches back and of `ds`; None where the
            dataset declares no item features.
        unusual: what needs more work, from `unusual_of`; None: not known, which costs a join of
            every event with its user's state and a sort of everybody's day.
    """
    targets = _targets(impressions, item_aggregates, dataset, ds)
    unusual = unusual or Unusual()
    events = _first_time(events, state, dataset, unusual.delivered_again)
    rows = _rows(events, targets, dataset, unusual.busy_users)
    packed = _pack(rows, dataset).join(state, "user_id", "left")
    packed = packed.select("*", *_histories(dataset))
    history = [
        F.slice(F.concat(F.col(f"before__{s.name}__{n}"), values(F.col(f"events__{s.name}"), n)),
                F.col(f"drop__{s.name}") + 1, F.col(f"keep__{s.name}")).alias(history_column(s.name, n))
        for s in dataset.streams
        for n in _history_names(dataset, s)
    ]  # fmt: skip
    target = [values(F.col("targets"), name).alias(name) for name in _target_names(dataset)]
    ends = [_history_end(s).alias(history_end_column(s.name)) for s in dataset.streams]
    rows = packed.select("user_id", "part", *history, *target, *ends)
    known = aggregates.drop("ds").withColumn("has_aggregates", F.lit(1))
    return conform(
        _with_user_features(rows.join(known, "user_id", "left"), dataset),
        contract(dataset, "examples"),
        ds,
    )


def _first_time(
    events: DataFrame, state: DataFrame, dataset: Dataset, known: Sequence[int] | None
) -> DataFrame:
    """`events` without those whose id is already in their user's state: they were delivered again."""
    if known is not None:
        return events.where(~F.col("event_id").isin(list(known))) if known else events
    again = _user_days(events.select("user_id", "event_id"), state, dataset)
    again = again.select("user_id", F.explode("again").alias("event_id"))
    return events.join(again, ["user_id", "event_id"], "left_anti")


def _user_days(rows: DataFrame, state: DataFrame, dataset: Dataset) -> DataFrame:
    """Per user of `rows` (user_id, event_id): how many `rows`, and the ids `again` that the state holds."""
    held = F.concat(*(F.col(history_column(s.name, "event_id")) for s in dataset.streams))
    days = rows.groupBy("user_id").agg(
        F.count(F.lit(1)).alias("rows"), F.collect_list("event_id").alias("ids")
    )
    days = days.join(state.select("user_id", held.alias("held")), "user_id", "left")
    again = F.coalesce(F.array_intersect("ids", "held"), empty("array<bigint>"))
    return days.select("user_id", "rows", again.alias("again"))


def _targets(
    impressions: DataFrame, item_aggregates: DataFrame | None, dataset: Dataset, ds: str
) -> DataFrame:
    """(user_id, as_of, target_id, target): `target` is a struct of the `targets__` columns."""
    kinds = F.array(*(F.lit(t.name) for t in dataset.targets))
    item = contract(dataset, "impressions").schema.field("item_id").type
    known_item = is_id(F.col("item_id"), dataset.item_id_type)
    no_item = F.lit("" if spark_type(item) == "string" else -1)
    values_ = [
        F.col("target_id").alias("targets__target_id"),
        (F.array_position(kinds, F.col("target")) - 1).cast("int").alias("targets__target"),
        F.col("time").alias("targets__time"),
        F.col("as_of").alias("targets__as_of"),
        F.when(known_item, F.col("item_id"))
        .otherwise(no_item)
        .cast(spark_type(item))
        .alias("targets__item_id"),
    ]
    values_ += [
        F.coalesce(F.col(c.name), missing(c)).alias(context_column(c.name))
        for c in dataset.context_features
    ]
    if dataset.item_features is not None:
        assert item_aggregates is not None
        targets = impressions.withColumn("_hour", hour_of(F.col("as_of")))
        counts = item_features.counts_before(
            targets.where(known_item), item_aggregates, dataset, ds
        )
        impressions = targets.join(counts, ["item_id", "_hour"], "left")
        values_ += item_features.features(dataset)
    return impressions.select("user_id", "as_of", "target_id", F.struct(*values_).alias("target"))


def _rows(
    events: DataFrame, targets: DataFrame, dataset: Dataset, busy: Sequence[int | str] | None
) -> DataFrame:
    """The day's events and targets in their users' timelines, and the `part` each is packed into.

    An event comes once more (`carried`) for each later part whose base it belongs to.
    """
    if busy is None:
        return _parts(_timeline(events, targets, dataset), dataset)
    whole = F.lit(0).alias("part"), F.lit(False).alias("carried")
    if not busy:
        return _timeline(events, targets, dataset).select("*", *whole)
    is_busy = F.col("user_id").isin(list(busy))
    few = _timeline(events.where(~is_busy), targets.where(~is_busy), dataset).select("*", *whole)
    many = _parts(_timeline(events.where(is_busy), targets.where(is_busy), dataset), dataset)
    return few.unionByName(many.select(*few.columns))


def _timeline(events: DataFrame, targets: DataFrame, dataset: Dataset) -> DataFrame:
    """A row per event and target with its `_position` in the user-day, and `seen__<stream>`: events
    of the day up to here, itself included.
    """
    streams = dataset.streams
    index = F.coalesce(
        *(F.when(F.col("stream") == s.name, F.lit(i)) for i, s in enumerate(streams)),
        F.lit(len(streams)),
    )
    event = F.struct("event_time", *(a.name for a in dataset.event_attributes)).alias("event")
    target_id = spark_type(contract(dataset, "impressions").schema.field("target_id").type)
    # Sail would fill in a void column
    no_target = F.lit(None).cast(_target_type(dataset)).alias("target")
    rows = events.select(
        "user_id",
        F.col("available_time").alias("at"),
        index.alias("stream"),
        "event_id",
        F.col("event_id").cast(target_id).alias("target_id"),
        index.alias("kind"),
        event,
        no_target,
    ).unionByName(
        targets.select(
            "user_id",
            F.col("as_of").alias("at"),
            F.lit(_TARGET).alias("stream"),
            F.col("as_of").alias("event_id"),
            "target_id",
            F.col("target.targets__target").alias("kind"),
            "target",
        ),
        allowMissingColumns=True,
    )  # fmt: skip
    # Targets sort before events of the same instant, since their stream is -1: `available_time < as_of`.
    # No column of the order is a constant in half of the union: see `build_labels`.
    order = ("at", "stream", "event_id", "target_id", "kind")
    timeline = Window.partitionBy("user_id").orderBy(*order)
    so_far = timeline.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    return rows.select(
        "*",
        (F.row_number().over(timeline) - 1).alias("_position"),
        *(
            F.sum((F.col("stream") == i).cast("int"))
            .over(so_far)
            .cast("int")
            .alias(f"seen__{s.name}")
            for i, s in enumerate(streams)
        ),
    )


def _parts(rows: DataFrame, dataset: Dataset) -> DataFrame:
    """Timelines cut into parts of `max_part_rows`.

    An event is in the base of each later part that starts before `max_events` more of its stream:
    the last of them holds the event that is `max_events` further on, or is the user's last.
    """
    streams = dataset.streams
    per_stream = Window.partitionBy("user_id", "stream").orderBy("_position")
    rows = rows.withColumn("own_part", _part(F.col("_position"), dataset))
    last_part = F.max("own_part").over(Window.partitionBy("user_id")).alias("last_part")
    until = [
        F.lead("own_part", s.max_events).over(per_stream).alias(f"until__{s.name}") for s in streams
    ]
    rows = rows.select("*", last_part, *until)
    last_use = F.coalesce(
        F.when(F.col("stream") == _TARGET, F.col("own_part")),
        *(F.when(F.col("stream") == i, F.col(f"until__{s.name}")) for i, s in enumerate(streams)),
        F.col("last_part"),
    )
    rows = rows.select("*", F.explode(F.sequence(F.col("own_part"), last_use)).alias("part"))
    rows = rows.withColumn("carried", F.col("part") > F.col("own_part"))
    return rows.drop("own_part", "last_part", *(f"until__{s.name}" for s in streams))


def _part(position: Column, dataset: Dataset) -> Column:
    size = F.lit(dataset.max_part_rows)
    return ((position - position % size) / size).cast("int")


def _pack(rows: DataFrame, dataset: Dataset) -> DataFrame:
    """One row per part that has targets: `targets`, and per stream the day's `events__<stream>`
    (carried ones first), how many of them are `carried__`, and how many of the day came `earlier__`.
    """
    columns = []
    for i, stream in enumerate(dataset.streams):
        event = event_struct(
            stream, first=("_position", F.col("at").alias("available_time")), source="event."
        )
        is_ours, own = F.col("stream") == i, ~F.col("carried")
        earlier = F.col(f"seen__{stream.name}") - is_ours.cast("int")
        columns += [
            F.sort_array(F.collect_list(F.when(is_ours, event))).alias(f"events__{stream.name}"),
            F.count(F.when(is_ours & ~own, 1)).cast("int").alias(f"carried__{stream.name}"),
            F.min(F.when(own, earlier)).alias(f"earlier__{stream.name}"),
        ]
    seen = [f"seen__{s.name}" for s in dataset.streams]
    fields = (F.col(f"target.{name}").alias(name) for name in _target_names(dataset))
    target = F.struct("_position", *fields, *seen)
    columns.append(
        F.sort_array(F.collect_list(F.when(F.col("stream") == _TARGET, target))).alias("targets")
    )
    return rows.groupBy("user_id", "part").agg(*columns).where(F.size("targets") > 0)


def _history_names(dataset: Dataset, stream: EventStream) -> list[str]:
    return [n for n in history_types(dataset, stream) if n != "event_id"]


def _target_names(dataset: Dataset) -> list[str]:
    names = contract(dataset, "examples").schema.names
    return [
        n for n in names if n.startswith("targets__") and not n.startswith("targets__history_end__")
    ]


def _target_type(dataset: Dataset) -> str:
    schema = contract(dataset, "examples").schema
    fields = (f"{n}: {spark_type(schema.field(n).type.value_type)}" for n in _target_names(dataset))
    return f"struct<{', '.join(fields)}>"


def _histories(dataset: Dataset) -> list[Column]:
    """Per stream what to cut out of yesterday's arrays and today's, and by how much counts shift."""
    columns = []
    for stream in dataset.streams:
        name, types = stream.name, history_types(dataset, stream)
        before = F.coalesce(F.size(history_column(name, "event_time")), F.lit(0))
        base = F.least(F.lit(stream.max_events), before + F.col(f"earlier__{name}"))
        own = F.size(f"events__{name}") - F.col(f"carried__{name}")
        everything = before + F.size(f"events__{name}")
        columns += [
            (base + own).alias(f"keep__{name}"),
            (everything - base - own).alias(f"drop__{name}"),
            (base - F.col(f"earlier__{name}")).alias(f"shift__{name}"),
        ]
        columns += [
            F.coalesce(F.col(history_column(name, n)), empty(types[n])).alias(
                f"before__{name}__{n}"
            )
            for n in _history_names(dataset, stream)
        ]
    return columns


def _history_end(stream: EventStream) -> Column:
    moved = F.col(f"shift__{stream.name}")
    return F.transform("targets", lambda target: target[f"seen__{stream.name}"] + moved)


def _with_user_features(rows: DataFrame, dataset: Dataset) -> DataFrame:
    """The features of users without aggregates filled with what stands for missing values."""
    filled = {"has_aggregates": F.coalesce("has_aggregates", F.lit(0))}
    for ua in dataset.user_attributes:
        name = f"user__{ua.name}"
        filled[name] = F.coalesce(name, missing(dataset.stream(ua.stream).attribute(ua.attribute)))
    schema = contract(dataset, "aggregates").schema
    for name in schema.names:
        if name.startswith("sparse__"):
            filled[name] = F.coalesce(name, empty(spark_type(schema.field(name).type)))
        elif name.startswith("dense__"):
            filled[name] = F.coalesce(name, F.lit(float("nan")).cast("float"))
    return rows.withColumns(filled)


def unusual_of(
    events: DataFrame, impressions: DataFrame, state: DataFrame, dataset: Dataset
) -> Unusual:
    """What is unusual about a day, in one small query."""
    rows = events.select("user_id", "event_id").unionByName(
        impressions.select("user_id", F.lit(None).cast("bigint").alias("event_id"))
    )
    days = _user_days(rows, state, dataset)
    is_busy = F.col("rows") > dataset.max_part_rows
    named = days.where(is_busy | (F.size("again") > 0)).orderBy(F.desc("rows"))
    found = named.limit(
        _MOST_NAMED + 1
    ).collect()  # the busy first: cut off, they are still all here
    busy = [row["user_id"] for row in found if row["rows"] > dataset.max_part_rows]
    again = [event_id for row in found for event_id in row["again"]]
    return Unusual(
        busy_users=None if len(busy) > _MOST_NAMED else busy,
        delivered_again=None if max(len(found), len(again)) > _MOST_NAMED else again,
    )


def run(context: JobContext) -> None:
    """Build `examples` of the context's day.

    Raises:
        MissingPartitionError: something of the day, or of the day before, is missing.
    """
    dataset, ds, yesterday = context.dataset, context.ds, add_days(context.ds, -1)
    inputs: dict[str, int] = {}
    state = load_before(context, inputs)
    if any(day <= yesterday for day in context.lake.partitions("events")):
        aggregates = read(context, "aggregates", [yesterday], inputs)
    else:
        aggregates = context.lake.frame(context.spark, "aggregates", [yesterday])
    items = None
    if dataset.item_features is not None:
        context.lake.require("item_aggregates", [ds])
        items = item_features.load(context, ds, inputs)
    events = read(context, "events", [ds], inputs)
    impressions = read(context, "impressions", [ds], inputs)
    frame = transform(
        events=events,
        impressions=impressions,
        state=state,
        aggregates=aggregates,
        item_aggregates=items,
        dataset=dataset,
        ds=ds,
        unusual=unusual_of(events, impressions, state, dataset),
    )
    publish(context, "examples", frame, inputs)


if __name__ == "__main__":
    from jobs.context import main

    main("build_examples")
