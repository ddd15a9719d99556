"""`sequences`: each user's last `max_events` of every stream, as of the end of a day.

A day's partition holds the users that the day touched; a *base* holds all of them. A user's state
is their newest row since the last base, so a day costs what its events cost, not what the length
of history does. A partition is a base every `base_days` days, and where there is nothing to build
on: no earlier partition, or one that is not current (`feature_store/lineage.py`).

An event whose id is already in its user's state was delivered again, and is dropped. The full
rebuild (`--full`) goes through the same days in one pass, so that it equals the incremental build
row by row.
"""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from feature_store.columns import history_column
from feature_store.days import add_days, day_range, parse_day
from feature_store.errors import MissingPartitionError
from feature_store.spec import Dataset
from feature_store.tables import contract
from jobs.frames import (
    conform,
    days_from,
    empty,
    history_types,
    last,
    newest,
    pack_events,
    publish,
    read,
    values,
)

if TYPE_CHECKING:
    from jobs.context import JobContext

_EPOCH = date(1970, 1, 1)


def transform(
    events: DataFrame, state: DataFrame, dataset: Dataset, ds: str, *, base: bool = False
) -> DataFrame:
    """The state at the end of the day before, merged with the day's events.

    Args:
        events: partition `ds` of `events`.
        state: one row per user (`frames.newest`).
        base: keep the users that the day did not touch as well.
    """
    touched = events.groupBy("user_id").agg(*pack_events(dataset))
    merged = touched.join(state, "user_id", "full_outer" if base else "left")
    kept, columns = [F.col("user_id")], [F.col("user_id")]
    for stream in dataset.streams:
        types = history_types(dataset, stream)
        old = {
            n: F.coalesce(F.col(history_column(stream.name, n)), empty(t)) for n, t in types.items()
        }
        new = F.col(f"new__{stream.name}")
        again = F.size(F.array_intersect(old["event_id"], values(new, "event_id"))) > 0
        first_time = F.when(again, _without(new, old["event_id"])).otherwise(new)
        kept += [
            *(c.alias(history_column(stream.name, n)) for n, c in old.items()),
            first_time.alias(f"new__{stream.name}"),
        ]
        for name, kind in types.items():
            column = history_column(stream.name, name)
            added = F.coalesce(values(new, name), empty(kind))
            columns.append(last(F.concat(F.col(column), added), stream.max_events).alias(column))
    return conform(
        merged.select(*kept).select(*columns, F.lit(ds).alias("ds")),
        contract(dataset, "sequences"),
        ds,
    )


def _without(new: Column, ids: Column) -> Column:
    return F.filter(new, lambda event: ~F.array_contains(ids, event["event_id"]))


def rebuild(events: DataFrame, dataset: Dataset, ds: str, *, base: bool = False) -> DataFrame:
    """What `transform` gives after going through every day up to `ds`, in one pass.

    Args:
        events: all partitions of `events` up to `ds`.
        base: every user, not only those that `ds` touched.
    """
    streams = dataset.streams
    names = [f"new__{s.name}" for s in streams]
    days = events.groupBy("user_id", "ds").agg(*pack_events(dataset))
    users = days.groupBy("user_id").agg(
        F.sort_array(F.collect_list(F.struct("ds", *names))).alias("days"),
        F.max("ds").alias("touched"),
    )
    if not base:
        users = users.where(F.col("touched") == ds)
    packed = users.select(
        "user_id", *(_fold(s.name, s.max_events).alias(f"new__{s.name}") for s in streams)
    )
    columns = [
        values(F.col(f"new__{s.name}"), n).alias(history_column(s.name, n))
        for s in streams
        for n in history_types(dataset, s)
    ]
    return conform(packed.select("user_id", *columns), contract(dataset, "sequences"), ds)


def _fold(stream: str, max_events: int) -> Column:
    """A user's last events of `stream` from their `days`, day by day only where an id comes twice."""
    field = f"new__{stream}"
    everything = F.flatten(values(F.col("days"), field))
    ids = values(everything, "event_id")

    def add_day(state: Column, day: Column) -> Column:
        held = values(state, "event_id")
        return last(F.concat(state, _without(day[field], held)), max_events)

    nothing = F.filter(everything, lambda _: F.lit(False))
    day_by_day = F.aggregate(F.col("days"), nothing, add_day)
    once = F.size(F.array_distinct(ids)) == F.size(ids)
    return F.when(once, last(everything, max_events)).otherwise(day_by_day)


def is_base_day(dataset: Dataset, ds: str) -> bool:
    """Whether `ds` is one of the days on which `sequences` holds every user."""
    return (parse_day(ds) - _EPOCH).days % dataset.base_days == 0


def load_state(context: JobContext, day: str, inputs: dict[str, int]) -> DataFrame | None:
    """The state at the end of `day` from partitions of `sequences`, noted in `inputs`.

    Returns:
        One row per user; None where there is nothing to build on: no partition up to `day`, or one
        that is not current.

    Raises:
        MissingPartitionError: a day up to `day` was not written, but an earlier day was.
    """
    lineage = context.lake.lineage()
    known = lineage.days("sequences")
    bases = [d for d, partition in known.items() if d <= day and partition.notes.get("base")]
    first = max(bases, default=min(known, default=""))
    if not first or first > day:
        return None
    days = day_range(first, day)
    if not bases or any(d in known and lineage.stale("sequences", d) for d in days):
        if day in known:
            return None
        days = [day]  # which says that it is missing
    return newest(read(context, "sequences", days, inputs))


def load_events(context: JobContext, day: str, inputs: dict[str, int]) -> DataFrame:
    """Every partition of `events` up to `day`, noted in `inputs`."""
    return read(context, "events", days_from(context.lake, "events", "0001-01-01", day), inputs)


def load_before(context: JobContext, inputs: dict[str, int]) -> DataFrame:
    """The state at the end of the day before the context's, noted in `inputs`: one row per user.

    Raises:
        MissingPartitionError: as of `load_state`.
    """
    yesterday = add_days(context.ds, -1)
    state = load_state(context, yesterday, inputs)
    if state is not None:
        return state
    if any(day <= yesterday for day in context.lake.partitions("events")):
        events = load_events(context, yesterday, inputs)
        return rebuild(events, context.dataset, yesterday, base=True).drop("ds")
    return context.lake.frame(context.spark, "sequences", [yesterday]).drop("ds")


def run(context: JobContext) -> None:
    """Build `sequences` of the context's day.

    Raises:
        MissingPartitionError: the day's events, or the sequences of the day before, are missing.
    """
    dataset, ds = context.dataset, context.ds
    inputs: dict[str, int] = {}
    try:
        state = load_state(context, add_days(ds, -1), {} if context.full else inputs)
    except MissingPartitionError:
        if not context.full:
            raise
        state = None
    base = state is None or is_base_day(dataset, ds)
    if state is None or context.full:
        frame = rebuild(load_events(context, ds, inputs), dataset, ds, base=base)
    else:
        frame = transform(read(context, "events", [ds], inputs), state, dataset, ds, base=base)
    publish(context, "sequences", frame, inputs, base=base, rebuilt=state is None or context.full)


if __name__ == "__main__":
    from jobs.context import main

    main("build_sequences")
