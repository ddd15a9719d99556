"""A difference between two results: its interval is the metric's, and every training counts alike."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.globo.results import Predictions, Result, Store, difference
from feature_store.errors import DataError
from models.metrics import Interval, bootstrap_ne_differences


def result(users: np.ndarray, *, offset: float = 0.0, seed: int = 0) -> Result:
    """Better by `offset` than a guess."""
    rng = np.random.default_rng(1)
    n = len(users)
    label = rng.integers(2, size=n)
    return Result(
        model="sum" if offset else "peer", tasks=("click",), seed=seed, facts={},
        predictions=Predictions(
            task=np.full(n, "click"), part=np.full(n, "test"), user_id=users,
            target_id=np.arange(n), label=label,
            prediction=np.clip(rng.random(n) + offset * (label - 0.5), 0.05, 0.95),
        ),
    )  # fmt: skip


def test_the_interval_of_one_training_is_that_of_the_metric() -> None:
    users = np.arange(60) // 3
    mine, other = result(users, offset=0.3), result(users)
    found = difference([mine], [other], "click", 0.4, samples=50)
    a, b = mine.predictions, other.predictions
    want = bootstrap_ne_differences(
        a.label, {"it": (a.prediction, b.prediction)}, users, 0.4, samples=50
    )["it"]
    for name in ("mean", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(want, name))
    assert found.mean < 0


def test_seeds_are_paired_and_count_alike_and_one_other_stands_against_all() -> None:
    users = np.arange(90) // 3
    mine = [result(users, offset=0.3), result(users, offset=-0.3, seed=1)]
    other = [result(users), result(users, offset=0.1, seed=1)]

    def mean(a: Result, b: Result) -> float:
        return difference([a], [b], "click", 0.5).mean

    paired = [mean(a, b) for a, b in zip(mine, other, strict=True)]
    assert difference(mine, other, "click", 0.5).mean == pytest.approx(np.mean(paired))
    against = [mean(a, other[0]) for a in mine]
    assert difference(mine, other[:1], "click", 0.5).mean == pytest.approx(np.mean(against))
    itself = difference(mine, mine, "click", 0.5)
    assert itself.mean == itself.low == itself.high == 0


def test_a_number_that_does_not_exist_is_none_in_the_file(tmp_path) -> None:
    nothing = Interval(mean=float("nan"), low=0.5, high=float("inf"))
    Store(tmp_path).write_table("a table", {"found": [nothing]})
    found = json.loads((tmp_path / "table.json").read_text())
    assert found == {"found": [{"mean": None, "low": 0.5, "high": None}]}
    assert (tmp_path / "table.md").read_text() == "a table"


def test_different_labels_are_not_compared() -> None:
    mine, other = result(np.arange(30), offset=0.3), result(np.arange(30))
    for changed in ({"label": 1 - other.predictions.label}, {"target_id": np.arange(1, 31)}):
        moved = replace(other, predictions=replace(other.predictions, **changed))
        with pytest.raises(DataError, match="click: sum and peer were tested on different labels"):
            difference([mine], [moved], "click", 0.5)
