"""Our own models in the comparison: a preset, trained day by day, then frozen and scored.

A name is a preset and what is changed of it, `<preset>[:<histories>][:<field>=<value>]...`: histories
of `histories.py`; fields of the model's configuration, or of its training where they begin with
`training.`; dotted into what is inside them, tuples by plus.

    sequence   sequence:shuffled   hybrid:layers=1   sum:mix.sizes=12+6   hybrid:training.epochs=1
    sequence:purchases=0   sequence:without=price
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.histories import Seen, histories
from benchmarks.results import PARTS, Predictions, joined, of_scored
from benchmarks.split import Split, rows_of, shown_on
from feature_store.errors import SpecError
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.training.config import to_plain
from jobs.training.ids import seed_of
from jobs.training.loader import cuts
from jobs.training.loop import Learner, choose_device, score, train
from jobs.training.presets import Preset, preset
from models.batch import Batch
from models.features import feature_plan


class _Seeing(Learner):
    """A learner of a preset to which a batch is what `seen` makes of it, one after the other."""

    def __init__(
        self, dataset: Dataset, preset: Preset, device: torch.device, seen: Sequence[Seen]
    ) -> None:
        super().__init__(dataset, preset, device)
        self.plan, self.seen = feature_plan(dataset), seen

    def step(self, batch: Batch) -> dict[str, Tensor]:
        return super().step(self._see(batch))

    def probabilities(self, batch: Batch) -> Tensor:
        return super().probabilities(self._see(batch))

    def _see(self, batch: Batch) -> Batch:
        return reduce(lambda found, see: see(found, self.plan), self.seen, batch)


class Ours:
    """One of our models.

    Args:
        lake, dataset: where the rows are.
        model: its name.
        split: of the days.
        share: of all users.

    Raises:
        SpecError: the name does not make a model.
    """

    def __init__(
        self, lake: Lake, dataset: Dataset, model: str, split: Split, *, share: float
    ) -> None:
        self.preset, self.seen = variant(dataset, model)
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
        of = self.dataset, self.preset, choose_device()
        learner = _Seeing(*of, self.seen) if self.seen else Learner(*of)
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

    def _rows(self, ds: str, seed: int | None) -> Any:
        day = shown_on(self.lake, self.dataset, ds)
        return rows_of(
            self.lake, self.dataset, day, share=self.share, seed=seed,
            history=self.preset.history, user_features=self.preset.user_features,
            limits=self.preset.training.limits,
        )  # fmt: skip


def variant(dataset: Dataset, model: str) -> tuple[Preset, list[Seen]]:
    """The preset and the histories that a name stands for.

    Raises:
        SpecError: the name does not make a model.
    """
    name, *changes = model.split(":")
    found, seen = preset(dataset, name), []
    for change in changes:
        see = histories(change, feature_plan(dataset))
        if see is None:
            found = changed(found, *change.split("=", 1))
        else:
            seen.append(see)
    try:
        with torch.random.fork_rng():
            found.build(dataset, torch.device("cpu"))
    except ValueError as error:
        raise SpecError(f"--models: {model!r} cannot be built: {error}") from error
    return found, seen


def changed(found: Preset, field: str, value: str) -> Preset:
    """The preset with one field of its model's or of its training's configuration set to `value`.

    Raises:
        SpecError: there is no such field, or it cannot have that value.
    """
    inside = "training" if field.startswith("training.") else found.architecture.value
    config = getattr(found, inside)
    if config is None:
        raise SpecError(f"--models: {found.architecture} has no configuration to change {field} of")
    try:
        new = _with(config, field.removeprefix("training.").split("."), value)
    except (AttributeError, ValueError) as error:
        raise SpecError(
            f"--models: {field}={value} cannot be set ({error}); name a field of {type(config).__name__}"
        ) from error
    return replace(found, **{inside: new})


def _with(config: Any, path: Sequence[str], value: str) -> Any:
    name, *deeper = path
    before = getattr(config, name)
    return replace(config, **{name: _with(before, deeper, value) if deeper else _as(before, value)})


def _as(before: Any, value: str) -> Any:
    """`value` as what `before` is."""
    if isinstance(before, bool):
        return bool(int(value))
    if isinstance(before, tuple):
        return tuple(_as(before[0] if before else "", x) for x in value.split("+"))
    if isinstance(before, int | float | str):
        return type(before)(value)  # enums too
    raise ValueError(f"a {type(before).__name__} is not one value")
