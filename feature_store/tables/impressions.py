"""What was scored: targets with their context and given labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from feature_store.columns import id_type, label_column, required, value_type
from feature_store.days import end_us, start_us
from feature_store.faults import (
    INCOMPLETE,
    OUT_OF_RANGE,
    YEAR_2000_US,
    YEAR_2100_US,
    Columns,
    Faults,
    as_numpy,
    check_numbers,
)
from feature_store.spec import Dataset, IdType
from feature_store.tables.base import Reach, TableKind, in_any_order

if TYPE_CHECKING:
    from feature_store.expectations import Expect


def target_fields(dataset: Dataset) -> list[pa.Field]:
    """Columns of `impressions` that every dataset has."""
    return [
        required("target_id", id_type(dataset.target_id_type)),
        required("target", pa.string()),
        required("user_id", id_type(dataset.user_id_type)),
        required("time", pa.int64()),
        required("as_of", pa.int64()),
        pa.field("item_id", id_type(dataset.item_id_type)),
    ]


def decides_targets(dataset: Dataset) -> list[object]:
    """What of the spec decides which targets there are, and their columns."""
    targets = [(t.name, t.has_item, t.id_from, in_any_order(t.context)) for t in dataset.targets]
    ids = (dataset.user_id_type, dataset.item_id_type, dataset.target_id_type)
    return [dataset.utc_offset, *ids, in_any_order(targets), sorted(dataset.given_labels)]


class Impressions(TableKind):
    """Targets of all kinds, by the day of their `as_of`."""

    name = "impressions"
    job = "ingest"
    grain = "one target with its context, scored on ds"
    key = ("user_id", "target", "target_id")
    plain = ("target", "user_id", "time", "as_of")
    faults = (INCOMPLETE, OUT_OF_RANGE)

    def columns(self, dataset: Dataset) -> list[pa.Field]:
        return [
            *target_fields(dataset),
            *(pa.field(c.name, value_type(c)) for c in dataset.context_features),
            *(pa.field(label_column(n), pa.int32()) for n in dataset.given_labels),
        ]

    def decides(self, dataset: Dataset) -> list[object]:
        return decides_targets(dataset)

    def reach(self, dataset: Dataset, ds: str) -> Reach:
        return Reach()

    def check(self, dataset: Dataset, ds: str, columns: Columns, faults: Faults) -> None:
        check_numbers(dataset.context_features, columns, faults)
        item = columns["item_id"]
        absent = ~as_numpy(item.is_valid())
        absent |= as_numpy(pc.less(item, 0).fill_null(True) if dataset.item_id_type is IdType.INT64
                         else pc.equal(item, "").fill_null(True))  # fmt: skip
        with_item = pa.array([t.name for t in dataset.targets if t.has_item], pa.string())
        faults.add(
            "out_of_range", absent & as_numpy(pc.is_in(columns["target"], with_item)), "item_id"
        )
        for label in dataset.given_labels:
            known = as_numpy(
                pc.is_in(columns[label_column(label)], pa.array([0, 1, None], pa.int32()))
            )
            faults.add("out_of_range", ~known, label_column(label))

    def expectations(self, dataset: Dataset, ds: str, expect: Expect) -> list[Any]:
        start, end = start_us(ds, dataset.utc_offset), end_us(ds, dataset.utc_offset)
        moment = "features look at nothing after as_of, which is at or before time"
        return [
            expect.names("target", [t.name for t in dataset.targets]),
            expect.instants("as_of", start, end - 1),
            expect.instants("time", YEAR_2000_US, YEAR_2100_US),
            expect.not_after("as_of", "time", moment),
        ]
