"""What published user embeddings bring to each downstream task, and what is left of it a day later.

    python -m benchmarks.globo.transfer --out DIR [--models sum,sequence] [--seeds 0,1,2] [--tasks ...]

Reads the lake and the snapshots of HEADWATER_HOME: features of the days below, and what each model
published on the three days before each of them (of day D from the snapshot of D, events before the
end of D; used on D + 1 it is out of sample). Trains `models.downstream` for one task on
6 to 11 October 2017, tests it on the 13th and 14th; the 12th is scored beside them and chooses nothing.
All users, since the split is in time; where a task has more targets than the budget, a share of them.
Each arm and seed is a file under --out and is not trained again. Arms, beside context and item:

    flag                whether the first model has published something of the user: a control
    random_sum          embeddings of an untrained SUM, made and pooled as published ones are: a control
    aggregates          the hand-made user features
    context_<model>     the model's embeddings as served: pooled, of the day before
    aggregates_<model>  both

NE: log loss over that of the constant at the base rate of the training days. Recovered: the gain of an
arm over context and item, as a share of what the aggregates gain. The second table is about lags, in
training and test alike: raw embeddings of 1, 2 and 3 days before, that of 1 day also as it was before it
was rounded to the float16 that is published; and of models that read events
those that the snapshot of the day before makes on the fly, of what was available 0 and 1 hours before.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks.flags import check_names, flags, listed
from benchmarks.globo import transfer_table as table
from benchmarks.globo.data import SPLIT as WHOLE
from benchmarks.globo.results import PARTS, Predictions, Result, Store, joined, of_scored
from benchmarks.globo.split import Split
from benchmarks.globo.user_sources import (
    Flag,
    Fresh,
    RandomSum,
    Snapshots,
    Source,
    Stored,
    Unrounded,
    by_moment,
    read_of,
)
from feature_store import datasets
from feature_store.days import add_days
from feature_store.embeddings import EmbeddingKind
from feature_store.errors import HeadwaterError, SpecError
from feature_store.lake import Lake
from feature_store.spec import Dataset, Task
from jobs.publish_embeddings import POOLED_DAYS
from jobs.settings import Settings
from jobs.training.co_occurrence import days_read
from jobs.training.config import DownstreamTraining
from jobs.training.downstream import ArmConfig, Comparison, Loaded, arms
from jobs.training.ids import int64_ids, seed_of
from jobs.training.loader import Limits, Users, cuts, labelled_day, labelled_rows, share_within
from jobs.training.presets import downstream_training, preset
from jobs.training.rows import Rows
from models.downstream import Published
from models.metrics import normalized_entropy

SPLIT = replace(WHOLE, train=("2017-10-06", "2017-10-11"))
LAGS_DAYS, LAGS_HOURS = (1, 2, 3), (0, 1)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    cli = flags("globo.transfer", __doc__, seeds="0,1,2")
    cli.add_argument("--models", type=listed, default=["sum", "sequence"], help="that published")
    cli.add_argument("--tasks", type=listed, default=[], help="default: all")
    return cli.parse_args(argv)


def more_targets(dataset: Dataset) -> DownstreamTraining:
    """The pipeline's budget of a downstream model, with more targets."""
    return replace(
        downstream_training(dataset), max_train_targets=150_000, max_test_targets=100_000
    )


