"""The nightly user features: windows over events."""

from __future__ import annotations

import pyarrow as pa

from feature_store.columns import id_type, required, user_feature_fields
from feature_store.days import DAY_US, day_of, day_range, end_us, micros
from feature_store.faults import (
    INCOMPLETE,
    MISALIGNED,
    OUT_OF_RANGE,
    Columns,
    Faults,
    check_user_features,
)
from feature_store.spec import Dataset
from feature_store.tables.base import Days, Reach, TableKind, in_any_order


def cutoff_us(dataset: Dataset, ds: str) -> int:
    """Where the windows of `aggregates(ds)` end: features see `available_time < cutoff`."""
    return end_us(ds, dataset.utc_offset) - micros(dataset.serve_delay)


def event_days(dataset: Dataset, ds: str) -> list[str]:
    """The partitions of `events` that the windows of `aggregates(ds)` reach into."""
    first = cutoff_us(dataset, ds) - dataset.window_days * DAY_US
    return day_range(day_of(first, dataset.utc_offset), ds)


class Aggregates(TableKind):
    """User attributes, sparse and dense features, by user."""

    name = "aggregates"
    job = "build_aggregates"
    grain = "one user with events in the longest window that ends at the end of ds less serve_delay"
    key = ("user_id",)
    made_from = ("events",)
    plain = ("user_id",)
    faults = (INCOMPLETE, MISALIGNED, OUT_OF_RANGE)

    def columns(self, dataset: Dataset) -> list[pa.Field]:
        user = required("user_id", id_type(dataset.user_id_type))
        return [user, *user_feature_fields(dataset)]

    def decides(self, dataset: Dataset) -> list[object]:
        features = (dataset.user_attributes, dataset.sparse_features, dataset.dense_features)
        return [dataset.serve_delay, *map(in_any_order, features)]

    def reach(self, dataset: Dataset, ds: str) -> Reach:
        return Reach(events=Days("events", event_days(dataset, ds)[0], ds))

    def check(self, dataset: Dataset, ds: str, columns: Columns, faults: Faults) -> None:
        check_user_features(dataset, columns, faults)
