"""Where a downstream model's user embeddings come from: what was published, and what it is held against.

    Stored       what a model published, one or more days before the target's day
    Flag         zeros where the user has one of those, and nothing else: is it the history, or that
                 there is one?
    RandomSum    what a SUM with its first weights would have published: is it the training, or the
                 features?
    Unrounded    what a model published the day before, but not rounded to float16: what do half the bytes
                 cost?
    Fresh        what the day before's snapshot makes of the events that were available some hours
                 before the target: what does waiting for the night cost?

`Fresh` has an embedding for each moment at which a row has targets, so it is asked about batches that
`by_moment` has cut; all others have one of each user a day.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from feature_store.days import HOUR_US, add_days
from feature_store.embeddings import EmbeddingKind, UserEmbeddings, pooled, read_embeddings
from feature_store.errors import SpecError
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.publish_embeddings import POOLED_DAYS, UserRows, embedded
from jobs.settings import Settings
from jobs.training.checkpoints import Checkpoints
from jobs.training.downstream import Loaded
from jobs.training.ids import int64_ids, seed_of
from jobs.training.learner import Learner
from jobs.training.loader import user_batches
from jobs.training.presets import Preset, preset
from jobs.training.trainer import choose_device
from jobs.training.whole import whole_learner
from models.batch import Batch
from models.downstream import Published
from models.history import visible_pairs

Read = Callable[[str, str, EmbeddingKind], UserEmbeddings]  # of a model and a day


class Source:
    """User embeddings of one kind.

    Attributes:
        name: letters, digits and underscores.
        per_moment: whether it is asked about batches that `by_moment` has cut.
    """

    name: str
    per_moment = False

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """What the embeddings of targets shown on `days` depend on.

        Raises:
            HeadwaterError: a partition or a snapshot is missing.
        """
        raise NotImplementedError

    def embeddings(self, ds: str) -> UserEmbeddings:
        """What targets shown on `ds` read, by int64 id."""
        raise NotImplementedError

    def of(self, ds: str, items: Sequence[Loaded]) -> list[Published]:
        """(R, K, D) of the rows of each batch; all of them were shown on `ds`."""
        found, out = self.embeddings(ds), []
        for item in items:
            values, present = found.lookup(item.batch.user_id.numpy())
            out.append(Published(torch.from_numpy(values).float(), torch.from_numpy(present)))
        return out


def read_of(
    lake: Lake, users: np.ndarray, model: str, ds: str, kind: EmbeddingKind
) -> UserEmbeddings:
    """What was published, of `users`, (n,) int64 ids, alone; by int64 id."""
    found = read_embeddings(lake, model, ds, kind)
    ids = int64_ids(found.ids)
    mine = np.isin(ids, users)
    return replace(found, ids=pa.array(ids[mine]), values=found.values[mine])


class Stored(Source):
    """What `model` published `lag_days` before the target's day: made from events before the end of
    that day less `serve_delay`."""

    def __init__(
        self, lake: Lake, read: Read, model: str, *,
        kind: EmbeddingKind = EmbeddingKind.POOLED, lag_days: int = 1,
    ) -> None:  # fmt: skip
        self.lake, self.read, self.model, self.kind, self.lag = lake, read, model, kind, lag_days
        served = (kind, lag_days) == (EmbeddingKind.POOLED, 1)
        self.name = model if served else f"{model}_{kind}_{lag_days}d"

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """Versions of the partitions."""
        read = [add_days(ds, -self.lag) for ds in days]
        return self.lake.require("user_embeddings", read, self.model)

    def embeddings(self, ds: str) -> UserEmbeddings:
        return self.read(self.model, add_days(ds, -self.lag), self.kind)


class Flag(Source):
    """Whether `source` has the user: its embeddings with every value zero."""

    name = "flag"

    def __init__(self, source: Source) -> None:
        self.source = source

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """Those of `source`."""
        return self.source.pins(days)

    def embeddings(self, ds: str) -> UserEmbeddings:
        found = self.source.embeddings(ds)
        return replace(found, values=np.zeros_like(found.values))


class RandomSum(Source):
    """A SUM with its first weights, one draw of them, published as a trained one is: from the
    `aggregates` of the day before, in float16, pooled with the two days before that.

    Its numeric features are standardised by the first batch of `first_day`, as those of a trained
    one are by the batches that it was trained on.

    Args:
        lake: of the aggregates.
        users: (n,) int64 ids of those who are asked about.
        first_day: of the aggregates that are read.
    """

    name = "random_sum"

    def __init__(self, lake: Lake, users: np.ndarray, *, first_day: str) -> None:
        self.lake, self.users, self.first_day = lake, users, first_day
        self.preset = preset(lake.dataset, "sum")
        self._raw: dict[str, UserEmbeddings] = {}

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """Versions of the partitions, and the model's shape."""
        read = sorted({day for ds in days for day in self._days(ds)})
        return {**self.lake.require("aggregates", read), "model": self.preset.plain()}

    def embeddings(self, ds: str) -> UserEmbeddings:
        for day in self._days(ds):
            if day not in self._raw:
                found = made(self._learner, self.lake, day, self.users)
                self._raw[day] = replace(found, values=found.values.astype(np.float16))
        today, *before = [self._raw[day] for day in self._days(ds)]
        mean, _ = pooled(today.ids, today.values, before)
        return replace(today, kind=EmbeddingKind.POOLED, values=mean)

    def _days(self, ds: str) -> list[str]:
        """Newest first, as publishing pools them."""
        return [add_days(ds, -i) for i in range(1, 1 + POOLED_DAYS)]

    @cached_property
    def _learner(self) -> Learner:
        dataset = self.lake.dataset
        torch.manual_seed(seed_of("init", dataset.name, self.name))
        learner = Learner(dataset, self.preset, choose_device())
        rows = UserRows.of(self.lake, self.preset, self.first_day)
        _, batch = next(user_batches(dataset, rows.batches(self.lake, self.preset)))
        with torch.no_grad():
            learner.model.train().user_embeddings(batch.to(learner.device))
        return learner


