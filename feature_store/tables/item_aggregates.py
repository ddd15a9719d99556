"""Events of an item by the hour, and what they come together with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_store.columns import (
    before_column,
    beside_column,
    counts_column,
    id_type,
    packed,
    required,
    value_type,
)
from feature_store.days import HOUR_US, end_us, start_us
from feature_store.faults import (
    INCOMPLETE,
    MISALIGNED,
    OUT_OF_RANGE,
    Columns,
    Faults,
    Lists,
    aligned,
    as_numpy,
)
from feature_store.spec import Attribute, Dataset
from feature_store.tables.base import BEGINNING, Days, Reach, TableKind

if TYPE_CHECKING:
    from feature_store.expectations import Expect


def co_occurrence_columns(dataset: Dataset) -> dict[str, Attribute]:
    """Columns of `item_aggregates` that hold values, beside first, and the attribute of each."""
    found: dict[str, Attribute] = {}
    pairs = dataset.co_occurrence
    if pairs is not None:
        stream = dataset.stream(pairs.stream)
        found |= {beside_column(n): stream.attribute(n) for n in pairs.beside}
        found |= {
            before_column(n, lags): stream.attribute(n) for n in pairs.before for lags in pairs.lags
        }
    return found


class ItemAggregates(TableKind):
    """Counts by item and hour; of datasets with `item_features`."""

    name = "item_aggregates"
    job = "build_item_aggregates"
    grain = "one item x hour (by availability): events per stream, and what they come together with"
    key = ("item_id", "hour")
    made_from = ("events",)
    plain = ("hour", "first_seen")
    faults = (INCOMPLETE, MISALIGNED, OUT_OF_RANGE)

    def exists(self, dataset: Dataset) -> bool:
        return dataset.item_features is not None

    def columns(self, dataset: Dataset) -> list[pa.Field]:
        assert dataset.item_features is not None
        counts = [required(f"events__{s}", pa.int64()) for s, _ in dataset.item_features.streams]
        for name, attribute in co_occurrence_columns(dataset).items():
            counts.append(packed(name, value_type(attribute)))
            counts.append(packed(counts_column(name), pa.int32()))
        return [
            required("item_id", id_type(dataset.item_id_type)),
            required("hour", pa.int64()),  # hours since the epoch, UTC
            *counts,
            required("first_seen", pa.int64()),  # earliest available_time in the last 30 days
        ]

    def decides(self, dataset: Dataset) -> list[object]:
        assert dataset.item_features is not None
        pairs = dataset.item_features.co_occurrence
        together: list[object] = []
        if pairs is not None:
            held = dataset.stream(pairs.stream).max_events
            together = [pairs.stream, pairs.attribute, sorted(pairs.beside), sorted(pairs.before)]
            together += [pairs.lags, held]
        return [sorted(dataset.item_features.streams), together]

    def reach(self, dataset: Dataset, ds: str) -> Reach:
        return Reach(events=Days("events", BEGINNING, ds))

    def check(self, dataset: Dataset, ds: str, columns: Columns, faults: Faults) -> None:
        for name in co_occurrence_columns(dataset):
            aligned([name, counts_column(name)], columns, faults)
            counts = Lists(columns[counts_column(name)])
            faults.add("out_of_range", counts.rows_where(counts.values < 1), counts_column(name))
        for name, column in columns.items():
            if name.startswith("events__"):
                faults.add("out_of_range", as_numpy(column) < 0, name)
        closed = (as_numpy(columns["hour"]) + 1) * HOUR_US
        faults.add(
            "out_of_range", as_numpy(columns["first_seen"]) >= closed, "first_seen after the hour"
        )

    def expectations(self, dataset: Dataset, ds: str, expect: Expect) -> list[Any]:
        first = start_us(ds, dataset.utc_offset) // HOUR_US
        last = (end_us(ds, dataset.utc_offset) - 1) // HOUR_US
        return [expect.between("hour", first, last, "hours since the epoch, UTC, of this day")]
