"""What a table is, for any dataset: one object that says all of it, a module each.

A table's module holds its columns, its key, the tables that it is made from, the parts of the spec
that decide its rows (from which its definition is hashed), the days of source tables that a partition
can depend on, and what has to hold of its rows. The job that builds it is a module of `jobs/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from feature_store.columns import required
from feature_store.faults import Columns, Faults
from feature_store.spec import Dataset

if TYPE_CHECKING:
    from feature_store.expectations import Expect
    from feature_store.ledger import Partition

BEGINNING = "0001-01-01"

# What says how a model reads a value, and not what the value is.
_NOT_IN_ROWS = {"vocabulary", "description", "sampled"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """The contract of one Delta table.

    Args:
        name: folder name under the dataset's lake.
        schema: Arrow schema, partition columns included; `nullable` is part of the contract.
        key: the columns that identify a row (the grain).
        partitioned_by: `("ds",)`, or `("model", "ds")`.
        grain: one sentence.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    partitioned_by: tuple[str, ...] = ("ds",)
    grain: str = ""


@dataclass(frozen=True)
class Days:
    """Days of a source table: every one from `first` to `last`, or those of `only`."""

    table: str
    first: str = "9999-12-31"
    last: str = ""
    only: frozenset[str] = frozenset()

    def among(self, written: Mapping[str, Partition]) -> dict[str, Partition]:
        """Those of `written` that are meant, in its order."""
        return {d: p for d, p in written.items() if self.first <= d <= self.last or d in self.only}


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The days of source tables whose rows a partition can depend on."""

    events: Days = Days("events")
    impressions: Days = Days("impressions")


class TableKind:
    """One table.

    Attributes:
        name: of the table.
        job: that writes it.
        grain: one sentence about a row.
        key: the columns that identify a row.
        partitioned_by: `("ds",)`, or `("model", "ds")`.
        made_from: tables whose definitions are part of its own. None: a source, which `ingest` writes.
        plain: columns beside the key that its checks read as they are.
        faults: the kinds (`feature_store/faults.py`) that its rows can have.
    """

    name: ClassVar[str]
    job: ClassVar[str]
    grain: ClassVar[str]
    key: ClassVar[tuple[str, ...]]
    partitioned_by: ClassVar[tuple[str, ...]] = ("ds",)
    made_from: ClassVar[tuple[str, ...]] = ()
    plain: ClassVar[tuple[str, ...]]
    faults: ClassVar[tuple[str, ...]]

    def exists(self, dataset: Dataset) -> bool:
        """Whether `dataset` has the table."""
        return True

    def columns(self, dataset: Dataset) -> list[pa.Field]:
        """Its columns, but for those it is partitioned by."""
        raise NotImplementedError

    def decides(self, dataset: Dataset) -> list[object]:
        """What of the spec decides its rows, beside the definitions of what it is made from."""
        raise NotImplementedError

    def reach(self, dataset: Dataset, ds: str) -> Reach:
        """The days of source tables that the rows of partition `ds` can depend on."""
        raise NotImplementedError

    def check(self, dataset: Dataset, ds: str, columns: Columns, faults: Faults) -> None:
        """Note the faults of a batch of rows in `faults`."""

    def expectations(self, dataset: Dataset, ds: str, expect: Expect) -> list[Any]:
        """What of a whole partition has to hold, beside unique keys, valid ids and no faults."""
        return []

    def contract(self, dataset: Dataset) -> Table:
        """Its contract in `dataset`."""
        partitions = [required(name, pa.string()) for name in self.partitioned_by]
        return Table(
            name=self.name,
            schema=pa.schema([*self.columns(dataset), *partitions]),
            key=self.key,
            partitioned_by=self.partitioned_by,
            grain=self.grain,
        )


def plain(value: object) -> object:
    """`value` as what decides rows: without the fields that only say how a model reads it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: plain(getattr(value, f.name))
            for f in fields(value)
            if f.name not in _NOT_IN_ROWS
        }
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def in_any_order(values: Iterable[object]) -> list[object]:
    """`plain` of each, in one order whatever the spec's."""
    return sorted(map(plain, values), key=repr)
