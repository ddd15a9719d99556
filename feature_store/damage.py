"""What is broken in a lake's files, and what mends it.

Looked for when something could not be read, as engines and readers say little about where. Commits
are atomic, so what is found here was done to the files from outside: a disk, a copy, a person.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake import DeltaTable

from feature_store import ledger
from feature_store.errors import HeadwaterError
from feature_store.spec import Dataset
from feature_store.tables import contracts

if TYPE_CHECKING:
    from feature_store.ledger import Partition

LEDGER = "partitions"
_UNTOUCHED = "raw logs and snapshots are untouched"


class DamageError(HeadwaterError):
    """A file of the lake is cut, garbled or gone."""


def check_commits(uri: str, dataset: Dataset) -> None:
    """Refuse what readers pass over without a word, so that rows vanish: an empty commit, or no log
    at all of a table that the ledger knows.

    Lists folders and reads no file.

    Raises:
        DamageError: names the file and the remedy.
    """
    for table in (LEDGER, *contracts(dataset)):
        files, home = ledger.opened(f"{uri}/{table}")
        commits = _commits(files, home)
        for i, info in enumerate(commits):
            if info.size == 0:
                raise DamageError(_bad_commit(uri, dataset, table, commits, i))
        recorded = files.get_file_info(f"{ledger.opened(uri)[1]}/{LEDGER}/table={table}")
        if not commits and recorded.type == pafs.FileType.Directory:
            raise DamageError(
                f"{dataset.name}.{table}: {home}/_delta_log is gone: {_rebuild(uri, dataset)}"
            )


def check(uri: str, dataset: Dataset) -> None:
    """`check_commits`, and read every log of the lake and look for every file that newest versions name.

    Args:
        uri: of the dataset's tables.

    Raises:
        DamageError: names the first thing that is broken, and the remedy.
    """
    check_commits(uri, dataset)
    for table in (LEDGER, *contracts(dataset)):
        _check_log(uri, dataset, table)
    for table in (LEDGER, *contracts(dataset)):
        _check_files(uri, dataset, table)


def _log(files: pafs.FileSystem, home: str) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(f"{home}/_delta_log", allow_not_found=True)
    return sorted(files.get_file_info(selector), key=lambda info: info.path)


def _commits(files: pafs.FileSystem, home: str) -> list[pafs.FileInfo]:
    """The log's commits, oldest first."""
    return [i for i in _log(files, home) if i.extension == "json" and _version(i) is not None]


def _version(info: pafs.FileInfo) -> int | None:
    digits = info.base_name.split(".")[0]
    return int(digits) if digits.isdecimal() else None


def _check_log(uri: str, dataset: Dataset, table: str) -> None:
    files, home = ledger.opened(f"{uri}/{table}")
    log = _log(files, home)
    checkpoints = [i for i in log if i.base_name.endswith(".checkpoint.parquet")]
    hints = [i for i in log if i.base_name == "_last_checkpoint"]
    bad = [i for i in checkpoints if not _is_parquet(files, i.path)]
    if bad or (hints and not checkpoints):
        which = " and ".join(i.path for i in (*bad, *hints))
        raise DamageError(
            f"{dataset.name}.{table}: a checkpoint is damaged: remove {which}, as the log holds the "
            "same, and run the same command again"
        )
    commits = _commits(files, home)
    for i, info in enumerate(commits):
        if not _is_commit(files, info.path):
            raise DamageError(_bad_commit(uri, dataset, table, commits, i))
    there = [_version(i) for i in commits]
    if there and there != list(range(len(there))):
        lost = min(set(range(len(there))) - set(there))
        raise DamageError(
            f"{dataset.name}.{table}: {home}/_delta_log has no {lost:020d}.json: {_rebuild(uri, dataset)}"
        )


def _bad_commit(
    uri: str, dataset: Dataset, table: str, commits: Sequence[pafs.FileInfo], i: int
) -> str:
    cut = f"{dataset.name}.{table}: {commits[i].path} is "
    if i < len(commits) - 1 or i == 0:
        return f"{cut}damaged: {_rebuild(uri, dataset)}"
    again = "then run the same command again"
    if table != LEDGER:
        version = _version(commits[i])
        written = [p for p in _written(uri, table) if p.version == version]
        if written:
            again = f"then run {' and '.join(ledger.command(dataset.name, p.table, p.ds, p.model) for p in written)}"
    return f"{cut}the newest commit and damaged: remove that file, {again}; nothing else was lost"


def _rebuild(uri: str, dataset: Dataset) -> str:
    return (
        f"bring it back from a copy, or remove {uri} and build the days again with "
        f"python -m jobs.local.run --dataset {dataset.name} --again; {_UNTOUCHED}"
    )


def _written(uri: str, table: str) -> list[Partition]:
    rows = ledger.rows(f"{uri}/{LEDGER}", table)
    return list({(p.model, p.ds): p for p in rows}.values())


def _is_commit(files: pafs.FileSystem, path: str) -> bool:
    """Whether every line is a JSON object, and there is one."""
    try:
        with files.open_input_file(path) as file:
            lines = file.read().decode().splitlines()
        return bool(lines) and all(isinstance(json.loads(line), dict) for line in lines)
    except (OSError, ValueError):
        return False


def _is_parquet(files: pafs.FileSystem, path: str) -> bool:
    try:
        pq.read_metadata(path, filesystem=files)
    except (OSError, pa.ArrowException):
        return False
    return True


def _named_files(uri: str) -> Iterator[tuple[str, int, str, str]]:
    """(path, bytes, ds, model) of what the newest version names; "" for what it is not partitioned by."""
    if DeltaTable.is_deltatable(uri):
        for action in pa.table(DeltaTable(uri).get_add_actions(flatten=True)).to_pylist():
            parts = (action.get("partition.ds") or "", action.get("partition.model") or "")
            yield action["path"], action["size_bytes"], *parts


def _check_files(uri: str, dataset: Dataset, table: str) -> None:
    files, home = ledger.opened(f"{uri}/{table}")
    named = list(_named_files(f"{uri}/{table}"))
    infos = files.get_file_info([f"{home}/{path}" for path, *_ in named])
    for info, (_, size, ds, model) in zip(infos, named, strict=True):
        if info.type == pafs.FileType.File and info.size == size:
            continue
        state = "gone" if info.type == pafs.FileType.NotFound else "damaged"
        if table == LEDGER:
            raise DamageError(
                f"{dataset.name}.{table}: {info.path} is {state}: {_rebuild(uri, dataset)}"
            )
        rows = [p for p in _written(uri, table) if (p.ds, p.model) == (ds, model)]
        again = "the job that writes it"
        if rows:
            again = ledger.command(dataset.name, table, rows[0].ds, rows[0].model)
        raise DamageError(
            f"{dataset.name}.{table}: {info.path} is {state}: run {again}, which writes that "
            "partition again; nothing else was lost"
        )
