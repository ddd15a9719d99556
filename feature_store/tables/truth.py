"""Of a simulated world: what its labels were drawn with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_store.columns import id_type, required
from feature_store.faults import INCOMPLETE
from feature_store.spec import Dataset
from feature_store.tables.base import Reach, TableKind
from feature_store.tables.impressions import decides_targets

if TYPE_CHECKING:
    from feature_store.expectations import Expect


class Truth(TableKind):
    """Probabilities that no feature can reach."""

    name = "truth"
    job = "ingest"
    grain = "the probability that a simulated label was drawn with; no feature can reach it"
    key = ("target_id", "task")
    plain = ("task", "probability")
    faults = (INCOMPLETE,)

    def exists(self, dataset: Dataset) -> bool:
        return dataset.simulated

    def columns(self, dataset: Dataset) -> list[pa.Field]:
        return [
            required("target_id", id_type(dataset.target_id_type)),
            required("task", pa.string()),
            required("probability", pa.float64()),
        ]

    def decides(self, dataset: Dataset) -> list[object]:
        return decides_targets(dataset)

    def reach(self, dataset: Dataset, ds: str) -> Reach:
        return Reach()

    def expectations(self, dataset: Dataset, ds: str, expect: Expect) -> list[Any]:
        return [
            expect.names("task", [t.name for t in dataset.tasks]),
            expect.between("probability", 0.0, 1.0, "a probability is between 0 and 1"),
        ]
