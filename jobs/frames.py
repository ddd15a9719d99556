"""What the feature jobs share: contract types as Spark columns, and packing events into arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from feature_store.columns import MISSING_ID, MISSING_STRING, history_column, value_type
from feature_store.days import HOUR_US, day_range
from feature_store.spec import Attribute, Dataset, EventStream, IdType, Kind
from feature_store.tables import Table, contract

if TYPE_CHECKING:
    from feature_store.lake import Lake
    from jobs.context import JobContext

_SPARK_TYPES = {
    pa.int32(): "int",
    pa.int64(): "bigint",
    pa.float32(): "float",
    pa.float64(): "double",
    pa.string(): "string",
    pa.binary(): "binary",
}


def spark_type(kind: pa.DataType) -> str:
    """The Spark SQL name of an Arrow type of a contract."""
    if pa.types.is_list(kind):
        return f"array<{spark_type(kind.value_type)}>"
    return _SPARK_TYPES[kind]


def conform(frame: DataFrame, table: Table, ds: str) -> DataFrame:
    """`frame` with the contract's columns, types and order, and `ds` a literal in every row."""
    columns = [
        F.lit(ds).alias("ds")
        if f.name == "ds"
        else F.col(f.name).cast(spark_type(f.type)).alias(f.name)
        for f in table.schema
    ]
    return frame.select(*columns)


def missing(attribute: Attribute) -> Column:
    """What stands for a missing value of `attribute` inside a packed array (`tables.missing_value`)."""
    if attribute.kind is Kind.CATEGORICAL:
        value = F.lit(MISSING_ID if attribute.id_type is IdType.INT64 else MISSING_STRING)
    elif attribute.kind is Kind.NUMERIC:
        value = F.lit(float("nan"))
    else:
        value = F.array(*[F.lit(0.0)] * (attribute.dim or 0))
    return value.cast(spark_type(value_type(attribute)))


def is_id(column: Column, kind: IdType) -> Column:
    """Whether `column` holds an id: not null, and not what stands for a missing one."""
    absent = MISSING_ID if kind is IdType.INT64 else MISSING_STRING
    return column.isNotNull() & (column != F.lit(absent))


def hour_of(instant: Column) -> Column:
    """Whole hours from the epoch to `instant` (microseconds, after 1970)."""
    return ((instant - instant % F.lit(HOUR_US)) / F.lit(HOUR_US)).cast("bigint")


def empty(kind: str) -> Column:
    """An empty array of Spark type `kind`."""
    return F.array().cast(kind)


def last(array: Column, count: Column | int) -> Column:
    """The last `count` elements of `array`."""
    length = F.size(array)
    count = F.least(length, F.lit(count) if isinstance(count, int) else count)
    return F.slice(array, length - count + 1, count)


def event_struct(
    stream: EventStream, *, first: tuple[Column | str, ...], source: str = ""
) -> Column:
    """One event of `stream` as a struct that sorts by the columns `first`; missing values filled in.

    Args:
        first: the columns that it sorts by, before `event_time` and the attributes.
        source: prefix of the columns that are not in `first`, such as `event.`.
    """
    values = [
        F.coalesce(F.col(source + a.name), missing(a)).alias(a.name) for a in stream.attributes
    ]
    return F.struct(*first, F.col(f"{source}event_time").alias("event_time"), *values)


def pack_events(dataset: Dataset) -> list[Column]:
    """Aggregations `new__<stream>`: a group's events of each stream, in timeline order."""
    order = ("available_time", "event_id")
    return [
        F.sort_array(
            F.collect_list(
                F.when(F.col("stream") == stream.name, event_struct(stream, first=order))
            )
        ).alias(f"new__{stream.name}")
        for stream in dataset.streams
    ]


def history_types(dataset: Dataset, stream: EventStream) -> dict[str, str]:
    """Spark types of a stream's arrays in `sequences`, by the name of what they hold."""
    schema = contract(dataset, "sequences").schema
    names = ("event_id", "event_time", "available_time", *(a.name for a in stream.attributes))
    return {n: spark_type(schema.field(history_column(stream.name, n)).type) for n in names}


def values(array: Column, name: str) -> Column:
    """The field `name` of each struct in `array`."""
    return F.transform(array, lambda element: element[name])


def newest(sequences: DataFrame) -> DataFrame:
    """Each user's newest row among partitions of `sequences`: the state."""
    by_day = Window.partitionBy("user_id").orderBy(F.col("ds").desc())
    ranked = sequences.withColumn("rank", F.row_number().over(by_day))
    return ranked.where(F.col("rank") == 1).drop("rank", "ds")


def days_from(lake: Lake, table: str, first: str, last: str) -> list[str]:
    """`first` to `last`, without days before the first that `table` has; `last` in any case."""
    begin = min(lake.partitions(table), default=last)
    return day_range(min(max(first, begin), last), last)


def read(context: JobContext, table: str, days: list[str], inputs: dict[str, int]) -> DataFrame:
    """Partitions of `table` as a frame at the versions that the ledger names, noted in `inputs`.

    Raises:
        MissingPartitionError: one of `days` was not written.
    """
    pins = context.lake.require(table, days)
    inputs.update(pins)
    return context.lake.frame(context.spark, table, days, max(pins.values()))


def publish(
    context: JobContext, table: str, frame: DataFrame, inputs: dict[str, int], **notes: object
) -> None:
    """Replace the context's day of `table` by `frame`."""
    context.lake.publish_frame(
        context.spark, table, context.ds, frame,
        inputs=inputs, notes=notes, code_version=context.code_version, engine=context.engine,
    )  # fmt: skip
