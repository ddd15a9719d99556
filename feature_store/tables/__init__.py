"""The tables of a dataset, one module each: `base.py` says what a module tells of its table."""

from __future__ import annotations

import hashlib

from feature_store.errors import SpecError
from feature_store.spec import Dataset
from feature_store.tables.aggregates import Aggregates
from feature_store.tables.base import Table, TableKind
from feature_store.tables.events import Events, event_fields
from feature_store.tables.examples import Examples
from feature_store.tables.impressions import Impressions, target_fields
from feature_store.tables.item_aggregates import ItemAggregates
from feature_store.tables.labels import Labels
from feature_store.tables.sequences import Sequences
from feature_store.tables.truth import Truth
from feature_store.tables.user_embeddings import UserEmbeddings

# In the order in which a day builds them.
KINDS: dict[str, TableKind] = {
    kind.name: kind
    for kind in (
        Events(), Impressions(), Truth(), Sequences(), Aggregates(), ItemAggregates(), Examples(), Labels(),
        UserEmbeddings(),
    )
}  # fmt: skip
SOURCES = tuple(name for name, kind in KINDS.items() if not kind.made_from)

# Raised when a job computes other rows from the same inputs, so that what older code made is rebuilt.
_REVISION = 1


def contracts(dataset: Dataset) -> dict[str, Table]:
    """Every table of `dataset` by name."""
    return {n: kind.contract(dataset) for n, kind in KINDS.items() if kind.exists(dataset)}


def contract(dataset: Dataset, table: str) -> Table:
    """The contract of one table.

    Raises:
        SpecError: the dataset has no such table.
    """
    known = [name for name, kind in KINDS.items() if kind.exists(dataset)]
    if table not in known:
        raise SpecError(f"table is {table!r}: {dataset.name} has {', '.join(known)}")
    return KINDS[table].contract(dataset)


def definition(dataset: Dataset, table: str) -> str:
    """16 hex digits that change with whatever of the spec decides the rows of `table`, and with nothing
    else: the order of features, say, does not."""
    kind = KINDS[table]
    if not kind.exists(dataset):
        return digest(_REVISION, table)
    made = (definition(dataset, name) for name in kind.made_from)
    return digest(_REVISION, table, *made, *kind.decides(dataset))


def feature_tables(dataset: Dataset) -> tuple[str, ...]:
    """The tables that the feature jobs write, in the order of a day."""
    return tuple(
        name
        for name, kind in KINDS.items()
        if kind.made_from and kind.partitioned_by == ("ds",) and kind.exists(dataset)
    )


def reserved_names(dataset: Dataset) -> set[str]:
    """Names that no attribute, context feature or given label can have: columns beside them."""
    return {"ds", *(f.name for f in (*event_fields(dataset), *target_fields(dataset)))}


def digest(*parts: object) -> str:
    """16 hex digits of values that print what they are."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
