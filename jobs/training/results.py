"""What the jobs that train leave of a day beside its snapshot: `result.json`, and predictions in Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from feature_store.errors import DataError
from jobs.settings import Settings
from jobs.training.checkpoints import Checkpoints, write_atomically
from models.metrics import Interval

if TYPE_CHECKING:
    import pandas as pd

R = TypeVar("R", "UpstreamResult", "DownstreamResult")

RESULT, EVALUATION, PREDICTIONS = "result.json", "evaluation.parquet", "predictions.parquet"


class Verdict(StrEnum):
    """What the gate says of a candidate. One that could not be judged becomes champion."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True, kw_only=True)
class TaskMetrics:
    """How predictions of one task did; a metric is None where it is not defined.

    Args:
        ne, shifted_ne, auc, calibration: as in `models.metrics`.
        why_not: in words, where there is no NE.
        labels, positives: counts.
        base_rate: share of positives among the labels that the predictions were trained on.
        domains: the same by value of the dataset's domain feature, as batches hold it: an integer, text
            hashed, so that a metric's name is one that MLflow takes whatever the text holds.
    """

    ne: float | None
    shifted_ne: float | None
    auc: float | None
    calibration: float | None
    why_not: str | None
    labels: int
    positives: int
    base_rate: float | None
    domains: dict[str, TaskMetrics] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation(TaskMetrics):
    """Progressive validation: of the snapshot that was live on `shown_ds`, when the targets were shown."""

    snapshot: str
    shown_ds: str


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far the embeddings of the same users moved; None where there is nothing to measure, or nothing to
    compare with.

    Args:
        users: how many.
        finite: all values are numbers.
        norm: mean L2 norm of the K*D values now.
        cosine, l2: mean cosine and mean distance to the embeddings before.
        l2_relative: the distance over the mean norm before.
    """

    users: int
    finite: bool
    norm: float | None
    cosine: float | None
    l2: float | None
    l2_relative: float | None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One task of the gate: both sides on the held-out users, and why it took no part, if it did not."""

    candidate: TaskMetrics
    champion: TaskMetrics | None
    why_not: str | None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The gate's decision.

    Args:
        reason: "" where the candidate is accepted.
        ne: of each side, over the tasks judged; None where none was.
        difference: of them, candidate less champion.
    """

    verdict: Verdict
    reason: str
    ne: dict[str, float | None]
    difference: Interval | None
    tasks: dict[str, Judged]
    drift: Drift


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training did; kept in its snapshot's metadata.

    Args:
        labels, loss: by task; loss is the mean log loss over them, where there is one.
        fresh_weights: what started from first weights.
        finished: seconds since 1970.
    """

    steps: int
    targets: int
    rows: int
    events: int
    seconds: float
    targets_per_second: float
    resumed: int
    labels: dict[str, int]
    loss: dict[str, float]
    fresh_weights: list[str]
    finished: int


@dataclass(frozen=True, kw_only=True)
class UpstreamResult:
    """A day of an upstream model.

    Args:
        evaluation: by task that got labels.
        not_evaluated: days shown whose snapshot does not fit the spec, with the reason.
        trained_on, lost: days whose labels were trained on, and that no champion knows nor will.
        candidate, champion, parent: snapshots.
        inputs: {"<table>/<ds>": Delta version}.
    """

    dataset: str
    model: str
    ds: str
    evaluation: dict[str, Evaluation]
    not_evaluated: dict[str, str]
    training: Training
    trained_on: list[str]
    lost: list[str]
    gate: Gate
    candidate: str
    champion: str
    parent: str | None
    inputs: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ArmResult(TaskMetrics):
    """One arm of a downstream comparison; `difference` is of its NE to the reference's, None of that itself
    and where nothing compares."""

    title: str
    sources: list[str]
    user_features: bool
    gauc: float | None
    difference: Interval | None


