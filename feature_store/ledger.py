"""The ledger `partitions`: one row per partition written, with what it was made from.

Rows are only ever appended. A partition that was written again has several; the newest counts, and
the version that it names is the Delta version at which the partition reads as it was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from feature_store.columns import required
from feature_store.tables import KINDS

T = TypeVar("T")

# Pinned versions have to stay readable: files and log entries outlive any training run.
RETENTION = {
    "delta.deletedFileRetentionDuration": "interval 3650 days",
    "delta.logRetentionDuration": "interval 3650 days",
}
_COMPACT_AT_FILES = 64

LEDGER = pa.schema(
    [
        required("table", pa.string()),
        required("model", pa.string()),  # "" unless the table is partitioned by model
        required("ds", pa.string()),
        required("version", pa.int64()),  # Delta version at which the partition reads as written
        required("inputs", pa.string()),  # JSON: {"<table>/<ds>": version}
        required("code_version", pa.string()),
        pa.field("definition", pa.string()),  # hash of what of the spec decides the table's rows
        pa.field("identity", pa.string()),  # hash of the source partitions it depends on
        required("engine", pa.string()),
        required("rows", pa.int64()),
        required("bytes", pa.int64()),
        required("seconds", pa.float64()),
        required("written_at", pa.int64()),  # UTC microseconds
        required(
            "notes", pa.string()
        ),  # JSON of counts worth keeping (duplicates dropped, coverage, drift)
    ]
)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One row of the ledger: a partition as it was written.

    Args:
        table, model, ds: which partition; `model` is "" unless the table is partitioned by model.
        version: Delta version at which the partition reads as written.
        inputs: `pin` of every partition it was made from -> its Delta version.
        code_version: of the job that wrote it.
        definition, identity: of its table and of itself (`feature_store/lineage.py`).
        engine: what computed it.
        rows, bytes: of the partition.
        seconds: from the start of the publish to its commit; includes a lazy frame's computation.
        written_at: UTC microseconds.
        notes: counts worth keeping (duplicates dropped, coverage, drift).
    """

    table: str
    model: str
    ds: str
    version: int
    inputs: dict[str, int]
    code_version: str
    definition: str
    identity: str
    engine: str
    rows: int
    bytes: int
    seconds: float
    written_at: int
    notes: dict[str, object]


def pin(table: str, ds: str, model: str = "") -> str:
    """The key of a partition in `inputs`: `<table>/<ds>`, or `<table>/<model>/<ds>`."""
    return f"{table}/{model}/{ds}" if model else f"{table}/{ds}"


def command(dataset: str, table: str, ds: str, model: str = "") -> str:
    """What a person types to write a partition of `dataset`."""
    option = f" --model {model}" if model else ""
    return f"python -m jobs {KINDS[table].job} --dataset {dataset} --ds {ds}{option}"


def opened(uri: str) -> tuple[pafs.FileSystem, str]:
    """Arrow's filesystem of a folder or URI, and the path in it."""
    if "://" in uri:
        files, path = pafs.FileSystem.from_uri(uri)
        return files, path
    return pafs.LocalFileSystem(), uri


def retry_on_conflict(attempt: Callable[[], T]) -> T:
    """What `attempt` returns, tried again where another writer committed to the table meanwhile.

    `attempt` has to start from a fresh snapshot of the table each time.

    Raises:
        deltalake.exceptions.CommitFailedError: still in conflict after 40 attempts.
    """

    def conflict(error: BaseException) -> bool:
        lost_creation = isinstance(error, DeltaError) and "already exists" in str(error)
        return isinstance(error, CommitFailedError) or lost_creation

    retrying = Retrying(
        retry=retry_if_exception(conflict),
        wait=wait_random_exponential(multiplier=0.02, max=2),
        stop=stop_after_attempt(40),
        reraise=True,
    )
    return retrying(attempt)


def append(uri: str, partition: Partition) -> None:
    """Add one row to the ledger at `uri`, which is created where there is none."""
    row = asdict(partition)
    row["inputs"] = json.dumps(partition.inputs, sort_keys=True)
    row["notes"] = json.dumps(partition.notes, sort_keys=True)
    data = pa.Table.from_pylist([row], schema=LEDGER)

    def write() -> None:
        table = DeltaTable.create(
            uri, LEDGER, mode="ignore", partition_by=["table"], configuration=RETENTION
        ) if not DeltaTable.is_deltatable(uri) else DeltaTable(uri)  # fmt: skip
        write_deltalake(table, data, mode="append", schema_mode="merge")

    def compact() -> None:
        filters: list[tuple[str, str, Any]] = [("table", "=", partition.table)]
        table = DeltaTable(uri)
        if len(table.file_uris(file_pruning_predicate=filters)) >= _COMPACT_AT_FILES:
            table.optimize.compact(partition_filters=filters)

    retry_on_conflict(write)
    retry_on_conflict(compact)


def rows(uri: str, table: str) -> list[Partition]:
    """Every row about `table`, the newest of each partition last; empty where there is no ledger."""
    return reader(uri)(table)


def reader(uri: str) -> Callable[[str], list[Partition]]:
    """`rows` for any table, all of them at the version that the ledger has when the first is asked for."""

    @cache
    def newest() -> DeltaTable | None:
        return DeltaTable(uri) if DeltaTable.is_deltatable(uri) else None

    def found(table: str) -> list[Partition]:
        version = newest()
        return [] if version is None else _rows(version, uri, table)

    return found


def _rows(version: DeltaTable, uri: str, table: str) -> list[Partition]:
    """A column that the ledger lacks, as an earlier release wrote it, reads as ""."""
    # Arrow's own filesystem: deltalake's calls back into Python, also from threads at a process's end.
    files, path = opened(uri)
    dataset = version.to_pyarrow_dataset(
        file_pruning_predicate=[("table", "=", table)],
        filesystem=pafs.SubTreeFileSystem(path, files),
    )
    names = [n for n in LEDGER.names if n in dataset.schema.names]
    blank = dict.fromkeys(LEDGER.names, "")
    found = [blank | row for row in dataset.to_table(columns=names).to_pylist()]
    for row in found:
        row |= {n: json.loads(row[n]) for n in ("inputs", "notes")}
        row |= {n: row[n] or "" for n in ("definition", "identity")}
    found.sort(key=lambda r: (r["ds"], r["version"], r["written_at"]))
    return [Partition(**row) for row in found]


def pins(found: Mapping[str, Partition]) -> dict[str, int]:
    """`{pin: version}` of partitions, as a later partition's `inputs`."""
    return {pin(p.table, p.ds, p.model): p.version for p in found.values()}
