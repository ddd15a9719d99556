"""What a run has found so far: one file of predictions and one of facts per model, tasks and seed; and
what two results differ by.

Both files are written whole or not at all, the facts last: where they are there and say the same
configuration, the run is done and is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import DataError
from feature_store.spec import Dataset
from jobs.training.checkpoints import replacing, write_atomically
from jobs.training.scoring import Scored
from models.metrics import Interval, Paired, bootstrap_mean_ne_difference, finite_or_none

PARTS = ("validation", "test")
Metric = Callable[[np.ndarray, np.ndarray], float]  # of labels and predictions


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Of n labels: task and part (n,) str; user_id, target_id (n,) int64; label, prediction (n,)."""

    task: np.ndarray
    part: np.ndarray
    user_id: np.ndarray
    target_id: np.ndarray
    label: np.ndarray
    prediction: np.ndarray

    def of(self, task: str, part: str) -> Predictions:
        """One task's and part's, by target."""
        keep = np.flatnonzero((self.task == task) & (self.part == part))
        keep = keep[np.argsort(self.target_id[keep], kind="stable")]
        return Predictions(**{k: v[keep] for k, v in self.__dict__.items()})

    def __len__(self) -> int:
        return len(self.label)


def of_scored(dataset: Dataset, part: str, scored: Scored) -> Predictions:
    """What one of our models said, under the name of a part."""
    return Predictions(
        task=np.array([t.name for t in dataset.tasks])[scored.task],
        part=np.full(len(scored), part),
        user_id=scored.user_id,
        target_id=scored.target_id,
        label=scored.label,
        prediction=scored.prediction,
    )


def joined(parts: Sequence[Predictions]) -> Predictions:
    """All of them in one."""
    names = parts[0].__dict__
    return Predictions(**{k: np.concatenate([getattr(p, k) for p in parts]) for k in names})


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one training gave.

    Args:
        model, seed: of it.
        tasks: that it was trained on.
        facts: what else is worth knowing: seconds, chosen parameters, command.
        predictions: of `PARTS`.
    """

    model: str
    tasks: tuple[str, ...]
    seed: int
    facts: dict[str, Any]
    predictions: Predictions


class Store:
    """Results in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, model: str, tasks: Sequence[str], seed: int) -> Path:
        """Of the facts; the predictions lie beside them."""
        return self.folder / f"{model}-{'+'.join(tasks)}-{seed}.json"

    def once(
        self,
        model: str,
        tasks: Sequence[str],
        seed: int,
        config: dict[str, Any],
        train: Callable[[], tuple[Predictions, dict[str, Any]]],
    ) -> Result:
        """What was found with this very `config`, everything that asks for another training where it
        changes; or what `train` finds now: predictions and facts."""
        path = self.path(model, tasks, seed)
        about = {"model": model, "tasks": tasks, "seed": seed, "config": plain(config)}
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("config") == about["config"]:
            facts, predictions = known["facts"], _read(path.with_suffix(".parquet"))
        else:
            predictions, facts = train()
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path.with_suffix(".parquet")) as staging:
                pq.write_table(pa.table(dict(predictions.__dict__)), staging)
            _write_json(path, {**about, "facts": facts})
        return Result(
            model=model, tasks=tuple(tasks), seed=seed, facts=facts, predictions=predictions
        )

    def write_table(self, table: str, values: Any) -> None:
        """Print the table, and keep it as `table.md` and its values, dataclasses in plain containers, as
        `table.json`; None where a number does not exist."""
        write_atomically(self.folder / "table.md", table.encode())
        _write_json(self.folder / "table.json", _finite(values))
        print(table)


def plain(config: Any) -> Any:
    """`config` as it comes back from a file."""
    return json.loads(json.dumps(config))


def _read(path: Path) -> Predictions:
    table = pq.read_table(path)
    columns = {n: table[n].to_numpy(zero_copy_only=False) for n in table.column_names}
    return Predictions(**columns | {n: columns[n].astype(str) for n in ("task", "part")})


def _finite(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return finite_or_none(value) if isinstance(value, float) else value


def _write_json(path: Path, value: Any) -> None:
    """`value` as the file, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1).encode())


def by_model(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results of each model, both in their order."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.model, []).append(result)
    return found


def by_seed(results: Sequence[Result], task: str, part: str, metric: Metric) -> np.ndarray:
    """(n,) float64: the metric of each result's predictions of a task and part."""
    found = [r.predictions.of(task, part) for r in results]
    return np.array([metric(p.label, p.prediction) for p in found])


def difference(
    mine: Sequence[Result],
    other: Sequence[Result],
    task: str,
    base_rate: float,
    *,
    samples: int = 1000,
) -> Interval:
    """NE on the test of `mine` less that of `other`, averaged over the seeds that both have, with its 95 %
    interval: a paired bootstrap as in `models.metrics.bootstrap_mean_ne_difference`. Where there is one
    `other`, it stands against all seeds of `mine`. A result against itself is not drawn.

    Raises:
        DataError: two results were tested on different labels.
    """
    if mine is other:
        return Interval(mean=0.0, low=0.0, high=0.0)
    of_seed = {result.seed: result for result in other}
    if len(other) == 1:
        of_seed = {result.seed: other[0] for result in mine}
    pairs = []
    for one in (result for result in mine if result.seed in of_seed):
        two = of_seed[one.seed]
        a, b = (result.predictions.of(task, "test") for result in (one, two))
        if not (np.array_equal(a.target_id, b.target_id) and np.array_equal(a.label, b.label)):
            raise DataError(
                f"{task}: {one.model} and {two.model} were tested on different labels ({len(a)} and "
                f"{len(b)}): delete the older of the two results"
            )
        pairs.append(Paired(a.label, a.prediction, b.prediction, a.user_id, base_rate))
    return bootstrap_mean_ne_difference(pairs, samples=samples)


def interval_text(found: Interval) -> str:
    """For a cell of a table."""
    if not np.isfinite(found.mean):
        return "too few users"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
