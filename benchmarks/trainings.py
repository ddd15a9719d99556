"""Trainings of our models side by side over one split, and the tables of what sets them apart.

Each training is a file, and a run that was killed goes on when the same is typed again. `paradigm.py` and
`ablations.py` name the models.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.flags import add_share, flags
from benchmarks.ours import Ours
from benchmarks.results import PARTS, Result, Store, difference, interval_text, mean_ne
from benchmarks.split import Split, base_rates, newest_split, pins
from feature_store import datasets
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.settings import Settings
from jobs.training.checkpoints import replacing
from jobs.training.plots import ne_differences
from models.metrics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Sequence[Result]]
Differences = Mapping[str, Mapping[str, Interval]]


def training_flags(program: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser of what `Trainings.asked` reads."""
    found = flags(program, doc)
    found.add_argument("--first", help="day to train from; default: the first of the lake")
    add_share(found)
    return found


class Trainings:
    """Models and seeds over one split.

    Args:
        lake, dataset: of the rows.
        split: of the days.
        out: folder of everything that is kept.
        seeds: of every training.
        share: of all users.

    Attributes:
        base_rates: of the training days, by task.
        store: where results and tables are kept.

    Raises:
        DataError: a task has no label on the training days.
    """

    def __init__(
        self, lake: Lake, dataset: Dataset, split: Split, *, out: Path, seeds: Iterable[int],
        share: float = 1.0,
    ) -> None:  # fmt: skip
        self.lake, self.dataset, self.split = lake, dataset, split
        self.seeds, self.share = list(seeds), share
        self.store = Store(out / dataset.name)
        tasks = [task.name for task in dataset.tasks]
        self.base_rates = base_rates(lake, dataset, split.days("train"), tasks)

    @classmethod
    def asked(cls, args: argparse.Namespace) -> Trainings:
        """Over the lake in HEADWATER_HOME, as a command line with the flags of `training_flags` says.

        Raises:
            HeadwaterError: the dataset is unknown, or the lake has too few days of it.
        """
        dataset = datasets.get(args.dataset)
        lake = Lake(Settings.from_env().lake_root, dataset)
        return cls(
            lake, dataset, newest_split(lake, dataset, first=args.first), out=args.out,
            seeds=map(int, args.seeds), share=args.share,
        )  # fmt: skip

    def run(self, names: Sequence[str]) -> dict[str, list[Result]]:
        """By name as in `ours.py`, a result of each seed: what is done, is read.

        Raises:
            SpecError: a name does not make a model; none is trained then.
        """
        of = self.lake, self.dataset
        models = {name: Ours(*of, name, self.split, share=self.share) for name in names}
        data = {
            "spec": self.dataset.hash, "split": asdict(self.split), "pins": pins(self.lake),
            "share": self.share,
        }  # fmt: skip
        tasks = list(self.base_rates)
        found: dict[str, list[Result]] = {name: [] for name in models}
        for seed in self.seeds:
            for name, model in models.items():
                config = {"data": data, "model": model.config()}
                train = partial(model.run, tasks, seed)
                found[name].append(self.store.once(name, tasks, seed, config, train))
        return found

    def differences(self, one: Sequence[Result], other: Sequence[Result]) -> dict[str, Interval]:
        """By task, NE on the test of the one less that of the other."""
        return {
            task: difference(one, "test", other, "test", {task: rate})
            for task, rate in self.base_rates.items()
        }

    def write(self, name: str, rows: Results, differences: Differences) -> None:
        """Print the tables, and keep them as `<name>.md` and `<name>.json`, the differences as `<name>.png`.

        Args:
            rows: by title.
            differences: by title.
        """
        values = {
            "base_rates": self.base_rates,
            "ne": {
                row: {t: mean_ne(of, "test", {t: rate}) for t, rate in self.base_rates.items()}
                for row, of in rows.items()
            },
            "differences": {
                text: {task: asdict(found) for task, found in by_task.items()}
                for text, by_task in differences.items()
            },
        }
        text = markdown(rows, differences, self.base_rates, self.dataset)
        self.store.write_table(text, values, name=name)
        if differences:
            with replacing(self.store.folder / f"{name}.png") as staging:
                self._drawn(name, differences).savefig(staging, format="png", dpi=120)

    def _drawn(self, name: str, differences: Differences) -> Figure:
        panels = {
            title: [
                (text, by_task[task].mean, by_task[task].low, by_task[task].high)
                for text, by_task in differences.items()
            ]
            for task, title in zip(self.base_rates, _titles(self.dataset), strict=True)
        }
        made_up = " (simulated data)" if self.dataset.simulated else ""
        days = " to ".join(dict.fromkeys(self.split.test))
        title = f"{self.dataset.name}, {name}, test {days}{made_up}"
        return ne_differences(panels, title=title, axis="difference in NE")


def markdown(
    rows: Results, differences: Differences, rates: Mapping[str, float], dataset: Dataset
) -> str:
    """NE of each row on validation and test, and the differences on the test."""
    titles, out = _titles(dataset), []
    for part in PARTS:
        out += _head([f"NE on the {part}", *titles, "seconds of a training"])
        for row, of in rows.items():
            cells = [f"{mean_ne(of, part, {task: rate}):.4f}" for task, rate in rates.items()]
            seconds = np.mean([r.facts["seconds"] for r in of])
            out.append(f"| {row} | {' | '.join(cells)} | {seconds:.0f} |")
    out += _head(["test, difference", *titles])
    for text, by_task in differences.items():
        out.append(f"| {text} | {' | '.join(interval_text(by_task[task]) for task in rates)} |")
    seeds = {r.seed for of in rows.values() for r in of}
    made_up = "; simulated data" if dataset.simulated else ""
    return "\n".join(out).lstrip() + f"\n\n{len(seeds)} seed(s){made_up}\n"


def _titles(dataset: Dataset) -> list[str]:
    return [f"{t.name}{' (sampled)' if t.sampled else ''}" for t in dataset.tasks]


def _head(columns: Sequence[str]) -> list[str]:
    return [f"\n| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
