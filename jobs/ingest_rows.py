"""Raw rows of a source, typed and marked: what is wrong with each, and whether it belongs to the day.

The columns of the contract less `ds`, and marks, whose names no spec can have:
    _part       the stream, or the kind of target
    _problem    `<column>/<code>` of the first thing wrong with the row; null where nothing is
    _value      the value that is wrong
    _clipped    how many of its values were clipped
    _outside    the row belongs to another day
    _late       it reached the log on a later day than it would have without a detour
    _arrived    when the log had it, as far as the source says (0 where it does not): rows of one key
                that arrived at different times are versions of one row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from feature_store.columns import id_type, label_column, value_type
from feature_store.days import DAY_US, end_us, micros, start_us
from feature_store.errors import DataError
from feature_store.spec import Dataset, EventStream, IdType
from jobs.frames import spark_type
from jobs.ingest_values import Problem, Values

MARKS = ("_part", "_problem", "_value", "_clipped", "_outside", "_late", "_arrived")
LATEST_DAYS = 30  # an event that is older when it arrives is a wrong clock, not a late event


def hash_of(first: str, columns: Sequence[Column]) -> Column:
    """A non-negative int64 of a name and values: nulls count, and values do not run into each other."""
    parts = [F.lit(first)]
    for column in columns:
        parts += [column.isNull().cast("int"), column]
    return F.xxhash64(*parts).bitwiseAND(F.lit(2**63 - 1))


def events(
    frames: Mapping[str, DataFrame], dataset: Dataset, ds: str, *, overlapping: bool
) -> DataFrame:
    """All streams' events, typed and marked.

    Raises:
        DataError: a stream's frame is missing or unknown, or has other columns than the spec.
    """
    known = [s.name for s in dataset.streams]
    for name in frames:
        if name not in known:
            raise DataError(
                f"the source gives events of {name!r}: the spec's streams are {', '.join(known)}; "
                "declare it, or drop it"
            )
    for name in known:
        if name not in frames:
            raise DataError(
                f"the source gives no frame of stream {name!r}: give it one, an empty one on a day "
                "without events"
            )
    typed = [_stream(frames[s.name], s, dataset, ds, overlapping) for s in dataset.streams]
    return reduce(DataFrame.unionByName, typed)


def _stream(
    frame: DataFrame, stream: EventStream, dataset: Dataset, ds: str, overlapping: bool
) -> DataFrame:
    rows = Values(frame, stream.name)
    own = [] if stream.id_from and "event_id" not in stream.id_from else ["event_id"]
    rows.require(
        [*own, "user_id", "event_time", *(a.name for a in stream.attributes)], ["ingest_time"]
    )
    span = (start_us(ds, dataset.utc_offset), end_us(ds, dataset.utc_offset))
    rows.take_id("user_id", dataset.user_id_type)
    event_time = rows.take_time("event_time", span)
    ingest_time = rows.take_time("ingest_time", span, default=event_time)
    delay = micros(stream.delay)
    available = F.greatest(event_time, ingest_time) + F.lit(delay)
    outside = ~available.between(F.lit(span[0]), F.lit(span[1] - 1))
    for attribute in stream.attributes:
        rows.take_attribute(attribute)
    if own:
        rows.take_id("event_id", IdType.STRING)
    # ids of the source may count within a user
    named = dict.fromkeys(("user_id", *(stream.id_from or own)))
    rows.columns["event_id"] = hash_of(stream.name, [rows.columns[c] for c in named])
    if not overlapping:
        happened = event_time >= ingest_time
        rows.problem(outside & happened, "event_time", Problem.OUTSIDE, available)
        rows.problem(outside & ~happened, "ingest_time", Problem.OUTSIDE, available)
    oldest = F.lit(span[0] - delay - LATEST_DAYS * DAY_US)
    rows.problem(~outside & (event_time < oldest), "event_time", Problem.FAR, event_time)
    rows.problem(~outside & (ingest_time < oldest), "ingest_time", Problem.FAR, ingest_time)
    missing = [
        F.lit(None).cast(spark_type(value_type(a))).alias(a.name)
        for a in dataset.event_attributes
        if a.name not in rows.columns
    ]
    return frame.select(
        *(c.alias(n) for n, c in rows.columns.items()),
        *missing,
        F.lit(stream.name).alias("stream"),
        available.alias("available_time"),
        F.lit(stream.name).alias("_part"),
        *rows.marks,
        outside.alias("_outside"),
        (~outside & (event_time + F.lit(delay) < F.lit(span[0]))).alias("_late"),
        (ingest_time if "ingest_time" in rows.types else F.lit(0)).cast("bigint").alias("_arrived"),
    )


def impressions(frame: DataFrame, dataset: Dataset, ds: str, *, overlapping: bool) -> DataFrame:
    """All targets, typed and marked.

    Raises:
        DataError: the frame has other columns than the spec.
    """
    rows = Values(frame, "impressions")
    kinds = dataset.targets
    with_item = [t.name for t in kinds if t.has_item]
    own = [t.name for t in kinds if not t.id_from]
    needed = ["user_id", "time", *(c.name for c in dataset.context_features), *dataset.given_labels]
    needed += ["target_id"] if own else []
    needed += ["target"] if len(kinds) > 1 else []
    needed += ["item_id"] if with_item else []
    rows.require(needed, ["as_of", "target", "item_id"])
    span = (start_us(ds, dataset.utc_offset), end_us(ds, dataset.utc_offset))
    if "target" in rows.types:
        kind = rows.take_text("target")
        named = F.coalesce(kind.isin([t.name for t in kinds]), F.lit(False))
        rows.problem(~named, "target", Problem.KIND)
    else:
        kind = rows.columns["target"] = F.lit(kinds[0].name)
    rows.take_id("user_id", dataset.user_id_type)
    time = rows.take_time("time", span)
    as_of = rows.take_time("as_of", span, default=time)
    outside = ~as_of.between(F.lit(span[0]), F.lit(span[1] - 1))
    if "item_id" in rows.types:
        rows.take_id("item_id", dataset.item_id_type, needed=kind.isin(with_item))
    else:
        rows.columns["item_id"] = F.lit(None).cast(spark_type(id_type(dataset.item_id_type)))
    for attribute in dataset.context_features:
        rows.take_attribute(attribute)
    for label in dataset.given_labels:
        value = rows.take_integer(label, kind="int", into=label_column(label), code=Problem.LABEL)
        rows.problem(~value.isin(0, 1), label, Problem.LABEL, value)
    if own:
        # such a number may be a hash
        rows.take_id("target_id", dataset.target_id_type, needed=kind.isin(own), negative=True)
    rows.columns["target_id"] = _target_id(rows, dataset, kind)
    if not overlapping:
        given = F.col("as_of").isNotNull() if "as_of" in rows.types else F.lit(False)
        rows.problem(outside & given, "as_of", Problem.OUTSIDE, as_of)
        rows.problem(outside & ~given, "time", Problem.OUTSIDE, as_of)
    rows.problem(as_of > time, "time", Problem.ORDER, time)
    rows.problem(~outside & (time > as_of + F.lit(LATEST_DAYS * DAY_US)), "time", Problem.FAR, time)
    return frame.select(
        *(c.alias(n) for n, c in rows.columns.items()),
        F.coalesce(kind, F.lit("null")).alias("_part"),
        *rows.marks,
        outside.alias("_outside"),
        F.lit(None).cast("boolean").alias("_late"),
        F.lit(0).cast("bigint").alias("_arrived"),
    )


def _target_id(rows: Values, dataset: Dataset, kind: Column) -> Column:
    hashed = [
        F.when(kind == t.name, hash_of(t.name, [rows.columns[c] for c in t.id_from]))
        for t in dataset.targets
        if t.id_from
    ]
    given = rows.columns.get("target_id")
    return F.coalesce(*hashed, *([] if given is None else [given]))
