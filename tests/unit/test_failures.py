"""What gives way under a run ends in one sentence; what is a fault of the code keeps its traceback."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import stat
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import tenacity.nap
import torch
from mlflow.exceptions import MlflowException

from feature_store.errors import DataError, TransientError
from jobs import failures
from jobs.failures import FAILED, USER_ERROR
from jobs.local.client import AirflowClient
from jobs.local.services import AirflowServices, ServiceError
from jobs.settings import Settings
from jobs.training import tracking


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A device to which every write meets a full disk; not the machine's own, which a writer that gives
    up may remove."""
    device = tmp_path / "full"
    try:
        os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
        device.open("wb").close()
    except OSError:
        pytest.skip("no device that is always full can be made here")
    return device


def raised(act: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as found:
        act()
    return found.value


def sqlite_full(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA max_page_count = 3")
    database.execute("CREATE TABLE t (x)")
    database.execute("INSERT INTO t VALUES (?)", ("x" * 100_000,))


def into_numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(100_000))


def into_parquet(path: Path) -> None:
    rows = pa.table({"a": np.random.default_rng(0).random(100_000)})
    pq.write_table(rows, str(path), filesystem=pafs.LocalFileSystem())


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"x"),
        lambda path: torch.save({"a": torch.zeros(100_000)}, path),
        into_numpy,
        into_parquet,
    ],
)
def test_a_full_disk_is_one_whoever_meets_it(write: Callable[[Path], object], full: Path) -> None:
    failure = failures.explain(raised(lambda: write(full)))
    assert failure is not None and failure.code == FAILED
    assert failure.sentence.startswith("the disk is full")


def test_a_full_database_is_a_full_disk(tmp_path: Path) -> None:
    failure = failures.explain(raised(lambda: sqlite_full(tmp_path / "file")))
    assert failure is not None and failure.code == FAILED
    assert failure.sentence.startswith("the disk is full")


FULL, RIGHTS, AWAY, ENGINE = (
    "the disk is full",
    "right to read and write",
    "move away",
    "the engine",
)


@pytest.mark.parametrize(
    ("error", "says", "code"),
    [
        # an error number counts in every language
        (OSError(errno.ENOSPC, "kein Platz", "/d/x"), FULL, FAILED),
        (OSError(errno.EDQUOT, "kein Platz", "/d/x"), FULL, FAILED),
        (OSError(errno.EACCES, "nein", "/d/x"), f"/d/x: Permission denied: give.*{RIGHTS}", USER_ERROR),
        (OSError(errno.EROFS, "nein", "/d/x"), RIGHTS, USER_ERROR),
        (OSError(errno.EPERM, "nein", "/d/x"), RIGHTS, USER_ERROR),
        (OSError(errno.EEXIST, "da", __file__), f"{__file__}: File exists: {AWAY}", USER_ERROR),
        (OSError(errno.ENOTDIR, "nein", "/d/x"), f"/d/x: Not a directory: {AWAY}", USER_ERROR),
        (OSError(errno.EISDIR, "nein", "/d/x"), AWAY, USER_ERROR),
        # and the text, where there is no number
        (RuntimeError("IO error: No space left on device (os error 28)"), FULL, FAILED),
        (RuntimeError("LocalFileSystem: Disk quota exceeded (os error 122)"), FULL, FAILED),
        (RuntimeError("PytorchStreamWriter failed writing file data/7"), FULL, FAILED),
        (RuntimeError("[enforce fail] unexpected pos 576 vs 470"), FULL, FAILED),
        (OSError("100000 requested and 4080 written"), FULL, FAILED),
        (RuntimeError("Generic error: Permission denied (os error 13)"), RIGHTS, USER_ERROR),
        (RuntimeError("Generic error: Read-only file system (os error 30)"), RIGHTS, USER_ERROR),
        (RuntimeError("java.nio.file.AccessDeniedException: /d/x"), RIGHTS, USER_ERROR),
        (RuntimeError("attempt to write a readonly database"), RIGHTS, USER_ERROR),
        (RuntimeError("unable to open database file"), RIGHTS, USER_ERROR),
        (RuntimeError("Unable to open: Not a directory (os error 20)"), AWAY, USER_ERROR),
        (RuntimeError("Unable to open: Is a directory (os error 21)"), AWAY, USER_ERROR),
        (RuntimeError("status = StatusCode.UNAVAILABLE"), f"^{ENGINE} did not answer", FAILED),
        (RuntimeError("failed to connect to all addresses"), f"^{ENGINE} did not", FAILED),
        # in one line, whatever was raised
        (DataError("two\n  lines"), "^two lines$", USER_ERROR),
        (TransientError("two\n  lines"), "^two lines$", FAILED),
    ],
)  # fmt: skip
def test_what_gives_way_has_a_sentence_and_an_exit_code(
    error: Exception, says: str, code: int
) -> None:
    failure = failures.explain(error)
    assert failure is not None and failure.code == code
    assert re.search(says, failure.sentence)


def test_a_cluster_that_does_not_answer_is_named() -> None:
    settings = Settings.from_env({"SPARK_REMOTE": "sc://host:15002"})
    failure = failures.explain(RuntimeError("StatusCode.UNAVAILABLE"), settings)
    assert failure is not None
    assert failure.sentence.startswith(
        "SPARK_REMOTE is sc://host:15002: the cluster did not answer"
    )