class TaskData:
    """The labelled targets of one task by part and day, and what was asked of sources so far.

    Args:
        lake, dataset, task: whose.
        pins: {"<table>/<ds>": version} to read at.
        split, budget: days, and how many targets at most.
        history: read events too.
    """

    def __init__(
        self, lake: Lake, dataset: Dataset, task: Task, pins: dict[str, int], *, split: Split,
        budget: DownstreamTraining, history: bool,
    ) -> None:  # fmt: skip
        self.dataset, self.task, self.budget = dataset, task, budget
        self._rows: dict[str, dict[str, list[Loaded]]] = {}
        for part in ("train", *PARTS):
            days = {
                ds: labelled_day(
                    lake, dataset, add_days(ds, task.matures_after), tasks=[task.name], inputs=pins
                )
                for ds in split.days(part)
            }
            training = part == "train"
            cap = budget.max_train_targets if training else budget.max_test_targets
            limits = Limits(max_targets=budget.batch_targets if training else 4096)
            share = share_within(days.values(), task.name, cap)
            self._rows[part] = {
                ds: [
                    item
                    for rows in labelled_rows(
                        lake, dataset, day.shown, users=Users.ALL, history=history, seed=1,
                        limits=limits, share=share,
                    )
                    for item in loaded(rows, limits)
                ]
                for ds, day in days.items()
            }  # fmt: skip
        self._found: dict[tuple[str, str], list[Published]] = {}

    def items(self, part: str, source: Source | None) -> list[Loaded]:
        """The batches of a part with the embeddings of `source`; cut by moment where it is."""
        days = self._rows[part]
        if source is None:
            return [item for of in days.values() for item in of]
        if source.per_moment:
            days = {
                ds: [replace(item, batch=by_moment(item.batch)) for item in of]
                for ds, of in days.items()
            }
        key = part, source.name
        if key not in self._found:
            self._found[key] = [p for ds, of in days.items() if of for p in source.of(ds, of)]
        batches = [item for of in days.values() for item in of]
        return [
            replace(item, published={source.name: found})
            for item, found in zip(batches, self._found[key], strict=True)
        ]

    def comparison(self, part: str, source: Source | None, seed: int) -> Comparison:
        """Training on the training days, scoring `part`."""
        return Comparison(
            dataset=self.dataset, task=self.task, config=self.budget, seed=seed,
            training=self.items("train", source), test=self.items(part, source),
        )  # fmt: skip


def loaded(rows: Rows, limits: Limits) -> list[Loaded]:
    """The rows in batches without events: a downstream model reads none. They stay in `Loaded.rows`."""
    without = replace(
        rows,
        event_offsets=np.zeros_like(rows.event_offsets),
        events={name: values[:0] for name, values in rows.events.items()},
        targets={**rows.targets, "history_end": np.zeros_like(rows.targets["history_end"])},
    )
    return [
        Loaded(batch=without.batch(lo, hi), published={}, rows=rows, lo=lo, hi=hi)
        for lo, hi in cuts(rows, limits)
    ]


