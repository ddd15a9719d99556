"""From Arrow rows of a user table to jagged batches: list columns become values and offsets.

Works on `examples` (history, user features and targets), `aggregates` (user features only) and
`sequences` (history only): what a table lacks is empty, or missing, in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from feature_store.columns import (
    MISSING_ID,
    NO_LABEL,
    context_column,
    dense_column,
    history_column,
    history_end_column,
    item_feature_column,
    scores_column,
    sparse_column,
    user_attribute_column,
)
from feature_store.errors import DataError
from feature_store.spec import Attribute, Dataset, Kind
from feature_store.tables import contract
from jobs.training.co_occurrence import CoOccurrences, Known, Seen, known_of
from jobs.training.ids import int64_ids
from models.batch import Batch, Sparse

_PAIRS = 1_000_000  # of a target and an event that are looked up at once

Column = Callable[[str], pa.Array]
Jagged = tuple[np.ndarray, np.ndarray]  # values, offsets (R+1,) int64 from 0


def columns_of(
    dataset: Dataset, table: str, *, history: bool = True, user_features: bool = True
) -> list[str]:
    """Columns of `table` that a reader needs which leaves out histories, or user features."""
    unread = {"ds", *(history_column(s.name, "event_id") for s in dataset.streams)}
    names = [n for n in contract(dataset, table).schema.names if n not in unread]
    if not history:
        names = [n for n in names if not n.startswith(("history__", "targets__history_end__"))]
    if not user_features:
        names = [n for n in names if not n.startswith(("user__", "sparse__", "dense__"))]
    return names


def jagged(column: pa.Array) -> Jagged:
    """A list column of R rows as (values, offsets): views where Arrow allows, ids as int64.

    `flatten` respects slices (`.values` does not), and the contract forbids nulls.
    """
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = column.flatten()
    if pa.types.is_string(values.type):
        return int64_ids(values), offsets
    if pa.types.is_list(values.type):  # vectors
        return values.flatten().to_numpy(zero_copy_only=False), offsets
    return values.to_numpy(zero_copy_only=False), offsets


@dataclass(frozen=True, kw_only=True)
class Rows:
    """R decoded rows. `batch(lo, hi)` cuts consecutive rows out of them without copying values.

    `stored_user_id` (R,) and `target_id` (T,) are the source's ids, numbers or text; `user_id` (R,)
    is int64 in any case (`ids.int64_ids`).
    """

    dataset: Dataset
    user_id: np.ndarray
    stored_user_id: pa.Array
    target_id: pa.Array
    part: np.ndarray
    event_offsets: np.ndarray
    target_offsets: np.ndarray
    events: dict[str, np.ndarray]  # merged: "stream", "time", "available", "ids/<a>", "floats/<a>"
    targets: dict[str, np.ndarray]
    users: dict[str, np.ndarray]
    sparse: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    labels: np.ndarray  # (T, n_tasks) int32
    together: CoOccurrences | None = None

    def __len__(self) -> int:
        return len(self.user_id)

    def labelled(self) -> Rows:
        """Without the targets that no task here asks about: a day's tasks mature on different days."""
        keep = (self.labels != NO_LABEL).any(axis=1)
        if keep.all():
            return self
        before = np.concatenate([[0], np.cumsum(keep)])
        return replace(
            self,
            target_offsets=before[self.target_offsets],
            target_id=self.target_id.filter(pa.array(keep)),
            targets={name: values[keep] for name, values in self.targets.items()},
            labels=self.labels[keep],
        )

    def batch(self, lo: int, hi: int) -> Batch:
        """Rows `lo` to `hi`."""

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array))

        e0, e1 = self.event_offsets[lo], self.event_offsets[hi]
        t0, t1 = self.target_offsets[lo], self.target_offsets[hi]
        events = {k: tensor(v[e0:e1]) for k, v in self.events.items()}
        targets = {k: tensor(v[t0:t1]) for k, v in self.targets.items()}
        users = {k: tensor(v[lo:hi]) for k, v in self.users.items()}
        counts = np.diff(self.target_offsets[lo : hi + 1])
        sparse = {}
        for name, (values, offsets, scores) in self.sparse.items():
            s0, s1 = offsets[lo], offsets[hi]
            sparse[name] = Sparse(
                tensor(values[s0:s1]),
                tensor(offsets[lo : hi + 1] - s0),
                None if scores is None else tensor(scores[s0:s1]),
            )
        known = self.known(lo, hi)
        return Batch(
            user_id=tensor(self.user_id[lo:hi]),
            row_of_target=tensor(np.repeat(np.arange(hi - lo), counts)),
            target_offsets=tensor(self.target_offsets[lo : hi + 1] - t0),
            event_offsets=tensor(self.event_offsets[lo : hi + 1] - e0),
            event_stream=events["stream"],
            event_time=events["time"],
            event_available=events["available"],
            event_ids=_group(events, "ids/"),
            event_floats=_group(events, "floats/"),
            history_end=targets["history_end"],
            target_kind=targets["kind"],
            time=targets["time"],
            as_of=targets["as_of"],
            item_id=targets["item_id"],
            context_ids=_group(targets, "ids/"),
            context_floats=_group(targets, "floats/"),
            item_features=torch.cat([targets["item_features"], tensor(known.beside)], dim=1),
            pair_numbers=tensor(known.numbers),
            has_aggregates=users["has_aggregates"],
            user_ids=_group(users, "ids/"),
            sparse=sparse,
            dense=users["dense"],
            labels=tensor(self.labels[t0:t1]),
        )

    def known(self, lo: int, hi: int) -> Known:
        """What is known of co-occurrence at the targets of rows `lo` to `hi`, and of their pairs.

        It is looked up for some `_PAIRS` pairs at a time: of batches that come in order, for many at once.
        """
        window = self._window
        if not window.lo <= lo <= hi <= window.hi:
            before = np.concatenate([[0], np.cumsum(self.targets["history_end"])])
            of_rows = before[self.target_offsets]
            last = int(np.searchsorted(of_rows, of_rows[lo] + _PAIRS, "right")) - 1
            window.look_up(self, lo, max(hi, min(last, len(self))))
        return window.of(self, lo, hi)

    @cached_property
    def _window(self) -> _Window:
        return _Window()


