"""Raw rows of a source, typed and marked: what is wrong with each, and whether it belongs to the day.

The columns of the contract less `ds`, and
    part       the stream, or the kind of target
    problem    `<column>/<code>` of the first thing wrong with the row; null where nothing is
    value      the value that is wrong
    outside    the row belongs to another day
    late       it reached the log on a later day than it would have without a detour
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from feature_store.days import DAY_US, end_us, micros, start_us
from feature_store.errors import DataError
from feature_store.spec import Attribute, Dataset, EventStream, IdType, Kind, Target
from feature_store.tables import id_type, label_column, value_type
from jobs.frames import spark_type

MARKS = ("part", "problem", "value", "outside", "late")
LATEST_DAYS = 30  # an event that is older when it arrives is a wrong clock, not a late event
_PLAUSIBLE_DAYS = 400  # a time that is this near to the day after a change of unit was in that unit


class Problem(StrEnum):
    """What can be wrong with a value; `jobs/ingest.py` has a sentence for each."""

    TYPE = "type"
    NULL = "null"
    NEGATIVE = "negative"
    LENGTH = "length"
    LABEL = "label"
    KIND = "kind"
    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    NANOSECONDS = "nanoseconds"
    FAR = "far"
    OUTSIDE = "outside"
    ORDER = "order"


class _Rows:
    """A raw frame whose columns are taken one by one, typed; collects what can be wrong with them."""

    def __init__(self, frame: DataFrame, where: str) -> None:
        self.frame, self.where = frame, where
        self.types = {f.name: f.dataType for f in frame.schema.fields}
        self.columns: dict[str, Column] = {}
        self._problems: list[Column] = []
        self._values: list[Column] = []

    def require(self, needed: Sequence[str], optional: Sequence[str]) -> None:
        """Refuse a frame that lacks a column, or has one that nobody asked for."""
        for name in needed:
            if name not in self.types:
                raise DataError(
                    f"{self.where}.{name} is missing from the source's columns ({', '.join(self.types)}): "
                    "add it, or leave it out of the spec"
                )
        for name in self.types:
            if name not in needed and name not in optional:
                raise DataError(
                    f"{self.where}.{name} is a column that the spec does not know: drop it in the source, "
                    f"or declare it (known are {', '.join([*needed, *optional])})"
                )

    def problem(
        self, condition: Column, name: str, code: Problem, value: Column | None = None
    ) -> None:
        """`code` is wrong with column `name` where `condition`."""
        shown = F.col(name) if value is None else value
        text = F.substring(F.coalesce(shown.cast("string"), F.lit("null")), 1, 80)
        self._problems.append(F.when(condition, F.lit(f"{name}/{code}")))
        self._values.append(F.when(condition, text))

    @property
    def marks(self) -> list[Column]:
        """The first problem of each row, and its value."""
        first, value = F.coalesce(*self._problems), F.coalesce(*self._values)
        return [first.alias("problem"), value.alias("value")]

    def take(self, name: str, kind: str, *, into: str = "", instant: bool = False) -> Column:
        """The column as Spark type `kind`; a value that is not one is a problem. `instant`: also ISO 8601."""
        raw, given = F.col(name), self.types[name]
        if isinstance(given, T.NullType):
            value = F.lit(None).cast(kind)
        elif isinstance(given, T.TimestampType | T.TimestampNTZType) and kind == "bigint":
            value = F.unix_micros(raw.cast("timestamp"))
        elif isinstance(given, T.ArrayType) or kind.startswith("array"):
            if not (isinstance(given, T.ArrayType) and kind.startswith("array")):
                raise DataError(
                    f"{self.where}.{name} is {given.simpleString()}: the spec has it as {kind}; convert it"
                )
            value = raw.cast(kind)
        else:
            value = raw if given.simpleString() == kind else raw.try_cast(kind)
            if instant and isinstance(given, T.StringType):
                value = F.coalesce(value, F.unix_micros(raw.try_cast("timestamp")))
            wrong = raw.isNotNull() & value.isNull()
            if kind in ("bigint", "int") and isinstance(
                given, T.FloatType | T.DoubleType | T.DecimalType
            ):
                wrong = wrong | (raw != value)
            if isinstance(given, T.StringType) and kind != "string":
                # an empty field of a CSV file is a missing value
                wrong = wrong & (F.trim(raw) != "")
            if given.simpleString() != kind:
                self.problem(wrong, name, Problem.TYPE)
        self.columns[into or name] = value
        return value

    def take_id(self, name: str, kind: IdType, *, needed: Column | bool = True) -> None:
        """An id: not null (or empty) where `needed`, and not negative."""
        value = self.take(name, spark_type(id_type(kind)))
        required = F.lit(needed) if isinstance(needed, bool) else needed
        absent = value.isNull() if kind is IdType.INT64 else (value.isNull() | (value == ""))
        self.problem(required & absent, name, Problem.NULL)
        if kind is IdType.INT64:
            self.problem(value < 0, name, Problem.NEGATIVE)

    def take_attribute(self, attribute: Attribute) -> None:
        """An event attribute or context feature; null where it is missing."""
        value = self.take(attribute.name, spark_type(value_type(attribute)))
        if attribute.kind is Kind.CATEGORICAL and attribute.id_type is IdType.INT64:
            self.problem(value < 0, attribute.name, Problem.NEGATIVE)
        elif attribute.kind is Kind.VECTOR:
            size = F.size(value)
            self.problem(
                value.isNotNull() & (size != attribute.dim), attribute.name, Problem.LENGTH, size
            )

    def take_time(
        self, name: str, span: tuple[int, int], *, default: Column | None = None
    ) -> Column:
        """UTC microseconds; another unit near the day `span` is recognised. Null: `default`."""
        if default is not None and name not in self.types:
            self.columns[name] = default
            return default
        value = self.take(name, "bigint", instant=True)
        if default is None:
            self.problem(value.isNull(), name, Problem.NULL)
        low, high = span[0] - _PLAUSIBLE_DAYS * DAY_US, span[1] + _PLAUSIBLE_DAYS * DAY_US
        for code, times, per in (
            (Problem.SECONDS, 1, 10**6),
            (Problem.MILLISECONDS, 1, 10**3),
            (Problem.NANOSECONDS, 10**3, 1),
        ):
            near = value.between(F.lit(low * times // per), F.lit(high * times // per))
            self.problem(near, name, code, value)
        if default is not None:
            value = F.coalesce(value, default)
        self.columns[name] = value
        return value


def _hash_of(first: str, columns: Sequence[Column]) -> Column:
    """A non-negative int64 of a name and values: nulls count, and values do not run into each other."""
    parts = [F.lit(first)]
    for column in columns:
        parts += [column.isNull().cast("int"), column]
    return F.xxhash64(*parts).bitwiseAND(F.lit(2**63 - 1))


def first_of_each(frame: DataFrame, key: str, order: Sequence[str]) -> DataFrame:
    """One row per part and id: the first by `order`; among equals the choice is not left to chance."""
    content = F.xxhash64(*[F.col(n) for n in frame.columns if n not in MARKS])
    window = Window.partitionBy("part", key).orderBy(*order, content)
    return frame.withColumn("row", F.row_number().over(window)).where(F.col("row") == 1).drop("row")


def events(
    frames: dict[str, DataFrame], dataset: Dataset, ds: str, *, overlapping: bool
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
    rows = _Rows(frame, stream.name)
    own = [] if stream.id_from else ["event_id"]
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
    if stream.id_from:
        rows.columns["event_id"] = _hash_of(stream.name, [rows.columns[c] for c in stream.id_from])
    else:
        rows.problem(F.col("event_id").isNull(), "event_id", Problem.NULL)
        rows.columns["event_id"] = _hash_of(stream.name, [F.col("event_id")])
    if not overlapping:
        which = "ingest_time" if "ingest_time" in rows.types else "event_time"
        rows.problem(outside, which, Problem.OUTSIDE, available)
    oldest = F.lit(span[0] - delay - LATEST_DAYS * DAY_US)
    rows.problem(~outside & (event_time < oldest), "event_time", Problem.FAR, event_time)
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
        F.lit(stream.name).alias("part"),
        *rows.marks,
        outside.alias("outside"),
        (~outside & (event_time + F.lit(delay) < F.lit(span[0]))).alias("late"),
    )


def impressions(frame: DataFrame, dataset: Dataset, ds: str, *, overlapping: bool) -> DataFrame:
    """All targets, typed and marked.

    Raises:
        DataError: the frame has other columns than the spec.
    """
    rows = _Rows(frame, "impressions")
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
        kind = rows.take("target", "string")
        named = F.coalesce(kind.isin([t.name for t in kinds]), F.lit(False))
        rows.problem(~named, "target", Problem.KIND, F.coalesce(kind, F.lit("null")))
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
        value = rows.take(label, "int", into=label_column(label))
        rows.problem(~value.isin(0, 1), label, Problem.LABEL, value)
        if label not in {c.name for c in dataset.context_features}:
            rows.columns.pop(label, None)
    if own:
        rows.problem(kind.isin(own) & F.col("target_id").isNull(), "target_id", Problem.NULL)
        if isinstance(rows.types["target_id"], T.StringType):
            rows.columns["target_id"] = _hash_of("target", [F.col("target_id")])
        else:
            rows.take("target_id", "bigint")
    rows.columns["target_id"] = _target_id(rows, kinds, kind)
    if not overlapping:
        which = "as_of" if "as_of" in rows.types else "time"
        rows.problem(outside, which, Problem.OUTSIDE, as_of)
    rows.problem(as_of > time, "time", Problem.ORDER, time)
    rows.problem(~outside & (time > as_of + F.lit(LATEST_DAYS * DAY_US)), "time", Problem.FAR, time)
    return frame.select(
        *(c.alias(n) for n, c in rows.columns.items()),
        F.coalesce(kind, F.lit("null")).alias("part"),
        *rows.marks,
        outside.alias("outside"),
        F.lit(None).cast("boolean").alias("late"),
    )


def _target_id(rows: _Rows, kinds: Sequence[Target], kind: Column) -> Column:
    given = rows.columns.get("target_id", F.lit(None).cast("bigint"))
    hashed = [
        F.when(kind == t.name, _hash_of(t.name, [rows.columns[c] for c in t.id_from]))
        for t in kinds
        if t.id_from
    ]
    return F.coalesce(*hashed, given)
