"""Rows of one key: duplicates and versions, of which the first to arrive stays, and keys that are none.

    equal content                        duplicates: a row that was delivered more than once
    other content, other arrival         versions of one row
    other content, one arrival or none   an error: the key does not tell the rows apart

The content of a row is what the source gives of it, less when it arrived.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyspark.sql import DataFrame, Row, Window
from pyspark.sql import functions as F

from feature_store.spec import Dataset
from jobs.ingest_rows import MARKS, hash_of

KEYS = {"events": ("event_id",), "impressions": ("user_id", "target", "target_id")}
_ORDER = {
    "events": ("available_time", "event_time", "ingest_time"),
    "impressions": ("as_of", "time"),
}
_ARRIVAL = ("ingest_time", "available_time")


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """What is dropped of the rows of a day that share a key.

    Args:
        duplicates, versions: rows.
        late: of them, how many came late.
    """

    duplicates: int = 0
    versions: int = 0
    late: int = 0


def ranked(rows: DataFrame, table: str) -> DataFrame:
    """`rows` with `_place` among those of their key, from 1, and `_same`: content as of the first."""
    rows = _with_content(rows)
    in_order = Window.partitionBy(*KEYS[table]).orderBy(*_ORDER[table])
    place, first = F.row_number().over(in_order), F.first("_content").over(in_order)
    return rows.select("*", place.alias("_place"), (F.col("_content") == first).alias("_same"))


def first_of_each(rows: DataFrame, table: str) -> DataFrame:
    """One row per key: the first to become available."""
    return ranked(rows, table).where(F.col("_place") == 1)


def dropped(rows: DataFrame, table: str) -> Dropped:
    """What `first_of_each` leaves out."""
    counts = (
        ranked(rows, table)
        .where(F.col("_place") > 1)
        .agg(
            F.count(F.when(F.col("_same"), 1)).alias("duplicates"),
            F.count(F.when(~F.col("_same"), 1)).alias("versions"),
            F.count(F.when(F.col("_late"), 1)).alias("late"),
        )
    )
    return Dropped(**counts.collect()[0].asDict())


def find_conflict(rows: DataFrame, table: str, dataset: Dataset, ds: str) -> str | None:
    """The sentence about keys that different rows share; None where there is none."""
    key = [*KEYS[table], "_part", "_arrived"]
    content = F.col("_content")
    clashes = (
        _with_content(rows)
        .groupBy(*key)
        .agg(F.min(content).alias("low"), F.max(content).alias("high"))
        .where(F.col("low") != F.col("high"))
    )
    one = clashes.orderBy(*key).limit(1).collect()
    if not one:
        return None
    count, clash = clashes.count(), one[0]
    mine = _with_content(rows)
    for name in key:
        mine = mine.where(F.col(name) == F.lit(clash[name]))
    first, second = (mine.where(content == clash[n]).limit(1).collect()[0] for n in ("low", "high"))
    part = clash["_part"]
    if table == "impressions":
        what = f"impressions.target_id {first['target_id']} of {part}"
        remedy = (
            "a target has one row: give each its own target_id, "
            f"or say in Target({part}).id_from what tells them apart"
        )
    else:
        columns = dataset.stream(part).id_from or ("event_id",)
        what = f"{part}: {', '.join(columns)} of an event"
        remedy = (
            f"name in EventStream({part}).id_from what tells them apart (event_id, or an attribute, too), "
            "or give versions of one row the ingest_time of each"
        )
    return (
        f"{dataset.name} {ds}: {what} is shared by rows that differ ({count} times), such as user_id "
        f"{first['user_id']} with {_difference(first, second)}: {remedy}"
    )


def _with_content(rows: DataFrame) -> DataFrame:
    names = [n for n in rows.columns if n not in (*MARKS, *_ARRIVAL)]
    return rows.withColumn("_content", hash_of("content", [F.col(n) for n in names]))


def _difference(one: Row, other: Row) -> str:
    differ = [n for n in one.asDict() if not n.startswith("_") and one[n] != other[n]]
    differ = [n for n in differ if n not in _ARRIVAL][:3]
    return " and ".join(", ".join(f"{n} {row[n]}" for n in differ) for row in (one, other))
