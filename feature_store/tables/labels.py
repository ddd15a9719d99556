"""Answers, on the day on which they became final."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from feature_store.columns import NO_LABEL, id_type, packed, required
from feature_store.days import add_days
from feature_store.faults import INCOMPLETE, OUT_OF_RANGE, Columns, Faults, Lists
from feature_store.spec import Dataset
from feature_store.tables.base import BEGINNING, Days, Reach, TableKind, in_any_order

if TYPE_CHECKING:
    from feature_store.expectations import Expect


class Labels(TableKind):
    """Arrays aligned with the targets of a row of `examples`."""

    name = "labels"
    job = "build_labels"
    grain = "one row of examples x task: the answers that became final on ds"
    key = ("user_id", "shown_ds", "part", "task")
    made_from = ("examples",)
    plain = ("user_id", "shown_ds", "task")
    faults = (INCOMPLETE, OUT_OF_RANGE)

    def columns(self, dataset: Dataset) -> list[pa.Field]:
        return [
            required("user_id", id_type(dataset.user_id_type)),
            required("shown_ds", pa.string()),
            required("part", pa.int32()),
            required("task", pa.string()),
            packed("labels", pa.int32()),  # aligned with the row's targets; 1, 0 or NO_LABEL
        ]

    def decides(self, dataset: Dataset) -> list[object]:
        return [dataset.domain, in_any_order(dataset.tasks)]

    def reach(self, dataset: Dataset, ds: str) -> Reach:
        shown = frozenset(add_days(ds, -t.matures_after) for t in dataset.tasks)
        events = Days("events", BEGINNING, ds)
        return Reach(events=events, impressions=Days("impressions", only=shown))

    def check(self, dataset: Dataset, ds: str, columns: Columns, faults: Faults) -> None:
        labels = Lists(columns["labels"])
        wrong = labels.rows_where(~np.isin(labels.values, (NO_LABEL, 0, 1)))
        faults.add(OUT_OF_RANGE, wrong, "labels")

    def expectations(self, dataset: Dataset, ds: str, expect: Expect) -> list[Any]:
        shown = sorted({add_days(ds, -t.matures_after) for t in dataset.tasks})
        tasks = [t.name for t in dataset.tasks]
        return [expect.names("task", tasks), expect.names("shown_ds", shown)]
