"""Predictions of a model, where there is a label."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from torch import Tensor

from feature_store.columns import NO_LABEL
from feature_store.spec import Dataset
from jobs.training.loader import Limits, cuts
from jobs.training.rows import Rows
from models.batch import Batch


class Predictor(Protocol):
    """What predicts."""

    def probabilities(self, batch: Batch) -> Tensor:
        """(T, n_tasks) float32 on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Predictions where there is a label, one entry per (target, task): arrays of length n."""

    user_id: np.ndarray  # int64 (strings hashed)
    stored_user_id: np.ndarray  # the source's, int64 or str
    target_id: np.ndarray  # the source's, int64 or str
    task: np.ndarray  # int64, index into dataset.tasks
    label: np.ndarray  # int64, 0 or 1
    prediction: np.ndarray  # float64
    domain: np.ndarray  # int64; -1 where the dataset has none

    def __len__(self) -> int:
        return len(self.label)

    def where(self, mask: np.ndarray) -> Scored:
        """Those entries."""
        return Scored(**{k: v[mask] for k, v in self.__dict__.items()})


def concat(parts: Iterable[Scored]) -> Scored:
    """All of them in one."""
    parts = list(parts)
    empty = {k: np.empty(0, np.float64 if k == "prediction" else np.int64) for k in _SCORED_FIELDS}
    if not parts:
        return Scored(**empty)
    return Scored(**{k: np.concatenate([getattr(p, k) for p in parts]) for k in _SCORED_FIELDS})


_SCORED_FIELDS = tuple(Scored.__annotations__)


def score(dataset: Dataset, model: Predictor, decoded: Iterable[Rows], limits: Limits) -> Scored:
    """Predictions for every label of the rows.

    Raises:
        FloatingPointError: a prediction is not a number.
    """
    return finite(
        concat(
            labelled_predictions(dataset, rows, lo, hi, batch, model.probabilities(batch).numpy())
            for rows in decoded
            for lo, hi in cuts(rows, limits)
            for batch in [rows.batch(lo, hi)]
        )
    )


def finite(scored: Scored) -> Scored:
    """The same.

    Raises:
        FloatingPointError: a prediction is not a number.
    """
    if not np.isfinite(scored.prediction).all():
        raise FloatingPointError("a prediction is not a number: the model has diverged")
    return scored


def labelled_predictions(
    dataset: Dataset, rows: Rows, lo: int, hi: int, batch: Batch, probabilities: np.ndarray
) -> Scored:
    """`probabilities` (T, n_tasks) of rows `lo` to `hi`, where there is a label."""
    labels = batch.labels.numpy()
    target, task = np.nonzero(labels != NO_LABEL)
    chosen = probabilities[target, task].astype(np.float64)
    at = rows.target_offsets[lo] + target
    row = np.searchsorted(rows.target_offsets, at, side="right") - 1  # a batch may have other rows
    domain = np.full(batch.targets, -1, np.int64)
    if dataset.domain is not None and dataset.domain in batch.context_ids:
        domain = batch.context_ids[dataset.domain].numpy()
    return Scored(
        user_id=rows.user_id[row],
        stored_user_id=_stored(rows.stored_user_id, row),
        target_id=_stored(rows.target_id, at),
        task=task,
        label=labels[target, task].astype(np.int64),
        prediction=chosen,
        domain=domain[target],
    )


def _stored(ids: pa.Array, at: np.ndarray) -> np.ndarray:
    return ids.take(pa.array(at)).to_numpy(zero_copy_only=False)
