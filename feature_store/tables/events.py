"""What happened, one stream beside the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_store.columns import id_type, required, value_type
from feature_store.days import end_us, start_us
from feature_store.faults import (
    INCOMPLETE,
    OUT_OF_RANGE,
    YEAR_2000_US,
    YEAR_2100_US,
    Columns,
    Faults,
    check_numbers,
)
from feature_store.spec import Dataset
from feature_store.tables.base import Reach, TableKind, in_any_order

if TYPE_CHECKING:
    from feature_store.expectations import Expect


def event_fields(dataset: Dataset) -> list[pa.Field]:
    """Columns of `events` that every dataset has."""
    return [
        required("event_id", pa.int64()),
        required("stream", pa.string()),
        required("user_id", id_type(dataset.user_id_type)),
        required("event_time", pa.int64()),
        required("ingest_time", pa.int64()),
        required("available_time", pa.int64()),
    ]


class Events(TableKind):
    """Rows of all streams, by the day on which they became available."""

    name = "events"
    job = "ingest"
    grain = "one event that became available on ds"
    key = ("event_id",)
    plain = ("stream", "user_id", "event_time", "ingest_time", "available_time")
    faults = (INCOMPLETE, OUT_OF_RANGE)

    def columns(self, dataset: Dataset) -> list[pa.Field]:
        attributes = (pa.field(a.name, value_type(a)) for a in dataset.event_attributes)
        return [*event_fields(dataset), *attributes]

    def decides(self, dataset: Dataset) -> list[object]:
        streams = [
            (s.name, s.delay, s.id_from, in_any_order(s.attributes)) for s in dataset.streams
        ]
        return [dataset.utc_offset, dataset.user_id_type, in_any_order(streams)]

    def reach(self, dataset: Dataset, ds: str) -> Reach:
        return Reach()

    def check(self, dataset: Dataset, ds: str, columns: Columns, faults: Faults) -> None:
        check_numbers(dataset.event_attributes, columns, faults)

    def expectations(self, dataset: Dataset, ds: str, expect: Expect) -> list[Any]:
        start, end = start_us(ds, dataset.utc_offset), end_us(ds, dataset.utc_offset)
        available = "available_time is max(event_time, ingest_time) + delay"
        return [
            expect.names("stream", [s.name for s in dataset.streams]),
            expect.instants("available_time", start, end - 1),
            expect.instants("event_time", YEAR_2000_US, YEAR_2100_US),
            expect.not_after("event_time", "available_time", available),
            expect.not_after("ingest_time", "available_time", available),
        ]
