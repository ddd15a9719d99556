"""A lake whose files were damaged from outside: what is broken is named, and the remedy mends it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from feature_store import damage, quality
from feature_store.damage import DamageError
from feature_store.lake import Lake
from feature_store.tables import contract
from jobs import failures
from jobs.settings import Settings
from tests.synthetic import dataset

SPEC = replace(dataset(), simulated=True)
FIRST, SECOND, THIRD = "2024-05-01", "2024-05-02", "2024-05-03"


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """Two days of `truth`, versions 1 and 2, without a quality gate."""
    monkeypatch.setattr(quality, "validate", lambda *args, **kwargs: None)
    monkeypatch.setattr(quality, "warm_up", lambda: SimpleNamespace(join=lambda: None))
    made = Lake(tmp_path / "lake", SPEC)
    for day in (FIRST, SECOND):
        publish(made, day)
    check(made)
    return made


def publish(lake: Lake, ds: str) -> None:
    schema = contract(SPEC, "truth").schema
    rows = pa.table([[1, 2], ["click"] * 2, [0.5] * 2, [ds] * 2], schema=schema)
    lake.publish_arrow("truth", ds, rows, inputs={}, code_version="v1")


def base(lake: Lake) -> Path:
    return Path(lake.uri("truth")).parent


def check(lake: Lake) -> None:
    damage.check(str(base(lake)), SPEC)


def found(lake: Lake) -> str:
    with pytest.raises(DamageError) as raised:
        check(lake)
    return str(raised.value)


def rows(lake: Lake) -> dict[str, int]:
    days = list(lake.partitions("truth"))
    pins = lake.require("truth", days)
    return {d: lake.read("truth", days=[d], version=pins).num_rows for d in days}


def commit(lake: Lake, table: str, version: int) -> Path:
    return base(lake) / table / "_delta_log" / f"{version:020d}.json"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


@pytest.mark.parametrize("harm", [cut, empty, garble])
def test_the_newest_commit_is_removed_and_its_partition_written_again(
    lake: Lake, harm: Callable[[Path], None]
) -> None:
    harm(commit(lake, "truth", 2))
    said = found(lake)
    assert f"python -m jobs ingest --dataset {SPEC.name} --ds {SECOND}" in said
    assert FIRST not in said and "nothing else was lost" in said
    commit(lake, "truth", 2).unlink()
    publish(lake, SECOND)
    check(lake)
    assert rows(lake) == {FIRST: 2, SECOND: 2}


@pytest.mark.parametrize("harm", [cut, empty, garble])
def test_the_ledgers_newest_commit_is_removed_and_one_partition_counts_as_not_written(
    lake: Lake, harm: Callable[[Path], None]
) -> None:
    newest = DeltaTable(base(lake) / "partitions").version()
    harm(commit(lake, "partitions", newest))
    said = found(lake)
    assert "remove that file, then run the same command again" in said
    commit(lake, "partitions", newest).unlink()
    check(lake)
    assert rows(lake) == {FIRST: 2}
    publish(lake, SECOND)
    assert rows(lake) == {FIRST: 2, SECOND: 2}


@pytest.mark.parametrize("table", ["truth", "partitions"])
@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("harm", [cut, empty, garble, Path.unlink])
def test_an_older_commit_comes_from_a_copy_or_everything_is_built_again(
    lake: Lake, table: str, version: int, harm: Callable[[Path], None]
) -> None:
    copy = commit(lake, table, version).read_bytes()
    harm(commit(lake, table, version))
    said = found(lake)
    assert (
        f"{version:020d}.json" in said and f"remove {base(lake)} and build the days again" in said
    )
    commit(lake, table, version).write_bytes(copy)
    check(lake)
    assert rows(lake) == {FIRST: 2, SECOND: 2}


def data_file(lake: Lake, ds: str) -> Path:
    (path,) = Path(lake.uri("truth"), f"ds={ds}").iterdir()
    return path


@pytest.mark.parametrize("harm", [cut, empty, Path.unlink])
def test_a_data_file_is_written_again_by_its_job(lake: Lake, harm: Callable[[Path], None]) -> None:
    path = data_file(lake, FIRST)
    harm(path)
    said = found(lake)
    assert (
        str(path) in said
        and f"run python -m jobs ingest --dataset {SPEC.name} --ds {FIRST}," in said
    )
    publish(lake, FIRST)
    check(lake)
    assert rows(lake) == {FIRST: 2, SECOND: 2}


def test_a_data_file_of_the_ledger_is_named(lake: Lake) -> None:
    next(base(lake).glob("partitions/table=truth/*.parquet")).unlink()
    assert "partitions" in found(lake)


@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_a_checkpoint_is_dispensable(lake: Lake, harm: Callable[[Path], None]) -> None:
    DeltaTable(lake.uri("truth")).create_checkpoint()
    log = Path(lake.uri("truth"), "_delta_log")
    (checkpoint,) = log.glob("*.checkpoint.parquet")
    harm(checkpoint)
    assert "a checkpoint is damaged: remove" in found(lake)
    checkpoint.unlink(missing_ok=True)
    (log / "_last_checkpoint").unlink()
    check(lake)
    assert rows(lake) == {FIRST: 2, SECOND: 2}


def test_a_table_whose_log_is_gone_is_not_an_empty_table(lake: Lake) -> None:
    shutil.rmtree(Path(lake.uri("truth"), "_delta_log"))
    with pytest.raises(DamageError, match=r"truth: .*_delta_log is gone"):
        damage.check_commits(str(base(lake)), SPEC)


def test_an_empty_commit_is_seen_before_anything_is_read(lake: Lake) -> None:
    damage.check_commits(str(base(lake)), SPEC)
    empty(commit(lake, "truth", 2))
    assert lake.read("truth", days=[SECOND]).num_rows == 0  # Delta itself passes over it
    with pytest.raises(DamageError, match="newest commit and damaged"):
        damage.check_commits(str(base(lake)), SPEC)


def test_what_failed_on_damaged_files_is_explained_by_them(
    lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_env({"HEADWATER_HOME": str(base(lake).parents[1])})
    assert settings.lake_root == str(base(lake).parent)
    assert failures.explain(RuntimeError("parquet"), settings, SPEC) is None
    with (
        monkeypatch.context() as patch
    ):  # what looks for damage hides nothing behind an error of its own
        patch.setattr(damage, "check_commits", lambda *_: 1 / 0)
        assert failures.explain(RuntimeError("parquet"), settings, SPEC) is None
    data_file(lake, SECOND).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        rows(lake)
    failure = failures.explain(raised.value, settings, SPEC)
    assert failure is not None and failure.code == 2
    assert re.search(rf"is gone: run .* --ds {SECOND}", failure.sentence)