@dataclass(frozen=True, kw_only=True)
class Snapshots:
    """The champions of a model, by the day that they were trained on."""

    dataset: Dataset
    settings: Settings
    model: str

    @property
    def preset(self) -> Preset:
        """The model's."""
        return preset(self.dataset, self.model)

    def pins(self, days: Sequence[str]) -> dict[str, str]:
        """Their ids by day.

        Raises:
            HeadwaterError: a day has none.
        """
        return {ds: self._checkpoints.require_champion(ds).id for ds in days}

    def learner(self, ds: str) -> Learner:
        """That of `ds`."""
        champion = self._checkpoints.require_champion(ds)
        return whole_learner(self.dataset, self._checkpoints, champion, ds=ds)

    @property
    def _checkpoints(self) -> Checkpoints:
        home = self.settings.snapshot_dir(self.dataset.name, self.model, self.dataset.first_day)
        return Checkpoints(home.parent)


class Unrounded(Source):
    """What a model published the day before its target's, raw, in float32: made again by its snapshot.

    Args:
        lake, snapshots: of the model.
        users: (n,) int64 ids of those who are asked about.
    """

    def __init__(self, lake: Lake, snapshots: Snapshots, users: np.ndarray) -> None:
        self.lake, self.snapshots, self.users = lake, snapshots, users
        self.name = f"{snapshots.model}_float32"
        self._made: dict[str, UserEmbeddings] = {}

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """Snapshots by day, and versions of the partitions."""
        before = [add_days(ds, -1) for ds in days]
        rows = [UserRows.of(self.lake, self.snapshots.preset, ds).inputs for ds in before]
        return {**self.snapshots.pins(before), **{k: v for of in rows for k, v in of.items()}}

    def embeddings(self, ds: str) -> UserEmbeddings:
        before = add_days(ds, -1)
        if ds not in self._made:
            learner = self.snapshots.learner(before)
            self._made[ds] = made(learner, self.lake, before, self.users)
        return self._made[ds]


