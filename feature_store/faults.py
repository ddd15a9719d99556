"""Faults of a batch of rows: what checks note, and the checks that several tables share.

Packed rows are wide and their faults are relations between arrays. They are found vectorised, batch
by batch, and given to the quality suite as a few text columns that hold what is wrong with a row,
and null where nothing is:

    incomplete     a column that may not be null is, or an array of it holds a null
    out_of_range   a value outside of what its column can hold
    misaligned     arrays that belong together differ in length
    unordered      a history is not in order of availability
    leaks          a target's `history_end` is not exactly the events available before its `as_of`
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from feature_store.columns import dense_column, history_column, scores_column, sparse_column
from feature_store.spec import Attribute, Dataset, Kind

YEAR_2000_US, YEAR_2100_US = 946_684_800_000_000, 4_102_444_800_000_000
INCOMPLETE, OUT_OF_RANGE = "incomplete", "out_of_range"
MISALIGNED, UNORDERED, LEAKS = "misaligned", "unordered", "leaks"
FAULTS = (INCOMPLETE, MISALIGNED, OUT_OF_RANGE, UNORDERED, LEAKS)

Columns = dict[str, pa.Array]


class Faults:
    """The first fault of each kind per row of one batch."""

    def __init__(self, rows: int, kinds: Iterable[str]) -> None:
        self.columns = {kind: np.full(rows, None, dtype=object) for kind in kinds}

    def add(self, kind: str, rows: np.ndarray, what: str) -> None:
        """Note `what` for `rows` (indices, or a mask over the batch) that have no fault of the kind."""
        column = self.columns[kind]
        rows = np.flatnonzero(rows) if rows.dtype == bool else np.unique(rows)
        column[rows[column[rows] == None]] = what  # noqa: E711


class Lists:
    """An Arrow list column as NumPy offsets and values, a slice of a larger one included."""

    def __init__(self, column: pa.ListArray) -> None:
        offsets = column.offsets.to_numpy()
        self.inner = column.values.slice(offsets[0], offsets[-1] - offsets[0])
        self.offsets = offsets - offsets[0]
        self.sizes = np.diff(self.offsets)

    @property
    def values(self) -> np.ndarray:
        return self.inner.to_numpy(zero_copy_only=False)

    def rows_where(self, bad: np.ndarray) -> np.ndarray:
        """The rows that hold a value of the mask `bad`."""
        return np.searchsorted(self.offsets, np.flatnonzero(bad), side="right") - 1


def check_incomplete(schema: pa.Schema, columns: Columns, faults: Faults) -> None:
    """Columns that may not be null are not, nor is what an array holds."""
    for f in schema:
        if f.nullable or f.name not in columns:
            continue
        column = columns[f.name]
        if column.null_count:
            faults.add("incomplete", ~as_numpy(column.is_valid()), f.name)
        while pa.types.is_list(column.type):
            lists = Lists(column)
            if lists.inner.null_count and column is columns[f.name]:
                faults.add(
                    "incomplete", lists.rows_where(~as_numpy(lists.inner.is_valid())), f.name
                )
            column = lists.inner


def check_histories(dataset: Dataset, columns: Columns, faults: Faults) -> None:
    """Arrays of a stream are aligned, in order of availability, at instants that can be."""
    for stream in dataset.streams:
        prefix = history_column(stream.name, "")
        aligned([n for n in columns if n.startswith(prefix)], columns, faults)
        times = {
            n: Lists(columns[history_column(stream.name, n)])
            for n in ("event_time", "available_time")
        }
        for name, lists in times.items():
            bad = (lists.values < YEAR_2000_US) | (lists.values > YEAR_2100_US)
            faults.add("out_of_range", lists.rows_where(bad), history_column(stream.name, name))
        available = times["available_time"]
        falling = np.zeros(len(available.values), dtype=bool)
        falling[1:] = np.diff(available.values) < 0
        falling[available.offsets[:-1][available.sizes > 0]] = False
        faults.add(
            "unordered",
            available.rows_where(falling),
            history_column(stream.name, "available_time"),
        )


def check_user_features(dataset: Dataset, columns: Columns, faults: Faults) -> None:
    """Lists no longer than they may be, scores beside their ids, and finite numbers."""
    for feature in dataset.sparse_features:
        name = sparse_column(feature.name)
        lists = Lists(columns[name])
        faults.add("out_of_range", lists.sizes > feature.max_ids, f"{name} longer than max_ids")
        if feature.scored:
            aligned([name, scores_column(feature.name)], columns, faults)
            scores = Lists(columns[scores_column(feature.name)])
            faults.add(
                "out_of_range",
                scores.rows_where(~np.isfinite(scores.values)),
                scores_column(feature.name),
            )
    absent = np.zeros(len(columns["user_id"]), dtype=bool)
    if "has_aggregates" in columns:
        has = as_numpy(columns["has_aggregates"])
        faults.add("out_of_range", ~np.isin(has, (0, 1)), "has_aggregates")
        absent = has == 0
    for dense in dataset.dense_features:
        name = dense_column(dense.name)
        faults.add("out_of_range", ~np.isfinite(as_numpy(columns[name])) & ~absent, name)


def check_numbers(attributes: Iterable[Attribute], columns: Columns, faults: Faults) -> None:
    """A number is finite, or missing; a vector has its length and only finite numbers."""
    for a in attributes:
        column = columns[a.name]
        if a.kind is Kind.NUMERIC:
            faults.add("out_of_range", np.isinf(as_numpy(column.fill_null(0.0))), a.name)
        elif a.kind is Kind.VECTOR:
            lists = Lists(column)
            wrong = as_numpy(column.is_valid()) & (lists.sizes != a.dim)
            faults.add("out_of_range", wrong, f"{a.name} is not of length {a.dim}")
            faults.add("out_of_range", lists.rows_where(~np.isfinite(lists.values)), a.name)


def aligned(names: list[str], columns: Columns, faults: Faults) -> None:
    """Arrays of these columns have one length in each row."""
    sizes = Lists(columns[names[0]]).sizes
    for name in names[1:]:
        faults.add("misaligned", Lists(columns[name]).sizes != sizes, f"{name} with {names[0]}")


def as_numpy(column: pa.Array) -> np.ndarray:
    """The values, copied where they have to be."""
    return column.to_numpy(zero_copy_only=False)
