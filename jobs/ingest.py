"""One day of a source to the tables `events` and `impressions` (and `truth`, where it is simulated).

The source only reads and renames. Here its columns are cast and checked, ids are made, availability
is worked out, and what a real log has every day is handled and counted in the ledger: rows that come
twice, rows that come late, rows of other days in files that overlap. Anything else that is wrong
stops the day with one sentence that names the column, the value and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from feature_store import quality
from feature_store.days import day_of
from feature_store.errors import DataError
from feature_store.spec import Dataset
from feature_store.tables import contract
from jobs import ingest_duplicates, ingest_rows, sources
from jobs.context import JobContext, main
from jobs.frames import conform, publish
from jobs.ingest_duplicates import KEYS, Dropped
from jobs.ingest_rows import LATEST_DAYS
from jobs.ingest_values import Problem
from jobs.sources import SourceDay

if TYPE_CHECKING:
    from types import ModuleType

_UNIT = "the time is in {}, and times are UTC microseconds: multiply it in the source"
_REMEDIES = {
    Problem.TYPE: "the spec has another type: convert it in the source, or declare it otherwise",
    Problem.ROUNDED: "a float holds no whole number of this size exactly: read the column as integers or text",
    Problem.SPELLING: "the spec has text, and a float has several spellings: read the column as text or integers",
    Problem.PADDED: "there are blanks around it, so that it matches no other: trim it in the source",
    Problem.NULL: "it is needed in every row: drop these rows in the source, or fill it in",
    Problem.NEGATIVE: "ids are 0 or more: use null where a value is missing, or map the ids",
    Problem.RANGE: "numbers are finite float32: mend it in the source, "
    "or set it to the nearer limit by Attribute(clip=(lowest, highest))",
    Problem.LENGTH: "the vector's length is not the spec's dim: mend one of them",
    Problem.LABEL: "a label is 1, 0 or null: map it in the source",
    Problem.KIND: "the spec has no target of this kind: declare it, or drop these rows",
    Problem.TIME: "a time is microseconds since 1970 (int64), a timestamp, or ISO 8601 text: convert it in the source",
    Problem.DATE: "it looks like a date written as digits, and times are UTC microseconds: "
    "convert it in the source (to_timestamp)",
    Problem.SECONDS: _UNIT.format("seconds"),
    Problem.MILLISECONDS: _UNIT.format("milliseconds"),
    Problem.NANOSECONDS: "the time is in nanoseconds, and times are UTC microseconds: divide it in the source",
    Problem.FAR: f"it is more than {LATEST_DAYS} days from the day: drop these rows in the source, or mend the clock",
    Problem.OUTSIDE: "the row belongs to another day: look at the time zone, filter it in the source, "
    "or return SourceDay(overlapping=True) where files reach over into other days",
    Problem.ORDER: "it is before as_of, and features look at as_of: as_of is at or before time",
}
_TIMES = {Problem.FAR, Problem.OUTSIDE, Problem.ORDER}
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
    wrong = [c for c in counts if c["_problem"] is not None]
    if not wrong:
        return None
    worst = max(wrong, key=lambda c: (c["rows"], c["_part"], c["_problem"]))
    column, _, code = worst["_problem"].partition("/")
    problem, value = Problem(code), worst["value"]
    if problem in _TIMES and _is_instant(value):
        value += f" ({day_of(int(value), dataset.utc_offset)})"
    remedy = _id_remedy(dataset, column) if problem is Problem.ID else _REMEDIES[problem]
    others = len(wrong) - 1
    return (
        f"{dataset.name} {ds}: {worst['_part']}.{column} is {value} in {worst['rows']} rows: {remedy}"
        + (f" ({others} more kinds of problem)" if others else "")
    )


def _id_remedy(dataset: Dataset, column: str) -> str:
    attributes = {a.name: a for a in (*dataset.event_attributes, *dataset.context_features)}
    setting = f"Dataset({column}_type=IdType.STRING)"
    if column in attributes:
        vocabulary = attributes[column].vocabulary
        setting = f"Attribute({column}, id_type=IdType.STRING)"
        if vocabulary in ("item", "user"):
            setting += f" and {vocabulary}_id_type=IdType.STRING"
    elif column == "item_id":
        setting += " and id_type=IdType.STRING of its attributes"
    return f"the spec has integers: declare {setting}, or map it to integers in the source"


def _is_instant(value: str) -> bool:
    # datetime ends in the year 9999
    return value.lstrip("-").isdigit() and abs(int(value)) < 2 * 10**17


def summary(frames: Mapping[str, DataFrame]) -> DataFrame:
    """Counts per table, part and problem: one row each, from one pass over all of `frames`."""
    marks = [
        frame.select(
            F.lit(table).alias("table"),
            "_part",
            "_problem",
            "_value",
            F.when(~F.col("_outside"), F.xxhash64(*KEYS[table])).alias("key"),
            F.col("_late").cast("int").alias("late"),
            F.when(~F.col("_outside"), F.col("_clipped")).alias("clipped"),
        )
        for table, frame in frames.items()
    ]
    every = marks[0]
    for other in marks[1:]:
        every = every.unionByName(other)
    return every.groupBy("table", "_part", "_problem").agg(
        F.count(F.lit(1)).alias("rows"),
        F.min("_value").alias("value"),
        F.count("key").alias("inside"),
        F.count_distinct("key").alias("keys"),
        F.sum("late").alias("late"),
        F.sum("clipped").alias("clipped"),
    )


def has_repeats(counts: list[Row], table: str) -> bool:
    """Whether rows of the day share a key."""
    return any(c["inside"] != c["keys"] for c in counts if c["table"] == table)


def notes_of(counts: list[Row], table: str, dropped: Dropped | None = None) -> dict[str, object]:
    """What the ledger keeps of a table's day.

    Args:
        dropped: of the rows that share a key; None: no rows do.

    Returns:
        rows_read and clipped (values, of parts that have any) by part; the rows dropped as duplicates,
        as later versions and as another day's; and of those kept, how many came late.
    """
    mine = sorted((c for c in counts if c["table"] == table), key=lambda c: c["_part"])
    dropped = dropped or Dropped()
    return {
        "rows_read": {c["_part"]: c["rows"] for c in mine},
        "clipped": {c["_part"]: c["clipped"] for c in mine if c["clipped"]},
        "duplicates_dropped": dropped.duplicates,
        "versions_dropped": dropped.versions,
        "other_days_dropped": sum(c["rows"] - c["inside"] for c in mine),
        "late": sum(c["late"] or 0 for c in mine) - dropped.late,
    }


def line_of(notes: Mapping[str, Any], table: str) -> str:
    """What `ingest` prints of a table's day: rows read, dropped, and kept."""
    read = ", ".join(f"{n} {part}" for part, n in notes["rows_read"].items())
    found = f"{read or 'none'} read; {notes['duplicates_dropped']} duplicates"
    if notes["versions_dropped"]:
        found += f", {notes['versions_dropped']} later versions"
    found += f" and {notes['other_days_dropped']} rows of other days dropped"
    lost = ("duplicates_dropped", "versions_dropped", "other_days_dropped")
    kept = sum(notes["rows_read"].values()) - sum(notes[n] for n in lost)
    found += f"; {kept} kept" + (f", {notes['late']} of them late" if table == "events" else "")
    if notes["clipped"]:
        clipped = ", ".join(f"{n} of {part}" for part, n in notes["clipped"].items())
        found += f"; values clipped: {clipped}"
    return found


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


