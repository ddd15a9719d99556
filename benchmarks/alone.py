"""A downstream model that reads context, item and one upstream model's embeddings alone, and its yardsticks.

In rounds: it trains on the targets of some days, each with the embeddings of the day before it, and
is tested on the day after them. Training leaves the held-out users out, as the pipeline's does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks.progressive import Progressive, progressive_ne, published
from benchmarks.results import Predictions, Result, Store, joined, of_scored
from feature_store import datasets
from feature_store.days import shift
from feature_store.embeddings import UserEmbeddings
from feature_store.errors import DataError, HeadwaterError
from feature_store.lake import Lake
from feature_store.spec import Dataset, Task
from feature_store.tables import NO_LABEL
from jobs.settings import Settings
from jobs.train_downstream import MIN_TRAIN_DAYS, TRAIN_DAYS
from jobs.training.config import DownstreamTraining, to_plain
from jobs.training.downstream import ArmConfig, Comparison, Loaded, load
from jobs.training.ids import seed_of
from jobs.training.loader import Limits, Users, labelled_day, labelled_rows, share_within
from jobs.training.loop import Scored
from jobs.training.presets import downstream_training
from jobs.training.rows import Rows

ROUNDS = 4  # newest ones
ALL_TASKS = "mean over the tasks"
CONTEXT = "context"  # and item: the downstream model without any embeddings
AGGREGATES = "aggregates"  # and context and item: with the hand-made user features in their place
_SOURCE = "upstream"

Part = Callable[[Sequence[Rows]], Sequence[Rows]]


@dataclass(frozen=True, kw_only=True)
class Round:
    """Days shown: those trained on, ascending, of which the last is the day before the test's."""

    training: tuple[str, ...]
    test: str

    @property
    def served(self) -> str:
        """The day whose embeddings the test's targets are served."""
        return self.training[-1]


def budget(dataset: Dataset) -> DownstreamTraining:
    """The pipeline's, with more targets."""
    return replace(
        downstream_training(dataset), max_train_targets=150_000, max_test_targets=100_000
    )


def rounds(lake: Lake, dataset: Dataset, task: Task, embedded: Collection[str]) -> list[Round]:
    """The newest rounds that `task` has labels for.

    Args:
        embedded: days that have embeddings.

    Raises:
        DataError: there is none.
    """
    labels = lake.partitions("labels")
    usable = {
        ds
        for ds in lake.partitions("examples")
        if shift(ds, task.matures_after) in labels and shift(ds, -1) in embedded
    }
    found = []
    for test in sorted(usable):
        days = [shift(test, -i) for i in range(TRAIN_DAYS, 0, -1)]
        training = tuple(ds for ds in days if ds in usable)
        if len(training) >= MIN_TRAIN_DAYS and training[-1] == days[-1]:
            found.append(Round(training=training, test=test))
    if not found:
        raise DataError(
            f"task {task.name} has {len(usable)} days with labels and embeddings of the day before: "
            f"{MIN_TRAIN_DAYS + 1} in a row are needed; build more days"
        )
    return found[-ROUNDS:]


@dataclass(frozen=True, kw_only=True)
class RoundRows:
    """Decoded rows of a round: of the days trained on, by day, and of the test day."""

    training: dict[str, list[Rows]]
    test: list[Rows]


def decode(
    lake: Lake, dataset: Dataset, task: Task, days: Round, *, user_features: bool = False
) -> RoundRows:
    """The labelled rows of a round, of a share of the users where there are too many targets."""

    def rows(shown: Sequence[str], users: Users, most: int) -> dict[str, list[Rows]]:
        found = {
            ds: labelled_day(lake, dataset, shift(ds, task.matures_after), tasks=[task.name])
            for ds in shown
        }
        share = share_within(found.values(), task.name, most)
        return {
            ds: list(
                labelled_rows(
                    lake, dataset, day.shown, users=users, history=False,
                    user_features=user_features, seed=1, share=share,
                )
            )
            for ds, day in found.items()
        }  # fmt: skip

    allowed = budget(dataset)
    return RoundRows(
        training=rows(days.training, Users.TRAINING, allowed.max_train_targets),
        test=rows((days.test,), Users.ALL, allowed.max_test_targets)[days.test],
    )


def with_embeddings(
    dataset: Dataset, decoded: Sequence[Rows], embeddings: UserEmbeddings | None
) -> list[Loaded]:
    """Batches that have targets, with the embeddings of their users; None: without any."""
    sources = {} if embeddings is None else {_SOURCE: embeddings}
    found = load(decoded, sources, Limits(max_targets=budget(dataset).batch_targets))
    return [item for item in found if item.batch.targets]


def announce(task: Task, done: Round) -> None:
    """A line of progress."""
    print(
        f"  downstream {task.name}: trained up to {done.served}, tested on {done.test}", flush=True
    )


def fit(
    dataset: Dataset,
    task: Task,
    training: Sequence[Loaded],
    *,
    seed: int,
    user_features: bool = False,
) -> Callable[[Sequence[Loaded]], Scored]:
    """Train on batches that all have, or all lack, embeddings; what it gives predicts such batches."""

    def comparison(test: Sequence[Loaded]) -> Comparison:
        return Comparison(
            dataset=dataset, task=task, config=budget(dataset), training=training, test=test,
            seed=seed_of("downstream", dataset.name, task.name, seed),
        )  # fmt: skip

    arm = ArmConfig(
        name="alone",
        title="alone",
        user_features=user_features,
        sources=tuple(training[0].published),
    )
    model = comparison([]).train(arm)
    return lambda test: comparison(test).predict(model, arm)


