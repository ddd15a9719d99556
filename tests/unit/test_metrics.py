"""Metrics against values worked out by hand and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from models import metrics


@pytest.fixture
def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions with ties, users."""
    rng = np.random.default_rng(3)
    predictions = rng.integers(1, 20, size=500) / 20
    labels = (rng.random(500) < predictions).astype(np.int32)
    return labels, predictions, rng.integers(0, 60, size=500)


def test_logloss_and_ne_by_hand() -> None:
    # -ln(0.8), -ln(1 - 0.5)
    expected = (-math.log(0.8) - math.log(0.5)) / 2
    assert metrics.logloss([1, 0], [0.8, 0.5]) == pytest.approx(expected)
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert metrics.normalized_entropy([1, 0], [0.8, 0.5], 0.25) == pytest.approx(expected / h)


def test_ne_of_the_base_rate_is_one_and_uses_the_training_rate() -> None:
    labels = [1, 0, 0, 0]
    assert metrics.normalized_entropy(labels, [0.25] * 4, 0.25) == pytest.approx(1.0)
    assert metrics.normalized_entropy(labels, [0.25] * 4, 0.5) < 1.0  # H(1/2) is larger


def test_logloss_and_auc_agree_with_scikit_learn(sample) -> None:
    labels, predictions, _ = sample
    assert metrics.logloss(labels, predictions) == pytest.approx(
        sklearn_metrics.log_loss(labels, predictions)
    )
    assert metrics.auc(labels, predictions) == pytest.approx(
        sklearn_metrics.roc_auc_score(labels, predictions)
    )


def test_auc_by_hand_counts_ties_half() -> None:
    # pairs: (.5, .5) tie, (.5, .1) won, (.9, .5) won, (.9, .1) won
    assert metrics.auc([1, 0, 1, 0], [0.5, 0.5, 0.9, 0.1]) == pytest.approx(3.5 / 4)


def test_grouped_auc_is_the_weighted_mean_of_the_users_auc(sample) -> None:
    labels, predictions, users = sample
    values, weights = [], []
    for user in np.unique(users):
        mine = users == user
        if 0 < labels[mine].sum() < mine.sum():
            values.append(sklearn_metrics.roc_auc_score(labels[mine], predictions[mine]))
            weights.append(mine.sum())
    assert metrics.grouped_auc(labels, predictions, users) == pytest.approx(
        np.average(values, weights=weights)
    )


def test_grouped_auc_sees_only_order_within_a_user() -> None:
    # user a is ranked right, user b wrong; between them everything is wrong
    assert metrics.grouped_auc([1, 0, 1, 0], [0.2, 0.1, 0.8, 0.9], list("aabb")) == 0.5


def test_calibration_by_hand() -> None:
    assert metrics.calibration([1, 0, 1, 0], [0.5, 0.5, 0.5, 0.1]) == pytest.approx(0.8)


def test_calibration_curve_covers_every_row_once(sample) -> None:
    labels, predictions, _ = sample
    curve = metrics.calibration_curve(labels, predictions, bins=7)
    assert curve.rows.sum() == len(labels)
    assert (np.diff(curve.predicted) >= 0).all()
    assert curve.observed @ curve.rows == pytest.approx(labels.sum())
    assert curve.predicted @ curve.rows == pytest.approx(predictions.sum())


def test_the_intercept_shift_repairs_calibration_and_keeps_the_ranking(sample) -> None:
    labels, predictions, _ = sample
    logits = np.log(predictions / (1 - predictions)) - 1.5
    biased = 1 / (1 + np.exp(-logits))
    shifted = metrics.shift_intercept(labels, biased)
    assert shifted.mean() == pytest.approx(labels.mean())
    np.testing.assert_array_equal(
        np.argsort(shifted, kind="stable"), np.argsort(biased, kind="stable")
    )
    rate = float(labels.mean())
    assert metrics.shifted_normalized_entropy(labels, biased, rate) < metrics.normalized_entropy(
        labels, biased, rate
    )


