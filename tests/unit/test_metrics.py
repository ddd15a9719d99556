"""Metrics against values worked out by hand and against scikit-learn."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
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
    # -ln(0.8), -ln(1 - 0.5); and by the constant .25: -ln(.25), -ln(.75)
    expected = (-math.log(0.8) - math.log(0.5)) / 2
    constant = (-math.log(0.25) - math.log(0.75)) / 2
    assert metrics.logloss([1, 0], [0.8, 0.5]) == pytest.approx(expected)
    assert metrics.normalized_entropy([1, 0], [0.8, 0.5], 0.25) == pytest.approx(
        expected / constant
    )


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("labels", [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0], [1]])
def test_the_base_rate_has_ne_one_whatever_the_days_own_rate(labels, rate) -> None:
    assert metrics.normalized_entropy(labels, [rate] * len(labels), rate) == 1.0


def test_where_training_and_day_have_one_rate_ne_is_that_of_the_paper() -> None:
    labels, predictions = [1, 0, 0, 0], [0.6, 0.1, 0.2, 0.4]
    paper = metrics.logloss(labels, predictions) / metrics.entropy(0.25)
    assert metrics.normalized_entropy(labels, predictions, 0.25) == pytest.approx(paper)


def test_rows_of_several_trainings_are_each_held_against_their_own_rate() -> None:
    labels, rates = [1, 0, 0, 1, 1, 0], [0.1] * 3 + [0.7] * 3
    assert metrics.normalized_entropy(labels, rates, rates) == 1.0
    pairs = {"a": ([0.3] * 6, rates)}
    (found,) = metrics.bootstrap_ne_differences(labels, pairs, list("abcdef"), rates).values()
    assert found.mean == pytest.approx(metrics.normalized_entropy(labels, [0.3] * 6, rates) - 1.0)


def test_the_shifted_ne_of_any_constant_is_one() -> None:
    labels = [1, 0, 0, 1, 0]
    for constant in (0.01, 0.4, 0.99):
        assert metrics.shifted_normalized_entropy(labels, [constant] * 5) == pytest.approx(1.0)


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
    assert metrics.shifted_normalized_entropy(labels, biased) < metrics.normalized_entropy(
        labels, biased, rate
    )


@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0]], ids=["no rows", "all 1", "all 0"])
def test_what_does_not_exist_is_nan_and_not_an_exception(labels) -> None:
    predictions = [0.5] * len(labels)
    assert math.isnan(metrics.auc(labels, predictions))
    assert math.isnan(metrics.grouped_auc(labels, predictions, labels))
    assert math.isnan(metrics.shifted_normalized_entropy(labels, predictions))
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


def test_the_interval_draws_what_the_ne_divides_by_with_the_losses() -> None:
    # users of all rates: with one denominator for all draws the interval would be another
    rng = np.random.default_rng(5)
    users = np.repeat(np.arange(30), 4)
    labels = (rng.random(120) < np.repeat(np.linspace(0.02, 0.9, 30), 4)).astype(int)
    predictions, baseline = np.full(120, 0.4), np.full(120, 0.1)
    found = difference(labels, predictions, baseline, users, 0.1, samples=500, seed=2)
    rng = np.random.default_rng(2)
    naive = []
    for _ in range(500):
        drawn = rng.integers(30, size=30)
        rows = (drawn[:, None] * 4 + np.arange(4)).ravel()
        sides = (
            metrics.normalized_entropy(labels[rows], p[rows], 0.1) for p in (predictions, baseline)
        )
        naive.append(next(sides) - next(sides))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])))


def test_a_draw_without_a_task_does_not_count_and_pairs_count_alike() -> None:
    users, one = np.arange(12), np.array([0])
    labels = users % 2
    many = metrics.Paired(labels, np.full(12, 0.5), np.full(12, 0.3), users, 0.3)
    rare = metrics.Paired(np.array([1]), np.array([0.9]), np.array([0.3]), one, 0.3)
    found = metrics.bootstrap_mean_ne_difference([many, rare], samples=200)
    alone = [
        metrics.normalized_entropy(p.labels, p.predictions, 0.3)
        - metrics.normalized_entropy(p.labels, p.baseline, 0.3)
        for p in (many, rare)
    ]
    assert found.mean == pytest.approx(np.mean(alone))
    assert found.low <= found.mean <= found.high
    assert math.isnan(metrics.bootstrap_mean_ne_difference([]).low)


# ---- the smallest inputs


ROWS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.floats(0, 1, width=32) | st.just(float("nan")),
        st.floats(0, 1, width=32),
        st.integers(0, 2),
    ),
    max_size=4,
)
RATE = st.none() | st.sampled_from([0.0, 1.0, float("nan")]) | st.floats(1e-9, 1 - 1e-9)


@hypothesis.given(rows=ROWS, rate=RATE)
def test_every_metric_of_a_handful_of_rows_is_a_number_or_nan(rows, rate) -> None:
    labels, predictions, other, users = (
        (list(x) for x in zip(*rows, strict=True)) if rows else ([],) * 4
    )
    found = metrics.summary(labels, predictions, rate, users)
    finite = bool(rows) and not np.isnan(predictions).any()
    both = len(set(labels)) == 2
    known = rate is not None and 0 < rate < 1
    assert not any(math.isinf(value) for value in found.values())
    assert math.isfinite(found["ne"]) == (finite and known)
    assert (metrics.why_no_ne(labels, rate) is None) == (bool(rows) and known)
    assert math.isfinite(found["auc"]) == math.isfinite(found["shifted_ne"]) == (finite and both)
    assert math.isfinite(found["calibration"]) == (finite and 1 in labels)
    metrics.calibration_curve(labels, predictions)
    pairs = {"first": (predictions, other), "second": (other, other)}
    intervals = metrics.bootstrap_ne_differences(labels, pairs, users, rate, samples=20)
    together = metrics.bootstrap_mean_ne_difference(
        [metrics.Paired(labels, *pair, users, rate) for pair in pairs.values()], samples=20
    )
    enough = len(set(users)) > 1 and known
    for name, interval in (*intervals.items(), ("mean", together)):
        bounds = (interval.low, interval.mean, interval.high)
        exists = enough and (finite or name == "second")
        assert [math.isfinite(x) for x in bounds] == [exists] * 3
        assert interval.low <= interval.high or not exists


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