def run(context: JobContext) -> None:
    """Publish the context's day of `events` and `impressions`."""
    dataset, ds = context.dataset, context.ds
    module = sources.get(dataset.name)
    quality.warm_up()  # imported while the source is read
    with context.lake.scratch("ingest", ds) as folder:
        try:
            day = _framed(context, folder, _read(module, context))
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
        rows, notes = {}, {}
        for table, frame in frames.items():
            rows[table], dropped = _once(frame, table, dataset, ds, has_repeats(counts, table))
            notes[table] = notes_of(counts, table, dropped)
        _publish(context, day, rows, notes)


def _once(
    frame: DataFrame, table: str, dataset: Dataset, ds: str, repeats: bool
) -> tuple[DataFrame, Dropped]:
    """The rows of the day, each key once. Without `repeats` nothing has to be sorted for that.

    Raises:
        DataError: rows of one key differ, and none came before the others.
    """
    inside = frame.where(~F.col("_outside"))
    if not repeats:
        return inside, Dropped()
    conflict = ingest_duplicates.find_conflict(inside, table, dataset, ds)
    if conflict:
        raise DataError(conflict)
    first = ingest_duplicates.first_of_each(inside, table)
    return first, ingest_duplicates.dropped(inside, table)


def _read(module: ModuleType, context: JobContext) -> SourceDay:
    name = context.dataset.name
    if module.NEEDS_SOURCE and context.source is None:
        raise DataError(
            f"SOURCE is missing: {name} reads files; name their folder (SOURCE=<dir>, or --source <dir>)"
        )
    source = None if context.source is None else str(context.source)
    return module.read(context.spark, source, context.ds, context.dataset)


def _framed(context: JobContext, folder: str, day: SourceDay) -> SourceDay:
    """The day with frames for its Arrow tables, by way of Parquet: an engine's client takes 128 MB at once."""

    def frame(name: str, rows: DataFrame | pa.Table) -> DataFrame:
        if not isinstance(rows, pa.Table):
            return rows
        path = context.lake.write_scratch(folder, f"source/{name}.parquet", rows)
        return context.spark.read.parquet(path)

    events = {name: frame(f"events-{name}", rows) for name, rows in day.events.items()}
    impressions = None if day.impressions is None else frame("impressions", day.impressions)
    return replace(day, events=events, impressions=impressions)


def _publish(
    context: JobContext,
    day: SourceDay,
    rows: Mapping[str, DataFrame],
    notes: Mapping[str, dict[str, object]],
) -> None:
    dataset, ds = context.dataset, context.ds
    for table in ("events", "impressions"):
        found = notes.get(table) or notes_of([], table)
        shape = contract(dataset, table)
        if table in rows:
            more = day.notes if table == "events" else {}
            publish(context, table, conform(rows[table], shape, ds), {}, **found, **more)
        else:
            _publish_arrow(context, table, shape.schema.empty_table(), found)
        print(f"{dataset.name} {ds} {table}: {line_of(found, table)}", flush=True)
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
