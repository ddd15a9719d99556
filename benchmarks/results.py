"""What a run has found so far: one file of predictions and one of facts per model, tasks and seed; and
what two results differ by.

Both files are written whole or not at all, the facts last: where they are there and say the same
configuration, the run is done and is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import DataError
from feature_store.spec import Dataset
from jobs.training.checkpoints import replacing, write_atomically
from jobs.training.loop import Scored
from models.metrics import Interval, Paired, bootstrap_mean_ne_difference, normalized_entropy

PARTS = ("validation", "test")


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


def same_labels(one: Predictions, other: Predictions) -> bool:
    """Whether both are of the same targets with the same labels, in the same order."""
    same = np.array_equal(one.target_id, other.target_id)
    return same and np.array_equal(one.label, other.label)


def interval_text(found: Interval) -> str:
    """For a cell of a table."""
    if not np.isfinite(found.mean):
        return "too few users"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


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
        config: everything that, if it changes, asks for another training.
        facts: what else is worth knowing: seconds, chosen parameters, command.
        predictions: of `PARTS`.
    """

    model: str
    tasks: tuple[str, ...]
    seed: int
    config: dict[str, Any]
    facts: dict[str, Any]
    predictions: Predictions


class Store:
    """Results in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, model: str, tasks: Sequence[str], seed: int) -> Path:
        """Of the facts; the predictions lie beside them."""
        return self.folder / f"{model}-{'+'.join(tasks)}-{seed}.json"

    def read(
        self, model: str, tasks: Sequence[str], seed: int, config: dict[str, Any]
    ) -> Result | None:
        """What was found; None: nothing yet, or with another configuration."""
        path = self.path(model, tasks, seed)
        if not path.exists():
            return None
        about = json.loads(path.read_text())
        if about["config"] != json.loads(json.dumps(config)):
            return None
        table = pq.read_table(path.with_suffix(".parquet"))
        columns = {n: table[n].to_numpy(zero_copy_only=False) for n in table.column_names}
        columns |= {n: columns[n].astype(str) for n in ("task", "part")}
        return Result(
            model=model, tasks=tuple(tasks), seed=seed, config=about["config"],
            facts=about["facts"], predictions=Predictions(**columns),
        )  # fmt: skip

    def write(self, result: Result) -> None:
        """Keep it."""
        path = self.path(result.model, result.tasks, result.seed)
        table = pa.table(dict(result.predictions.__dict__))
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path.with_suffix(".parquet")) as staging:
            pq.write_table(table, staging)
        about = {k: getattr(result, k) for k in ("model", "tasks", "seed", "config", "facts")}
        _write_json(path, about)

    def write_table(self, table: str, values: Any, *, name: str = "table") -> None:
        """Print the table, and keep it as `<name>.md` and its values as `<name>.json`."""
        write_atomically(self.folder / f"{name}.md", table.encode())
        _write_json(self.folder / f"{name}.json", values)
        print(table)

    def once(
        self,
        model: str,
        tasks: Sequence[str],
        seed: int,
        config: dict[str, Any],
        train: Callable[[], tuple[Predictions, dict[str, Any]]],
    ) -> Result:
        """What was found, or what `train` finds: predictions and facts."""
        found = self.read(model, tasks, seed, config)
        if found is None:
            predictions, facts = train()
            found = Result(
                model=model, tasks=tuple(tasks), seed=seed, config=config, facts=facts,
                predictions=predictions,
            )  # fmt: skip
            self.write(found)
        return replace(found, config=config)


class Pair(NamedTuple):
    """Predictions of the same labels, by target, the base rate that both were trained on, and what they
    are of, for an error."""

    mine: Predictions
    other: Predictions
    base_rate: float
    name: str = "the pair"


def mean_ne_difference(pairs: Sequence[Pair], *, samples: int = 1000, seed: int = 0) -> Interval:
    """NE of `mine` less NE of `other`, averaged over the pairs, with its 95 % interval: a paired bootstrap
    as in `models.metrics.bootstrap_mean_ne_difference`.

    Raises:
        DataError: a pair was tested on different labels.
    """
    for mine, other, _, name in pairs:
        if not same_labels(mine, other):
            raise DataError(
                f"{name} were tested on different labels ({len(mine)} and {len(other)}): delete the older "
                "of the two results"
            )
    paired = [
        Paired(mine.label, mine.prediction, other.prediction, mine.user_id, rate)
        for mine, other, rate, _ in pairs
    ]
    return bootstrap_mean_ne_difference(paired, samples=samples, seed=seed)


def difference(
    mine: Sequence[Result],
    part: str,
    other: Sequence[Result],
    other_part: str,
    base_rates: Mapping[str, float],
) -> Interval:
    """NE of a part of `mine` less NE of a part of `other`, averaged over the tasks of `base_rates` and
    the seeds that both have; where there is one `other`, it stands against all seeds of `mine`. A result
    against itself is not drawn."""
    if mine is other and part == other_part:
        return Interval(mean=0.0, low=0.0, high=0.0)
    seeds = {result.seed: result for result in other}
    both = [(result, seeds[result.seed]) for result in mine if result.seed in seeds]
    if len(other) == 1:
        both = [(result, other[0]) for result in mine]
    return mean_ne_difference(
        [
            Pair(
                a.predictions.of(task, part), b.predictions.of(task, other_part), rate,
                f"{task}: {a.model} and {b.model}",
            )
            for a, b in both
            for task, rate in base_rates.items()
        ]
    )  # fmt: skip


def by_model(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results of each model, both in their order."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.model, []).append(result)
    return found


def mean_ne(results: Sequence[Result], part: str, base_rates: Mapping[str, float]) -> float:
    """NE of a part, averaged over the tasks of `base_rates` and over seeds."""
    found = [(r.predictions.of(t, part), rate) for r in results for t, rate in base_rates.items()]
    return float(np.mean([normalized_entropy(p.label, p.prediction, rate) for p, rate in found]))


def trial(path: Path, config: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a trial of `config` found, from the lines of `path` or from `run`, which is then added.

    One JSON object a line; a line that a killed run left unfinished is not read.
    """
    plain = json.loads(json.dumps(config))
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                known = json.loads(line)
            except json.JSONDecodeError:
                continue
            if known["config"] == plain:
                return known["found"]
    found = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write("\n" * bool(out.tell()) + json.dumps({"config": plain, "found": found}))
    return found


def tune(
    path: Path,
    key: dict[str, Any],
    start: dict[str, Any],
    choices: Sequence[tuple[str, Sequence[Any]]],
    run: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[dict[str, Any], float]:
    """Parameters chosen one after the other by the "logloss" of trials.

    Args:
        path: of the trials.
        key: what else a trial depends on.
        start: parameters of the first trial.
        choices: parameter -> values that are tried beside the best so far, in this order.
        run: what a trial of parameters finds: "logloss", "seconds" and more.

    Returns:
        The best parameters, and the seconds that trials of earlier runs had taken.
    """
    spent = 0.0

    def loss(params: dict[str, Any]) -> float:
        nonlocal spent
        ran: list[bool] = []

        def now() -> dict[str, Any]:
            ran.append(True)
            return run(params)

        found = trial(path, {**key, "params": params}, now)
        spent += 0.0 if ran else found["seconds"]
        return found["logloss"]

    best = dict(start)
    lowest = loss(best)
    for name, values in choices:
        for value in values:
            params = {**best, name: value}
            found = loss(params)
            if found < lowest:
                best, lowest = params, found
    return best, spent


def _write_json(path: Path, value: Any) -> None:
    """`value` as the file, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1).encode())