class Transfer:
    """Every task, arm and seed that was asked for.

    Args:
        lake, dataset, settings: of the rows, and where the snapshots are.
        args: of the command line.
        split, budget: of the days, and of every training; by default `more_targets`.

    Raises:
        HeadwaterError: a name is unknown, or a day was not built or published.
    """

    def __init__(
        self, lake: Lake, dataset: Dataset, settings: Settings, args: argparse.Namespace, *,
        split: Split = SPLIT, budget: DownstreamTraining | None = None,
    ) -> None:  # fmt: skip
        self.lake, self.dataset, self.args = lake, dataset, args
        self.split, self.budget = split, budget or more_targets(dataset)
        known = [t.name for t in dataset.tasks]
        check_names("--tasks", args.tasks, known)
        if not args.models:
            raise SpecError("--models is empty: name one or more that published embeddings")
        self.tasks = [dataset.task(name) for name in args.tasks or known]
        self.days = [ds for part in ("train", *PARTS) for ds in split.days(part)]
        self.history = any(preset(dataset, model).kind.history for model in args.models)
        self.store = Store(args.out / "transfer")
        users = shown_users(lake, self.days)
        read = cache(partial(read_of, lake, users))
        served = [Stored(lake, read, model) for model in args.models]
        self.sources: dict[str, Source] = {source.name: source for source in served}
        self.arms = [arm for arm in arms(args.models) if len(arm.sources) < 2]
        self.lags: list[table.Lag] = []
        first = add_days(split.train[0], -POOLED_DAYS)
        self._alone(Flag(served[0]), "context and item + whether there is a history")
        self._alone(RandomSum(lake, users, first_day=first), "context and item + untrained SUM")
        for model in args.models:
            snapshots = Snapshots(dataset=dataset, settings=settings, model=model)
            of_age: dict[str, Source] = {}
            if snapshots.preset.kind.history:
                of_age |= {f"{h} h": Fresh(snapshots, lag_hours=h) for h in LAGS_HOURS}
            raw = partial(Stored, lake, read, model, kind=EmbeddingKind.RAW)
            of_age |= {f"{days} d": raw(lag_days=days) for days in LAGS_DAYS}
            of_age["1 d, float32"] = Unrounded(lake, snapshots, users)
            for age, source in of_age.items():
                self._alone(source, f"{model}, {age}")
                self.lags.append(table.Lag(model, age, source.name))
            self.lags.append(table.Lag(model, "1 d, pooled as served", f"context_{model}"))
        self.pins = {name: source.pins(self.days) for name, source in self.sources.items()}

    def _alone(self, source: Source, title: str) -> None:
        """An arm of context, item and `source`."""
        self.sources[source.name] = source
        self.arms.append(
            ArmConfig(name=source.name, title=title, user_features=False, sources=(source.name,))
        )

    def run(self) -> list[Result]:
        """What is done is read; a task whose arms are all done loads nothing."""
        pins = {task.name: self.inputs(task) for task in self.tasks}  # before anything is trained
        found = []
        for task in self.tasks:
            data = cache(
                partial(
                    TaskData, self.lake, self.dataset, task, pins[task.name], split=self.split,
                    budget=self.budget, history=self.history,
                )
            )  # fmt: skip
            about = {
                "inputs": pins[task.name], "spec": self.dataset.hash,
                "split": asdict(self.split), "budget": asdict(self.budget),
            }  # fmt: skip
            for seed in map(int, self.args.seeds):
                for arm in self.arms:
                    read = {name: self.pins[name] for name in arm.sources}
                    found.append(
                        self.store.once(
                            arm.name, [task.name], seed,
                            {**about, "arm": asdict(arm), "sources": read},
                            partial(self._train, data, arm, seed),
                        )
                    )  # fmt: skip
        return found

    def inputs(self, task: Task) -> dict[str, int]:
        """Versions of every partition that the targets of `task` and their labels are read from."""
        counted = days_read(self.dataset, list(self.lake.partitions("item_aggregates")), self.days)
        answered = [add_days(ds, task.matures_after) for ds in self.days]
        return {
            **self.lake.require("examples", self.days),
            **self.lake.require("labels", answered),
            **self.lake.require("item_aggregates", counted),
        }

    def _train(
        self, data: Callable[[], TaskData], arm: ArmConfig, seed: int
    ) -> tuple[Predictions, dict[str, Any]]:
        of, task = data(), data().task
        source = self.sources[arm.sources[0]] if arm.sources else None
        draw = seed_of("transfer", self.dataset.name, task.name, seed)
        compared = {part: of.comparison(part, source, draw) for part in PARTS}
        begun = time.monotonic()
        model = compared["test"].train([arm])
        seconds = time.monotonic() - begun
        rate = compared["test"].base_rate()
        found = [
            of_scored(self.dataset, part, comparison.predict(model)[arm.name])
            for part, comparison in compared.items()
        ]
        test = found[-1]
        ne = normalized_entropy(test.label, test.prediction, rate)
        print(f"{task.name} seed {seed}: {arm.name:24} NE {ne:.4f}", flush=True)
        return joined(found), {"seconds": seconds, "base_rate": rate, "title": arm.title}


def shown_users(lake: Lake, days: Sequence[str]) -> np.ndarray:
    """(n,) int64 ids, ascending, of everyone who has a row of `examples` on one of `days`.

    Raises:
        MissingPartitionError: a day was not built.
    """
    pins = lake.require("examples", days)
    rows = lake.read("examples", days=days, columns=["user_id"], version=pins)
    return np.unique(int64_ids(rows["user_id"].combine_chunks()))


def report(transfer: Transfer) -> None:
    """Run what is missing, print the tables, keep them."""
    lines = table.lines(transfer.run())
    lags = table.lag_lines(lines, transfer.lags)
    transfer.store.write_table(table.markdown(lines, lags), {"arms": lines, "lags": lags})


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables; they are kept as `table.md` and `table.json` too."""
    args = arguments(argv)
    dataset, settings = datasets.get("globo"), Settings.from_env()
    try:
        report(Transfer(Lake(settings.lake_root, dataset), dataset, settings, args))
    except HeadwaterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
