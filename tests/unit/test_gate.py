"""The gate: a candidate is rejected where it is clearly worse, and judged only where there is enough."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from feature_store.days import day_range
from jobs.report_page import arms_figure, drift_figure
from jobs.training import plots
from jobs.training.config import GateConfig
from jobs.training.judge import decide, drift, task_metrics
from jobs.training.parent import untrained
from jobs.training.results import Drift, Verdict
from jobs.training.scoring import Scored
from jobs.training.upstream_log import metrics_of
from models.metrics import Interval
from tests.synthetic import dataset
from tests.written import upstream_result

SPEC = dataset()
TASKS = [t.name for t in SPEC.tasks]
RATES = dict.fromkeys(TASKS, 0.3)
STILL = drift(np.ones((3, 2, 4)), np.ones((3, 2, 4)))
GATE = GateConfig()
DAYS = day_range("2024-05-01", "2024-05-06")


def scored(labels, predictions, users, tasks) -> Scored:
    n = len(labels)
    return Scored(
        user_id=np.array(users, np.int64), stored_user_id=np.array(users, np.int64),
        target_id=np.arange(n), task=np.array(tasks, np.int64),
        label=np.array(labels, np.int64), prediction=np.array(predictions, np.float64),
        domain=np.full(n, -1),
    )  # fmt: skip


def two_sides(*, users: int, rows: int = 10, worse: float, noise: float = 0.0, seed: int = 0):
    """Candidate and champion on one task; the candidate's logits are too small by `worse`, more or less
    by `noise` of each user."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows)
    logit = rng.normal(-1, 1, users * rows)
    label = rng.random(len(user)) < 1 / (1 + np.exp(-logit))
    off = worse + noise * rng.normal(size=users)[user]
    sides = (scored(label, 1 / (1 + np.exp(-x)), user, 0 * user) for x in (logit - off, logit))
    return tuple(sides)


def verdict(candidate, champion, *, gate=GATE, rates=RATES, moved=STILL):
    found = decide(SPEC, candidate, champion, rates, moved, gate)
    json.dumps(asdict(found), allow_nan=False)
    return found


def test_a_candidate_that_is_clearly_worse_is_rejected_and_one_as_good_is_not() -> None:
    found = verdict(*two_sides(users=200, worse=1.0))
    assert found.verdict == Verdict.REJECTED
    assert found.difference.low > GATE.ne_tolerance
    assert "held-out NE is worse by +" in found.reason
    assert found.ne["candidate"] - found.ne["champion"] == pytest.approx(found.difference.mean)
    same = verdict(*two_sides(users=200, worse=0.0))
    assert (same.verdict, same.reason) == (Verdict.ACCEPTED, "")
    assert same.difference == Interval(mean=0.0, low=0.0, high=0.0)


def test_what_may_be_chance_does_not_reject() -> None:
    """Worse by more than is tolerated, in few users who differ much: the interval reaches below it."""
    found = verdict(*two_sides(users=20, worse=0.1, noise=0.6, seed=1))
    assert found.difference.mean > GATE.ne_tolerance > found.difference.low
    assert found.verdict == Verdict.ACCEPTED


@pytest.mark.parametrize(
    ("users", "rows", "why"),
    [
        (0, 1, "0 labels of 0 held-out users (200 labels of 20 users are needed)"),
        (150, 1, "150 labels of 150 held-out users (200 labels of 20 users are needed)"),
        (1, 500, "500 labels of 1 held-out users (200 labels of 20 users are needed)"),
    ],
)
def test_with_too_little_it_is_not_judged_however_bad(users, rows, why) -> None:
    found = verdict(*two_sides(users=users, rows=rows, worse=5.0))
    assert found.verdict == Verdict.NOT_JUDGED
    assert why in found.reason
    assert found.tasks[TASKS[0]].why_not == why
    assert found.difference is None and found.ne == {"candidate": None, "champion": None}


def test_one_answer_only_no_base_rate_and_no_champion_are_not_judged() -> None:
    candidate, champion = two_sides(users=40, worse=1.0)
    for side in (candidate, champion):
        side.label[:] = 0
    assert "all 400 held-out labels are 0" in verdict(candidate, champion).reason
    known = two_sides(users=40, worse=1.0)
    assert "no base rate" in verdict(*known, rates={}).reason
    alone = verdict(known[0], None)
    assert (alone.verdict, alone.reason) == (Verdict.NOT_JUDGED, "no champion is before it")
    assert alone.tasks[TASKS[0]].champion is None


