"""The lake: Delta tables of one dataset, read by Arrow and replaced one partition at a time.

Publishing a partition goes in four steps, none of which leaves anything half-written:

    stage    the engine (or Arrow) writes plain Parquet beside the tables: the computation runs once
    check    the table's quality suite reads what was staged
    commit   the files move into the table's folder and one Delta commit replaces the partition
    record   the ledger gets its row

A process killed before the commit leaves the old partition, after it the new one; a partition whose
ledger row is missing counts as not written. What was staged and not committed is removed by the
next publish of that partition. Only the commit needs `deltalake`, so it costs milliseconds on any
engine, and the same files are read back by Spark, Sail and Arrow.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from feature_store import ledger
from feature_store.days import parse_day
from feature_store.errors import ContractError, MissingPartitionError
from feature_store.ledger import Partition, pin
from feature_store.spec import Dataset
from feature_store.tables import Table, contracts

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from pyspark.sql import DataFrame, SparkSession

Version = int | Mapping[str, int] | None

_PART = "part"
_ABANDONED_AFTER = timedelta(days=1)


class Lake:
    """The tables of one dataset under one root.

    Args:
        root: a folder, or a URI that `deltalake` and `pyarrow.fs` both know (`s3://...`).
        dataset: whose tables; their contracts follow from it.
        docs_root: where quality pages are kept; by default `quality/<dataset>` beside the root.
    """

    def __init__(self, root: str | Path, dataset: Dataset, *, docs_root: Path | None = None) -> None:
        self.dataset = dataset
        self._tables = contracts(dataset)
        self._remote = "://" in str(root)
        if self._remote:
            self._fs, base = pafs.FileSystem.from_uri(str(root))
            self._base = f"{base.rstrip('/')}/{dataset.name}"
            self._uri = f"{str(root).rstrip('/')}/{dataset.name}"
            self.docs_root = docs_root or Path("quality") / dataset.name
        else:
            self._fs = pafs.LocalFileSystem()
            self._base = self._uri = str(Path(root).absolute() / dataset.name)
            self.docs_root = docs_root or Path(root).absolute().parent / "quality" / dataset.name

    # ---- what there is

    def contract(self, table: str) -> Table:
        """The contract of `table`.

        Raises:
            ContractError: the dataset has no such table.
        """
        if table not in self._tables:
            known = ", ".join(self._tables)
            raise ContractError(f"table is {table!r}: {self.dataset.name} has {known}; use one of them")
        return self._tables[table]

    def uri(self, table: str) -> str:
        """Where `table` lies."""
        self.contract(table)
        return f"{self._uri}/{table}"

    def exists(self, table: str) -> bool:
        """Whether any partition of `table` was ever written."""
        from deltalake import DeltaTable

        return DeltaTable.is_deltatable(self.uri(table))

    def version(self, table: str) -> int:
        """The newest Delta version of `table`.

        Raises:
            MissingPartitionError: it does not exist yet.
        """
        return self._open(table).version()

    def partitions(self, table: str, model: str = "") -> dict[str, Partition]:
        """The newest ledger row of each day of `table`, by day, ascending; {} if there is none."""
        self.contract(table)
        return ledger.newest(self._ledger, table, model)

    def require(self, table: str, days: Sequence[str], model: str = "") -> dict[str, int]:
        """`{"<table>/<ds>": version}` of the named days, to read them by and to record as inputs.

        For a table that is partitioned by model the keys are `<table>/<model>/<ds>`.

        Raises:
            MissingPartitionError: a day was not written; names the days and the job that writes them.
        """
        found = self.partitions(table, model)
        missing = [day for day in days if day not in found]
        if missing:
            raise MissingPartitionError(self._missing(table, missing, model))
        return ledger.pins({day: found[day] for day in days})

    # ---- reading

    def read(
        self,
        table: str,
        *,
        days: Sequence[str] | None = None,
        model: str | None = None,
        columns: Sequence[str] | None = None,
        version: Version = None,
    ) -> pa.Table:
        """Rows of `table` as Arrow, in the contract's types, without an engine.

        Args:
            days: which days, in this order; None is all.
            model: which model, for a table that is partitioned by it; None is all.
            columns: which columns, in this order; None is all of the contract's.
            version: a Delta version, or the pins that `require` gave (each day at its own
                version); None is the newest.

        A column that the contract gained after the version read is null.

        Raises:
            MissingPartitionError: the table does not exist.
            ContractError: the contract has no such column.
        """
        schema = self._projection(table, columns)
        tables = [
            pa.Table.from_batches(self._rebuilt(scanner.to_batches(), schema), schema)
            for scanner in self._scanners(table, days, model, schema, version, readahead=4)
        ]
        return pa.concat_tables(tables) if tables else schema.empty_table()

    def batches(
        self,
        table: str,
        *,
        days: Sequence[str],
        model: str | None = None,
        columns: Sequence[str] | None = None,
        version: Version = None,
        batch_rows: int = 4096,
    ) -> Iterator[pa.RecordBatch]:
        """Like `read`, as a stream of batches of at most `batch_rows` rows.

        Days come in the order given and rows in one order for a given version. Memory is bounded by
        a few batches and one row group, not by the partition.
        """
        schema = self._projection(table, columns)
        scanners = self._scanners(table, days, model, schema, version, batch_rows=batch_rows)
        for scanner in scanners:
            yield from self._rebuilt(scanner.to_batches(), schema)

    def frame(
        self,
        spark: SparkSession,
        table: str,
        days: Sequence[str] | None = None,
        version: int | None = None,
    ) -> DataFrame:
        """`table` as a Spark frame, limited to `days`; empty where the table does not exist."""
        from pyspark.sql import functions as F
        from pyspark.sql.pandas.types import from_arrow_schema

        names = self.contract(table).schema.names
        if not self.exists(table):
            schema = from_arrow_schema(self.contract(table).schema, prefer_timestamp_ntz=True)
            return spark.createDataFrame([], schema)
        reader = spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        frame = reader.load(self.uri(table))
        if days is not None:
            frame = frame.where(F.col("ds").isin(list(days)) if len(days) != 1 else F.col("ds") == days[0])
        return frame.select(*names)

    # ---- publishing

    def publish_frame(
        self,
        spark: SparkSession,
        table: str,
        ds: str,
        frame: DataFrame,
        *,
        inputs: Mapping[str, int],
        model: str = "",
        notes: Mapping[str, object] | None = None,
        code_version: str,
        engine: str,
    ) -> Partition:
        """Replace the partition `ds` of `table` by the rows of `frame`, which is computed once.

        Raises:
            ContractError: columns, types or `ds` are not the contract's. Nothing was changed.
            QualityError: the table's suite refused the rows. Nothing was changed.
        """
        from pyspark.sql.pandas.types import to_arrow_schema

        contract = self.contract(table)
        _check_schema(contract, to_arrow_schema(frame.schema))
        frame = frame.select(*contract.schema.names)

        def stage(folder: str) -> None:
            scheme = self._uri.split("://")[0] + "://" if self._remote else ""
            frame.write.partitionBy(*contract.partitioned_by).parquet(scheme + folder)

        return self._publish(contract, ds, model, stage, inputs, notes, code_version, engine)

    def publish_arrow(
        self,
        table: str,
        ds: str,
        data: pa.Table,
        *,
        inputs: Mapping[str, int],
        model: str = "",
        notes: Mapping[str, object] | None = None,
        code_version: str,
        engine: str = "arrow",
    ) -> Partition:
        """Like `publish_frame`, for rows that are in memory."""
        contract = self.contract(table)
        _check_schema(contract, data.schema)
        data = data.select(contract.schema.names).cast(_nullable(contract.schema))

        def stage(folder: str) -> None:
            for values in data.group_by(list(contract.partitioned_by)).aggregate([]).to_pylist():
                rows = data
                for column, value in values.items():
                    rows = rows.filter(pads.field(column) == value)
                path = f"{folder}/{_folder(values)}"
                self._fs.create_dir(path)
                rows = rows.drop_columns(list(contract.partitioned_by))
                pq.write_table(rows, f"{path}/0.parquet", filesystem=self._fs, compression="zstd")

        return self._publish(contract, ds, model, stage, inputs, notes, code_version, engine)

    def _publish(
        self,
        contract: Table,
        ds: str,
        model: str,
        stage: Callable[[str], None],
        inputs: Mapping[str, int],
        notes: Mapping[str, object] | None,
        code_version: str,
        engine: str,
    ) -> Partition:
        from feature_store import quality

        started = time.monotonic()
        parse_day(ds)
        values = self._values(contract, ds, model)
        with self._staging(contract.name, values) as folder:
            importing = quality.warm_up()
            stage(folder)
            files = self._staged(contract, folder, values)
            staged = pads.dataset(list(files), schema=_stored(contract), filesystem=self._fs)
            importing.join()
            quality.validate(self.dataset, contract.name, ds, staged, model=model, docs_root=self.docs_root)
            version = self._commit(contract, values, files)
            partition = Partition(
                table=contract.name,
                model=model,
                ds=ds,
                version=version,
                inputs=dict(inputs),
                code_version=code_version,
                spec_hash=self.dataset.hash,
                engine=engine,
                rows=sum(rows for rows, _ in files.values()),
                bytes=sum(size for _, size in files.values()),
                seconds=round(time.monotonic() - started, 3),
                written_at=time.time_ns() // 1000,
                notes=dict(notes or {}),
            )
            ledger.append(self._ledger, partition)
        return partition

    @contextmanager
    def scratch(self, job: str, ds: str) -> Iterator[str]:
        """A folder, not made yet, for what a job keeps while it works on `ds`; removed at the end.

        One process at a time has it; what a killed one left is removed by the next.
        """
        parse_day(ds)
        with self._staging(job, {"ds": ds}) as folder:
            yield (self._uri.split("://")[0] + "://" if self._remote else "") + folder

    @contextmanager
    def _staging(self, table: str, values: Mapping[str, str]) -> Iterator[str]:
        """A path to stage one partition in, which does not exist yet; removed at the end."""
        home = f"{self._base}/_staging/{table}/{_folder(values)}"
        self._fs.create_dir(home)
        with self._locked(f"{home}/.lock"):
            self._remove_abandoned(home)
            folder = f"{home}/{uuid.uuid4().hex}"
            try:
                yield folder
            finally:
                if self._fs.get_file_info(folder).type == pafs.FileType.Directory:
                    self._fs.delete_dir(folder)

    def _locked(self, path: str):  # noqa: ANN202
        if self._remote:  # an object store has no locks: the commit's conflict check decides there
            return nullcontext()
        from filelock import FileLock

        return FileLock(path)

    def _remove_abandoned(self, home: str) -> None:
        # Under the lock whatever lies here is a dead writer's. Without one it may be a living one's.
        since = datetime.now(timezone.utc) - (_ABANDONED_AFTER if self._remote else timedelta(0))
        for info in self._fs.get_file_info(pafs.FileSelector(home)):
            if info.type == pafs.FileType.Directory:
                inside = self._fs.get_file_info(pafs.FileSelector(info.path, recursive=True))
                times = [i.mtime for i in inside if i.mtime is not None]
                if not self._remote or (times and max(times) < since):
                    self._fs.delete_dir(info.path)

    def _staged(
        self, contract: Table, folder: str, values: Mapping[str, str]
    ) -> dict[str, tuple[int, int]]:
        """Staged files with rows -> (rows, bytes), after checking them against the contract.

        Raises:
            ContractError: a file has other columns or types, or lies in another partition.
        """
        found = {}
        selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
        for info in self._fs.get_file_info(selector):
            inside = info.path.removeprefix(folder).strip("/")
            if info.type != pafs.FileType.File or not inside.endswith(".parquet"):
                continue
            metadata = pq.read_metadata(info.path, filesystem=self._fs)
            if metadata.num_rows == 0:
                continue
            where = inside.rpartition("/")[0]
            if where != _folder(values):
                raise ContractError(
                    f"{contract.name} {values['ds']}: the frame has rows of {where or 'no partition'}, "
                    f"expected {_folder(values)} in every row; filter the frame, or set the column"
                )
            _check_schema(contract, metadata.schema.to_arrow_schema(), partitioned=True)
            found[info.path] = (metadata.num_rows, info.size)
        return dict(sorted(found.items()))

    def _commit(
        self, contract: Table, values: Mapping[str, str], files: Mapping[str, tuple[int, int]]
    ) -> int:
        from deltalake import CommitProperties, Transaction
        from deltalake.transaction import AddAction

        home = f"{self._base}/{contract.name}"
        write = uuid.uuid4().hex
        self._fs.create_dir(f"{home}/{_folder(values)}")
        actions = []
        for i, (path, (rows, size)) in enumerate(files.items()):
            name = f"{_folder(values)}/{_PART}-{i:05d}-{write}.parquet"
            self._fs.move(path, f"{home}/{name}")
            stats = json.dumps({"numRecords": rows})
            now = time.time_ns() // 1_000_000
            actions.append(AddAction(name, size, dict(values), now, True, stats))

        def attempt() -> int:
            table = self._create_or_open(contract)
            # Counting the writes of a partition makes two of them conflict, also where the
            # partition was empty before and there is no removed file for both to trip over.
            app = _folder(values)
            count = Transaction(app, (table.transaction_version(app) or 0) + 1)
            table.create_write_transaction(
                actions,
                mode="overwrite",
                schema=_grown(contract, table),
                partition_by=list(contract.partitioned_by),
                partition_filters=[(c, "=", v) for c, v in values.items()],
                commit_properties=CommitProperties(app_transactions=[count]),
            )
            table.update_incremental()
            return table.version()

        return ledger.retry_on_conflict(attempt)

    # ---- inside

    @property
    def _ledger(self) -> str:
        return f"{self._uri}/partitions"

    def _values(self, contract: Table, ds: str, model: str) -> dict[str, str]:
        by_model = "model" in contract.partitioned_by
        if by_model and model not in self.dataset.models:
            known = ", ".join(self.dataset.models)
            raise ContractError(f"model is {model!r}: {contract.name} is partitioned by model; use {known}")
        if not by_model and model:
            raise ContractError(f"model is {model!r}: {contract.name} is not partitioned by model; leave it out")
        return {"model": model, "ds": ds} if by_model else {"ds": ds}

    def _missing(self, table: str, days: Sequence[str], model: str = "") -> str:
        job = ledger.PRODUCERS[table]
        name = f"{self.dataset.name}.{table}" + (f" of model {model}" if model else "")
        option = f" --model {model}" if model else ""
        shown = ", ".join(days[:5]) + (f" and {len(days) - 5} more" if len(days) > 5 else "")
        first = days[0] if days else "<day>"
        return (
            f"{name} has no partition for {shown or 'any day'}: "
            f"run python -m jobs {job} --dataset {self.dataset.name} --ds {first}{option}"
        )

    def _open(self, table: str, version: int | None = None) -> DeltaTable:
        from deltalake import DeltaTable

        if not self.exists(table):
            raise MissingPartitionError(self._missing(table, []))
        return DeltaTable(self.uri(table), version=version)

    def _create_or_open(self, contract: Table) -> DeltaTable:
        from deltalake import DeltaTable

        uri = self.uri(contract.name)
        if DeltaTable.is_deltatable(uri):
            return DeltaTable(uri)
        return DeltaTable.create(
            uri,
            contract.schema,
            mode="ignore",
            partition_by=list(contract.partitioned_by),
            description=contract.grain,
            configuration=ledger.RETENTION,
        )

    def _projection(self, table: str, columns: Sequence[str] | None) -> pa.Schema:
        schema = self.contract(table).schema
        for column in columns or ():
            if column not in schema.names:
                known = ", ".join(schema.names)
                raise ContractError(f"column is {column!r}: {table} has {known}; use some of them")
        return schema if columns is None else pa.schema([schema.field(c) for c in columns])

    def _scanners(
        self,
        table: str,
        days: Sequence[str] | None,
        model: str | None,
        schema: pa.Schema,
        version: Version,
        *,
        batch_rows: int = 131_072,
        readahead: int = 1,
    ) -> Iterator[pads.Scanner]:
        """One scanner per day (one for all where `days` is None), files in the order of their paths."""
        opened: dict[int | None, DeltaTable] = {}
        for day in days if days is not None else [None]:
            at = version
            if isinstance(version, Mapping):
                key = pin(table, day or "", model or "")
                if key not in version:
                    raise MissingPartitionError(f"{key} is not pinned: call require for that day first")
                at = version[key]
            if at not in opened:
                opened[at] = self._open(table, at)
            chosen = [("ds", "=", day)] if day is not None else []
            if model is not None:
                chosen.append(("model", "=", model))
            # Arrow's own filesystem reads faster than deltalake's, which calls back into Python.
            folder = pafs.SubTreeFileSystem(f"{self._base}/{table}", self._fs)
            whole = opened[at].to_pyarrow_dataset(partitions=chosen or None, filesystem=folder)
            fragments = sorted(whole.get_fragments(), key=lambda f: f.path)
            ordered = pads.FileSystemDataset(fragments, whole.schema, whole.format, folder)
            yield ordered.scanner(
                columns=[n for n in schema.names if n in whole.schema.names],
                batch_size=batch_rows,
                batch_readahead=2 * readahead,
                fragment_readahead=readahead,
            )

    @staticmethod
    def _rebuilt(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """`batches` with exactly the fields of `schema`, non-empty ones only."""
        for batch in batches:
            if batch.num_rows:
                has = set(batch.schema.names)
                columns = [
                    batch.column(f.name).cast(f.type) if f.name in has else pa.nulls(batch.num_rows, f.type)
                    for f in schema
                ]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _folder(values: Mapping[str, str]) -> str:
    return "/".join(f"{column}={value}" for column, value in values.items())


def _nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([f.with_nullable(True) for f in schema])


def _stored(contract: Table) -> pa.Schema:
    """What the files hold: the contract without its partition columns."""
    return _nullable(pa.schema([f for f in contract.schema if f.name not in contract.partitioned_by]))


def _plain(kind: pa.DataType) -> pa.DataType:
    """`kind` without what engines differ in: names and nullability of list elements, large offsets."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_large_string(kind):
        return pa.string()
    return pa.binary() if pa.types.is_large_binary(kind) else kind


