"""One partition at a time: replaced whole or not at all, by whoever, however often."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import functions as F

from feature_store import ledger, quality
from feature_store.commit import replace_partition
from feature_store.errors import (
    ContractError,
    DataError,
    MissingPartitionError,
    StalePartitionError,
)
from feature_store.lake import Lake
from feature_store.ledger import pin
from feature_store.spec import Attribute, IdType, Kind
from feature_store.tables import contract, definition
from tests.synthetic import FIRST_DAY, dataset, tables

SPEC = replace(dataset(), simulated=True)
DAY, NEXT = "2024-05-01", "2024-05-02"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """A lake without a quality gate, which has tests of its own."""
    monkeypatch.setattr(quality, "validate", lambda *args, **kwargs: None)
    monkeypatch.setattr(quality, "warm_up", lambda: SimpleNamespace(join=lambda: None))
    return Lake(tmp_path / "lake", SPEC)


def truth(ids: list[int], ds: str = DAY) -> pa.Table:
    n = len(ids)
    schema = contract(SPEC, "truth").schema
    return pa.table([ids, ["click"] * n, [0.5] * n, [ds] * n], schema=schema)


def publish(lake: Lake, ids: list[int], ds: str = DAY, **more: object):
    arguments = {"inputs": {"events/" + ds: 3}, "code_version": "v1", **more}
    return lake.publish_arrow("truth", ds, truth(ids, ds), **arguments)


def ids(lake: Lake, ds: str = DAY, **more: object) -> list[int]:
    return sorted(lake.read("truth", days=[ds], **more).column("target_id").to_pylist())


def test_what_was_published_is_read_back_in_the_contracts_types(lake: Lake) -> None:
    written = tables(SPEC, days=1, users=6)
    for table in ("examples", "sequences", "aggregates", "impressions", "labels"):
        rows = written[table][FIRST_DAY]
        lake.publish_arrow(table, FIRST_DAY, rows, inputs={}, code_version="v1")
        found = lake.read(table, days=[FIRST_DAY])
        assert found.schema == contract(SPEC, table).schema
        # NaN is not equal to itself, text of it is
        assert str(found.to_pylist()) == str(rows.select(found.schema.names).to_pylist())


def test_the_delta_table_has_the_contracts_types_partitioning_and_plain_protocol(
    lake: Lake,
) -> None:
    rows = tables(SPEC, days=1, users=2)["examples"][FIRST_DAY]
    lake.publish_arrow("examples", FIRST_DAY, rows, inputs={}, code_version="v1")
    table = DeltaTable(lake.uri("examples"))
    stored = pa.schema(table.schema().to_arrow())
    for field in contract(SPEC, "examples").schema:
        assert stored.field(field.name).type == field.type
        # Files of engines have nullable columns, and Sail wants the table to say the same; that
        # nothing is null which may not be is the quality suite's to check.
        assert stored.field(field.name).nullable
    assert table.metadata().partition_columns == ["ds"]
    assert (table.protocol().min_reader_version, table.protocol().min_writer_version) == (1, 2)
    assert "3650" in table.metadata().configuration["delta.deletedFileRetentionDuration"]


def test_publishing_again_replaces_the_partition_and_leaves_the_others(lake: Lake) -> None:
    publish(lake, [1, 2])
    publish(lake, [7], NEXT)
    publish(lake, [1, 2])
    assert ids(lake) == [1, 2]
    publish(lake, [3])
    assert ids(lake) == [3]
    assert ids(lake, NEXT) == [7]


def test_a_pinned_version_reads_as_it_was(lake: Lake) -> None:
    first = publish(lake, [1])
    publish(lake, [2], NEXT)
    pins = lake.require("truth", [DAY, NEXT])
    assert pins[pin("truth", DAY)] == first.version
    publish(lake, [9])
    publish(lake, [9], NEXT)
    assert ids(lake, version=first.version) == [1]
    both = lake.read("truth", days=[NEXT, DAY], version=pins)
    assert both.column("target_id").to_pylist() == [2, 1]  # in the order of days asked for
    with pytest.raises(MissingPartitionError, match="truth/2024-05-03 is not pinned"):
        lake.read("truth", days=["2024-05-03"], version=pins)


def test_the_ledger_tells_how_a_partition_was_made(lake: Lake) -> None:
    publish(lake, [1, 2])
    made = publish(lake, [4, 5, 6], notes={"duplicates": 2}, engine="sail-0.7.2")
    found = lake.partitions("truth")
    assert found == {DAY: made}
    assert made.rows == 3 and made.bytes > 0 and made.inputs == {f"events/{DAY}": 3}
    assert made.notes == {"duplicates": 2} and made.engine == "sail-0.7.2"
    assert made.definition == definition(SPEC, "truth") and made.code_version == "v1"
    assert lake.partitions("events") == {}


def test_an_empty_day_is_a_partition_and_removes_the_old_rows(lake: Lake) -> None:
    publish(lake, [1])
    assert publish(lake, []).rows == 0
    assert ids(lake) == []
    assert lake.require("truth", [DAY])
    assert publish(lake, [], NEXT).rows == 0  # where nothing was before
    assert list(lake.batches("truth", days=[DAY, NEXT])) == []


def test_a_day_that_was_not_written_is_named_with_the_job_that_writes_it(lake: Lake) -> None:
    publish(lake, [1])
    with pytest.raises(
        MissingPartitionError,
        match=r"synthetic.truth has no partition for 2024-05-02: "
        r"run python -m jobs ingest --dataset synthetic --ds 2024-05-02",
    ):
        lake.require("truth", [DAY, NEXT])
    with pytest.raises(MissingPartitionError, match=r"synthetic.events has no partition"):
        lake.read("events", days=[DAY])
    with pytest.raises(MissingPartitionError, match=r"of model sum .*--model sum"):
        lake.require("user_embeddings", [DAY], "sum")


def test_what_the_contract_does_not_have_is_refused_before_anything_is_written(lake: Lake) -> None:
    publish(lake, [1])
    rows = truth([2])
    wrong = {
        "truth.probability is missing": rows.drop_columns(["probability"]),
        "truth.extra is not in the contract": rows.append_column("extra", pa.array([1])),
        "truth.target_id is int32: the contract has int64; cast it": rows.set_column(
            0, "target_id", pa.array([2], pa.int32())
        ),
        "rows of ds=2024-05-02, expected ds=2024-05-01": pa.concat_tables([rows, truth([3], NEXT)]),
    }
    for message, data in wrong.items():
        with pytest.raises(ContractError, match=message):
            lake.publish_arrow("truth", DAY, data, inputs={}, code_version="v1")
    assert ids(lake) == [1]
    with pytest.raises(ContractError, match="table is 'clicks': synthetic has events"):
        lake.read("clicks")
    with pytest.raises(ContractError, match="column is 'odds': truth has target_id"):
        lake.read("truth", columns=["odds"])
    with pytest.raises(DataError, match="day is 'None'"):
        publish(lake, [], "None")
    with pytest.raises(ContractError, match="model is 'sum': truth is not partitioned by model"):
        publish(lake, [1], model="sum")


def test_columns_in_another_order_are_put_right(lake: Lake) -> None:
    data = truth([1]).select(["ds", "probability", "task", "target_id"])
    lake.publish_arrow("truth", DAY, data, inputs={}, code_version="v1")
    assert lake.read("truth", days=[DAY]) == truth([1])


def test_batches_are_bounded_and_hold_every_row_in_one_order(lake: Lake) -> None:
    publish(lake, list(range(1000)))
    publish(lake, list(range(1000, 1010)), NEXT)
    found = list(lake.batches("truth", days=[NEXT, DAY], columns=["target_id"], batch_rows=64))
    assert max(b.num_rows for b in found) <= 64
    values = [v for b in found for v in b.column("target_id").to_pylist()]
    assert values == [*range(1000, 1010), *range(1000)]
    again = lake.batches("truth", days=[NEXT, DAY], columns=["target_id"], batch_rows=64)
    assert [b.num_rows for b in again] == [b.num_rows for b in found]


def test_a_schema_grows_and_a_spec_can_go_back(lake: Lake, tmp_path: Path) -> None:
    base = SPEC
    lake.publish_arrow(
        "sequences",
        DAY,
        contract(base, "sequences").schema.empty_table(),
        inputs={},
        code_version="v",
    )
    old = tables(base, days=1, users=4)["sequences"][FIRST_DAY]
    lake.publish_arrow("sequences", DAY, old, inputs={}, code_version="v1")
    likes = base.stream("likes")
    weight = Attribute(name="weight", kind=Kind.NUMERIC)
    grown = replace(
        base,
        streams=(replace(likes, attributes=(*likes.attributes, weight)), *base.streams[1:]),
    )
    wider = Lake(tmp_path / "lake", grown)
    schema = contract(grown, "sequences").schema
    name = "history__likes__weight"
    sizes = [[1.0] * len(v) for v in old.column("history__likes__event_time").to_pylist()]
    columns = {
        **{n: old.column(n) for n in old.schema.names},
        name: pa.array(sizes, pa.list_(pa.float32())),
    }
    columns["ds"] = pa.array([NEXT] * old.num_rows)
    new = pa.table([columns[n] for n in schema.names], schema=schema)
    wider.publish_arrow("sequences", NEXT, new, inputs={}, code_version="v2")
    assert wider.read("sequences", days=[NEXT], columns=[name]).column(0).to_pylist() == sizes
    assert wider.read("sequences", days=[DAY], columns=[name]).column(0).null_count == old.num_rows
    lake.publish_arrow("sequences", DAY, old, inputs={}, code_version="v1")
    assert lake.read("sequences", days=[DAY]).select(old.schema.names).equals(old)
    assert lake.read("sequences", days=[NEXT]).num_rows == old.num_rows
    assert wider.read("sequences", days=[NEXT], columns=[name]).column(0).to_pylist() == sizes


def test_a_column_of_another_type_begins_the_table_anew_and_pins_read_the_old_one(
    lake: Lake, tmp_path: Path
) -> None:
    old = tables(SPEC, days=1, users=4)["sequences"][FIRST_DAY]
    before = lake.publish_arrow("sequences", DAY, old, inputs={}, code_version="v1")
    likes = SPEC.stream("likes")
    image = Attribute(name="image", id_type=IdType.STRING)
    streams = (replace(likes, attributes=(likes.attributes[0], image)), *SPEC.streams[1:])
    texts = Lake(tmp_path / "lake", replace(SPEC, streams=streams))
    name = "history__likes__image"
    names = [["a.png"] * len(v) for v in old.column(name).to_pylist()]
    schema = contract(texts.dataset, "sequences").schema
    columns = {n: old.column(n) for n in old.schema.names} | {name: pa.array(names)}
    new = pa.table([columns[n] for n in schema.names], schema=schema)
    texts.publish_arrow("sequences", DAY, new, inputs={}, code_version="v2")
    assert texts.read("sequences", days=[DAY], columns=[name]).column(0).equals(new.column(name))
    assert lake.read("sequences", days=[DAY], version=before.version).num_rows == old.num_rows
    with pytest.raises(StalePartitionError, match="made under definition"):
        lake.require("sequences", [DAY])


_KILLED = """
    import os, sys, threading
    sys.path.insert(0, {repository!r})
    from tests.unit.test_lake import SPEC, publish
    from feature_store import commit, lake, ledger, quality
    quality.warm_up = lambda: type("Imported", (), {{"join": lambda self: None}})()
    quality.validate = lambda *args, **kwargs: None
    {module}.{name} = lambda *args, **kwargs: os._exit(9)
    publish(lake.Lake({root!r}, SPEC), [5, 6])
