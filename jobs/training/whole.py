"""The model of a snapshot as it was trained: what may be scored, judged and published from.

Training goes on from a snapshot of an earlier spec, whatever that lacks (`Learner.taken`). A model with
first weights among its weights, or without an input that it learned to read, says nothing that holds.
"""

from __future__ import annotations

import torch

from feature_store.errors import DataError, SpecError
from feature_store.spec import Dataset
from jobs.training.checkpoints import Checkpoints, Snapshot
from jobs.training.learner import Learner
from jobs.training.presets import Preset
from jobs.training.trainer import choose_device

_SERVED = ("weights", "axes")


class NotWholeError(DataError):
    """A snapshot does not fit the spec.

    Args:
        snapshot: its id.
        misfit: what it lacks, or was trained with and the spec has not.
        remedy: what to do.
    """

    def __init__(self, snapshot: str, misfit: str, remedy: str) -> None:
        self.fact = f"snapshot {snapshot} of another spec {misfit}"
        super().__init__(f"{self.fact}: {remedy}")


def recorded_preset(snapshot: Snapshot) -> Preset:
    """The configuration that `snapshot` was trained with.

    Raises:
        DataError: this code does not know it.
    """
    try:
        return Preset.from_plain(snapshot.config, f"snapshot {snapshot.id}: config")
    except SpecError as error:
        raise DataError(
            f"{error}; other code wrote it: check out that version, or train the model again from its "
            "first day"
        ) from None


def whole_learner(
    dataset: Dataset, checkpoints: Checkpoints, snapshot: Snapshot, *, ds: str
) -> Learner:
    """A new model with the weights of `snapshot`, in the shape that it was trained in.

    Tasks that the spec has got since are no part of it: see `Learner.taken`.

    Args:
        ds: the day that wants it.

    Raises:
        NotWholeError: it was trained with other inputs than the spec has.
        DataError: it is damaged, or this code does not know its configuration.
    """
    preset = recorded_preset(snapshot)
    state = checkpoints.load(snapshot.id)
    torch.set_num_threads(preset.training.threads)
    learner = Learner(dataset, preset, choose_device(), {name: state[name] for name in _SERVED})
    if misfit := learner.taken.misfit():
        remedy = f"run {checkpoints.command(ds)} again, whose champion will fit"
        raise NotWholeError(snapshot.id, misfit, remedy)
    return learner
