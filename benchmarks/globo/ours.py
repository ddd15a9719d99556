"""Our own models in the comparison: a preset, trained day by day in one pass, then frozen and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.globo.data import Split, rows_of, shown_on
from benchmarks.globo.histories import HISTORIES
from benchmarks.globo.results import PARTS, Predictions, joined
from feature_store.errors import SpecError
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.training.config import to_plain
from jobs.training.ids import seed_of
from jobs.training.loader import cuts
from jobs.training.loop import Learner, Scored, choose_device, score, train
from jobs.training.presets import Preset, preset
from models.batch import Batch
from models.features import feature_plan


class _Seeing(Learner):
    """A learner of a preset to which a batch is what `seen` makes of it."""

    def __init__(
        self, dataset: Dataset, preset: Preset, device: torch.device, seen: Callable[[Batch], Batch]
    ) -> None:
        super().__init__(dataset, preset, device)
        self.seen = seen

    def step(self, batch: Batch) -> dict[str, Tensor]:
        return super().step(self.seen(batch))

    def probabilities(self, batch: Batch) -> Tensor:
        return super().probabilities(self.seen(batch))


class Ours:
    """One of our models.

    Args:
        lake, dataset: where the rows are.
        model: name of its preset.
        split: of the days.
        share: of all users.
        epochs: passes over each day, if other than the preset's.
    """

    def __init__(
        self, lake: Lake, dataset: Dataset, model: str, split: Split, *, share: float,
        epochs: int | None,
    ) -> None:  # fmt: skip
        # `sequence:stale`, `sequence:shuffled`: the preset on other histories
        name, _, histories = model.partition(":")
        if histories not in ("", *HISTORIES):
            raise SpecError(
                f"--models: {model!r} has no such histories; known are {', '.join(HISTORIES)}"
            )
        self.histories = HISTORIES.get(histories)
        found = preset(dataset, name)
        if epochs is not None:
            found = replace(found, training=replace(found.training, epochs=epochs))
        self.preset: Preset = found
        self.lake, self.dataset, self.model, self.split = lake, dataset, model, split
        self.share = share

    def config(self) -> dict[str, Any]:
        """What a result depends on beside the data."""
        return to_plain(self.preset)

    def run(self, tasks: Sequence[str], seed: int) -> tuple[Predictions, dict[str, Any]]:
        """Predictions of `tasks` for validation and test, and what is worth knowing."""
        config = self.preset.training
        torch.set_num_threads(config.threads)
        torch.manual_seed(seed_of("init", self.dataset.name, self.model, seed))
        learner = self._learner()
        seconds = 0.0
        for ds in self.split.days("train"):
            learner.keep_parent()
            done = train(
                learner,
                lambda epoch, skip, ds=ds: self._batches(ds, seed_of(ds, self.model, seed, epoch)),
                seed=seed_of("train", ds, self.model, seed),
            )
            seconds += done.seconds
            print(f"  {self.model} seed {seed}: {ds} in {done.seconds:.0f} s", flush=True)
        found = []
        for part in PARTS:
            for ds in self.split.days(part):
                scored = score(self.dataset, learner, self._rows(ds, None), config.inference)
                found.append(_predictions(self.dataset, scored, part, tasks))
        return joined(found), {"seconds": seconds, "device": learner.device.type}

    def _batches(self, ds: str, seed: int) -> Iterator[Batch]:
        for rows in self._rows(ds, seed):
            for lo, hi in cuts(rows, self.preset.training.limits):
                yield rows.batch(lo, hi)

    def _learner(self) -> Learner:
        of = self.dataset, self.preset, choose_device()
        if self.histories is None:
            return Learner(*of)
        return _Seeing(*of, seen=partial(self.histories, plan=feature_plan(self.dataset)))

    def _rows(self, ds: str, seed: int | None) -> Any:
        day = shown_on(self.lake, self.dataset, ds)
        return rows_of(
            self.lake, self.dataset, day, share=self.share, seed=seed,
            history=self.preset.history, user_features=self.preset.user_features,
            limits=self.preset.training.limits,
        )  # fmt: skip


def _predictions(dataset: Dataset, scored: Scored, part: str, tasks: Sequence[str]) -> Predictions:
    names = np.array([t.name for t in dataset.tasks])
    mine = scored.where(np.isin(names[scored.task], list(tasks)))
    return Predictions(
        task=names[mine.task],
        part=np.full(len(mine), part),
        user_id=mine.user_id,
        target_id=mine.target_id,
        label=mine.label,
        prediction=mine.prediction,
    )
