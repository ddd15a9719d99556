"""User-days packed for training: a history once, and every target of the day."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from feature_store.columns import (
    context_column,
    history_column,
    history_end_column,
    history_fields,
    id_type,
    item_feature_column,
    packed,
    required,
    user_feature_fields,
    value_type,
)
from feature_store.days import end_us, start_us
from feature_store.faults import (
    INCOMPLETE,
    LEAKS,
    MISALIGNED,
    OUT_OF_RANGE,
    UNORDERED,
    Columns,
    Faults,
    Lists,
    aligned,
    check_histories,
    check_user_features,
)
from feature_store.spec import Dataset
from feature_store.tables.base import BEGINNING, Days, Reach, TableKind

if TYPE_CHECKING:
    from feature_store.expectations import Expect


def target_arrays(dataset: Dataset) -> list[pa.Field]:
    """Arrays over a row's targets."""
    columns = [
        packed("targets__target_id", id_type(dataset.target_id_type)),
        packed("targets__target", pa.int32()),  # index into dataset.targets
        packed("targets__time", pa.int64()),
        packed("targets__as_of", pa.int64()),
        packed("targets__item_id", id_type(dataset.item_id_type)),
    ]
    columns += [packed(context_column(c.name), value_type(c)) for c in dataset.context_features]
    if dataset.item_features is not None:
        columns += [
            packed(item_feature_column(n), pa.float32()) for n in dataset.item_features.names
        ]
    columns += [packed(history_end_column(s.name), pa.int32()) for s in dataset.streams]
    return columns


class Examples(TableKind):
    """What models read."""

    name = "examples"
    job = "build_examples"
    grain = "one user-day (or part of one): its history once and every target of the day"
    key = ("user_id", "part")
    made_from = ("sequences", "aggregates", "item_aggregates", "impressions")
    plain = ("user_id", "part")
    faults = (INCOMPLETE, MISALIGNED, OUT_OF_RANGE, UNORDERED, LEAKS)

    def columns(self, dataset: Dataset) -> list[pa.Field]:
        return [
            required("user_id", id_type(dataset.user_id_type)),
            required("part", pa.int32()),
            required("has_aggregates", pa.int32()),  # 0: the user features are all missing
            *user_feature_fields(dataset),
            *history_fields(dataset, event_id=False),
            *target_arrays(dataset),
        ]

    def decides(self, dataset: Dataset) -> list[object]:
        items = dataset.item_features
        windows = () if items is None else tuple(sorted(items.windows_hours))
        kinds = [t.name for t in dataset.targets], [s.name for s in dataset.streams]
        return [windows, dataset.max_part_rows, *kinds]

    def reach(self, dataset: Dataset, ds: str) -> Reach:
        shown = Days("impressions", only=frozenset([ds]))
        return Reach(events=Days("events", BEGINNING, ds), impressions=shown)

    def check(self, dataset: Dataset, ds: str, columns: Columns, faults: Faults) -> None:
        check_histories(dataset, columns, faults)
        check_user_features(dataset, columns, faults)
        aligned([n for n in columns if n.startswith("targets__")], columns, faults)
        as_of = Lists(columns["targets__as_of"])
        time = Lists(columns["targets__time"])
        kinds = Lists(columns["targets__target"])
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
            end = Lists(columns[name]).values.astype(np.int64)
            available = Lists(columns[history_column(stream.name, "available_time")])
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

    def expectations(self, dataset: Dataset, ds: str, expect: Expect) -> list[Any]:
        return [expect.between("part", 0, None, "parts of a user-day count from 0")]
