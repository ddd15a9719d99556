"""What is written against what the contract says: columns, types, and schemas that grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from feature_store.errors import ContractError
from feature_store.tables import Table

if TYPE_CHECKING:
    from deltalake import DeltaTable


def nullable(schema: pa.Schema) -> pa.Schema:
    """`schema` with every field nullable: what engines write."""
    return pa.schema([f.with_nullable(True) for f in schema])


def stored_schema(contract: Table) -> pa.Schema:
    """What the files hold: the contract without its partition columns."""
    return nullable(
        pa.schema([f for f in contract.schema if f.name not in contract.partitioned_by])
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    """`kind` without what engines differ in: names and nullability of list elements, large offsets."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_large_string(kind):
        return pa.string()
    return pa.binary() if pa.types.is_large_binary(kind) else kind


def check_schema(contract: Table, found: pa.Schema, *, partitioned: bool = False) -> None:
    """Columns and types have to be the contract's; their order is put right by who writes.

    Args:
        partitioned: `found` is of a file, without the partition columns.

    Raises:
        ContractError: names the column, its type and the contract's.
    """
    wanted = {f.name: f.type for f in (stored_schema(contract) if partitioned else contract.schema)}
    have = {f.name: f.type for f in found}
    for name, kind in wanted.items():
        if name not in have:
            raise ContractError(
                f"{contract.name}.{name} is missing: the contract has it as {kind}; add it"
            )
        if _plain(have[name]) != _plain(kind):
            raise ContractError(
                f"{contract.name}.{name} is {have[name]}: the contract has {kind}; cast it"
            )
    for name in have:
        if name not in wanted or list(found.names).count(name) > 1:
            raise ContractError(
                f"{contract.name}.{name} is not in the contract, or there twice: drop it"
            )


def grown_schema(contract: Table, table: DeltaTable) -> pa.Schema | None:
    """The schema to commit with: the table's, and behind it the columns that the contract gained.

    A column that the contract lost stays, null in what is written from then on, so that a spec can
    go back. None: a column has another type, so that the table has to begin anew.

    Raises:
        ContractError: the contract changed the partitioning.
    """
    stored = pa.schema(table.schema().to_arrow())
    by = tuple(table.metadata().partition_columns)
    if by != contract.partitioned_by:
        raise ContractError(
            f"{contract.name} is partitioned by {by} and the contract has {contract.partitioned_by}: use a new lake"
        )
    wanted = {f.name: f for f in contract.schema}
    for f in stored:
        if f.name in wanted and _plain(wanted[f.name].type) != _plain(f.type):
            return None
    added = [f.with_nullable(True) for f in contract.schema if f.name not in stored.names]
    return pa.schema([*stored, *added])
