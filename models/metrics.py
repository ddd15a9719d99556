"""Metrics of binary predictions, in NumPy, float64.

Predictions are probabilities. Where a metric does not exist (no rows, one class only, a base rate
of 0 or 1) or where a prediction is NaN, the answer is NaN and never an exception: a day without a
conversion is not an error. Whoever logs a metric skips NaN.

Normalized entropy is NE = logloss of the model / logloss of the constant at the *training* base rate,
on the same rows: on any day 1 is what the base rate gets, and lower is better. He et al. (2014,
section 3) divide by the entropy of the background CTR, which is the mean logloss of the constant at the
rows' own rate. The two agree where training and test have one rate; where the rate has moved, by theirs
the base rate itself is not 1. The shifted NE has taken the move out, and divides by the entropy of the
rows' own rate, as they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Name = TypeVar("Name")

_EPSILON = 1e-7  # float32 probabilities of exactly 0 or 1 would make the logloss infinite
_MIN_USERS = 2  # of a bootstrap: one user drawn again and again is no interval


def row_logloss(labels: ArrayLike, predictions: ArrayLike) -> Array:
    """Logloss of each row in nats, predictions clipped to [1e-7, 1 - 1e-7]."""
    y = np.asarray(labels, dtype=np.float64)
    p = np.clip(np.asarray(predictions, dtype=np.float64), _EPSILON, 1 - _EPSILON)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def row_base_logloss(labels: ArrayLike, base_rate: ArrayLike | None) -> Array:
    """Logloss of each row by the constant at the base rate: what an NE divides by.

    Args:
        labels: (n,).
        base_rate: (), or (n,) where rows were predicted by models of several trainings.

    Returns:
        (n,); NaN unless 0 < rate < 1.
    """
    y = np.asarray(labels, dtype=np.float64)
    rate = np.asarray(np.nan if base_rate is None else base_rate, dtype=np.float64)
    known = np.where((rate > 0) & (rate < 1), rate, np.nan)
    return row_logloss(y, np.broadcast_to(known, y.shape))


def logloss(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Mean logloss in nats; NaN without rows."""
    return _mean(row_logloss(labels, predictions))


def _mean(rows: Array) -> float:
    return float(rows.mean()) if rows.size else float("nan")


def entropy(rate: float) -> float:
    """Entropy in nats of a coin that gives 1 at `rate`; NaN unless 0 < rate < 1."""
    if not 0 < rate < 1:
        return float("nan")
    return float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def normalized_entropy(
    labels: ArrayLike, predictions: ArrayLike, base_rate: ArrayLike | None
) -> float:
    """Logloss over that of the constant at the training base rate, as `row_base_logloss` takes it."""
    return logloss(labels, predictions) / _mean(row_base_logloss(labels, base_rate))


def why_no_ne(labels: ArrayLike, base_rate: float | None) -> str | None:
    """Why there is no NE, for people; None where there is one."""
    if not np.size(labels):
        return "no labels"
    if base_rate is None or not 0 < base_rate < 1:
        return "no base rate: it was trained on no labels, or on those of one answer only"
    return None


def logits(predictions: ArrayLike) -> Array:
    """Log odds of probabilities, clipped as in `row_logloss`."""
    p = np.clip(np.asarray(predictions, dtype=np.float64), _EPSILON, 1 - _EPSILON)
    return np.log(p) - np.log1p(-p)


def shift_intercept(labels: ArrayLike, predictions: ArrayLike) -> Array:
    """The predictions with one constant added to every logit, so that their mean is the labels'.

    Takes out a base rate that drifted and leaves the ranking. NaN where the labels are one class.
    """
    y, x = np.asarray(labels, dtype=np.float64), logits(predictions)
    if not y.size or not 0 < y.mean() < 1 or np.isnan(x).any():
        return np.full(x.shape, np.nan)
    low, high = -40.0, 40.0
    for _ in range(80):  # bisection: the mean rises with the shift
        middle = (low + high) / 2
        too_high = _sigmoid(x + middle).mean() > y.mean()
        low, high = (low, middle) if too_high else (middle, high)
    return _sigmoid(x + (low + high) / 2)


