"""A world through all feature jobs on one engine, compared with the oracle: every column of every table."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from feature_store.lake import Lake
from feature_store.spec import Attribute, Dataset, IdType, Kind
from jobs import (
    build_aggregates,
    build_examples,
    build_item_aggregates,
    build_labels,
    build_sequences,
    ingest,
    sources,
)
from jobs.context import JobContext
from jobs.settings import Settings
from jobs.sources import SourceDay
from tests import oracle, oracle_tables
from tests.worlds import Row, World

KEYS = {
    "sequences": ("user_id",),
    "aggregates": ("user_id",),
    "item_aggregates": ("item_id", "hour"),
    "examples": ("user_id", "part"),
    "labels": ("user_id", "shown_ds", "part", "task"),
}
# Of these alone the last digit may differ: engines and Python have logarithms of their own.
LOGARITHMS = "targets__item__"


def check(world: World, spark: SparkSession, settings: Settings, lake: Path) -> None:
    """Build all days of `world` in a lake of its own, and compare.

    Raises:
        AssertionError: names the table, the row and the column that differ.
        DataError: `ingest` refused a day.
    """
    days = {ds: context(world, ds, spark, settings, lake) for ds in world.days}
    for day in days.values():
        ingest_day(world, day)
    events, shown = ingested(world, days[world.days[-1]].lake)
    for ds, day in days.items():
        for job in (
            build_sequences,
            build_aggregates,
            build_item_aggregates,
            build_examples,
            build_labels,
        ):
            job.run(day)
        base = ds == world.days[0] or build_sequences.is_base_day(world.dataset, ds)
        want = oracle_tables.feature_tables(world.dataset, events, shown, ds, base=base)
        for table, rows in want.items():
            compare(
                day.lake.read(table, days=[ds]).to_pylist(), rows, f"{table} of {ds}", KEYS[table]
            )


def context(
    world: World, ds: str, spark: SparkSession, settings: Settings, lake: Path
) -> JobContext:
    """A job's context for a day of `world`, in the session that the tests share."""
    made = JobContext(
        dataset=world.dataset,
        ds=ds,
        settings=dataclasses.replace(settings, lake_root=str(lake)),
    )
    made.__dict__["spark"] = spark
    return made


def ingest_day(world: World, day: JobContext) -> None:
    """`ingest` of a day, from a source that gives the rows of `world`."""
    module = SimpleNamespace(NEEDS_SOURCE=False, read=_reader(world))
    with mock.patch.object(sources, "get", lambda name: module):
        ingest.run(day)


# -- what the source gives -------------------------------------------------------------------------


def _reader(world: World) -> Any:
    dataset = world.dataset

    def read(spark: SparkSession, source: Path | None, day: str, dataset: Dataset) -> SourceDay:
        events, shown = world.given(day)
        return SourceDay(
            events={
                s.name: _frame(spark, events[s.name], columns[s.name], world.text)
                for s in dataset.streams
            },
            impressions=_frame(spark, shown, columns[""], world.text) if shown else None,
            overlapping=world.overlapping,
        )

    columns: dict[str, dict[str, pa.DataType]] = {}
    user = {"user_id": _type_of_id(dataset.user_id_type)}
    for s in dataset.streams:
        own = {"event_id": pa.int64()} if not s.id_from or "event_id" in s.id_from else {}
        times = {"event_time": _TIME, "ingest_time": _TIME}
        if all(e["ingest_time"] is None for e in world.events[s.name]):
            del times["ingest_time"]
        columns[s.name] = user | own | times | {a.name: _type_of(a) for a in s.attributes}
    columns[""] = user | {"time": _TIME, "as_of": _TIME}
    if len(dataset.targets) > 1:
        columns[""]["target"] = pa.string()
    if not all(t.id_from for t in dataset.targets):
        columns[""]["target_id"] = _type_of_id(dataset.target_id_type)
    if any(t.has_item for t in dataset.targets):
        columns[""]["item_id"] = _type_of_id(dataset.item_id_type)
    columns[""] |= {c.name: _type_of(c) for c in dataset.context_features}
    columns[""] |= dict.fromkeys(dataset.given_labels, pa.int64())
    return read


_TIME = pa.timestamp("us", "UTC")  # int64 for a source that has microseconds, else text


def _type_of_id(kind: IdType) -> pa.DataType:
    return pa.int64() if kind is IdType.INT64 else pa.string()


def _type_of(attribute: Attribute) -> pa.DataType:
    if attribute.kind is Kind.CATEGORICAL:
        return _type_of_id(attribute.id_type)
    return pa.float64() if attribute.kind is Kind.NUMERIC else pa.list_(pa.float64())