"""


@pytest.mark.parametrize(
    ("module", "name", "left"),
    [
        ("quality", "validate", [1, 2]),  # staged
        ("commit", "retry_on_conflict", [1, 2]),  # moved, not committed
        ("ledger", "append", [5, 6]),  # committed, not recorded
    ],
)
def test_a_killed_job_leaves_the_old_partition_or_the_new_one(
    lake: Lake, tmp_path: Path, module: str, name: str, left: list[int]
) -> None:
    recorded = publish(lake, [1, 2])
    root = str(tmp_path / "lake")
    script = _KILLED.format(repository=str(REPOSITORY), module=module, name=name, root=root)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 9, run.stderr
    assert ids(lake) == left
    assert lake.partitions("truth")[DAY] == recorded  # what is not recorded counts as not written
    assert ids(lake, version=recorded.version) == [1, 2]
    publish(lake, [8])
    assert ids(lake) == [8]
    staging = Path(root) / SPEC.name / "_staging" / "truth" / f"ds={DAY}"
    assert [p.name for p in staging.iterdir()] == [".lock"]
    assert files_of(lake) == named_by_any_version(lake)
    for written in (recorded, lake.partitions("truth")[DAY]):
        assert ids(lake, version=written.version) == ([1, 2] if written == recorded else [8])


def files_of(lake: Lake) -> set[str]:
    """What lies in the folder of the partition `DAY`."""
    return {p.name for p in Path(lake.uri("truth"), f"ds={DAY}").iterdir()}


def named_by_any_version(lake: Lake) -> set[str]:
    newest = lake.version("truth")
    tables = [DeltaTable(lake.uri("truth"), version=v) for v in range(newest + 1)]
    return {Path(uri).name for table in tables for uri in table.file_uris()}


def test_a_file_that_nobody_committed_stays_where_its_writer_may_live(lake: Lake) -> None:
    """Without a lock, as on an object store: only what is a day old is a dead writer's."""
    publish(lake, [1])
    folder = Path(lake.uri("truth"), f"ds={DAY}")
    young, old = folder / "young.parquet", folder / "old.parquet"
    for path in (young, old):
        path.write_bytes(b"moved")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    files = pafs.LocalFileSystem()
    where = str(folder.parent), lake.uri("truth"), contract(SPEC, "truth"), {"ds": DAY}
    replace_partition(files, *where, {}, locked=False)
    assert young.exists() and not old.exists()
    replace_partition(files, *where, {}, locked=True)
    assert not young.exists()
    assert files_of(lake) == named_by_any_version(lake)


