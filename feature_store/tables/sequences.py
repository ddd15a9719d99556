"""A user's event histories, brought forward day by day."""

from __future__ import annotations

import pyarrow as pa

from feature_store.columns import history_column, history_fields, id_type, required
from feature_store.days import end_us
from feature_store.faults import (
    INCOMPLETE,
    MISALIGNED,
    OUT_OF_RANGE,
    UNORDERED,
    Columns,
    Faults,
    Lists,
    check_histories,
)
from feature_store.spec import Dataset
from feature_store.tables.base import BEGINNING, Days, Reach, TableKind


class Sequences(TableKind):
    """The newest events of each stream, by user."""

    name = "sequences"
    job = "build_sequences"
    grain = (
        "one user touched on ds (every base_days: each user): the last max_events of each stream"
    )
    key = ("user_id",)
    made_from = ("events",)
    plain = ("user_id",)
    faults = (INCOMPLETE, MISALIGNED, OUT_OF_RANGE, UNORDERED)

    def columns(self, dataset: Dataset) -> list[pa.Field]:
        user = required("user_id", id_type(dataset.user_id_type))
        return [user, *history_fields(dataset, event_id=True)]

    def decides(self, dataset: Dataset) -> list[object]:
        return [sorted((s.name, s.max_events) for s in dataset.streams)]

    def reach(self, dataset: Dataset, ds: str) -> Reach:
        return Reach(events=Days("events", BEGINNING, ds))

    def check(self, dataset: Dataset, ds: str, columns: Columns, faults: Faults) -> None:
        check_histories(dataset, columns, faults)
        end = end_us(ds, dataset.utc_offset)
        for stream in dataset.streams:
            name = history_column(stream.name, "available_time")
            available = Lists(columns[name])
            too_long = f"{history_column(stream.name, '')}* longer than max_events"
            faults.add(OUT_OF_RANGE, available.sizes > stream.max_events, too_long)
            after = available.rows_where(available.values >= end)
            faults.add(OUT_OF_RANGE, after, f"{name} after the day")