@dataclass
class _Window:
    """What is known of the targets of the rows `lo` to `hi`."""

    lo: int = 0
    hi: int = -1
    pairs: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # before each target
    known: Known | None = None

    def look_up(self, rows: Rows, lo: int, hi: int) -> None:
        """Fill it anew."""
        t0, t1 = rows.target_offsets[lo], rows.target_offsets[hi]
        starts = np.repeat(rows.event_offsets[lo:hi], np.diff(rows.target_offsets[lo : hi + 1]))
        targets = {name: values[t0:t1] for name, values in rows.targets.items()}
        seen = Seen(
            items=targets["item_id"],
            as_of=targets["as_of"],
            contexts=_group(targets, "ids/"),
            first=starts,
            end=targets["history_end"],
            events=_group(rows.events, "ids/"),
        )
        self.lo, self.hi = lo, hi
        self.pairs = np.concatenate([[0], np.cumsum(seen.end)])
        self.known = known_of(rows.dataset, seen, rows.together)

    def of(self, rows: Rows, lo: int, hi: int) -> Known:
        """Of the rows `lo` to `hi`, which lie in it."""
        assert self.known is not None
        t0, t1 = rows.target_offsets[[lo, hi]] - rows.target_offsets[self.lo]
        p0, p1 = self.pairs[t0], self.pairs[t1]
        return Known(self.known.beside[t0:t1], self.known.numbers[p0:p1])


