"""Each fault of a partition is refused, in one sentence, and the page of it is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pytest

from feature_store.days import HOUR_US, start_us
from feature_store.errors import QualityError
from feature_store.lake import Lake
from feature_store.quality import checked, suite, validate
from feature_store.spec import IdType
from feature_store.tables import contract, contracts
from tests.synthetic import FIRST_DAY, dataset, tables

SPEC = replace(dataset(), simulated=True)
START = start_us(FIRST_DAY, SPEC.utc_offset)
ROWS = {name: days[FIRST_DAY] for name, days in tables(SPEC, days=1, users=12).items()}
DAY_AFTER = tables(SPEC, days=2, users=12)["labels"]["2024-05-02"]


def _events() -> pa.Table:
    n = 4
    columns = {
        "event_id": range(n),
        "stream": ["likes", "clicks"] * 2,
        "user_id": range(n),
        "event_time": [START + i for i in range(n)],
        "ingest_time": [START + i for i in range(n)],
        "available_time": [START + i + 5 for i in range(n)],
        "ds": [FIRST_DAY] * n,
    }
    schema = contract(SPEC, "events").schema
    filled = [
        pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type)
        for f in schema
    ]
    return pa.table(filled, schema=schema)


def _others() -> dict[str, pa.Table]:
    hour = START // HOUR_US
    rows = {
        "item_aggregates": {
            "item_id": [1, 1, 2],
            "hour": [hour, hour + 23, hour],
            "events__clicks": [3, 1, 2],
            "beside__category": [[4], [4, 5], []],
            "beside__category__counts": [[2], [1, 7], []],
            "before_1__ad": [[2], [], [1]],
            "before_1__ad__counts": [[3], [], [1]],
            "before_20__ad": [[2], [], [1, 2]],
            "before_20__ad__counts": [[3], [], [1, 4]],
            "before_1__category": [[], [], []],
            "before_1__category__counts": [[], [], []],
            "before_20__category": [[], [], []],
            "before_20__category__counts": [[], [], []],
            "first_seen": [START, START, START - HOUR_US],
        },
        "truth": {"target_id": [1, 2], "task": ["click", "click"], "probability": [0.0, 0.4]},
        "user_embeddings": {
            "user_id": [1, 2],
            "snapshot": ["s", "s"],
            "embeddings": [1, 1],
            "dim": [2, 2],
            "raw": [b"\0\0\0\x3c", b"\0\x3c\0\0"],
            "pooled": [b"\0\0\0\x3c", b"\0\x3c\0\0"],
            "pooled_days": [1, 3],
            "model": ["sum", "sum"],
        },
    }
    made = {}
    for table, columns in rows.items():
        n = len(next(iter(columns.values())))
        made[table] = pa.table({**columns, "ds": [FIRST_DAY] * n}).cast(
            contract(SPEC, table).schema
        )
    return made


VALID = {**ROWS, **_others(), "events": _events()}


def _validate(table: str, rows: pa.Table, docs: Path, spec=SPEC) -> None:
    shape = contract(spec, table)
    nullable = pa.schema([f.with_nullable(True) for f in shape.schema])
    data = pads.dataset(rows.cast(nullable).drop_columns(list(shape.partitioned_by)))
    validate(spec, table, FIRST_DAY, data, docs_root=docs)


def _set(column: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    """Rows of a table with one value of `column` changed."""

    def change(rows: pa.Table) -> pa.Table:
        field = rows.schema.field(column).with_nullable(True)
        values = rows.column(column).to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        return rows.set_column(
            rows.schema.get_field_index(column), field, pa.array(values, field.type)
        )

    return change


def _first(value: object) -> Callable[[list], list]:
    return lambda old: [value, *old[1:]]


@pytest.mark.parametrize("table", list(contracts(SPEC)))
def test_a_partition_as_it_should_be_passes_and_its_page_is_kept(
    table: str, tmp_path: Path
) -> None:
    _validate(table, VALID[table], tmp_path)
    page = (tmp_path / table / f"{FIRST_DAY}.html").read_text()
    assert f"synthetic.{table} {FIRST_DAY}" in page.replace("  ", " ")
    assert f"{table}/{FIRST_DAY}.html" in (tmp_path / "index.html").read_text()
    assert len(suite(SPEC, table, FIRST_DAY).expectations) <= 14  # each costs a pass


@pytest.mark.parametrize("table", list(contracts(SPEC)))
def test_an_empty_day_passes(table: str, tmp_path: Path) -> None:
    _validate(table, VALID[table].slice(0, 0), tmp_path)


def test_string_ids_pass_and_empty_ones_do_not(tmp_path: Path) -> None:
    spec = dataset(user_id_type=IdType.STRING)
    rows = tables(spec, days=1, users=5)["aggregates"][FIRST_DAY]
    _validate("aggregates", rows, tmp_path, spec)
    with pytest.raises(QualityError, match=r"value_lengths_to_be_between\(user_id"):
        _validate("aggregates", _set("user_id", 0, "")(rows), tmp_path, spec)


HISTORY, AS_OF = "history__likes__available_time", "targets__as_of"
BUSY = next(
    i
    for i, r in enumerate(ROWS["examples"].to_pylist())
    if len(r[HISTORY]) > 2 and len(r[AS_OF]) > 1 and r["targets__history_end__likes"][-1] > 1
)
FULL = next(i for i, r in enumerate(ROWS["sequences"].to_pylist()) if len(r[HISTORY]) > 2)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("events", _set("stream", 1, "views"), r"in_set\(stream.* value views"),
        ("events", _set("user_id", 1, -7), r"between\(user_id; min_value 0\) .* value -7, at .*event_id 1"),
        ("events", _set("user_id", 1, None), r"null\(incomplete\) .* value user_id"),
        ("events", _set("event_time", 2, START // 1000), r"between\(event_time.*UTC microseconds"),
        ("events", _set("event_time", 2, START * 1000), r"between\(event_time.*UTC microseconds"),
        ("events", _set("available_time", 0, START - 1), r"between\(available_time;.*day"),
        ("events", _set("available_time", 2, START + 30 * HOUR_US), r"between\(available_time;"),
        ("events", _set("event_time", 3, START + HOUR_US), r"greater_than_b\(available_time, event_time"),
        ("events", _set("ingest_time", 3, START + HOUR_US), r"greater_than_b\(available_time, ingest_time"),
        ("impressions", _set("target", 1, "view"), r"in_set\(target.* value view"),
        ("impressions", lambda rows: pa.concat_tables([rows, rows.slice(0, 1)]),
         r"unique\(user_id, target, target_id\) .* 2 of"),
        ("events", _set("price", 0, float("inf")), r"null\(out_of_range\) .* value price"),
        ("events", _set("image", 0, [1.0, None, 2.0]), r"null\(out_of_range\) .* value image"),
        ("events", _set("image", 0, [1.0, float("nan"), 2.0]), r"null\(out_of_range\) .* value image"),
        ("events", _set("image", 0, [1.0]), r"null\(out_of_range\) .* value image is not of length 3"),
        ("impressions", _set("as_of", 1, START - 1), r"between\(as_of;"),
        ("impressions", _set("time", 1, START - HOUR_US), r"greater_than_b\(time, as_of"),
        ("impressions", _set("item_id", 1, None), r"null\(out_of_range\) .* value item_id"),
        ("impressions", _set("item_id", 1, -1), r"null\(out_of_range\) .* value item_id"),
        ("impressions", _set("label__clicked", 1, 2), r"value label__clicked"),
        ("labels", _set("labels", 0, _first(3)), r"null\(out_of_range\) .* value labels"),
        ("labels", _set("task", 0, "like"), r"in_set\(task.* value like"),
        ("labels", _set("shown_ds", 0, "2024-04-02"), r"in_set\(shown_ds"),
        ("sequences", _set(HISTORY, FULL, lambda v: v[:-1]), r"null\(misaligned\) .* value history__likes__"),
        ("sequences", _set(HISTORY, FULL, lambda v: v[::-1]), r"null\(unordered\) .* value " + HISTORY),
        ("sequences", _set(HISTORY, FULL, lambda v: [*v[:-1], None]), r"null\(incomplete\) .* value " + HISTORY),
        (
            "sequences",
            _set(HISTORY, FULL, lambda v: [*v[:-1], START + 25 * HOUR_US]),
            r"null\(out_of_range\) .* value history__likes__available_time after the day",
        ),
        ("sequences", _set("history__likes__event_time", FULL, _first(START // 1000)), r"out_of_range"),
        ("sequences", _set("user_id", 0, 1), r"unique\(user_id\)"),
        ("aggregates", _set("dense__likes_2d", 0, float("inf")), r"value dense__likes_2d"),
        ("aggregates", _set("dense__likes_2d", 0, float("nan")), r"value dense__likes_2d"),
        ("aggregates", _set("sparse__liked__scores", 0, lambda v: [*v, 1.0]), r"misaligned"),
        ("aggregates", _set("sparse__clicked", 0, [1, 2, 3, 4, 5]), r"sparse__clicked longer than max_ids"),
        ("examples", _set("part", 0, -1), r"between\(part"),
        ("examples", _set("has_aggregates", 0, 2), r"value has_aggregates"),
        ("examples", _set("targets__item_id", BUSY, lambda v: v[1:]), r"misaligned"),
        ("examples", _set("targets__target", BUSY, _first(1)), r"value targets__target"),
        ("examples", _set(AS_OF, BUSY, lambda v: [t + 24 * HOUR_US for t in v]), r"out_of_range"),
        ("examples", _set("targets__time", BUSY, _first(START)), r"targets__as_of after targets__time|leaks"),
        (
            "examples",
            _set("targets__history_end__likes", BUSY, _first(999)),
            r"null\(leaks\) .* value targets__history_end__likes outside of the history",
        ),
        ("examples", _set("targets__history_end__likes", BUSY, _first(-1)), r"outside of the history"),
        (
            "examples",
            _set("targets__history_end__likes", BUSY, lambda v: [*v[:-1], v[-1] - 1]),
            r"history_end__likes short of as_of",
        ),
        (
            "examples",
            _set(AS_OF, BUSY, lambda v: [*v[:-1], START]),
            r"null\(leaks\) .* value targets__history_end__\w+ past as_of",
        ),
        ("item_aggregates", _set("hour", 1, START // HOUR_US + 24), r"between\(hour"),
        ("item_aggregates", _set("events__clicks", 1, -1), r"value events__clicks"),
        ("item_aggregates", _set("before_1__ad__counts", 0, [0]), r"value before_1__ad__counts"),
        ("item_aggregates", _set("before_1__ad__counts", 0, []), r"before_1__ad__counts with before_1__ad"),
        ("item_aggregates", _set("first_seen", 0, START + HOUR_US), r"first_seen after the hour"),
        ("item_aggregates", _set("hour", 1, START // HOUR_US), r"compound_columns_to_be_unique\(item_id, hour"),
        ("item_aggregates", _set("item_id", 2, -1), r"between\(item_id"),
        ("truth", _set("probability", 0, 1.5), r"between\(probability.* value 1.5, at target_id 1, task click"),
        ("user_embeddings", _set("snapshot", 0, "t"), r"value_count.*\(snapshot; max_value 1\) fails with 2"),
        ("user_embeddings", _set("dim", 0, 3), r"raw is not embeddings x dim float16"),
        ("user_embeddings", _set("raw", 1, b"\0\x7c\0\0"), r"value raw is not finite, at user_id 2"),
        ("user_embeddings", _set("pooled_days", 1, 4), r"between\(pooled_days"),
    ],
)  # fmt: skip
def test_a_fault_is_refused_in_a_sentence_that_names_it(
    table: str, change: Callable[[pa.Table], pa.Table], message: str, tmp_path: Path
) -> None:
    with pytest.raises(QualityError, match=message) as refused:
        _validate(table, change(VALID[table]), tmp_path)
    sentence = str(refused.value)
    assert sentence.startswith(f"synthetic.{table} {FIRST_DAY}: expect_")
    assert sentence.endswith("nothing was published") and "\n" not in sentence
    assert (tmp_path / table / f"{FIRST_DAY}.refused.html").exists()


def test_labels_of_another_day_are_not_final_on_this_one(tmp_path: Path) -> None:
    shape = contract(SPEC, "labels")
    data = pads.dataset(DAY_AFTER.drop_columns(["ds"]))
    validate(SPEC, "labels", "2024-05-02", data, docs_root=tmp_path)
    assert shape.key == ("user_id", "shown_ds", "part", "task")
    with pytest.raises(QualityError, match=r"in_set\(shown_ds"):
        validate(SPEC, "labels", "2024-05-03", data, docs_root=tmp_path)


def test_a_refused_partition_stays_and_so_does_its_page(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake", SPEC)
    more = {"inputs": {}, "code_version": "v1"}
    lake.publish_arrow("truth", FIRST_DAY, VALID["truth"], **more)
    bad = _set("probability", 0, 2.0)(VALID["truth"])
    with pytest.raises(QualityError):
        lake.publish_arrow("truth", FIRST_DAY, bad, **more)
    assert lake.read("truth", days=[FIRST_DAY]).sort_by("target_id") == VALID["truth"]
    pages = tmp_path / "quality" / "synthetic" / "truth"
    assert sorted(p.name for p in pages.iterdir()) == [
        f"{FIRST_DAY}.html",
        f"{FIRST_DAY}.refused.html",
    ]
    lake.publish_arrow("truth", FIRST_DAY, VALID["truth"], **more)
    assert [p.name for p in pages.iterdir()] == [f"{FIRST_DAY}.html"]


def test_faults_are_found_in_a_slice_of_a_larger_batch() -> None:
    rows = VALID["examples"].combine_chunks()
    batch = rows.drop_columns(["ds"]).to_batches()[0]
    for start in (0, 1, len(batch) // 2):
        part = checked(SPEC, "examples", FIRST_DAY, batch.slice(start))
        for kind in ("incomplete", "misaligned", "out_of_range", "unordered", "leaks"):
            assert part.column(kind).null_count == part.num_rows
    late = pc.add(batch.column(AS_OF).values, -HOUR_US * 24)
    moved = pa.ListArray.from_arrays(batch.column(AS_OF).offsets, late)
    bad = batch.set_column(batch.schema.get_field_index(AS_OF), AS_OF, moved)
    for start in (0, 3):
        part = checked(SPEC, "examples", FIRST_DAY, bad.slice(start))
        assert part.column("out_of_range").null_count == 0


def test_nothing_is_written_outside_of_the_docs_root(tmp_path: Path) -> None:
    home, docs = tmp_path / "home", tmp_path / "docs"
    home.mkdir()
    script = """
import sys, pathlib
from tests.unit.test_quality import VALID, _validate
_validate("truth", VALID["truth"], pathlib.Path(sys.argv[1]))
import great_expectations, os, json
print(json.dumps(os.environ["GX_ANALYTICS_ENABLED"]))
"""
    repository = Path(__file__).resolve().parents[2]
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(repository)}
    run = subprocess.run(
        [sys.executable, "-c", script, str(docs)],
        cwd=home,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == "false"
    assert list(home.iterdir()) == []
    assert sorted(p.name for p in docs.rglob("*.html")) == [f"{FIRST_DAY}.html", "index.html"]