def _check_schema(contract: Table, found: pa.Schema, *, partitioned: bool = False) -> None:
    """Columns and types have to be the contract's; their order is put right by who writes."""
    wanted = {f.name: f.type for f in (_stored(contract) if partitioned else contract.schema)}
    have = {f.name: f.type for f in found}
    for name, kind in wanted.items():
        if name not in have:
            raise ContractError(f"{contract.name}.{name} is missing: the contract has it as {kind}; add it")
        if _plain(have[name]) != _plain(kind):
            raise ContractError(f"{contract.name}.{name} is {have[name]}: the contract has {kind}; cast it")
    for name in have:
        if name not in wanted or list(found.names).count(name) > 1:
            raise ContractError(f"{contract.name}.{name} is not in the contract, or there twice: drop it")


def _grown(contract: Table, table: DeltaTable) -> pa.Schema:
    """The schema to commit with: the table's, and behind it the columns that the contract gained.

    Raises:
        ContractError: the contract lost a column, or changed a type or the partitioning.
    """
    stored = pa.schema(table.schema().to_arrow())
    wanted = {f.name: f for f in contract.schema}
    for f in stored:
        if f.name not in wanted or _plain(wanted[f.name].type) != _plain(f.type):
            now = wanted[f.name].type if f.name in wanted else "no such column"
            raise ContractError(
                f"{contract.name}.{f.name} is stored as {f.type} and the contract has {now}: "
                "schemas grow by adding only; use a new name, or a new lake"
            )
    by = tuple(table.metadata().partition_columns)
    if by != contract.partitioned_by:
        raise ContractError(
            f"{contract.name} is partitioned by {by} and the contract has {contract.partitioned_by}: use a new lake"
        )
    added = [f.with_nullable(True) for f in contract.schema if f.name not in stored.names]
    return pa.schema([*stored, *added])