def test_a_disk_without_room_explains_what_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_env({"HEADWATER_HOME": str(tmp_path)})
    error = TransientError("Airflow did not answer")
    assert "Airflow" in str(failures.explain(error, settings))
    monkeypatch.setattr(failures.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    assert "the disk is full" in str(failures.explain(error, settings))
    assert "column" in str(failures.explain(DataError("column"), settings))


def test_a_file_where_a_folder_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "spark").write_text("")
    for act in (
        lambda: (tmp_path / "spark").mkdir(exist_ok=True),
        lambda: (tmp_path / "spark" / "log").write_text(""),
        lambda: pafs.LocalFileSystem().create_dir(str(tmp_path / "spark" / "log")),
    ):
        failure = failures.explain(raised(act))
        assert failure is not None and failure.code == USER_ERROR
        assert str(tmp_path / "spark") in failure.sentence and "move away" in failure.sentence


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("ours"), KeyError("x"), FileExistsError(errno.EEXIST, "", "/tmp")]
)
def test_a_fault_of_the_code_has_no_sentence(error: Exception) -> None:
    assert failures.explain(error) is None


def test_what_gave_way_is_found_under_what_was_raised() -> None:
    try:
        try:
            raise TransientError("the engine ended")
        finally:
            raise RuntimeError("could not clear up")
    except RuntimeError as error:
        assert failures.explain(error) == failures.Failure(code=FAILED, sentence="the engine ended")
    error = RuntimeError("could not clear up")
    error.__cause__ = TransientError("the engine ended")
    assert failures.explain(error) == failures.Failure(code=FAILED, sentence="the engine ended")


@pytest.fixture
def store(tmp_path: Path) -> tuple[Settings, Path]:
    settings = Settings.from_env({"HEADWATER_HOME": str(tmp_path)})
    tracking.client(settings)
    return settings, tmp_path / "mlflow" / "mlflow.db"


def test_a_locked_mlflow_is_named_and_tried_again(store: tuple[Settings, Path]) -> None:
    settings, path = store
    impatient = f"{settings.mlflow_uri}?timeout=0"
    holder = sqlite3.connect(path)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        quick = Settings.from_env(
            {"HEADWATER_HOME": str(settings.home), "MLFLOW_TRACKING_URI": impatient}
        )
        failure = failures.explain(raised(lambda: tracking.client(quick)), settings)
    finally:
        holder.close()
    assert failure is not None and failure.code == FAILED
    assert f"MLflow's database {path} is locked" in failure.sentence


def test_a_damaged_mlflow_is_named_and_moved_away(tmp_path: Path) -> None:
    settings = Settings.from_env({"HEADWATER_HOME": str(tmp_path)})
    path = tmp_path / "mlflow" / "mlflow.db"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 20)
    failure = failures.explain(raised(lambda: tracking.client(settings)), settings)
    assert failure is not None and failure.code == USER_ERROR
    assert f"MLflow's database {path} is damaged: move it away" in failure.sentence


def test_a_failed_run_that_mlflow_cannot_note_keeps_its_error(
    store: tuple[Settings, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*args: object) -> None:
        raise MlflowException("database is locked")

    run = tracking.Run(store[0], experiment="e", name="n", key="k", tags={})
    monkeypatch.setattr(run.client, "set_terminated", locked)
    with pytest.raises(DataError, match="ours"), run:
        raise DataError("ours")


def test_a_service_that_ended_on_a_full_disk_or_a_damaged_database_says_so(tmp_path: Path) -> None:
    services = AirflowServices(home=tmp_path)
    log = tmp_path / "services" / "scheduler.log"
    log.parent.mkdir()
    log.write_text("a long traceback")
    services._check_ground("scheduler")
    log.write_text("sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) disk I/O error")
    services._check_ground("scheduler")
    log.write_text("(sqlite3.OperationalError) database or disk is full")
    error = raised(lambda: services._check_ground("scheduler"))
    assert "the disk is full" in str(failures.explain(error))
    log.write_text("(sqlite3.DatabaseError) database disk image is malformed")
    with pytest.raises(ServiceError, match=r"airflow\.db is damaged: move it away"):
        services._check_ground("scheduler")


def test_a_damaged_airflow_database_is_named_when_airflow_starts(tmp_path: Path) -> None:
    (tmp_path / "airflow.db").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "database-version").write_text(version("apache-airflow-core"))
    services = AirflowServices(home=tmp_path)
    services.acquire()
    try:
        services.migrate()
        with pytest.raises(ServiceError, match=r"airflow\.db is damaged"):
            services.start_api()
    finally:
        services.stop()


def test_a_server_that_is_silent_as_its_database_is_locked_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda _: None)
    services = AirflowServices(home=tmp_path)
    log = tmp_path / "services" / "api-server.log"
    log.parent.mkdir()
    log.write_text("(sqlite3.OperationalError) database is locked")
    refuses = httpx.MockTransport(lambda _: httpx.Response(500, text="Database error"))
    client = AirflowClient("http://airflow", services._explain_silence)
    client._http = httpx.Client(base_url="http://airflow", transport=refuses)
    with pytest.raises(ServiceError, match=r"airflow\.db is locked: end what holds it"):
        client.request("GET", "/dags")