def test_nothing_is_removed_where_older_versions_may_name_it(lake: Lake) -> None:
    publish(lake, [1])
    first = publish(lake, [2])
    table = DeltaTable(lake.uri("truth"))
    table.create_checkpoint()
    log = Path(lake.uri("truth"), "_delta_log")
    for version in range(first.version):  # as a table's retention removes them
        (log / f"{version:020d}.json").unlink()
    before = files_of(lake)
    publish(lake, [3])
    assert before < files_of(lake)


def test_a_refused_partition_stays_as_it_was(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, [1])

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(quality, "validate", refuse)
    with pytest.raises(OSError, match="no space"):
        publish(lake, [2])
    assert ids(lake) == [1]


def _at_once(jobs: list) -> list[BaseException]:
    failures: list[BaseException] = []

    def guarded(job) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_writers_of_different_partitions_at_once_lose_nothing(lake: Lake) -> None:
    days = [f"2024-05-{d:02d}" for d in range(1, 13)]
    failures = _at_once([lambda d=d, i=i: publish(lake, [i], d) for i, d in enumerate(days)])
    assert not failures
    assert [ids(lake, d) for d in days] == [[i] for i in range(len(days))]
    assert list(lake.partitions("truth")) == days


def test_writers_of_one_partition_at_once_leave_the_rows_of_one(lake: Lake, tmp_path: Path) -> None:
    """Also without the lock, as on an object store: the commit itself notices."""
    shape = contract(SPEC, "truth")

    def write(i: int) -> None:
        folder = tmp_path / "staged" / str(i)
        folder.mkdir(parents=True)
        path = folder / "0.parquet"
        rows = truth([i]).drop_columns(["ds"])
        pq.write_table(rows, path)
        home = f"{tmp_path}/lake/{SPEC.name}/truth"
        files = {str(path): (1, path.stat().st_size)}
        replace_partition(
            pafs.LocalFileSystem(), home, lake.uri("truth"), shape, {"ds": DAY}, files, locked=False
        )

    assert not _at_once([lambda i=i: write(i) for i in range(6)])
    assert len(ids(lake)) == 1
    assert not _at_once([lambda i=i: publish(lake, [i, i + 100]) for i in range(6)])
    first, second = ids(lake)
    assert second == first + 100