@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0]], ids=["no rows", "all 1", "all 0"])
def test_what_does_not_exist_is_nan_and_not_an_exception(labels) -> None:
    predictions = [0.5] * len(labels)
    assert math.isnan(metrics.auc(labels, predictions))
    assert math.isnan(metrics.grouped_auc(labels, predictions, labels))
    assert math.isnan(metrics.shifted_normalized_entropy(labels, predictions, 0.5))
    assert metrics.calibration_curve(labels, predictions).rows.sum() == len(labels)
    assert math.isnan(metrics.calibration([0, 0], [0.5, 0.5]))
    assert math.isnan(metrics.normalized_entropy([1, 0], [0.5, 0.5], 0.0))


def test_a_nan_prediction_makes_nan_metrics() -> None:
    found = metrics.summary([1, 0, 1], [0.5, float("nan"), 0.2], 0.5, ["a", "a", "b"])
    assert all(math.isnan(found[k]) for k in ("ne", "shifted_ne", "auc", "gauc", "calibration"))


def test_certain_predictions_stay_finite() -> None:
    assert math.isfinite(metrics.logloss([1, 0], [0.0, 1.0]))


def difference(labels, predictions, baseline, users, rate, **options) -> metrics.Interval:
    pairs = {"only": (predictions, baseline)}
    return metrics.bootstrap_ne_differences(labels, pairs, users, rate, **options)["only"]


def test_bootstrap_agrees_with_a_naive_one_and_brackets_the_difference(sample) -> None:
    labels, predictions, users = sample
    baseline = np.full(len(labels), labels.mean())
    rate = float(labels.mean())
    found = difference(labels, predictions, baseline, users, rate, samples=400, seed=1)
    observed = metrics.normalized_entropy(labels, predictions, rate) - metrics.normalized_entropy(
        labels, baseline, rate
    )
    assert found.mean == pytest.approx(observed)
    assert found.low < found.mean < found.high < 0

    rng = np.random.default_rng(9)
    rows_of = [np.flatnonzero(users == u) for u in np.unique(users)]
    naive = []
    for _ in range(400):
        picked = np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))])
        naive.append(
            metrics.normalized_entropy(labels[picked], predictions[picked], rate)
            - metrics.normalized_entropy(labels[picked], baseline[picked], rate)
        )
    width = np.quantile(naive, 0.975) - np.quantile(naive, 0.025)
    assert found.high - found.low == pytest.approx(width, rel=0.25)


def test_bootstrap_draws_users_and_not_rows() -> None:
    # every user is one row repeated 50 times: drawing rows would give an interval 7 times narrower
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, size=40)
    better = np.clip(labels * 0.5 + rng.random(40) * 0.5, 0.05, 0.95)
    base = np.full(40, 0.5)
    one = difference(labels, better, base, np.arange(40), 0.5)
    many = difference(
        np.repeat(labels, 50),
        np.repeat(better, 50),
        np.repeat(base, 50),
        np.repeat(np.arange(40), 50),
        0.5,
    )
    assert many.low == pytest.approx(one.low)
    assert many.high == pytest.approx(one.high)


def test_bootstrap_of_a_model_with_itself_is_zero_and_of_nothing_nan() -> None:
    same = difference([1, 0], [0.4, 0.3], [0.4, 0.3], [1, 2], 0.5)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert math.isnan(difference([], [], [], [], 0.5).mean)


def test_pairs_that_are_bootstrapped_together_get_what_each_gets_alone(sample) -> None:
    labels, predictions, users = sample
    base = np.full(len(labels), 0.3)
    broken = np.where(np.arange(len(labels)) == 3, np.nan, 0.5)
    pairs = {"good": (predictions, base), "broken": (broken, base), "back": (base, predictions)}
    found = metrics.bootstrap_ne_differences(labels, pairs, users, 0.3, samples=50)
    assert list(found) == list(pairs)
    assert math.isnan(found["broken"].mean)
    for name in ("good", "back"):
        alone = difference(labels, *pairs[name], users, 0.3, samples=50)
        ours = found[name]
        assert (ours.low, ours.high) == pytest.approx((alone.low, alone.high))
    assert found["back"].mean == pytest.approx(-found["good"].mean)


def test_importance_ranks_by_what_shuffling_costs() -> None:
    found = metrics.importance_ranking(0.8, {"a": 0.81, "b": 0.9, "c": float("nan"), "d": 0.79})
    assert [f.feature for f in found] == ["b", "a", "d", "c"]
    assert [f.rank for f in found] == [1, 2, 3, 4]
    assert found[0].ne_increase == pytest.approx(0.1)
