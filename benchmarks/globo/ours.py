"""Our own models in the comparison: a preset, trained day by day, then frozen and scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.globo.results import PARTS, Predictions, joined, of_scored
from benchmarks.globo.split import Split, rows_of, shown_on
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.training.ids import seed_of
from jobs.training.learner import Learner
from jobs.training.loader import cuts
from jobs.training.presets import preset
from jobs.training.rows import Rows
from jobs.training.scoring import score
from jobs.training.trainer import choose_device, train
from models.batch import Batch


class Ours:
    """One of our models.

    Args:
        lake, dataset: where the rows are.
        model: name of a preset.
        split: of the days.
        share: of all users.

    Raises:
        SpecError: no preset has that name.
    """

    def __init__(
        self, lake: Lake, dataset: Dataset, model: str, split: Split, *, share: float
    ) -> None:
        self.preset = preset(dataset, model)
        self.lake, self.dataset, self.model, self.split = lake, dataset, model, split
        self.share = share

    def config(self) -> dict[str, Any]:
        """What a result depends on beside the data."""
        return self.preset.plain()

    def run(self, tasks: Sequence[str], seed: int) -> tuple[Predictions, dict[str, Any]]:
        """Predictions of `tasks` for validation and test, and what is worth knowing."""
        config = self.preset.training
        torch.set_num_threads(config.threads)
        torch.manual_seed(seed_of("init", self.dataset.name, self.model, seed))
        learner = Learner(self.dataset, self.preset, choose_device())
        seconds = 0.0
        trained: set[str] = set()
        for ds in self.split.days("train"):
            learner.keep_parent(trained)
            done = train(
                learner, partial(self._epoch, ds, seed), seed=seed_of("train", ds, self.model, seed)
            )
            trained |= {t.name for t, n in zip(self.dataset.tasks, done.labels, strict=True) if n}
            seconds += done.seconds
            print(f"  {self.model} seed {seed}: {ds} in {done.seconds:.0f} s", flush=True)
        names = np.array([t.name for t in self.dataset.tasks])
        found = []
        for part in PARTS:
            for ds in self.split.days(part):
                scored = score(self.dataset, learner, self._rows(ds, None), config.inference)
                mine = scored.where(np.isin(names[scored.task], list(tasks)))
                found.append(of_scored(self.dataset, part, mine))
        return joined(found), {"seconds": seconds, "device": learner.device.type}

    def _epoch(self, ds: str, seed: int, epoch: int, skip: int) -> Iterator[Batch]:
        for rows in self._rows(ds, seed_of(ds, self.model, seed, epoch)):
            for lo, hi in cuts(rows, self.preset.training.limits):
                yield rows.batch(lo, hi)

    def _rows(self, ds: str, seed: int | None) -> Iterator[Rows]:
        day = shown_on(self.lake, self.dataset, ds)
        return rows_of(
            self.lake, self.dataset, day, share=self.share, seed=seed,
            history=self.preset.kind.history, user_features=self.preset.kind.user_features,
            limits=self.preset.training.limits,
        )  # fmt: skip
