"""A difference between two results: its interval is the metric's, and every pair counts alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.results import Pair, Predictions, mean_ne_difference
from feature_store.errors import DataError
from models.metrics import bootstrap_ne_differences


def some(users, *, offset: float = 0.0) -> Predictions:
    rng = np.random.default_rng(1)
    n = len(users)
    label = rng.integers(2, size=n)
    return Predictions(
        task=np.full(n, "click"), part=np.full(n, "test"), user_id=np.array(users, np.int64),
        target_id=np.arange(n), label=label,
        prediction=np.clip(rng.random(n) + offset * (label - 0.5), 0.05, 0.95),
    )  # fmt: skip


def test_the_interval_of_one_pair_is_that_of_the_metric() -> None:
    users = np.arange(60) // 3
    mine, other = some(users, offset=0.3), some(users)
    found = mean_ne_difference([Pair(mine, other, 0.4)], samples=50)
    want = bootstrap_ne_differences(
        mine.label, {"it": (mine.prediction, other.prediction)}, users, 0.4, samples=50
    )["it"]
    for name in ("mean", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(want, name))
    assert found.mean < 0


def test_pairs_count_alike_however_many_labels_they_have_and_draw_users_together() -> None:
    many, few = np.arange(90) // 3, np.arange(30)
    a = Pair(some(many, offset=0.3), some(many), 0.5)
    b = Pair(some(few, offset=-0.3), some(few), 0.2)
    both = mean_ne_difference([a, b], samples=200)
    alone = [mean_ne_difference([pair]).mean for pair in (a, b)]
    assert both.mean == pytest.approx(np.mean(alone))
    against = mean_ne_difference([a, Pair(a.other, a.mine, a.base_rate)], samples=200)
    assert abs(against.low) < 1e-12 and abs(against.high) < 1e-12
    with pytest.raises(DataError, match="different labels"):
        moved = replace(a.other, label=1 - a.other.label)
        mean_ne_difference([Pair(a.mine, moved, 0.5)])
