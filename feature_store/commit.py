"""From staged files to a partition: one Delta commit that names them in place of the old ones."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import unquote

import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.transaction import AddAction, RemoveAction

from feature_store.errors import ContractError
from feature_store.ledger import RETENTION, retry_on_conflict
from feature_store.schemas import check_schema, grown_schema, nullable
from feature_store.staging import ABANDONED_AFTER, partition_folder
from feature_store.tables import Table


def staged_files(
    filesystem: pafs.FileSystem, contract: Table, folder: str, values: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Staged files with rows -> (rows, bytes), after checking them against the contract.

    Raises:
        ContractError: a file has other columns or types, or lies in another partition.
    """
    found = {}
    selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
    for info in filesystem.get_file_info(selector):
        inside = info.path.removeprefix(folder).strip("/")
        if info.type != pafs.FileType.File or not inside.endswith(".parquet"):
            continue
        metadata = pq.read_metadata(info.path, filesystem=filesystem)
        if metadata.num_rows == 0:
            continue
        where = inside.rpartition("/")[0]
        if where != partition_folder(values):
            raise ContractError(
                f"{contract.name} {values['ds']}: the frame has rows of {where or 'no partition'}, "
                f"expected {partition_folder(values)} in every row; filter the frame, or set the column"
            )
        check_schema(contract, metadata.schema.to_arrow_schema(), partitioned=True)
        found[info.path] = (metadata.num_rows, info.size)
    return dict(sorted(found.items()))


def replace_partition(
    filesystem: pafs.FileSystem,
    home: str,
    uri: str,
    contract: Table,
    values: Mapping[str, str],
    files: Mapping[str, tuple[int, int]],
    *,
    locked: bool,
) -> int:
    """Make `files` the partition `values` of the table at `uri`, in one commit, and return its version.

    The files move into the table's folder, where nothing reads them until the commit names them.
    What a killed writer moved there and did not commit is removed first. The version that is
    returned reads the partition as written. Where a column has another type than before, the commit
    removes the other partitions too: they were made under another definition, so that nobody reads
    them but at their own versions.

    Args:
        home: the table's folder, a path of `filesystem`.
        files: path -> (rows, bytes); none leaves the partition empty.
        locked: nobody else can be writing this partition. Otherwise only what is a day old counts
            as left by a killed writer.

    Raises:
        ContractError: the stored table is partitioned otherwise.
    """
    write = uuid.uuid4().hex
    filesystem.create_dir(f"{home}/{partition_folder(values)}")
    _remove_orphans(filesystem, home, partition_folder(values), locked=locked)
    actions: list[AddAction | RemoveAction] = []
    for i, (path, (rows, size)) in enumerate(files.items()):
        name = f"{partition_folder(values)}/part-{i:05d}-{write}.parquet"
        filesystem.move(path, f"{home}/{name}")
        stats = json.dumps({"numRecords": rows})
        now = time.time_ns() // 1_000_000
        actions.append(AddAction(name, size, dict(values), now, True, stats))

    def attempt() -> int:
        table = _create_or_open(uri, contract)
        # Counting the writes of a partition makes two of them conflict, also where the
        # partition was empty before and there is no removed file for both to trip over.
        app = partition_folder(values)
        count = Transaction(app, (table.transaction_version(app) or 0) + 1)
        schema = grown_schema(contract, table)
        table.create_write_transaction(
            actions,
            mode="overwrite",
            schema=schema or nullable(contract.schema),
            partition_by=list(contract.partitioned_by),
            partition_filters=[(c, "=", v) for c, v in values.items()] if schema else None,
            commit_properties=CommitProperties(app_transactions=[count]),
        )
        table.update_incremental()
        return table.version()

    return retry_on_conflict(attempt)


def _remove_orphans(filesystem: pafs.FileSystem, home: str, folder: str, *, locked: bool) -> None:
    """Remove files of a partition that no version names and no living writer has moved there.

    Nothing is removed where the log does not go back to its start, as what older versions name is
    not known then.
    """
    found = {
        info.path: info
        for info in filesystem.get_file_info(pafs.FileSelector(f"{home}/{folder}"))
        if info.extension == "parquet"
    }
    if not found:
        return
    log = pafs.FileSelector(f"{home}/_delta_log", allow_not_found=True)
    commits = [i for i in filesystem.get_file_info(log) if i.extension == "json"]
    if commits and f"{0:020d}.json" not in {i.base_name for i in commits}:
        return
    for commit in commits:
        with filesystem.open_input_file(commit.path) as file:
            for line in file.read().splitlines():
                added = json.loads(line).get("add")
                if added:
                    found.pop(f"{home}/{unquote(added['path'])}", None)
    since = datetime.now(UTC) - ABANDONED_AFTER
    for path, info in found.items():
        if locked or (info.mtime is not None and info.mtime < since):
            filesystem.delete_file(path)


def _create_or_open(uri: str, contract: Table) -> DeltaTable:
    if DeltaTable.is_deltatable(uri):
        return DeltaTable(uri)
    return DeltaTable.create(
        uri,
        nullable(contract.schema),  # as the files are: Sail refuses to read them as anything else
        mode="ignore",
        partition_by=list(contract.partitioned_by),
        description=contract.grain,
        configuration=RETENTION,
    )