def _group(tensors: dict, prefix: str) -> dict:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def unpacked_rows(
    dataset: Dataset,
    table: pa.Table,
    *,
    labels: np.ndarray | None = None,
    cutoff: int | None = None,
) -> Rows:
    """Rows of `examples`, `aggregates` or `sequences` as numpy arrays, streams merged.

    Args:
        table: R rows; columns that were left out become empty or missing.
        labels: (T, n_tasks) int32 in the rows' order; none: NO_LABEL everywhere.
        cutoff: drop events with `available_time >= cutoff` (only where there are no targets, whose
            `history_end` would then point beyond the row).
    """
    table = table.combine_chunks()
    rows = table.num_rows
    names = set(table.schema.names)

    def column(name: str) -> pa.Array:
        chunked = table[name]
        return chunked.chunk(0) if chunked.num_chunks == 1 else pa.concat_arrays(chunked.chunks)

    def empty(name: str) -> bool:
        return rows == 0 or name not in names

    if rows == 0:
        table = table.slice(0, 0)
    event_offsets, events = _merge(dataset, column, rows, names if rows else set(), cutoff)
    target_offsets, targets = _targets(dataset, column, rows, names if rows else set())
    users: dict[str, np.ndarray] = {}
    has = not empty(user_feature_probe(dataset))
    if "has_aggregates" in names and rows:
        users["has_aggregates"] = column("has_aggregates").to_numpy().astype(np.float32)
    else:
        users["has_aggregates"] = np.full(rows, 1.0 if has else 0.0, np.float32)
    for ua in dataset.user_attributes:
        name = user_attribute_column(ua.name)
        missing = np.full(rows, MISSING_ID, np.int64)
        if dataset.stream(ua.stream).attribute(ua.attribute).kind is Kind.CATEGORICAL:
            users[f"ids/{ua.name}"] = missing if empty(name) else int64_ids(column(name))
    dense = np.full((rows, len(dataset.dense_features)), np.nan, np.float32)
    for i, df in enumerate(dataset.dense_features):
        if not empty(dense_column(df.name)):
            dense[:, i] = column(dense_column(df.name)).to_numpy(zero_copy_only=False)
    users["dense"] = dense
    sparse = {}
    for sf in dataset.sparse_features:
        name = sparse_column(sf.name)
        nothing: Jagged = (np.empty(0, np.int64), np.zeros(rows + 1, np.int64))
        values, offsets = nothing if empty(name) else jagged(column(name))
        scores = None
        if sf.scored:
            scores_name = scores_column(sf.name)
            scores = (
                np.empty(0, np.float32) if empty(scores_name) else jagged(column(scores_name))[0]
            )
        sparse[sf.name] = (values, offsets, scores)
    total = int(target_offsets[-1])
    if labels is None:
        labels = np.full((total, len(dataset.tasks)), NO_LABEL, np.int32)
    return Rows(
        dataset=dataset,
        user_id=int64_ids(column("user_id")) if rows else np.empty(0, np.int64),
        stored_user_id=column("user_id") if rows else pa.nulls(0),
        target_id=pa.nulls(0)
        if empty("targets__target_id")
        else column("targets__target_id").flatten(),
        part=np.zeros(rows, np.int32) if empty("part") else column("part").to_numpy(),
        event_offsets=event_offsets,
        target_offsets=target_offsets,
        events=events,
        targets=targets,
        users=users,
        sparse=sparse,
        labels=labels,
    )


def user_feature_probe(dataset: Dataset) -> str:
    """Some user-feature column: whether a table has it says whether it has user features."""
    names = [user_attribute_column(u.name) for u in dataset.user_attributes]
    names += [sparse_column(s.name) for s in dataset.sparse_features]
    names += [dense_column(d.name) for d in dataset.dense_features]
    return names[0] if names else ""