class Fresh(Source):
    """What the snapshot of the day before makes of the events that were available `lag_hours` before
    the target's `as_of`. That snapshot was trained on prefixes that end at midnight less `serve_delay`.

    Raises:
        SpecError: the model does not read events.
    """

    per_moment = True

    def __init__(self, snapshots: Snapshots, *, lag_hours: int) -> None:
        if not snapshots.preset.kind.history:
            raise SpecError(
                f"Fresh.snapshots are of {snapshots.model!r}, which reads no events: name another"
            )
        self.snapshots, self.lag_us = snapshots, lag_hours * HOUR_US
        self.name = f"{snapshots.model}_{lag_hours}h"

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """Snapshots by day."""
        return self.snapshots.pins([add_days(ds, -1) for ds in days])

    def of(self, ds: str, items: Sequence[Loaded]) -> list[Published]:
        """(M, K, D) each, of batches of M moments."""
        learner = self.snapshots.learner(add_days(ds, -1))
        return [self._published(learner, item) for item in items]

    @torch.no_grad()
    def _published(self, learner: Learner, item: Loaded) -> Published:
        # what is known of pairs of items is read by no user embedding, and costs the most
        batch = replace(item.rows, together=None).batch(item.lo, item.hi)
        row, as_of, _ = moments(batch)
        at = as_of - self.lag_us
        seen = available_before(batch, row, at).to(learner.device)
        end = seen.event_offsets.diff()
        model = learner.model.eval()
        values = model.user_embeddings(seen, at.to(end.device)).cpu()
        return Published(values.half().float(), end.cpu() > 0)  # without events none is published


def made(learner: Learner, lake: Lake, ds: str, users: np.ndarray) -> UserEmbeddings:
    """What the learner makes of those of `users` who have a row at the end of `ds`, by int64 id, raw and
    in float32."""
    rows = UserRows.of(lake, learner.preset, ds).batches(lake, learner.preset)
    mine = (b.filter(pa.array(np.isin(int64_ids(b.column("user_id")), users))) for b in rows)
    ids, values = zip(*embedded(learner, ds, mine), strict=True)
    return UserEmbeddings(
        model="", ds=ds, kind=EmbeddingKind.RAW, snapshot="",
        ids=pa.array(np.concatenate([int64_ids(x) for x in ids])), values=np.concatenate(values),
    )  # fmt: skip


def moments(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The M instants at which rows have targets: row (M,), as_of (M,) and each target's moment (T,)."""
    row, as_of = batch.row_of_target, batch.as_of
    first = F.pad((row.diff() != 0) | (as_of.diff() != 0), (1, 0), value=True)[: len(row)]
    return row[first], as_of[first], first.cumsum(0) - 1


def by_moment(batch: Batch) -> Batch:
    """The same targets in M rows, one for each moment, without events and user features."""
    row, _, of_target = moments(batch)
    return replace(
        batch,
        user_id=batch.user_id[row],
        row_of_target=of_target,
        target_offsets=F.pad(torch.bincount(of_target, minlength=len(row)).cumsum(0), (1, 0)),
        history_end=torch.zeros_like(of_target),
        has_aggregates=torch.zeros(len(row)),
        user_ids={},
        sparse={},
        dense=torch.zeros(len(row), 0),
        **_events_of(batch, of_target[:0], torch.zeros_like(row)),
    )


def available_before(batch: Batch, row: Tensor, at: Tensor) -> Batch:
    """M rows without targets: of each `row` (M,) its events with `event_available < at` (M,)."""
    pairs = visible_pairs(batch.event_offsets, row, batch.event_offsets.diff()[row])
    known = batch.event_available[pairs.event] < at[pairs.query]
    sizes = torch.bincount(pairs.query[known], minlength=len(row))
    return replace(
        batch,
        user_id=batch.user_id[row],
        row_of_target=row[:0],
        target_offsets=torch.zeros(len(row) + 1, dtype=torch.int64),
        **_events_of(batch, pairs.event[known], sizes),
    )


def _events_of(batch: Batch, event: Tensor, sizes: Tensor) -> dict[str, Any]:
    """The fields of a batch whose rows have `sizes` (R,) of the events `event`, row by row."""
    return {
        "event_offsets": F.pad(sizes.cumsum(0), (1, 0)),
        "event_stream": batch.event_stream[event],
        "event_time": batch.event_time[event],
        "event_available": batch.event_available[event],
        "event_ids": {k: v[event] for k, v in batch.event_ids.items()},
        "event_floats": {k: v[event] for k, v in batch.event_floats.items()},
    }