def _frame(
    spark: SparkSession, rows: list[Row], columns: dict[str, pa.DataType], text: bool
) -> DataFrame:
    def stored(kind: pa.DataType) -> pa.DataType:
        if text and not pa.types.is_list(kind):
            return pa.string()
        return pa.int64() if kind == _TIME else kind

    def value(kind: pa.DataType, v: Any) -> Any:
        if v is None or not text or pa.types.is_list(kind):
            return v
        if kind == _TIME:
            seconds = datetime.fromtimestamp(v // 1_000_000, tz=UTC).replace(tzinfo=None)
            return f"{seconds.isoformat()}.{v % 1_000_000:06}Z"
        return str(v)

    schema = pa.schema([(n, stored(kind)) for n, kind in columns.items()])
    if not rows:
        return spark.createDataFrame([], from_arrow_schema(schema))
    data = [{n: value(kind, r[n]) for n, kind in columns.items()} for r in rows]
    return spark.createDataFrame(pa.Table.from_pylist(data, schema=schema))


# -- ids -------------------------------------------------------------------------------------------


def ingested(world: World, lake: Lake) -> tuple[oracle.ByDay, oracle.ByDay]:
    """`events` and `impressions` of all days as the oracle has them, compared with the lake's, and
    with the lake's ids."""
    events, shown = {}, {}
    for ds in world.days:
        given = world.given(ds)
        events[ds] = oracle.events(world.dataset, given[0], ds)
        shown[ds] = oracle.impressions(world.dataset, given[1], ds)
    keys = {"events": ("event_id",), "impressions": ("user_id", "target", "target_id")}
    hashed = {t.name for t in world.dataset.targets if t.id_from}
    for want, table, column in (
        (events, "events", "event_id"),
        (shown, "impressions", "target_id"),
    ):
        got = {ds: lake.read(table, days=[ds]).to_pylist() for ds in world.days}
        for ds in world.days:
            ours = sorted(bits({k: v for k, v in r.items() if k != column}) for r in got[ds])
            theirs = sorted(bits({k: v for k, v in r.items() if k != column}) for r in want[ds])
            assert ours == theirs, f"{table} of {ds}: {_difference(ours, theirs)}"
        kept = [
            r for rows in got.values() for r in rows if table == "events" or r["target"] in hashed
        ]
        made = [
            r for rows in want.values() for r in rows if table == "events" or r["target"] in hashed
        ]
        names = _names_of(kept, made, column)
        for row in made:
            row[column] = names[row[column]]
        for ds in world.days:
            compare(got[ds], want[ds], f"{table} of {ds}", keys[table])
    return events, shown


def _names_of(got: list[Row], want: list[Row], column: str) -> dict[Any, int]:
    """Which of the ids in `got` stands for which in `want`: those of the same rows on the same days.

    Ids with the same rows can be told apart by nothing, so that it does not matter which is which.
    """

    def by_rows(rows: list[Row]) -> dict[tuple[str, ...], list[Any]]:
        rows_of = defaultdict(list)
        for row in rows:
            rows_of[row[column]].append(bits({k: v for k, v in row.items() if k != column}))
        found = defaultdict(list)
        for name, theirs in rows_of.items():
            found[tuple(sorted(theirs))].append(name)
        return found

    ours, theirs = by_rows(got), by_rows(want)
    assert {k: len(v) for k, v in ours.items()} == {k: len(v) for k, v in theirs.items()}, (
        f"{column}: rows of one id have several, or rows of several have one"
    )
    return {t: o for k in theirs for t, o in zip(theirs[k], ours[k], strict=True)}


# -- comparison ------------------------------------------------------------------------------------


def bits(value: Any) -> str:
    """Text that two values share only where they are the same to the bit (a NaN is a NaN)."""
    if isinstance(value, dict):
        return str({k: bits(value[k]) for k in sorted(value)})
    if isinstance(value, list):
        return str([bits(v) for v in value])
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value!r}f{struct.pack('<f', value).hex()}"
    return repr(value)


def _difference(got: list[str], want: list[str]) -> str:
    too_many = [r for r in got if r not in want or got.count(r) > want.count(r)]
    missing = [r for r in want if r not in got or want.count(r) > got.count(r)]
    return f"\n  has      {too_many[:2]}\n  has not  {missing[:2]}"


def _keyed(rows: list[Row], key: tuple[str, ...]) -> dict[tuple[Any, ...], Row]:
    found = {tuple(r[k] for k in key): r for r in rows}
    assert len(found) == len(rows), f"two rows of one key {key}"
    return found


def compare(got: list[Row], want: list[Row], what: str, key: tuple[str, ...]) -> None:
    """Both hold the same rows, to the bit; logarithms to one unit in the last place of a float32."""
    ours, theirs = _keyed(got, key), _keyed(want, key)
    assert sorted(map(repr, ours)) == sorted(map(repr, theirs)), f"{what}: other rows"
    for name, row in theirs.items():
        assert sorted(ours[name]) == sorted(row), f"{what}: other columns"
        for column, value in row.items():
            mine = ours[name][column]
            near = (
                column.startswith(LOGARITHMS)
                and len(mine) == len(value)
                and all(
                    math.isclose(a, b, rel_tol=2**-23) for a, b in zip(mine, value, strict=True)
                )
            )
            assert near or bits(mine) == bits(value), (
                f"{what}, {dict(zip(key, name, strict=True))}, {column}:"
                f"\n  is      {mine}\n  has to  {value}"
            )