def _merge(
    dataset: Dataset, column: Column, rows: int, names: set[str], cutoff: int | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """All streams of a row in one sequence, ordered by (available_time, stream, position)."""
    present = [
        (i, s)
        for i, s in enumerate(dataset.streams)
        if history_column(s.name, "event_time") in names
    ]
    counts = np.zeros(rows, np.int64)
    row_parts, available_parts, time_parts, blocks = [], [], [], []
    start = 0
    for index, stream in present:
        available, offsets = jagged(column(history_column(stream.name, "available_time")))
        lengths = np.diff(offsets)
        counts += lengths
        row_parts.append(np.repeat(np.arange(rows), lengths))
        available_parts.append(available)
        time_parts.append(jagged(column(history_column(stream.name, "event_time")))[0])
        blocks.append((index, stream, start, start + len(available)))
        start += len(available)
    total = start
    row = _concat(row_parts, np.int64)
    available = _concat(available_parts, np.int64)
    # Streams lie one after the other, each ascending within a row: a stable sort by (row, time)
    # leaves ties in the order of stream, then position.
    order = np.lexsort((available, row))
    if cutoff is not None:
        order = order[available[order] < cutoff]
        counts = np.bincount(row[order], minlength=rows)
    place = np.full(total, -1, np.int64)  # where an unmerged event went; -1: cut off
    place[order] = np.arange(len(order))
    kept = len(order)
    events: dict[str, np.ndarray] = {
        "stream": np.zeros(kept, np.int64),
        "time": _concat(time_parts, np.int64)[order],
        "available": available[order],
    }
    for attribute in dataset.event_attributes:
        events[_event_key(attribute)] = _missing(attribute, kept)
    for index, stream, lo, hi in blocks:
        where = place[lo:hi]
        keep = where >= 0
        where = where[keep]
        events["stream"][where] = index
        for attribute in stream.attributes:
            values, _ = jagged(column(history_column(stream.name, attribute.name)))
            if attribute.kind is Kind.VECTOR:
                values = _vectors(values, attribute, hi - lo, stream.name)
            events[_event_key(attribute)][where] = values[keep]
    offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets, events


def _vectors(values: np.ndarray, attribute: Attribute, count: int, stream: str) -> np.ndarray:
    if len(values) != count * (attribute.dim or 0):
        raise DataError(
            f"{history_column(stream, attribute.name)} holds {len(values)} numbers for {count} vectors: "
            f"each has to have {attribute.dim}; correct the source"
        )
    return values.reshape(count, attribute.dim or 0)


def _event_key(attribute: Attribute) -> str:
    return f"{'ids' if attribute.kind is Kind.CATEGORICAL else 'floats'}/{attribute.name}"


def _missing(attribute: Attribute, count: int) -> np.ndarray:
    if attribute.kind is Kind.CATEGORICAL:
        return np.full(count, MISSING_ID, np.int64)
    if attribute.kind is Kind.NUMERIC:
        return np.full(count, np.nan, np.float32)
    return np.zeros((count, attribute.dim or 0), np.float32)


def _concat(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _targets(
    dataset: Dataset, column: Column, rows: int, names: set[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    features = () if dataset.item_features is None else dataset.item_features.names
    present = "targets__time" in names
    offsets = np.zeros(rows + 1, np.int64)
    targets: dict[str, np.ndarray] = {}
    if present:
        targets["time"], offsets = jagged(column("targets__time"))
        targets["as_of"] = jagged(column("targets__as_of"))[0]
        targets["item_id"] = jagged(column("targets__item_id"))[0]
        targets["kind"] = jagged(column("targets__target"))[0].astype(np.int64)
    else:
        for name in ("time", "as_of", "item_id", "kind"):
            targets[name] = np.empty(0, np.int64)
    total = int(offsets[-1])
    ends = [history_end_column(s.name) for s in dataset.streams]
    history_end = np.zeros(total, np.int64)
    for name in ends:
        if name in names:
            history_end += jagged(column(name))[0]
    targets["history_end"] = history_end
    for attribute in dataset.context_features:
        values = (
            jagged(column(context_column(attribute.name)))[0] if present else _missing(attribute, 0)
        )
        targets[_event_key(attribute)] = values
    matrix = np.empty((total, len(features)), np.float32)
    if present:
        for i, name in enumerate(features):
            matrix[:, i] = jagged(column(item_feature_column(name)))[0]
    targets["item_features"] = matrix
    return offsets, targets
