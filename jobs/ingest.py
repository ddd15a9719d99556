"""One day of a source to the tables `events` and `impressions` (and `truth`, where it is simulated).

The source only reads and renames. Here its columns are cast and checked, ids are made, availability
is worked out, and what a real log has every day is handled and counted in the ledger: rows that come
twice, rows that come late, rows of other days in files that overlap. Anything else that is wrong
stops the day with one sentence that names the column, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from feature_store import quality
from feature_store.days import day_of
from feature_store.errors import DataError
from feature_store.spec import Dataset
from feature_store.tables import contract
from jobs import ingest_rows, sources
from jobs.context import JobContext, main
from jobs.frames import conform, publish
from jobs.ingest_rows import LATEST_DAYS, Problem
from jobs.sources import SourceDay

if TYPE_CHECKING:
    from types import ModuleType

_UNIT = "the time is in {}, and times are UTC microseconds: multiply it in the source"
_REMEDIES = {
    Problem.TYPE: "the spec has another type: convert it in the source, or declare it otherwise",
    Problem.NULL: "it is needed in every row: drop these rows in the source, or fill it in",
    Problem.NEGATIVE: "ids are 0 or more: use null where a value is missing, or map the ids",
    Problem.LENGTH: "the vector's length is not the spec's dim: mend one of them",
    Problem.LABEL: "a label is 1, 0 or null: map it in the source",
    Problem.KIND: "the spec has no target of this kind: declare it, or drop these rows",
    Problem.SECONDS: _UNIT.format("seconds"),
    Problem.MILLISECONDS: _UNIT.format("milliseconds"),
    Problem.NANOSECONDS: "the time is in nanoseconds, and times are UTC microseconds: divide it in the source",
    Problem.FAR: f"it is more than {LATEST_DAYS} days from the day: drop these rows in the source, or mend the clock",
    Problem.OUTSIDE: "the row belongs to another day: look at the time zone, filter it in the source, "
    "or return SourceDay(overlapping=True) where files reach over into other days",
    Problem.ORDER: "it is before as_of, and features look at as_of: as_of is at or before time",
}
_TIMES = {Problem.FAR, Problem.OUTSIDE, Problem.ORDER}
_IDS = {"events": "event_id", "impressions": "target_id"}
_ORDER = {"events": ("available_time", "event_time"), "impressions": ("as_of", "time")}
# error classes of Apache Spark, and what Sail says
_UNREADABLE = (
    "PATH_NOT_FOUND",
    "FAILED_READ_FILE",
    "No such file",
    "corrupt",
    "invalid gzip",
    "incorrect header",
)


def find_problem(counts: list[Row], dataset: Dataset, ds: str) -> str | None:
    """The sentence about the problem that most rows have; None where no row has one.

    Args:
        counts: rows of `summary`.
    """
    wrong = [c for c in counts if c["problem"] is not None]
    if not wrong:
        return None
    worst = max(wrong, key=lambda c: (c["rows"], c["part"], c["problem"]))
    column, _, code = worst["problem"].partition("/")
    value = worst["value"]
    if code in _TIMES and _is_instant(value):
        value += f" ({day_of(int(value), dataset.utc_offset)})"
    others = len(wrong) - 1
    return (
        f"{dataset.name} {ds}: {worst['part']}.{column} is {value} in {worst['rows']} rows: "
        f"{_REMEDIES[Problem(code)]}" + (f" ({others} more kinds of problem)" if others else "")
    )


def _is_instant(value: str) -> bool:
    # datetime ends in the year 9999
    return value.lstrip("-").isdigit() and abs(int(value)) < 2 * 10**17


def summary(frames: Mapping[str, DataFrame]) -> DataFrame:
    """Counts per table, part and problem: one row each, from one pass over all of `frames`."""
    marks = [
        frame.select(
            F.lit(table).alias("table"),
            "part",
            "problem",
            "value",
            F.when(~F.col("outside"), F.col(_IDS[table])).alias("id"),
            F.col("late").cast("int").alias("late"),
        )
        for table, frame in frames.items()
    ]
    every = marks[0]
    for other in marks[1:]:
        every = every.unionByName(other)
    return every.groupBy("table", "part", "problem").agg(
        F.count(F.lit(1)).alias("rows"),
        F.min("value").alias("value"),
        F.count("id").alias("inside"),
        F.count_distinct("id").alias("ids"),
        F.sum("late").alias("late"),
    )


def notes_of(counts: list[Row], table: str) -> dict[str, object]:
    """What the ledger keeps: rows read, duplicates and rows of other days dropped, late rows, by part."""
    mine = sorted((c for c in counts if c["table"] == table), key=lambda c: c["part"])
    return {
        "rows_read": {c["part"]: c["rows"] for c in mine},
        "duplicates_dropped": sum(c["inside"] - c["ids"] for c in mine),
        "late": sum(c["late"] or 0 for c in mine),
        "other_days_dropped": sum(c["rows"] - c["inside"] for c in mine),
    }


def transform(day: SourceDay, dataset: Dataset, ds: str) -> dict[str, DataFrame]:
    """Typed and marked rows by table; see `ingest_rows`.

    Raises:
        DataError: a frame is missing, or has other columns than the spec.
    """
    frames = {"events": ingest_rows.events(day.events, dataset, ds, overlapping=day.overlapping)}
    if day.impressions is not None:
        frames["impressions"] = ingest_rows.impressions(
            day.impressions, dataset, ds, overlapping=day.overlapping
        )
    return frames


def kept(frame: DataFrame, table: str, *, duplicates: bool) -> DataFrame:
    """The rows of the day, each once."""
    inside = frame.where(~F.col("outside"))
    if not duplicates:  # the counts say so, and finding them out means sorting everything
        return inside
    return ingest_rows.first_of_each(inside, _IDS[table], _ORDER[table])


def run(context: JobContext) -> None:
    """Publish the context's day of `events` and `impressions`."""
    dataset, ds = context.dataset, context.ds
    module = sources.get(dataset.name)
    quality.warm_up()  # imported while the source is read
    with context.lake.scratch("ingest", ds) as folder:
        try:
            day = _read(module, context)
            frames = {}
            for table, frame in transform(day, dataset, ds).items():
                frame.write.parquet(
                    f"{folder}/{table}"
                )  # the source is read once, whatever it costs
                # an empty frame may leave no file behind to read the columns from
                frames[table] = context.spark.read.schema(frame.schema).parquet(f"{folder}/{table}")
            counts = summary(frames).collect()
        except PySparkException as error:
            if not any(marker in str(error) for marker in _UNREADABLE):
                raise
            first = str(error).strip().splitlines()[0]
            raise DataError(
                f"{dataset.name} {ds}: a file of SOURCE {context.source} cannot be read ({first[:300]}): "
                "put it right, or take it away"
            ) from error
        problem = find_problem(counts, dataset, ds)
        if problem:
            raise DataError(problem)
        _publish(context, day, frames, counts)


