"""Ingestion: what is wrong with a source's rows stops the day with one sentence; what every log has is counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from pyspark.sql import functions as F

from feature_store import datasets
from feature_store.days import DAY_US, HOUR_US, start_us
from feature_store.errors import DataError
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
from jobs import ingest, sources
from jobs.context import JobContext
from jobs.ingest_rows import hash_of
from jobs.settings import Settings
from jobs.sources import SourceDay

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DAY = "2024-05-02"
DATASET = Dataset(
    name="shop",
    first_day="2024-05-01",
    utc_offset=timedelta(hours=-3),
    user_id_type=IdType.STRING,
    streams=(
        EventStream(
            name="views",
            attributes=(
                Attribute(name="product", vocabulary="item"),
                Attribute(name="price", kind=Kind.NUMERIC),
                Attribute(name="look", kind=Kind.VECTOR, dim=2),
            ),
            max_events=5,
            delay=timedelta(minutes=10),
            id_from=("user_id", "event_time", "product"),
        ),
        EventStream(name="visits", attributes=(Attribute(name="page"),), max_events=5),
    ),
    targets=(
        Target(name="offer", context=(Attribute(name="place"),)),
        Target(name="visit", has_item=False, id_from=("user_id", "time")),
    ),
    tasks=(Task(name="bought", label=GivenLabel(column="paid"), targets=("offer",)),),
)
START = start_us(DAY, DATASET.utc_offset)
NOON = START + 12 * HOUR_US

Row = dict[str, Any]


def view(**changed: Any) -> Row:
    return {
        "user_id": "u",
        "event_time": NOON,
        "product": 7,
        "price": 1.5,
        "look": [0.5, 1.0],
        **changed,
    }


def visit(**changed: Any) -> Row:
    return {"event_id": 1, "user_id": "u", "event_time": NOON, "page": 3, **changed}


def offer(**changed: Any) -> Row:
    row = {
        "target_id": 5,
        "target": "offer",
        "user_id": "u",
        "time": NOON,
        "item_id": 7,
        "place": 0,
        "paid": 1,
    }
    return {**row, **changed}


def source(
    spark: SparkSession,
    views: list[Row] | None = None,
    visits: list[Row] | None = None,
    shown: list[Row] | None = None,
    **more: Any,
) -> SourceDay:
    """A day of these rows; one good row of each where nothing is said."""

    def frame(rows: list[Row]) -> Any:
        return spark.createDataFrame(pa.Table.from_pylist(rows))

    return SourceDay(
        events={"views": frame(views or [view()]), "visits": frame(visits or [visit()])},
        impressions=frame(shown or [offer()]),
        **more,
    )


def problem_of(day: SourceDay) -> str | None:
    counts = ingest.summary(ingest.transform(day, DATASET, DAY)).collect()
    return ingest.find_problem(counts, DATASET, DAY)


@pytest.fixture
def run(
    spark: SparkSession, settings_of: Callable, lake_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[SourceDay], JobContext]:
    """Run the job on a source that gives this day."""

    def ingest_day(day: SourceDay | Exception, *, needs_source: bool = False) -> JobContext:
        def read(*_: object) -> SourceDay:
            if isinstance(day, Exception):
                raise day
            return day

        module = SimpleNamespace(NEEDS_SOURCE=needs_source, read=read)
        monkeypatch.setattr(sources, "get", lambda name: module)
        settings = settings_of("sail")
        settings = Settings.from_env(
            {"HEADWATER_HOME": str(settings.home), "HEADWATER_ENGINE": "sail",
             "HEADWATER_LAKE": str(lake_home)}
        )  # fmt: skip
        context = JobContext(dataset=DATASET, ds=DAY, settings=settings)
        context.__dict__["spark"] = spark
        ingest.run(context)
        return context

    return ingest_day


def test_good_rows_have_no_problem_and_become_the_contracts_rows(
    run: Callable, spark: SparkSession
) -> None:
    late = view(event_time=START - HOUR_US, ingest_time=NOON, price=None, product=None, look=None)
    views = [{**view(), "ingest_time": None}, late]
    shown = [
        {**offer(), "as_of": NOON - 5},
        {**offer(target="visit", target_id=None, item_id=None, paid=None), "as_of": None},
    ]
    context = run(source(spark, views=views, shown=shown))
    rows = {
        r["product"]: r for r in context.lake.read("events").to_pylist() if r["stream"] == "views"
    }
    assert rows[7]["available_time"] == NOON + 600_000_000
    assert rows[7]["ingest_time"] == NOON and rows[7]["ds"] == DAY
    assert rows[None]["event_time"] == START - HOUR_US
    assert rows[None]["available_time"] == NOON + 600_000_000
    targets = {r["target"]: r for r in context.lake.read("impressions").to_pylist()}
    assert targets["offer"]["target_id"] == 5 and targets["offer"]["as_of"] == NOON - 5
    assert targets["offer"]["label__paid"] == 1
    assert targets["visit"]["target_id"] > 0 and targets["visit"]["as_of"] == NOON
    notes = context.lake.partitions("events")[DAY].notes
    assert notes["late"] == 1 and notes["duplicates_dropped"] == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"views": [view(user_id=None)]}, r"views.user_id is null in 1 rows: it is needed in every row"),
        ({"views": [view(user_id="")]}, r"views.user_id is blank in 1 rows: it is needed"),
        ({"views": [view(user_id=" \t")]}, r"views.user_id is blank in 1 rows: it is needed"),
        ({"views": [view(user_id="NULL")]}, r"views.user_id is NULL in 1 rows: it is needed"),
        ({"views": [view(user_id="None")]}, r"views.user_id is None in 1 rows: it is needed"),
        ({"views": [view(user_id="u ")]}, r"views.user_id is u  in 1 rows: there are blanks around it"),
        ({"views": [view(user_id=7.0)], "visits": [visit(user_id=7)], "shown": [offer(user_id=7)]},
         r"views.user_id is 7.0 in 1 rows: the spec has text, and a float has several spellings"),
        ({"views": [view(product=-4)]}, r"views.product is -4 in 1 rows: ids are 0 or more"),
        ({"views": [view(product="seven")]}, r"views.product is seven in 1 rows: the spec has integers: declare "
         r"Attribute\(product, id_type=IdType.STRING\) and item_id_type=IdType.STRING, or map it"),
        ({"views": [view(product=7.5)]}, r"views.product is 7.5 in 1 rows: the spec has integers"),
        ({"views": [view(product=2.0**60)]}, r"views.product is .* a float holds no whole number of this size"),
        ({"views": [view(product="7.0")]}, r"views.product is 7.0 in 1 rows: the spec has integers"),
        ({"views": [view(price="12.90f")]}, r"views.price is 12.90f in 1 rows: the spec has another type"),
        ({"views": [view(price="NaN")]}, r"views.price is NaN in 1 rows: the spec has another type"),
        ({"views": [view(price="inf")]}, r"views.price is inf in 1 rows: numbers are finite float32"),
        ({"views": [view(price=float("-inf"))]}, r"views.price is -[Ii]nf\w* in 1 rows: numbers are finite"),
        ({"views": [view(price=1e39)]}, r"views.price is 1.*39 in 1 rows: numbers are finite float32: .*clip="),
        ({"views": [view(look=[1.0, None])]}, r"views.look is 1.0, null in 1 rows: numbers are finite"),
        ({"views": [view(look=[float("nan"), 1.0])]}, r"views.look is NaN, 1.0 in 1 rows: numbers are"),
        ({"views": [view(look=[1e39, 1.0])]}, r"views.look is 1.*39, 1.0 in 1 rows: numbers are finite"),
        ({"views": [view(look=[1.0])]}, r"views.look is 1 in 1 rows: the vector's length"),
        ({"views": [view(event_time=None)]}, r"views.event_time is null"),
        ({"views": [view(event_time=NOON // 1000)]}, r"event_time is \d+ in 1 rows: the time is in milliseconds"),
        ({"views": [view(event_time=NOON // 10**6)]}, r"event_time is \d+ in 1 rows: the time is in seconds"),
        ({"views": [view(event_time=NOON * 1000)]}, r"event_time is \d+ in 1 rows: the time is in nanoseconds"),
        ({"views": [view(event_time=20240501, ingest_time=NOON)]}, r"event_time is 20240501 .* like a date"),
        ({"views": [view(event_time=NOON, ingest_time=20240501)]}, r"ingest_time is 20240501 .* like a date"),
        ({"views": [view(event_time="202405021500", ingest_time=NOON)]}, r"event_time is 2024.* like a date"),
        ({"shown": [offer(time=20240502150000)]}, r"offer.time is 20240502150000 .* looks like a date"),
        ({"views": [view(event_time=NOON + DAY_US, ingest_time=NOON)]}, r"views.event_time is .* another day"),
        ({"views": [view(ingest_time=NOON + DAY_US)]}, r"views.ingest_time is .* another day"),
        ({"views": [view(ingest_time=5)]}, r"views.ingest_time is 5 .* more than 30 days"),
        ({"views": [view(event_time="15:00")]}, r"views.event_time is 15:00 in 1 rows: a time is microseconds"),
        ({"views": [view(event_time=NOON / 10**6 + .5)]}, r"views.event_time is .* in 1 rows: a time is microseconds"),
        ({"views": [view(event_time=NOON + DAY_US)]}, r"event_time is \d+ \(2024-05-03\) .*belongs to another day"),
        ({"views": [view(event_time=NOON - 40 * DAY_US, ingest_time=NOON)]}, r"more than 30 days"),
        ({"visits": [visit(event_id=None)]}, r"visits.event_id is null"),
        ({"shown": [offer(item_id=None)]}, r"offer.item_id is null"),
        ({"shown": [offer(item_id=-1)]}, r"offer.item_id is -1"),
        ({"shown": [offer(target_id=None)]}, r"offer.target_id is null"),
        ({"shown": [offer(target_id="5a")]}, r"offer.target_id is 5a in 1 rows: the spec has integers: declare "
         r"Dataset\(target_id_type=IdType.STRING\), or map"),
        ({"shown": [offer(item_id="b7")]}, r"item_id is b7 .* declare Dataset\(item_id_type=IdType.STRING\) and "),
        ({"shown": [offer(place="left")]}, r"place is left .* declare Attribute\(place, id_type=IdType.STRING\), or"),
        ({"visits": [visit(event_id="NULL")]}, r"visits.event_id is NULL in 1 rows: it is needed"),
        ({"visits": [visit(event_id=1.0)]}, r"visits.event_id is 1.0 in 1 rows: the spec has text, and a float"),
        ({"shown": [offer(target="banner")]}, r"banner.target is banner .* the spec has no target of this kind"),
        ({"shown": [offer(paid=2)]}, r"offer.paid is 2 in 1 rows: a label is 1, 0 or null"),
        ({"shown": [offer(time=NOON, as_of=NOON + 1)]}, r"offer.time is .* it is before as_of"),
        ({"shown": [offer(time=NOON // 1000)]}, r"offer.time is .* milliseconds"),
    ],
)  # fmt: skip
def test_bad_values_are_named(
    spark: SparkSession, rows: dict[str, list[Row]], message: str
) -> None:
    found = problem_of(source(spark, **rows))
    assert found is not None and found.startswith(f"shop {DAY}: ")
    assert re.search(message, found), found


def test_the_problem_of_most_rows_is_the_one_that_is_named(spark: SparkSession) -> None:
    views = [view(product=-1), view(user_id=None), view(user_id=None)]
    found = problem_of(source(spark, views=views))
    assert found is not None and "views.user_id is null in 2 rows" in found
    assert "1 more kinds of problem" in found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"views": [{k: v for k, v in view().items() if k != "price"}]}, r"views\.price is missing"),
        ({"views": [view(prise=1)]}, r"views\.prise is a column that the spec does not know"),
        ({"shown": [offer(plaace=1)]}, r"impressions\.plaace is a column that the spec does not know"),
        ({"views": [view(event_time=date(2024, 5, 2))]}, r"views\.event_time is date: the spec has it as bigint"),
        ({"views": [view(look=1.0)]}, r"views\.look is double: the spec has it as array<float>"),
    ],
)  # fmt: skip
def test_wrong_columns_are_named(
    spark: SparkSession, rows: dict[str, list[Row]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ingest.transform(source(spark, **rows), DATASET, DAY)


def test_a_stream_without_a_frame_and_one_that_is_not_the_specs_are_named(
    spark: SparkSession,
) -> None:
    day = source(spark)
    with pytest.raises(DataError, match="no frame of stream 'visits'"):
        ingest.transform(SourceDay(events={"views": day.events["views"]}), DATASET, DAY)
    with pytest.raises(DataError, match="events of 'likes'"):
        more = {**day.events, "likes": day.events["views"]}
        ingest.transform(SourceDay(events=more), DATASET, DAY)


def test_text_of_a_csv_file_is_converted_and_an_empty_field_is_missing(
    run: Callable, spark: SparkSession
) -> None:
    views = [
        view(event_time=str(NOON), product="12", price=""),
        view(product="", event_time=str(NOON + 1), price="2.5"),
    ]
    context = run(source(spark, views=views))
    rows = [r for r in context.lake.read("events").to_pylist() if r["stream"] == "views"]
    assert {(r["product"], r["price"]) for r in rows} == {(12, None), (None, 2.5)}


@pytest.mark.parametrize("text", ["2024-05-02T15:00:00Z", "2024-05-02 12:00:00-03:00", str(NOON)])
def test_a_time_may_be_text(spark: SparkSession, text: str) -> None:
    day = source(spark, visits=[visit(event_time=text)])
    assert problem_of(day) is None
    (row,) = ingest.transform(day, DATASET, DAY)["events"].where("stream = 'visits'").collect()
    assert row["event_time"] == NOON


def test_text_that_is_no_time_is_named(spark: SparkSession) -> None:
    found = problem_of(source(spark, visits=[visit(event_time="yesterday")]))
    assert found is not None and "visits.event_time is yesterday" in found


def test_duplicates_are_dropped_and_counted_and_the_first_to_arrive_stays(
    run: Callable, spark: SparkSession
) -> None:
    views = [view(ingest_time=NOON + 9), view(ingest_time=NOON + 3), view(ingest_time=NOON + 3)]
    visits = [visit(), visit(), visit(event_id=2, page=4)]
    context = run(source(spark, views=views, visits=visits, shown=[offer(), offer()]))
    rows = context.lake.read("events").to_pylist()
    assert [r["ingest_time"] for r in rows if r["stream"] == "views"] == [NOON + 3]
    assert sorted(r["page"] for r in rows if r["stream"] == "visits") == [3, 4]
    notes = context.lake.partitions("events")[DAY].notes
    assert notes["duplicates_dropped"] == 3 and notes["versions_dropped"] == 0
    assert notes["rows_read"] == {"views": 3, "visits": 3}
    assert context.lake.partitions("impressions")[DAY].notes["duplicates_dropped"] == 1


def test_streams_may_number_their_events_alike(spark: SparkSession) -> None:
    twice = Dataset(
        name="shop",
        first_day="2024-05-01",
        utc_offset=DATASET.utc_offset,
        streams=tuple(
            EventStream(name=n, attributes=(Attribute(name="page"),), max_events=5)
            for n in ("a", "b")
        ),
        targets=DATASET.targets,
        tasks=DATASET.tasks,
        user_id_type=IdType.STRING,
    )
    frame = spark.createDataFrame(pa.Table.from_pylist([visit(event_id="x"), visit(event_id="y")]))
    frames = ingest.transform(SourceDay(events={"a": frame, "b": frame}), twice, DAY)
    ids = [r["event_id"] for r in frames["events"].collect()]
    assert len(set(ids)) == 4 and min(ids) >= 0


def test_values_of_hashed_ids_do_not_run_into_each_other(spark: SparkSession) -> None:
    rows = [("ab", "c"), ("a", "bc"), ("abc", None), (None, "abc"), ("abc", ""), ("", "abc")]
    frame = spark.createDataFrame(pa.Table.from_pylist([{"x": x, "y": y} for x, y in rows]))
    ids = [r[0] for r in frame.select(hash_of("s", [F.col("x"), F.col("y")])).collect()]
    assert len(set(ids)) == len(rows) and min(ids) >= 0


def test_rows_of_other_days_are_dropped_where_files_overlap(
    run: Callable, spark: SparkSession
) -> None:
    views = [view(), view(event_time=NOON + DAY_US), view(event_time=NOON - 60 * DAY_US)]
    context = run(source(spark, views=views, overlapping=True))
    assert context.lake.partitions("events")[DAY].notes["other_days_dropped"] == 2
    assert context.lake.read("events").num_rows == 2


def test_a_delay_carries_an_event_into_the_next_day(spark: SparkSession) -> None:
    end = START + DAY_US
    found = problem_of(source(spark, views=[view(event_time=end - 1)]))
    assert found is not None and "belongs to another day" in found
    assert problem_of(source(spark, views=[view(event_time=START - 1)])) is None
    assert problem_of(source(spark, visits=[visit(event_time=end - 1)])) is None


def test_an_empty_day_is_published_empty(run: Callable, spark: SparkSession) -> None:
    day = source(spark)
    nothing = {name: frame.limit(0) for name, frame in day.events.items()}
    context = run(SourceDay(events=nothing))
    assert context.lake.partitions("events")[DAY].rows == 0
    assert context.lake.partitions("impressions")[DAY].rows == 0


def test_a_bad_day_leaves_the_partition_as_it_was(run: Callable, spark: SparkSession) -> None:
    context = run(source(spark))
    before = context.lake.read("events"), context.lake.version("events")
    with pytest.raises(DataError, match=r"views\.product is -1"):
        run(source(spark, views=[view(product=-1)]))
    assert context.lake.read("events").equals(before[0])
    assert context.lake.version("events") == before[1]
    left = list(Path(context.lake.uri("events")).parent.rglob("_staging/**/*.parquet"))
    assert left == []


def test_the_same_day_again_gives_the_same_rows(run: Callable, spark: SparkSession) -> None:
    views = [view(product=p, price=x, ingest_time=NOON + p + x) for p in range(4) for x in range(3)]

    def rows() -> pa.Table:
        return run(source(spark, views=views)).lake.read("events").sort_by("event_id")

    assert rows().equals(rows())


def test_a_source_that_needs_a_folder_says_so(run: Callable, spark: SparkSession) -> None:
    with pytest.raises(DataError, match="SOURCE is missing: shop reads files"):
        run(source(spark), needs_source=True)


def test_a_file_that_cannot_be_read_is_named(
    run: Callable, spark: SparkSession, tmp_path: Path
) -> None:
    path = tmp_path / "views.csv.gz"
    path.write_bytes(b"this is not gzip")
    day = source(spark)
    broken = spark.read.csv(
        str(path), schema="user_id string, event_time bigint, page bigint, event_id bigint"
    )
    with pytest.raises(DataError, match="cannot be read"):
        run(SourceDay(events={**day.events, "visits": broken}))


def test_a_dataset_without_a_source_says_which_file_to_add() -> None:
    with pytest.raises(DataError, match=r"add jobs/sources/nowhere\.py"):
        sources.get("nowhere")


@pytest.mark.parametrize("engine", ["sail", "spark"], indirect=True)
def test_simulated_rows_are_typed_the_same_by_both_engines(
    spark: SparkSession, engine: str, request: pytest.FixtureRequest
) -> None:
    dataset = datasets.get("simulated")
    day = sources.get("simulated").read(spark, "/anywhere/users=40,seed=5", "2024-03-05", dataset)
    day = replace(
        day,
        events={name: spark.createDataFrame(rows) for name, rows in day.events.items()},
        impressions=spark.createDataFrame(day.impressions),
    )
    frames = ingest.transform(day, dataset, "2024-03-05")
    counts = ingest.summary(frames).collect()
    assert ingest.find_problem(counts, dataset, "2024-03-05") is None
    rows = {
        table: sorted(map(str, frame.drop("_outside", "_late").collect()))
        for table, frame in frames.items()
    }
    known = request.config.stash.setdefault(_ROWS, {})
    assert known.setdefault("rows", rows) == rows


_ROWS: pytest.StashKey[dict[str, Any]] = pytest.StashKey()


def test_tables_in_memory_are_read_as_frames_are(run: Callable, spark: SparkSession) -> None:
    views, visits, shown = [view(), view(user_id="v")], [visit()], [offer()]
    tables = {"views": pa.Table.from_pylist(views), "visits": pa.Table.from_pylist(visits)}

    def published(day: SourceDay) -> list[pa.Table]:
        lake = run(day).lake
        found = [lake.read(table, days=[DAY]) for table in ("events", "impressions")]
        return [rows.sort_by([("user_id", "ascending")]) for rows in found]

    memory = published(SourceDay(events=tables, impressions=pa.Table.from_pylist(shown)))
    assert [rows.num_rows for rows in memory] == [3, 1]
    for rows, wanted in zip(memory, published(source(spark, views, visits, shown)), strict=True):
        assert rows.equals(wanted)


def test_a_table_beyond_what_a_client_takes_at_once_is_read(
    run: Callable, spark: SparkSession
) -> None:
    context = run(source(spark))
    letters = pa.table({"user_id": ["x" * 100_000] * 1500})  # gRPC refuses more than 128 MiB
    with context.lake.scratch("test", DAY) as folder:
        framed = ingest._framed(context, folder, SourceDay(events={"letters": letters}))
        frame = framed.events["letters"]
        assert frame.select(F.sum(F.length("user_id"))).collect()[0][0] == 150_000_000
    assert not Path(folder).exists()