def test_not_judged_is_no_way_round_the_bounds_of_the_embeddings() -> None:
    nobody = scored([], [], [], [])
    broken = drift(np.full((2, 1, 2), np.nan), np.ones((2, 1, 2)))
    assert "an embedding is not a number" in verdict(nobody, nobody, moved=broken).reason
    turned = drift(-np.ones((2, 1, 2)), np.ones((2, 1, 2)))
    found = verdict(nobody, nobody, moved=turned)
    assert found.verdict == Verdict.REJECTED and "embeddings turned" in found.reason
    candidate, champion = two_sides(users=40, worse=0.0)
    candidate.prediction[3] = math.nan
    found = verdict(candidate, champion)
    assert found.verdict == Verdict.REJECTED and "a prediction is not" in found.reason


def test_labels_since_the_parents_day_are_untrained() -> None:
    lake = SimpleNamespace(partitions=lambda _: dict.fromkeys(DAYS[:3] + DAYS[4:]))
    assert untrained(lake, None, DAYS[5]) == []
    assert untrained(lake, SimpleNamespace(ds=DAYS[4]), DAYS[5]) == []
    assert untrained(lake, SimpleNamespace(ds=DAYS[1]), DAYS[5]) == [DAYS[2], DAYS[4]]


# ---- the smallest inputs


ROWS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.floats(0, 1),
        st.floats(0, 1),
        st.integers(0, 2),
        st.integers(0, len(TASKS) - 1),
    ),
    max_size=5,
)


@hypothesis.given(
    rows=ROWS,
    rates=st.dictionaries(st.sampled_from(TASKS), st.floats(0.01, 0.99)),
    first=st.booleans(),
    least=st.integers(0, 3),
)
def test_a_handful_of_rows_gets_a_verdict_metrics_and_plots(rows, rates, first, least) -> None:
    labels, ours, theirs, users, tasks = (
        (list(x) for x in zip(*rows, strict=True)) if rows else ([],) * 5
    )
    candidate, champion = (scored(labels, p, users, tasks) for p in (ours, theirs))
    gate = GateConfig(min_labels=least, min_users=least, bootstrap_samples=20)
    found = verdict(candidate, None if first else champion, gate=gate, rates=rates)
    assert found.verdict in set(Verdict)
    assert bool(found.reason) == (found.verdict != Verdict.ACCEPTED)
    assert (found.difference is None) == (found.ne["candidate"] is None)
    result = upstream_result(task_metrics(SPEC, candidate, rates), gate=found)
    logged = metrics_of(result)
    assert all(value is None or math.isfinite(value) for value in logged.values())
    assert (logged["accepted"] is None) == (found.verdict == Verdict.NOT_JUDGED)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("label", [0, 1])
def test_plots_of_a_handful_of_rows_can_be_drawn(rows, label) -> None:
    curves = {"it": (np.full(rows, label), np.full(rows, 0.3))}
    series = {"it": [("2024-05-01", 0.9), ("2024-05-02", math.nan)][:rows]}
    arm = {"title": "it", "name": "context", "by_day": {"2024-05-01": None}}
    task = {"days": ["2024-05-01"], "arms": [arm][:rows], "oracle": {"ne": None}}
    embeddings = [{"model": "sum", "ds": "2024-05-01", "cosine_raw": None, "cosine_pooled": None}]
    for figure in (
        plots.calibration(curves, title=""),
        plots.calibration({}, title=""),
        plots.ne_by_day(series, title=""),
        arms_figure(task),
        drift_figure(embeddings[:rows]),
    ):
        figure.canvas.draw()


@pytest.mark.parametrize("users", [0, 1])
def test_drift_of_nobody_and_of_one(users) -> None:
    one = np.ones((users, 2, 4))
    assert drift(one, one).cosine == (pytest.approx(1.0) if users else None)
    nobody = np.empty((0, 0, 0), np.float32)
    assert drift(nobody, nobody) == Drift(
        users=0, finite=True, norm=None, cosine=None, l2=None, l2_relative=None
    )
