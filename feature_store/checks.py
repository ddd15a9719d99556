"""What a quality suite looks at: a narrow frame of a partition's keys, times, names and faults.

Packed rows are wide and their faults are relations between arrays. They are found here, vectorised,
batch by batch, and given to the suite as a few text columns that hold what is wrong with a row, and
null where nothing is:

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
import pyarrow.compute as pc

from feature_store.days import HOUR_US, end_us, start_us
from feature_store.spec import Attribute, Dataset, IdType, Kind
from feature_store.tables import (
    Table,
    co_occurrence_columns,
    contract,
    counts_column,
    history_column,
    history_end_column,
    label_column,
    scores_column,
    sparse_column,
)

YEAR_2000_US, YEAR_2100_US = 946_684_800_000_000, 4_102_444_800_000_000
FLOAT16_BYTES = 2

# Columns beside the key that a suite reads as they are.
PLAIN = {
    "events": ("stream", "user_id", "event_time", "ingest_time", "available_time"),
    "impressions": ("target", "user_id", "time", "as_of"),
    "labels": ("user_id", "shown_ds", "task"),
    "sequences": ("user_id",),
    "aggregates": ("user_id",),
    "examples": ("user_id", "part"),
    "item_aggregates": ("hour", "first_seen"),
    "truth": ("task", "probability"),
    "user_embeddings": ("user_id", "snapshot", "embeddings", "dim", "pooled_days"),
}
FAULTS = {
    "events": ("incomplete", "out_of_range"),
    "impressions": ("incomplete", "out_of_range"),
    "labels": ("incomplete", "out_of_range"),
    "sequences": ("incomplete", "misaligned", "out_of_range", "unordered"),
    "aggregates": ("incomplete", "misaligned", "out_of_range"),
    "examples": ("incomplete", "misaligned", "out_of_range", "unordered", "leaks"),
    "item_aggregates": ("incomplete", "misaligned", "out_of_range"),
    "truth": ("incomplete",),
    "user_embeddings": ("incomplete", "out_of_range"),
}
_NAMES = ("stream", "target", "task", "snapshot", "shown_ds", *FAULTS["examples"])


class _Faults:
    """The first fault of each kind per row of one batch."""

    def __init__(self, rows: int, kinds: Iterable[str]) -> None:
        self.columns = {kind: np.full(rows, None, dtype=object) for kind in kinds}

    def add(self, kind: str, rows: np.ndarray, what: str) -> None:
        """Note `what` for `rows` (indices, or a mask over the batch) that have no fault of the kind."""
        column = self.columns[kind]
        rows = np.flatnonzero(rows) if rows.dtype == bool else np.unique(rows)
        column[rows[column[rows] == None]] = what  # noqa: E711


class _Lists:
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


def checked(dataset: Dataset, table: str, ds: str, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Key, plain and fault columns of `batch`, one row per row."""
    shape = contract(dataset, table)
    columns = {f.name: batch.column(f.name) for f in shape.schema if f.name in batch.schema.names}
    faults = _Faults(batch.num_rows, FAULTS[table])
    _incomplete(shape, columns, faults)
    if table in ("sequences", "examples"):
        _histories(dataset, table, columns, faults)
    if table in ("aggregates", "examples"):
        _user_features(dataset, shape, columns, faults)
    if table == "examples":
        _targets(dataset, ds, shape, columns, faults)
    elif table == "sequences":
        _before(dataset, columns, end_us(ds, dataset.utc_offset), faults)
    elif table == "events":
        _numbers(dataset.event_attributes, columns, faults)
    elif table == "impressions":
        _numbers(dataset.context_features, columns, faults)
        _impressions(dataset, columns, faults)
    elif table == "labels":
        labels = _Lists(columns["labels"])
        faults.add("out_of_range", labels.rows_where(~np.isin(labels.values, (-1, 0, 1))), "labels")
    elif table == "item_aggregates":
        _item_counts(dataset, columns, faults)
    elif table == "user_embeddings":
        _embeddings(columns, faults)
    kept = {n: columns[n] for n in dict.fromkeys((*shape.key, *PLAIN[table]))}
    # A null key or time is a fault already; filled, the column keeps its integer type in pandas.
    kept = {n: c.fill_null(-1) if pa.types.is_integer(c.type) else c for n, c in kept.items()}
    kept |= {n: pa.array(c, pa.string()) for n, c in faults.columns.items()}
    kept = {n: c.dictionary_encode() if n in _NAMES else c for n, c in kept.items()}
    return pa.RecordBatch.from_pydict(kept)


