"""Both engines start, are shared, are replaced when they die, and write what Arrow reads back."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pyspark.errors import PySparkException
from pyspark.sql import functions as F

from feature_store.days import DAY_US
from jobs import spark as engines
from jobs.settings import REPOSITORY, Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

BOTH = pytest.mark.parametrize("engine", ["sail", "spark"], indirect=True)


@BOTH
def test_a_partition_is_replaced_and_the_others_stay(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "table")

    def write(ds: str, rows: int, *, first: bool = False) -> None:
        frame = spark.range(rows).select(
            F.col("id"), F.array(F.col("id"), F.col("id") * 2).alias("ids"), F.lit(ds).alias("ds")
        )
        writer = frame.write.format("delta").partitionBy("ds").mode("overwrite")
        (writer if first else writer.option("replaceWhere", f"ds = '{ds}'")).save(path)

    write("2024-05-01", 10, first=True)
    write("2024-05-02", 20)
    write("2024-05-01", 3)
    frame = spark.read.format("delta").load(path)
    counts = {r["ds"]: r["n"] for r in frame.groupBy("ds").agg(F.count("*").alias("n")).collect()}
    assert counts == {"2024-05-01": 3, "2024-05-02": 20}
    kept = DeltaTable(path).to_pyarrow_table(partitions=[("ds", "=", "2024-05-01")])
    assert sorted(kept["ids"].to_pylist()) == [[0, 0], [1, 2], [2, 4]]


@BOTH
def test_the_session_is_utc_and_ansi(spark: SparkSession) -> None:
    cell = F.from_unixtime(F.lit(0).cast("long"), "yyyy-MM-dd HH:mm:ss").alias("t")
    assert spark.range(1).select(cell).collect()[0]["t"] == "1970-01-01 00:00:00"
    with pytest.raises(PySparkException):
        spark.range(1).select(F.lit("x").cast("int")).collect()


@BOTH
def test_a_python_function_of_this_repository_runs_on_the_server(spark: SparkSession) -> None:
    def doubled(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield pa.RecordBatch.from_arrays(
                [pa.array([DAY_US + x for x in batch["id"].to_pylist()])], names=["v"]
            )

    out = spark.range(3).mapInArrow(doubled, "v long").collect()
    assert sorted(r["v"] for r in out) == [86_400_000_000 + i for i in range(3)]


@BOTH
def test_every_task_shares_one_server_that_writes_under_home_only(
    spark: SparkSession, engine: str, settings_of: Callable[[str], Settings]
) -> None:
    settings = settings_of(engine)
    server = engines.start(settings)
    assert server.engine == engine and server.url.startswith("sc://127.0.0.1:")
    process = psutil.Process(server.pid)
    listening = {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    outside = [f.path for f in process.open_files() if getattr(f, "mode", "r") != "r"]
    assert all(Path(p).is_relative_to(settings.home) for p in outside), outside
    said = subprocess.run(
        [sys.executable, "-m", "jobs.spark", "status"],
        env={"HEADWATER_HOME": str(settings.home), "HEADWATER_ENGINE": engine, "PATH": "/bin:/usr/bin"},
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert f"alive, pid {server.pid}" in said.stdout


def test_a_dead_server_is_noticed_and_replaced(lake_home: Path) -> None:
    settings = Settings.from_env({"HEADWATER_HOME": str(lake_home), "HEADWATER_ENGINE": "sail"})
    try:
        first = engines.start(settings)
        assert engines.start(settings) == first
        process = psutil.Process(first.pid)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        assert "dead" in engines.status(settings)
        session = engines.session(settings)
        assert session.range(3).count() == 3
        session.stop()
        second = engines.start(settings)
        assert second.pid != first.pid and second.alive()
    finally:
        assert engines.stop(settings)
    assert not second.alive()
    assert engines.stop(settings) is False


def test_tasks_that_start_at_once_start_one_server(lake_home: Path) -> None:
    env = {"HEADWATER_HOME": str(lake_home), "HEADWATER_ENGINE": "sail", "PATH": "/bin:/usr/bin"}
    command = [sys.executable, "-m", "jobs.spark", "start"]
    tasks = [
        subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        urls = {task.communicate(timeout=120)[0].splitlines()[-1] for task in tasks}
        assert len(urls) == 1
    finally:
        engines.stop(Settings.from_env(env))


def test_a_server_that_cannot_start_says_why(
    lake_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_env({"HEADWATER_HOME": str(lake_home), "HEADWATER_ENGINE": "sail"})
    command = [sys.executable, "-c", "import sys; sys.exit('no memory for it')"]
    monkeypatch.setattr(engines, "_sail_command", lambda settings, port: (command, {}))
    with pytest.raises(engines.EngineLost, match=r"\(sail\) did not start.*no memory for it"):
        engines.start(settings)
    assert engines._read(settings) is None