@dataclass(frozen=True, kw_only=True)
class RankedFeature:
    """A feature of the richest arm, and by how much NE rises where its values are shuffled."""

    rank: int
    feature: str
    ne_increase: float | None


@dataclass(frozen=True, kw_only=True)
class FeatureImportance:
    """Permutation importance in the arm of that name, whose NE on as many targets is `ne`."""

    arm: str
    ne: float | None
    targets: int
    ranking: list[RankedFeature]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a comparison of arms found.

    Args:
        users_share: of users that were taken, "training" and "test".
        targets: the same.
        snapshots: by upstream model and day, which published the embeddings.
        config: of `DownstreamTraining`.
    """

    base_rate: float
    reference: str
    test_day: str
    train_days: list[str]
    users_share: dict[str, float]
    targets: dict[str, int]
    users: int
    importance: FeatureImportance | None
    snapshots: dict[str, dict[str, str]]
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DownstreamResult:
    """A day of a downstream task; without arms, and with the reason in `why_not`, where nothing could be
    compared."""

    dataset: str
    task: str
    ds: str
    arms: dict[str, ArmResult] = field(default_factory=dict)
    why_not: str | None = None
    compared: Compared | None = None
    sampled: bool = False
    simulated: bool = False
    inputs: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Results(Generic[R]):
    """The files of one upstream model, or of one downstream task, by day.

    Args:
        kind: what `result.json` holds.
        root: `<root>/<ds>/` holds those of a day.
        command: what a person types to write the files of a day again.
    """

    kind: type[R]
    root: Path
    command: Callable[[str], str]

    def write(self, result: R) -> None:
        """Keep the result of its day."""
        folder = self.root / result.ds
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RESULT, json.dumps(asdict(result), indent=1).encode())

    def until(self, ds: str) -> dict[str, R]:
        """Results of the days up to `ds` that have one, by day, ascending.

        Raises:
            DataError: one of them is damaged.
        """
        days = sorted(p.parent.name for p in self.root.glob(f"*/{RESULT}"))
        return {day: self._read(day) for day in days if day <= ds}

    def of(self, ds: str) -> R | None:
        """The result of a day, if there is one.

        Raises:
            DataError: it is damaged.
        """
        return self._read(ds) if (self.root / ds / RESULT).exists() else None

    def rows(self, ds: str, name: str, *, task: str | None = None) -> pd.DataFrame:
        """The predictions in file `name` of a day, those of `task` alone where it is given.

        Raises:
            DataError: the file is damaged, or gone.
        """
        path = self.root / ds / name
        try:
            filters = None if task is None else [("task", "==", task)]
            return pq.read_table(path, filters=filters).to_pandas()
        except PermissionError:
            raise
        except (OSError, pa.ArrowException):
            raise self._lost(path, ds) from None

    def _read(self, ds: str) -> R:
        path = self.root / ds / RESULT
        try:
            result: R = TypeAdapter(self.kind).validate_json(path.read_bytes())
        except ValidationError:
            raise self._lost(path, ds) from None
        if result.ds != ds:
            raise self._lost(path, ds)
        return result

    def _lost(self, path: Path, ds: str) -> DataError:
        state = "damaged" if path.exists() else "gone"
        return DataError(
            f"{path} is {state}: run {self.command(ds)}, which writes it again, and then the same "
            "command as now"
        )


def upstream_results(settings: Settings, dataset: str, model: str) -> Results[UpstreamResult]:
    """Of an upstream model."""
    root = settings.snapshot_dir(dataset, model, "")
    return Results(kind=UpstreamResult, root=root, command=Checkpoints(root).command)


def downstream_results(settings: Settings, dataset: str, task: str) -> Results[DownstreamResult]:
    """Of the downstream models of a task."""
    command = f"python -m jobs train_downstream --dataset {dataset} --task {task} --ds "
    root = settings.downstream_dir(dataset, task)
    return Results(kind=DownstreamResult, root=root, command=command.__add__)
