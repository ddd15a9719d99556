"""The rows of a day, flat: one line per target, what every model here may know of it, and its labels.

From the same decoded batches that our models are trained on, so that nobody sees more or less: ids,
item and co-occurrence counts, nightly features of the user, what can be counted about the visible
history, and hand-made summaries of it (`summaries.py`). A day is computed once and kept as one file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.globo import summaries
from benchmarks.globo.results import Predictions
from benchmarks.globo.split import Split, rows_of, shown_on
from feature_store.columns import NO_LABEL
from feature_store.errors import DataError
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.training.checkpoints import replacing
from jobs.training.loader import Limits, cuts
from jobs.training.rows import Rows
from models.features import ITEM, TARGET_ITEM, feature_plan
from models.history import bag_match_numbers, match_numbers, stream_numbers, target_pairs

_MINUTE_US = 60_000_000
SPLIT = Split(
    train=("2017-10-02", "2017-10-11"),
    validation=("2017-10-12", "2017-10-12"),
    test=("2017-10-13", "2017-10-14"),
)
_LIMITS = Limits(max_targets=8192)
_VERSION = 2  # of what is computed here: files of another are made again
_PER_TARGET = ("user_id", "target_id", "labels", "ids", "numbers")


@dataclass(frozen=True, kw_only=True)
class Flat:
    """T targets of one or more days. A target whose tasks' labels became final on different days is
    there once for each of these.

    Args:
        names: of the columns of `ids` (K) and `numbers` (C), and of the tasks.
        user_id, target_id: (T,) int64.
        labels: (T, n_tasks) int8; 1, 0 or NO_LABEL.
        ids: (T, K) int64, the target's and its user's; -1 where missing.
        numbers: (T, C) float32; NaN where missing.
    """

    names: dict[str, list[str]]
    user_id: np.ndarray
    target_id: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.user_id)

    def of_task(self, task: str) -> np.ndarray:
        """(T,) bool: which targets have a label of `task`."""
        return self.label(task) != NO_LABEL

    def label(self, task: str) -> np.ndarray:
        """(T,) int8: labels of `task`."""
        return self.labels[:, self.names["tasks"].index(task)]

    def where(self, mask: np.ndarray) -> Flat:
        """Those targets."""
        return Flat(names=self.names, **{k: getattr(self, k)[mask] for k in _PER_TARGET})

    def predicted(self, task: str, part: str, prediction: np.ndarray) -> Predictions:
        """`prediction` (T,) of the targets, all of which have a label of `task`."""
        return Predictions(
            task=np.full(len(self), task),
            part=np.full(len(self), part),
            user_id=self.user_id,
            target_id=self.target_id,
            label=self.label(task),
            prediction=prediction,
        )

    def save(self, path: Path, note: dict[str, Any]) -> None:
        """Write one file, whole or not at all, that `load` accepts under the same `note`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"names": self.names, "note": note})
        with replacing(path) as staging, staging.open("wb") as file:
            np.savez(file, about=np.array(about), **{k: getattr(self, k) for k in _PER_TARGET})

    @staticmethod
    def load(path: Path, note: dict[str, Any]) -> Flat | None:
        """What `save` wrote; None where there is nothing, or something made from other inputs."""
        if not path.exists():
            return None
        with np.load(path) as found:
            about = json.loads(str(found["about"]))
            if about["note"] != note:
                return None
            return Flat(names=about["names"], **{k: found[k] for k in _PER_TARGET})


def concat(parts: Sequence[Flat]) -> Flat:
    """All of them in one, in order."""
    of = {k: np.concatenate([getattr(p, k) for p in parts]) for k in _PER_TARGET}
    return Flat(names=parts[0].names, **of)


def flatten(dataset: Dataset, rows: Rows, lo: int, hi: int) -> Flat:
    """Rows `lo` to `hi`, one line per target."""
    plan = feature_plan(dataset)
    batch = rows.batch(lo, hi)
    pairs = target_pairs(batch)
    of_row = batch.row_of_target.numpy()
    ids = {ITEM: batch.item_id, **batch.context_ids}
    ids |= {f"user_{k}": v[batch.row_of_target] for k, v in batch.user_ids.items()}
    columns: summaries.Columns = {}
    columns |= {k: v.numpy() for k, v in batch.context_floats.items()}
    columns |= _named("", plan.item_numbers, batch.item_features.numpy())
    columns |= _named("", plan.user_numbers, batch.dense.numpy()[of_row])
    columns["has_aggregates"] = batch.has_aggregates.numpy()[of_row]
    for bag in plan.bags:
        columns[f"ids_{bag.name}"] = batch.sparse[bag.name].offsets.diff().numpy()[of_row]
    columns |= _named("bag", None, bag_match_numbers(batch, plan).numpy())
    columns |= _named("stream", None, stream_numbers(batch, pairs, batch.as_of, plan).numpy())
    columns |= _named("match", None, match_numbers(batch, pairs, plan).numpy())
    # summaries are of the events that carry an item
    item = next(m.name for m in plan.matches if m.candidate == TARGET_ITEM)
    events = pairs.event.numpy()
    keep = batch.event_ids[item].numpy()[events] != -1
    events, of = events[keep], pairs.query.numpy()[keep]
    segments = summaries.Segments(of, batch.targets)
    columns |= summaries.together(segments, batch.pair_numbers.numpy()[keep], plan.pair_numbers)
    if plan.ordered_items:
        signed = batch.item_id.numpy()[of] - batch.event_ids[item].numpy()[events]
        columns |= summaries.distances(segments, signed)
    age = (batch.as_of.numpy()[of] - batch.event_time.numpy()[events]) / _MINUTE_US
    columns |= summaries.recency(segments, age.astype(np.float32))
    recent = {k: v.numpy()[events] for k, v in batch.event_ids.items()}
    columns |= summaries.last_ids(segments, recent, {item: 3})
    t0, t1 = rows.target_offsets[lo], rows.target_offsets[hi]
    return Flat(
        names={"ids": list(ids), "numbers": list(columns), "tasks": list(plan.tasks)},
        user_id=batch.user_id.numpy()[of_row],
        target_id=rows.target_id.slice(t0, t1 - t0).to_numpy(),
        labels=batch.labels.numpy().astype(np.int8),
        ids=np.stack([v.numpy() for v in ids.values()], axis=1),
        numbers=np.stack([np.asarray(v, np.float32) for v in columns.values()], axis=1),
    )


def _named(prefix: str, names: Sequence[str] | None, values: np.ndarray) -> summaries.Columns:
    chosen = names or [f"{prefix}_{i}" for i in range(values.shape[1])]
    return dict(zip(chosen, values.T, strict=True))


def flat_day(lake: Lake, dataset: Dataset, ds: str, *, share: float, folder: Path) -> Flat:
    """What was shown on `ds`: from its file in `folder`, or computed and written there."""
    day = shown_on(lake, dataset, ds)
    note = {"inputs": day.inputs, "spec": dataset.hash, "share": share, "version": _VERSION}
    path = folder / f"{ds}-{share:g}.npz"
    found = Flat.load(path, note)
    if found is None:
        parts = [
            flatten(dataset, rows, lo, hi)
            for rows in rows_of(lake, dataset, day, share=share, seed=None)
            for lo, hi in cuts(rows, _LIMITS)
        ]
        if not parts:
            raise DataError(
                f"the lake has no labelled targets of {ds}: build it with `make run DATASET="
                f"{dataset.name}` for these days, and name its HEADWATER_HOME"
            )
        found = concat(parts)
        found.save(path, note)
    return found