def _incomplete(shape: Table, columns: dict[str, pa.Array], faults: _Faults) -> None:
    for f in shape.schema:
        if f.nullable or f.name not in columns:
            continue
        column = columns[f.name]
        if column.null_count:
            faults.add("incomplete", ~_numpy(column.is_valid()), f.name)
        while pa.types.is_list(column.type):
            lists = _Lists(column)
            if lists.inner.null_count and column is columns[f.name]:
                faults.add("incomplete", lists.rows_where(~_numpy(lists.inner.is_valid())), f.name)
            column = lists.inner


def _histories(dataset: Dataset, table: str, columns: dict[str, pa.Array], faults: _Faults) -> None:
    for stream in dataset.streams:
        prefix = history_column(stream.name, "")
        _aligned([n for n in columns if n.startswith(prefix)], columns, faults)
        times = {
            n: _Lists(columns[history_column(stream.name, n)])
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
        if table == "sequences":
            faults.add(
                "out_of_range",
                available.sizes > stream.max_events,
                f"{prefix}* longer than max_events",
            )


def _before(dataset: Dataset, columns: dict[str, pa.Array], end: int, faults: _Faults) -> None:
    for stream in dataset.streams:
        name = history_column(stream.name, "available_time")
        lists = _Lists(columns[name])
        faults.add("out_of_range", lists.rows_where(lists.values >= end), f"{name} after the day")


def _user_features(
    dataset: Dataset, shape: Table, columns: dict[str, pa.Array], faults: _Faults
) -> None:
    for feature in dataset.sparse_features:
        name = sparse_column(feature.name)
        lists = _Lists(columns[name])
        faults.add("out_of_range", lists.sizes > feature.max_ids, f"{name} longer than max_ids")
        if feature.scored:
            _aligned([name, scores_column(feature.name)], columns, faults)
            scores = _Lists(columns[scores_column(feature.name)])
            faults.add(
                "out_of_range",
                scores.rows_where(~np.isfinite(scores.values)),
                scores_column(feature.name),
            )
    absent = np.zeros(len(columns["user_id"]), dtype=bool)
    if "has_aggregates" in columns:
        has = _numpy(columns["has_aggregates"])
        faults.add("out_of_range", ~np.isin(has, (0, 1)), "has_aggregates")
        absent = has == 0
    for f in shape.schema:
        if f.name.startswith("dense__"):
            faults.add("out_of_range", ~np.isfinite(_numpy(columns[f.name])) & ~absent, f.name)


def _targets(
    dataset: Dataset, ds: str, shape: Table, columns: dict[str, pa.Array], faults: _Faults
) -> None:
    _aligned([n for n in columns if n.startswith("targets__")], columns, faults)
    as_of = _Lists(columns["targets__as_of"])
    time = _Lists(columns["targets__time"])
    kinds = _Lists(columns["targets__target"])
    day = start_us(ds, dataset.utc_offset), end_us(ds, dataset.utc_offset)
    faults.add(
        "out_of_range",
        as_of.rows_where((as_of.values < day[0]) | (as_of.values >= day[1])),
        "targets__as_of",
    )
    bad = (kinds.values < 0) | (kinds.values >= len(dataset.targets))
    faults.add("out_of_range", kinds.rows_where(bad), "targets__target")
    if len(time.values) == len(as_of.values):
        faults.add(
            "out_of_range",
            as_of.rows_where(as_of.values > time.values),
            "targets__as_of after targets__time",
        )
    row = np.repeat(np.arange(len(as_of.sizes)), as_of.sizes)
    for stream in dataset.streams:
        name = history_end_column(stream.name)
        end = _Lists(columns[name]).values.astype(np.int64)
        available = _Lists(columns[history_column(stream.name, "available_time")])
        if len(end) != len(as_of.values):
            continue  # misaligned already
        outside = (end < 0) | (end > available.sizes[row])
        faults.add("leaks", row[outside], f"{name} outside of the history")
        times = np.append(available.values, 0)
        at = np.where(outside, 0, available.offsets[:-1][row] + end)
        seen_late = ~outside & (end > 0) & (times[np.maximum(at - 1, 0)] >= as_of.values)
        faults.add("leaks", row[seen_late], f"{name} past as_of")
        unseen = ~outside & (end < available.sizes[row]) & (times[at] < as_of.values)
        faults.add("leaks", row[unseen], f"{name} short of as_of")


def _numbers(
    attributes: Iterable[Attribute], columns: dict[str, pa.Array], faults: _Faults
) -> None:
    """A number is finite, or missing; a vector has its length and only finite numbers."""
    for a in attributes:
        column = columns[a.name]
        if a.kind is Kind.NUMERIC:
            faults.add("out_of_range", np.isinf(_numpy(column.fill_null(0.0))), a.name)
        elif a.kind is Kind.VECTOR:
            lists = _Lists(column)
            wrong = _numpy(column.is_valid()) & (lists.sizes != a.dim)
            faults.add("out_of_range", wrong, f"{a.name} is not of length {a.dim}")
            faults.add("out_of_range", lists.rows_where(~np.isfinite(lists.values)), a.name)


def _impressions(dataset: Dataset, columns: dict[str, pa.Array], faults: _Faults) -> None:
    item = columns["item_id"]
    absent = ~_numpy(item.is_valid())
    absent |= _numpy(pc.less(item, 0).fill_null(True) if dataset.item_id_type is IdType.INT64
                     else pc.equal(item, "").fill_null(True))  # fmt: skip
    with_item = pa.array([t.name for t in dataset.targets if t.has_item], pa.string())
    faults.add("out_of_range", absent & _numpy(pc.is_in(columns["target"], with_item)), "item_id")
    for label in dataset.given_labels:
        known = _numpy(pc.is_in(columns[label_column(label)], pa.array([0, 1, None], pa.int32())))
        faults.add("out_of_range", ~known, label_column(label))


def _item_counts(dataset: Dataset, columns: dict[str, pa.Array], faults: _Faults) -> None:
    for name in co_occurrence_columns(dataset):
        _aligned([name, counts_column(name)], columns, faults)
        counts = _Lists(columns[counts_column(name)])
        faults.add("out_of_range", counts.rows_where(counts.values < 1), counts_column(name))
    for name, column in columns.items():
        if name.startswith("events__"):
            faults.add("out_of_range", _numpy(column) < 0, name)
    closed = (_numpy(columns["hour"]) + 1) * HOUR_US
    faults.add("out_of_range", _numpy(columns["first_seen"]) >= closed, "first_seen after the hour")


def _embeddings(columns: dict[str, pa.Array], faults: _Faults) -> None:
    count, dim = _numpy(columns["embeddings"]), _numpy(columns["dim"])
    for name in ("raw", "pooled"):
        column = columns[name].fill_null(b"")
        wrong = _numpy(pc.binary_length(column)) != count * dim * FLOAT16_BYTES
        faults.add("out_of_range", wrong, f"{name} is not embeddings x dim float16")
        if wrong.any() or not len(column):
            continue
        sizes = count * dim
        start = np.concatenate([[0], np.cumsum(sizes)])
        values = np.frombuffer(column.buffers()[2], dtype="<f2")
        first = (
            int(np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset]) // FLOAT16_BYTES
        )
        bad = np.flatnonzero(~np.isfinite(values[first : first + start[-1]]))
        faults.add(
            "out_of_range", np.searchsorted(start, bad, side="right") - 1, f"{name} is not finite"
        )


def _aligned(names: list[str], columns: dict[str, pa.Array], faults: _Faults) -> None:
    sizes = _Lists(columns[names[0]]).sizes
    for name in names[1:]:
        faults.add("misaligned", _Lists(columns[name]).sizes != sizes, f"{name} with {names[0]}")


def _numpy(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)