def shifted_normalized_entropy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Logloss after an intercept shift over the entropy of these labels' own rate; NaN of one class."""
    y = np.asarray(labels, dtype=np.float64)
    return logloss(y, shift_intercept(y, predictions)) / entropy(_mean(y))


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def _ranks(values: Array) -> Array:
    """Ranks from 1, ties averaged."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[first, len(values)])
    mean_rank = first + (counts + 1) / 2
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(mean_rank, counts)
    return ranks


def auc(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive is above a negative, ties half."""
    y = np.asarray(labels, dtype=np.float64)
    p = np.asarray(predictions, dtype=np.float64)
    positives = y.sum()
    negatives = len(y) - positives
    if positives == 0 or negatives == 0 or np.isnan(p).any():
        return float("nan")
    total = _ranks(p)[y == 1].sum()
    return float((total - positives * (positives + 1) / 2) / (positives * negatives))


def grouped_auc(labels: ArrayLike, predictions: ArrayLike, users: ArrayLike) -> float:
    """gAUC: AUC within each user, weighted by the user's rows; users of one class are left out."""
    y = np.asarray(labels, dtype=np.float64)
    p = np.asarray(predictions, dtype=np.float64)
    if not y.size or np.isnan(p).any():
        return float("nan")
    _, user = np.unique(np.asarray(users), return_inverse=True)
    order = np.lexsort((p, user))
    y, p, user = y[order], p[order], user[order]
    rows = np.bincount(user).astype(np.float64)
    start = np.r_[0, np.cumsum(rows)[:-1]]
    # ranks within the user: global ranks of the (user, prediction) order less the user's start
    tied = np.flatnonzero(np.r_[True, (user[1:] != user[:-1]) | (p[1:] != p[:-1])])
    counts = np.diff(np.r_[tied, len(p)])
    ranks = np.repeat(tied + (counts + 1) / 2, counts) - start[user]
    positives = np.bincount(user, weights=y)
    negatives = rows - positives
    above = np.bincount(user, weights=ranks * y) - positives * (positives + 1) / 2
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return float("nan")
    per_user = above[both] / (positives[both] * negatives[both])
    return float(np.average(per_user, weights=rows[both]))


