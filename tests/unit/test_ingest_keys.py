"""Ingestion: ids that tell rows apart, rows that share one, and the names that a spec may give."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from feature_store.columns import label_column
from feature_store.days import HOUR_US, start_us
from feature_store.spec import (
    Attribute,
    Dataset,
    EventStream,
    GivenLabel,
    IdType,
    Kind,
    Target,
    Task,
)
from feature_store.tables import reserved_names
from jobs import ingest
from jobs.ingest_duplicates import Dropped, dropped, find_conflict, first_of_each
from jobs.ingest_rows import MARKS
from jobs.sources import SourceDay

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

DAY = "2024-05-02"
NOON = start_us(DAY, timedelta(0)) + 12 * HOUR_US
BOOK = Attribute(name="book", vocabulary="item")
SHOP = Dataset(
    name="shop",
    first_day="2024-05-01",
    streams=(EventStream(name="views", attributes=(BOOK,), max_events=5),),
    targets=(Target(name="offer"), Target(name="banner")),
    tasks=(Task(name="bought", label=GivenLabel(column="paid"), targets=("offer",)),),
)

Row = dict[str, Any]


def view(**changed: Any) -> Row:
    return {"event_id": "1", "user_id": 1, "event_time": NOON, "book": 7, **changed}


def offer(**changed: Any) -> Row:
    row = {"target_id": 5, "target": "offer", "user_id": 1, "time": NOON, "item_id": 7, "paid": 1}
    return {**row, **changed}


def typed(
    spark: SparkSession,
    dataset: Dataset = SHOP,
    *,
    views: list[Row] | None = None,
    shown: list[Row] | None = None,
) -> dict[str, DataFrame]:
    def frame(rows: list[Row]) -> DataFrame:
        return spark.createDataFrame(pa.Table.from_pylist(rows))

    stream = dataset.streams[0].name
    day = SourceDay(
        events={stream: frame(views or [view()])}, impressions=frame(shown or [offer()])
    )
    frames = ingest.transform(day, dataset, DAY)
    counts = ingest.summary(frames).collect()
    assert ingest.find_problem(counts, dataset, DAY) is None
    return frames


def once(frames: dict[str, DataFrame], table: str, *columns: str) -> list[tuple]:
    return sorted(first_of_each(frames[table], table).select(*columns).collect())


def test_ids_that_count_within_a_user_do_not_meet(spark: SparkSession) -> None:
    views = [view(), view(user_id=2, book=8), view(event_id="2", book=9)]
    frames = typed(spark, views=views, shown=[offer(), offer(user_id=2), offer(target="banner")])
    assert find_conflict(frames["events"], "events", SHOP, DAY) is None
    assert find_conflict(frames["impressions"], "impressions", SHOP, DAY) is None
    assert not ingest.has_repeats(ingest.summary(frames).collect(), "events")
    assert not ingest.has_repeats(ingest.summary(frames).collect(), "impressions")
    assert once(frames, "events", "user_id", "book") == [(1, 7), (1, 9), (2, 8)]
    assert len(once(frames, "impressions", "user_id", "target")) == 3


def test_an_id_that_several_events_share_is_an_error_with_both(spark: SparkSession) -> None:
    views = [view(book=b, ingest_time=NOON + 5) for b in (7, 8, 9)] + [view(event_id="2")] * 2
    found = find_conflict(typed(spark, views=views)["events"], "events", SHOP, DAY)
    assert found is not None and found.startswith(
        f"shop {DAY}: views: event_id of an event is shared by rows that differ (1 times), such as "
        "user_id 1 with book "
    )
    assert "EventStream(views).id_from" in found
    apart = replace(SHOP, streams=(replace(SHOP.streams[0], id_from=("event_id", "book")),))
    frames = typed(spark, apart, views=views)
    assert find_conflict(frames["events"], "events", apart, DAY) is None
    assert once(frames, "events", "book") == [(7,), (7,), (8,), (9,)]


def test_without_a_time_of_arrival_rows_of_one_id_cannot_be_versions(spark: SparkSession) -> None:
    views = [view(), view(event_time=NOON + 5)]
    frames = typed(spark, views=views)
    assert find_conflict(frames["events"], "events", SHOP, DAY) is not None
    frames = typed(spark, views=[{**v, "ingest_time": v["event_time"]} for v in views])
    assert find_conflict(frames["events"], "events", SHOP, DAY) is None


def test_the_first_version_of_a_row_stays_whatever_its_content(spark: SparkSession) -> None:
    for books in ([7, 8, 9], [9, 8, 7], [8, 9, 7]):  # one of them hashes lowest
        views = [view(book=b, ingest_time=NOON + i) for i, b in enumerate(books)]
        views.append(view(book=books[0], ingest_time=NOON + 9))  # the first again
        views += [view(event_id="2"), view(event_id="2")]
        rows = typed(spark, views=views)["events"]
        assert find_conflict(rows, "events", SHOP, DAY) is None
        assert once({"events": rows}, "events", "book") == sorted([(books[0],), (7,)])
        assert dropped(rows, "events") == Dropped(duplicates=2, versions=2)


def test_a_target_that_comes_twice_and_differs_is_an_error(spark: SparkSession) -> None:
    rows = typed(spark, shown=[offer(), offer(), offer(paid=0)])["impressions"]
    found = find_conflict(rows, "impressions", SHOP, DAY)
    assert found is not None and "impressions.target_id 5 of offer is shared" in found
    assert (
        "label__paid 0" in found and "label__paid 1" in found and "Target(offer).id_from" in found
    )
    rows = typed(spark, shown=[offer(), offer()])["impressions"]
    assert find_conflict(rows, "impressions", SHOP, DAY) is None
    assert dropped(rows, "impressions") == Dropped(duplicates=1)


def test_a_missing_value_is_content(spark: SparkSession) -> None:
    rows = typed(spark, views=[view(book=None), view(book=8)])["events"]
    assert find_conflict(rows, "events", SHOP, DAY) is not None


@pytest.mark.parametrize("given", ["7", 7])
def test_an_id_is_one_however_a_file_has_it(spark: SparkSession, given: object) -> None:
    """Of the event, the item, the target: as text, or as a number."""
    views = [view(event_id=given, book=given)]
    frames = typed(spark, views=views, shown=[offer(target_id=given, item_id=given)])
    (event,), (target,) = frames["events"].collect(), frames["impressions"].collect()
    (same,) = typed(spark, views=[view(event_id=7)])["events"].collect()
    assert event["event_id"] == same["event_id"] and event["book"] == 7
    assert target["target_id"] == 7 and target["item_id"] == 7


def test_text_ids_are_stored_as_they_are_where_the_spec_says_so(spark: SparkSession) -> None:
    text = replace(
        SHOP, target_id_type=IdType.STRING, user_id_type=IdType.STRING, item_id_type=IdType.STRING,
        streams=(replace(SHOP.streams[0], attributes=(replace(BOOK, id_type=IdType.STRING),)),),
    )  # fmt: skip
    views = [view(user_id="Ann", book="b-7")]
    shown = [
        offer(user_id="Ann", item_id="b-7", target_id="0017"),
        offer(user_id="Ann", target_id="17", item_id="c"),
    ]
    frames = typed(spark, text, views=views, shown=shown)
    rows = frames["impressions"].select("user_id", "target_id", "item_id").collect()
    assert sorted(map(tuple, rows)) == [("Ann", "0017", "b-7"), ("Ann", "17", "c")]
    assert [r["book"] for r in frames["events"].collect()] == ["b-7"]


def test_numbers_beyond_the_limits_are_clipped_and_counted(spark: SparkSession) -> None:
    attributes = (
        Attribute(name="price", kind=Kind.NUMERIC, clip=(0.0, 100.0)),
        Attribute(name="look", kind=Kind.VECTOR, dim=2, clip=(-1.0, 1.0)),
    )
    shop = replace(SHOP, streams=(EventStream(name="views", attributes=attributes, max_events=5),))

    def of(number: int, price: object, look: list[float] | None) -> Row:
        row = {"event_id": number, "user_id": 1, "event_time": NOON}
        return {**row, "price": price, "look": look}

    views = [
        of(1, 1e39, [0.5, float("inf")]), of(2, -float("inf"), [0.0, 1.0]),
        of(3, float("nan"), None), of(4, None, None), of(5, 7.5, None),
    ]  # fmt: skip
    frames = typed(spark, shop, views=views)
    rows = sorted(
        (r["price"], r["look"]) for r in frames["events"].collect() if r["price"] is not None
    )
    assert rows == [(0.0, [0.0, 1.0]), (7.5, None), (100.0, [0.5, 1.0])]
    assert (
        sum(r["price"] is None for r in frames["events"].collect()) == 2
    )  # NaN is a missing value
    notes = ingest.notes_of(ingest.summary(frames).collect(), "events")
    assert notes["clipped"] == {"views": 3}
    assert ingest.line_of(notes, "events").endswith("values clipped: 3 of views")
    texts = typed(
        spark, shop, views=[of(1, "-Infinity", None), of(2, " 99.5 ", None), of(3, "", None)]
    )
    assert [r["price"] for r in texts["events"].orderBy("price").collect()] == [None, 0.0, 99.5]


def test_counts_before_and_after_dropping_add_up() -> None:
    row = {"table": "events", "_part": "views", "_problem": None, "rows": 20, "inside": 16,
           "keys": 12, "late": 5, "clipped": 0}  # fmt: skip
    notes = ingest.notes_of([row], "events", Dropped(duplicates=3, versions=1, late=2))  # type: ignore[list-item]
    assert notes["late"] == 3
    assert ingest.line_of(notes, "events") == (
        "20 views read; 3 duplicates, 1 later versions and 4 rows of other days dropped; "
        "12 kept, 3 of them late"
    )


def test_any_name_that_a_spec_may_give_comes_through(spark: SparkSession) -> None:
    """As attribute and as context or given label: names that ours, Python's or SQL's could meet."""
    ours = {"place", "same", "content", "key", "id", "row", "rows", "table", "count", "part", "raw"}
    words = {"select", "from", "order", "case", "end", "null", "user", "class", "lambda", "a" * 200}
    names = sorted(({m.removeprefix("_") for m in MARKS} | ours | words) - reserved_names(SHOP))
    context, labels = names[::2], names[1::2]
    dataset = replace(
        SHOP,
        streams=(EventStream(name="value", attributes=_numeric(names), max_events=3),),
        targets=(Target(name="late", context=_numeric(context)),),
        tasks=tuple(
            Task(name=n, label=GivenLabel(column=n), targets=("late",)) for n in labels
        ),
    )  # fmt: skip
    given = {n: float(i) for i, n in enumerate(names)}
    views = [{"event_id": 1, "user_id": 1, "event_time": NOON, **given}] * 2
    shown = {"target_id": 1, "user_id": 1, "time": NOON, "item_id": 2}
    shown |= {n: given[n] % 2 if n in labels else given[n] for n in names}
    frames = typed(spark, dataset, views=views, shown=[shown])
    assert find_conflict(frames["events"], "events", dataset, DAY) is None
    (event,) = first_of_each(frames["events"], "events").select(*names).collect()
    assert event.asDict() == given
    (target,) = frames["impressions"].collect()
    assert {n: target[n] for n in context} == {n: given[n] for n in context}
    assert [target[label_column(n)] for n in labels] == [given[n] % 2 for n in labels]


def _numeric(names: list[str]) -> tuple[Attribute, ...]:
    return tuple(Attribute(name=n, kind=Kind.NUMERIC) for n in names)