def test_models_have_partitions_of_their_own(lake: Lake) -> None:
    schema = contract(SPEC, "user_embeddings").schema

    def rows(model: str, user: int) -> pa.Table:
        values = [user, "s", 1, 2, b"\0" * 4, b"\0" * 4, 1, model, DAY]
        return pa.table([[v] for v in values], schema=schema)

    for model, user in (("sum", 1), ("sequence", 2), ("sum", 3)):
        lake.publish_arrow(
            "user_embeddings", DAY, rows(model, user), inputs={}, model=model, code_version="v1"
        )
    read = lambda m: lake.read("user_embeddings", days=[DAY], model=m).column("user_id").to_pylist()  # noqa: E731
    assert read("sum") == [3] and read("sequence") == [2]
    assert list(lake.require("user_embeddings", [DAY], "sum")) == [f"user_embeddings/sum/{DAY}"]
    with pytest.raises(ContractError, match="model is '': user_embeddings is partitioned by model"):
        lake.publish_arrow("user_embeddings", DAY, rows("sum", 1), inputs={}, code_version="v1")
    with pytest.raises(ContractError, match=r"rows of model=sequence/ds"):
        lake.publish_arrow(
            "user_embeddings", DAY, rows("sequence", 1), inputs={}, model="sum", code_version="v1"
        )