def calibration(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Sum of predictions over sum of labels: 1 is calibrated; NaN without positives."""
    positives = float(np.sum(labels, dtype=np.float64))
    return float(np.sum(predictions, dtype=np.float64)) / positives if positives else float("nan")


@dataclass(frozen=True, kw_only=True)
class CalibrationCurve:
    """Per bin of about equally many rows, lowest first: mean prediction, mean label, rows."""

    predicted: Array
    observed: Array
    rows: NDArray[np.int64]


def calibration_curve(
    labels: ArrayLike, predictions: ArrayLike, *, bins: int = 20
) -> CalibrationCurve:
    """Predictions against labels in bins of equal size (fewer bins than asked where rows are few)."""
    y = np.asarray(labels, dtype=np.float64)
    p = np.asarray(predictions, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, max(len(order), 1))) if len(part)]
    return CalibrationCurve(
        predicted=np.array([p[part].mean() for part in parts]),
        observed=np.array([y[part].mean() for part in parts]),
        rows=np.array([len(part) for part in parts], dtype=np.int64),
    )


def summary(
    labels: ArrayLike,
    predictions: ArrayLike,
    base_rate: ArrayLike | None,
    users: ArrayLike | None = None,
) -> dict[str, float]:
    """Every metric of one task: rows, positives, logloss, ne, shifted_ne, auc, gauc, calibration."""
    found = {
        "rows": float(np.size(labels)),
        "positives": float(np.sum(labels)),
        "logloss": logloss(labels, predictions),
        "ne": normalized_entropy(labels, predictions, base_rate),
        "shifted_ne": shifted_normalized_entropy(labels, predictions),
        "auc": auc(labels, predictions),
        "calibration": calibration(labels, predictions),
    }
    if users is not None:
        found["gauc"] = grouped_auc(labels, predictions, users)
    return found


def finite_or_none(value: float) -> float | None:
    """`value`, or None where it is NaN or infinite: what a JSON file or a page can hold."""
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A difference with its bootstrap interval; all NaN where too little is there to compare."""

    mean: float
    low: float
    high: float


_NO_INTERVAL = Interval(mean=float("nan"), low=float("nan"), high=float("nan"))


class Paired(NamedTuple):
    """Predictions and a baseline of the same n rows, in one order; `base_rate` as in `row_base_logloss`."""

    labels: ArrayLike
    predictions: ArrayLike
    baseline: ArrayLike
    users: ArrayLike
    base_rate: ArrayLike | None


def bootstrap_ne_differences(
    labels: ArrayLike,
    pairs: Mapping[Name, tuple[ArrayLike, ArrayLike]],
    users: ArrayLike,
    base_rate: ArrayLike | None,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[Name, Interval]:
    """NE of predictions minus NE of a baseline on the same rows, for each pair: negative is better.

    A paired bootstrap that draws users and not rows, since the rows of one user are not
    independent; what the NE divides by is drawn with them. Each user is reduced to sums over its
    rows, so a sample costs the users and not the rows; and all pairs share the samples.

    Args:
        pairs: name -> (predictions, baseline).
        base_rate: as in `row_base_logloss`.

    Returns:
        By name, the observed difference and the percentile interval at `confidence`; NaN of fewer than
        two users.
    """
    found: dict[Name, Interval] = dict.fromkeys(pairs, _NO_INTERVAL)
    base = row_base_logloss(labels, base_rate)
    known, user = np.unique(np.asarray(users), return_inverse=True)
    if len(known) < _MIN_USERS or np.isnan(base).any():
        return found
    lost = {
        name: row_logloss(labels, predictions) - row_logloss(labels, baseline)
        for name, (predictions, baseline) in pairs.items()
    }
    usable = {name: rows for name, rows in lost.items() if not np.isnan(rows).any()}
    if not usable:
        return found
    sums = np.stack([np.bincount(user, weights=rows) for rows in usable.values()], axis=1)
    bases = np.bincount(user, weights=base)[:, None]
    draws = _bootstrap_ratios(sums, bases, samples=samples, seed=seed)
    for i, (name, observed) in enumerate(zip(usable, sums.sum(0) / bases.sum(), strict=True)):
        found[name] = _interval(float(observed), draws[:, i], confidence)
    return found


def bootstrap_mean_ne_difference(
    pairs: Sequence[Paired], *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """NE of predictions minus NE of their baseline, averaged over the pairs, each counting alike.

    As in `bootstrap_ne_differences`; a user is drawn in all pairs at once, since tasks and seeds share
    users.
    """
    if not pairs:
        return _NO_INTERVAL
    known, place = np.unique(
        np.concatenate([np.asarray(p.users) for p in pairs]), return_inverse=True
    )
    lost = [row_logloss(p.labels, p.predictions) - row_logloss(p.labels, p.baseline) for p in pairs]
    base = [row_base_logloss(p.labels, p.base_rate) for p in pairs]
    usable = all(b.size and np.isfinite(x).all() and np.isfinite(b).all()
                 for x, b in zip(lost, base, strict=True))  # fmt: skip
    if len(known) < _MIN_USERS or not usable:
        return _NO_INTERVAL
    user, n = np.split(place, np.cumsum([b.size for b in base])[:-1]), len(known)

    def by_user(rows: Sequence[Array]) -> Array:
        found = [np.bincount(u, weights=x, minlength=n) for u, x in zip(user, rows, strict=True)]
        return np.stack(found, axis=1)

    sums, bases = by_user(lost), by_user(base)
    draws = _bootstrap_ratios(sums, bases, samples=samples, seed=seed).mean(axis=1)
    return _interval(float((sums.sum(0) / bases.sum(0)).mean()), draws, confidence)


def _bootstrap_ratios(above: np.ndarray, below: np.ndarray, *, samples: int, seed: int) -> Array:
    """(samples, k): sums of `above` (users, k) over sums of `below` (users, k or 1), users drawn with
    replacement; NaN where none was drawn that has anything below."""
    rng, users = np.random.default_rng(seed), len(below)
    draws = np.empty((samples, above.shape[1]))
    for i in range(samples):
        weight = np.bincount(rng.integers(users, size=users), minlength=users)
        with np.errstate(invalid="ignore"):
            draws[i] = (weight @ above) / (weight @ below)
    return draws


def _interval(observed: float, draws: Array, confidence: float) -> Interval:
    """The percentile interval of the draws that exist."""
    draws = draws[np.isfinite(draws)]
    if not draws.size:
        return _NO_INTERVAL
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=observed, low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Importance:
    """A feature's permutation importance: how much the NE rises when its values are shuffled."""

    rank: int  # 1 is the most important
    feature: str
    ne_increase: float


def importance_ranking(ne: float, permuted: Mapping[str, float]) -> list[Importance]:
    """Rank features by the NE that the model has with each of them permuted.

    Args:
        ne: with nothing permuted.
        permuted: feature -> NE with it permuted; NaN ranks last.

    Returns:
        Most important first; ties by name.
    """
    rises = {name: value - ne for name, value in permuted.items()}
    order = sorted(rises, key=lambda n: (np.isnan(rises[n]), -np.nan_to_num(rises[n]), n))
    return [
        Importance(rank=i + 1, feature=name, ne_increase=float(rises[name]))
        for i, name in enumerate(order)
    ]
