"""Results as the jobs that train write them, made up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from jobs.training.config import DownstreamTraining
from jobs.training.results import (
    ArmResult,
    Compared,
    DownstreamResult,
    Drift,
    Evaluation,
    Gate,
    TaskMetrics,
    Training,
    UpstreamResult,
    Verdict,
)

STILL = Drift(users=0, finite=True, norm=None, cosine=None, l2=None, l2_relative=None)
ACCEPTED = Gate(
    verdict=Verdict.ACCEPTED, reason="", ne={"candidate": None, "champion": None}, difference=None,
    tasks={}, drift=STILL,
)  # fmt: skip
NOTHING = Training(
    steps=0, targets=0, rows=0, events=0, seconds=0.0, targets_per_second=0.0, resumed=0, labels={},
    loss={}, fresh_weights=[], finished=0,
)  # fmt: skip


def upstream_result(
    evaluation: Mapping[str, TaskMetrics], *, ds: str = "2024-05-02", gate: Gate = ACCEPTED
) -> UpstreamResult:
    """Of a day on which nothing was trained."""
    return UpstreamResult(
        dataset="synthetic", model="sum", ds=ds,
        evaluation={
            task: Evaluation(**vars(found), snapshot="sum-2024-05-01-0", shown_ds="2024-05-01")
            for task, found in evaluation.items()
        },
        not_evaluated={}, training=NOTHING, trained_on=[ds], lost=[], gate=gate,
        candidate=f"sum-{ds}-1", champion=f"sum-{ds}-1", parent=None, inputs={},
    )  # fmt: skip


def downstream_result(found: TaskMetrics, *, ds: str) -> DownstreamResult:
    """Of a task `click` with one arm."""
    arm = ArmResult(
        **vars(found), title="context", sources=[], user_features=False, gauc=None, difference=None
    )
    compared = Compared(
        base_rate=0.5, reference="context", test_day=ds, train_days=[], users_share={}, targets={},
        users=2, importance=None, snapshots={}, config=asdict(DownstreamTraining()),
    )  # fmt: skip
    return DownstreamResult(
        dataset="synthetic", task="click", ds=ds, arms={"context": arm}, compared=compared
    )
