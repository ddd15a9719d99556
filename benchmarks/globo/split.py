"""A split in time of a lake's days, and the labelled rows that were shown on one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from feature_store.days import add_days, day_range
from feature_store.errors import DataError
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.training.loader import LabelledDay, Users, labelled_day, labelled_rows
from jobs.training.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Split:
    """Days shown: first to last of training, then validation, then test."""

    train: tuple[str, str]
    validation: tuple[str, str]
    test: tuple[str, str]

    def days(self, part: str) -> list[str]:
        """The days of `train`, `validation` or `test`."""
        return day_range(*getattr(self, part))


def pins(lake: Lake) -> dict[str, int]:
    """Versions of what a result of all days depends on: {"<table>/<ds>": version}."""
    return {
        f"{t}/{ds}": p.version
        for t in ("examples", "labels", "item_aggregates")
        for ds, p in lake.partitions(t).items()
    }


def shown_on(lake: Lake, dataset: Dataset, ds: str) -> LabelledDay:
    """What was shown on `ds`, with the labels of every task that had become final by the lake's end."""
    known = lake.partitions("labels")
    tasks = [t for t in dataset.tasks if add_days(ds, t.matures_after) in known]
    found = [
        labelled_day(
            lake,
            dataset,
            add_days(ds, after),
            tasks=[t.name for t in tasks if t.matures_after == after],
        )
        for after in sorted({t.matures_after for t in tasks})
    ]
    inputs = {k: v for day in found for k, v in day.inputs.items()}
    return LabelledDay(ds=ds, shown=tuple(s for day in found for s in day.shown), inputs=inputs)


def rows_of(
    lake: Lake, dataset: Dataset, day: LabelledDay, *, share: float, seed: int | None, **more: Any
) -> Iterator[Rows]:
    """The decoded rows of a day, of `share` of all users, in an order given by `seed`."""
    return labelled_rows(lake, dataset, day.shown, users=Users.ALL, share=share, seed=seed, **more)


def base_rates(
    lake: Lake, dataset: Dataset, days: Sequence[str], tasks: Sequence[str]
) -> dict[str, float]:
    """By task of `tasks`, the positive share of the labels of what was shown on `days`.

    Raises:
        DataError: a task has no label there.
    """
    found = dict.fromkeys(tasks, (0, 0))
    for ds in days:
        counts = shown_on(lake, dataset, ds).counts()
        for task, (positives, labels) in found.items():
            more = counts.get(task, (0, 0))
            found[task] = (positives + more[0], labels + more[1])
    for task, (_, labels) in found.items():
        if not labels:
            raise DataError(
                f"task {task} has no label of {days[0]} to {days[-1]}: train on more days"
            )
    return {task: positives / labels for task, (positives, labels) in found.items()}
