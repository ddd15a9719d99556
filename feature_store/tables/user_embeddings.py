"""What a model says of each user, a snapshot a day."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.columns import id_type, required
from feature_store.faults import INCOMPLETE, OUT_OF_RANGE, Columns, Faults, as_numpy
from feature_store.spec import Dataset
from feature_store.tables.base import BEGINNING, Days, Reach, TableKind

if TYPE_CHECKING:
    from feature_store.expectations import Expect

FLOAT16_BYTES = 2


class UserEmbeddings(TableKind):
    """Published embeddings, raw and pooled over days, by model and user."""

    name = "user_embeddings"
    job = "publish_embeddings"
    grain = "one user of one model's snapshot, as served on the day after ds"
    key = ("user_id",)
    partitioned_by = ("model", "ds")
    made_from = ("labels",)
    plain = ("user_id", "snapshot", "embeddings", "dim", "pooled_days")
    faults = (INCOMPLETE, OUT_OF_RANGE)

    def columns(self, dataset: Dataset) -> list[pa.Field]:
        return [
            required("user_id", id_type(dataset.user_id_type)),
            required("snapshot", pa.string()),
            required("embeddings", pa.int32()),  # K
            required("dim", pa.int32()),  # D
            required("raw", pa.binary()),  # K*D little-endian float16
            required("pooled", pa.binary()),  # mean over the days that the user has
            required("pooled_days", pa.int32()),
        ]

    def decides(self, dataset: Dataset) -> list[object]:
        return [dataset.held_out_share]

    def reach(self, dataset: Dataset, ds: str) -> Reach:
        # of a model that was trained on every day so far
        events, shown = Days("events", BEGINNING, ds), Days("impressions", BEGINNING, ds)
        return Reach(events=events, impressions=shown)

    def check(self, dataset: Dataset, ds: str, columns: Columns, faults: Faults) -> None:
        count, dim = as_numpy(columns["embeddings"]), as_numpy(columns["dim"])
        for name in ("raw", "pooled"):
            column = columns[name].fill_null(b"")
            wrong = as_numpy(pc.binary_length(column)) != count * dim * FLOAT16_BYTES
            faults.add("out_of_range", wrong, f"{name} is not embeddings x dim float16")
            if wrong.any() or not len(column):
                continue
            sizes = count * dim
            start = np.concatenate([[0], np.cumsum(sizes)])
            values = np.frombuffer(column.buffers()[2], dtype="<f2")
            first = (
                int(np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset])
                // FLOAT16_BYTES
            )
            bad = np.flatnonzero(~np.isfinite(values[first : first + start[-1]]))
            faults.add(
                "out_of_range",
                np.searchsorted(start, bad, side="right") - 1,
                f"{name} is not finite",
            )

    def expectations(self, dataset: Dataset, ds: str, expect: Expect) -> list[Any]:
        days = "pooled is the mean over ds, ds - 1 and ds - 2"
        return [
            *(expect.one(column) for column in ("snapshot", "embeddings", "dim")),
            expect.between("pooled_days", 1, 3, days),
        ]