def _read(module: ModuleType, context: JobContext) -> SourceDay:
    name = context.dataset.name
    if module.NEEDS_SOURCE and context.source is None:
        raise DataError(
            f"SOURCE is missing: {name} reads files; name their folder (SOURCE=<dir>, or --source <dir>)"
        )
    source = None if context.source is None else str(context.source)
    return module.read(context.spark, source, context.ds, context.dataset)


def _publish(
    context: JobContext, day: SourceDay, frames: Mapping[str, DataFrame], counts: list[Row]
) -> None:
    dataset, ds = context.dataset, context.ds
    for table in ("events", "impressions"):
        notes = notes_of(counts, table)
        if table in frames:
            once = kept(frames[table], table, duplicates=bool(notes["duplicates_dropped"]))
            rows = conform(once, contract(dataset, table), ds)
            publish(context, table, rows, {}, **notes, **(day.notes if table == "events" else {}))
        else:
            _publish_arrow(context, table, contract(dataset, table).schema.empty_table(), notes)
        read = notes["rows_read"]
        assert isinstance(read, dict)
        print(
            f"{dataset.name} {ds} {table}: "
            + (", ".join(f"{n} {part}" for part, n in read.items()) or "none")
            + f"; {notes['duplicates_dropped']} duplicates and {notes['other_days_dropped']} rows of other days dropped"
            + (f"; {notes['late']} late" if table == "events" else ""),
            flush=True,
        )
    if day.truth is not None:
        truth = day.truth.append_column("ds", pa.array([ds] * day.truth.num_rows, pa.string()))
        _publish_arrow(context, "truth", truth, {})


def _publish_arrow(
    context: JobContext, table: str, rows: pa.Table, notes: dict[str, object]
) -> None:
    context.lake.publish_arrow(
        table, context.ds, rows, inputs={}, notes=notes, code_version=context.code_version
    )


if __name__ == "__main__":
    main("ingest")