def label_counts(dataset: Dataset, task: Task, rows: Mapping[str, Sequence[Rows]]) -> np.ndarray:
    """(2,) int64: positives and labels of `task` in the rows of some days."""
    index = [t.name for t in dataset.tasks].index(task.name)
    labels = np.concatenate([r.labels[:, index] for of_day in rows.values() for r in of_day])
    return np.array([(labels == 1).sum(), (labels != NO_LABEL).sum()])


def measure(
    progressive: Progressive,
    *,
    seed: int,
    parts: Mapping[str, Part],
    embeddings: bool,
    user_features: bool = False,
) -> tuple[Predictions, dict[str, Any]]:
    """Train upstream; and downstream, in each part on its own, with the embeddings that the budget reads.

    Args:
        parts: by name, what of some rows is in it. Where a task has labels of one kind only there, it
            is left out.
        embeddings: whether the downstream model reads any; if not, nothing is trained upstream.
        user_features: whether it reads the hand-made ones.

    Returns:
        Predictions by part; and facts: base_rates by part and task, upstream_ne by task, seconds.
    """
    began = time.monotonic()
    dataset, lake = progressive.dataset, progressive.lake
    days = progressive.run() if embeddings else {}
    found: list[Predictions] = []
    counts: dict[str, dict[str, np.ndarray]] = {}
    tested = set()

    @cache
    def before(ds: str) -> UserEmbeddings | None:
        kind = budget(dataset).kind
        return published(days, shift(ds, -1), kind) if embeddings else None

    def batches(rows: Sequence[Rows], ds: str) -> list[Loaded]:
        return with_embeddings(dataset, rows, before(ds))

    for task in dataset.tasks:
        for each in rounds(lake, dataset, task, progressive.days):
            tested.add(each.test)
            rows = decode(lake, dataset, task, each, user_features=user_features)
            for name, part in parts.items():
                mine = {ds: part(of) for ds, of in rows.training.items()}
                seen = label_counts(dataset, task, mine)
                if not 0 < seen[0] < seen[1]:
                    continue
                of_part = counts.setdefault(name, {})
                of_part[task.name] = of_part.get(task.name, 0) + seen
                training = [item for ds, of in mine.items() for item in batches(of, ds)]
                predict = fit(dataset, task, training, seed=seed, user_features=user_features)
                found.append(of_scored(dataset, name, predict(batches(part(rows.test), each.test))))
            announce(task, each)
    rates = {
        name: {task: float(seen[0] / seen[1]) for task, seen in of.items()}
        for name, of in counts.items()
    }
    return joined(found), {
        "base_rates": rates,
        "upstream_ne": progressive_ne(days, sorted(tested)),
        "seconds": time.monotonic() - began,
    }


def report(
    name: str,
    args: argparse.Namespace,
    find: Callable[[Program], list[Any]],
    markdown: Callable[[list[Any]], str],
) -> None:
    """Run the program `name` over the lake in HEADWATER_HOME, print and keep the tables of what it
    finds (dataclasses), `table.md` and `table.json`; bad input is one line and exit status 2."""
    try:
        program = Program(name, Settings.from_env(), datasets.get(args.dataset), args)
        found = find(program)
    except HeadwaterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    program.store.write_table(markdown(found), [asdict(x) for x in found])


class Program:
    """A program's results, which `store` keeps in `<out>/<program>/<dataset>/`.

    Args:
        name: of the program.
        settings, dataset: of the lake.
        args: of the command line, as `benchmarks.flags` reads it.
    """

    def __init__(
        self, name: str, settings: Settings, dataset: Dataset, args: argparse.Namespace
    ) -> None:
        self.settings, self.dataset, self.args = settings, dataset, args
        self.store = Store(args.out / name / dataset.name)

    def beside_context(self, models: Sequence[str], parts: Mapping[str, Part]) -> list[Result]:
        """What `measure` finds in `parts`, of no embeddings first, then of each upstream model."""
        found = self.measured(CONTEXT, models[0], parts, embeddings=False)
        for model in models:
            found += self.measured(model, model, parts, embeddings=True)
        return found

    def measured(
        self,
        name: str,
        upstream: str,
        parts: Mapping[str, Part],
        *,
        embeddings: bool,
        user_features: bool = False,
    ) -> list[Result]:
        """What `measure` finds in `parts`, by seed, of a downstream model that reads what is asked for."""
        find = partial(measure, parts=parts, embeddings=embeddings, user_features=user_features)
        return self.results(name, upstream, find, parts=list(parts))

    def results(
        self,
        name: str,
        upstream: str,
        measure: Callable[..., tuple[Predictions, dict[str, Any]]],
        **more: Any,
    ) -> list[Result]:
        """What `measure` finds, by seed, of an upstream model: what is done, is read. `more` is what else
        a result depends on."""
        found = []
        tasks = [t.name for t in self.dataset.tasks]
        for seed in map(int, self.args.seeds):
            training = Progressive(
                self.settings, self.dataset, upstream, seed=seed, out=self.args.out
            )
            downstream = {**to_plain(budget(self.dataset)), "rounds": ROUNDS}
            about = {"upstream": training.config(), "downstream": downstream, **more}
            train = partial(measure, training, seed=seed)
            found.append(self.store.once(name, tasks, seed, about, train))
        return found