def test_a_ledger_that_grew_long_is_compacted_and_keeps_its_rows(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_COMPACT_AT_FILES", 3)
    days = [f"2024-05-{d:02d}" for d in range(1, 7)]
    for i, day in enumerate(days):
        publish(lake, [i], day)
    assert list(lake.partitions("truth")) == days
    files = DeltaTable(f"{Path(lake.uri('truth')).parent}/partitions").file_uris()
    assert len(files) < 3


@pytest.mark.parametrize("engine", ["sail", "spark"], indirect=True)
def test_an_engines_frame_is_published_and_read_back(lake: Lake, spark) -> None:
    def frame(n: int, ds: str = DAY):
        columns = {
            "target_id": F.col("id"),
            "task": F.lit("click"),
            "probability": F.lit(0.5),
            "ds": F.lit(ds),
        }
        return spark.range(n).select(*[c.alias(name) for name, c in columns.items()])

    more = {"inputs": {}, "code_version": "v1", "engine": "test"}
    assert lake.frame(spark, "truth", [DAY]).collect() == []
    assert lake.publish_frame(spark, "truth", DAY, frame(3), **more).rows == 3
    lake.publish_frame(spark, "truth", NEXT, frame(2, NEXT), **more)
    assert ids(lake) == [0, 1, 2]
    assert lake.frame(spark, "truth", [NEXT]).count() == 2
    assert lake.frame(spark, "truth", [DAY, NEXT]).count() == 5
    assert lake.frame(spark, "truth").schema.names == contract(SPEC, "truth").schema.names
    with pytest.raises(ContractError, match="rows of ds=2024-05-02, expected ds=2024-05-01"):
        lake.publish_frame(spark, "truth", DAY, frame(1).union(frame(1, NEXT)), **more)
    with pytest.raises(
        ContractError, match=r"truth\.probability is float: the contract has double"
    ):
        narrow = frame(1).withColumn("probability", F.col("probability").cast("float"))
        lake.publish_frame(spark, "truth", DAY, narrow, **more)
    assert ids(lake) == [0, 1, 2]
    assert lake.publish_frame(spark, "truth", DAY, frame(3).where("id > 5"), **more).rows == 0
    assert ids(lake) == []
    rows = tables(SPEC, days=1, users=4)["examples"][FIRST_DAY]
    lake.publish_arrow("examples", FIRST_DAY, rows, inputs={}, code_version="v1")
    copied = lake.frame(spark, "examples", [FIRST_DAY])
    lake.publish_frame(spark, "examples", FIRST_DAY, copied, **more)
    found = lake.read("examples", days=[FIRST_DAY]).sort_by(
        [("user_id", "ascending"), ("part", "ascending")]
    )
    rows = rows.sort_by([("user_id", "ascending"), ("part", "ascending")])
    assert str(found.to_pylist()) == str(rows.to_pylist())
