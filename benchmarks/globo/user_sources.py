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

Each says what it depends on (`pins`, which raises where something is missing), and gives the
embeddings of the rows of batches. `Fresh` has one for each moment at which a row has targets, so it
is asked about batches that `by_moment` has cut; all others have one a day.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from feature_store.days import HOUR_US, shift
from feature_store.embeddings import EmbeddingKind, UserEmbeddings, pooled, read_embeddings
from feature_store.errors import SpecError
from feature_store.lake import Lake
from feature_store.spec import Dataset
from jobs.publish_embeddings import POOLED_DAYS, UserRows, embedded
from jobs.settings import Settings
from jobs.training.checkpoints import Checkpoints
from jobs.training.config import to_plain
from jobs.training.downstream import Loaded
from jobs.training.ids import int64_ids, seed_of
from jobs.training.loader import user_batches
from jobs.training.loop import Learner, choose_device
from jobs.training.presets import Preset, preset
from jobs.training.whole import whole_learner
from models.batch import Batch
from models.downstream import Published
from models.history import visible_pairs


class Source(Protocol):
    """User embeddings of one kind."""

    @property
    def name(self) -> str:
        """Letters, digits and underscores."""

    @property
    def per_moment(self) -> bool:
        """Whether it is asked about batches that `by_moment` has cut."""

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """What the embeddings of targets shown on `days` depend on.

        Raises:
            HeadwaterError: a partition or a snapshot is missing.
        """

    def of(self, ds: str, items: Sequence[Loaded]) -> list[Published]:
        """The embeddings of the rows of each batch; all of them were shown on `ds`."""


class Reader:
    """What was published, read once for each model, day and kind.

    Args:
        lake: of it.
        users: (n,) int64 ids of those who are asked about; others are not kept.
    """

    def __init__(self, lake: Lake, users: np.ndarray) -> None:
        self.lake, self.users = lake, users
        self._read: dict[tuple[str, str, EmbeddingKind], UserEmbeddings] = {}

    def read(self, model: str, ds: str, kind: EmbeddingKind) -> UserEmbeddings:
        """Embeddings of `users`, by int64 id."""
        key = model, ds, kind
        if key not in self._read:
            found = read_embeddings(self.lake, model, ds, kind)
            ids = int64_ids(found.ids)
            mine = np.isin(ids, self.users)
            self._read[key] = replace(found, ids=pa.array(ids[mine]), values=found.values[mine])
        return self._read[key]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What `model` published `lag_days` before the target's day: made from events before the end of
    that day less `serve_delay`."""

    reader: Reader
    model: str
    kind: EmbeddingKind = EmbeddingKind.POOLED
    lag_days: int = 1
    per_moment = False

    @property
    def name(self) -> str:
        """The model's where it is what is served."""
        served = (self.kind, self.lag_days) == (EmbeddingKind.POOLED, 1)
        return self.model if served else f"{self.model}_{self.kind}_{self.lag_days}d"

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """Versions of the partitions."""
        read = [shift(ds, -self.lag_days) for ds in days]
        return self.reader.lake.require("user_embeddings", read, self.model)

    def of(self, ds: str, items: Sequence[Loaded]) -> list[Published]:
        """(R, K, D) each."""
        return looked_up(self.reader.read(self.model, shift(ds, -self.lag_days), self.kind), items)


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Whether `source` has the user: its embeddings with every value zero."""

    source: Source
    name = "flag"
    per_moment = False

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """Those of `source`."""
        return self.source.pins(days)

    def of(self, ds: str, items: Sequence[Loaded]) -> list[Published]:
        """(R, K, D) zeros each."""
        found = self.source.of(ds, items)
        return [Published(torch.zeros_like(p.values), p.present) for p in found]


@dataclass(frozen=True, kw_only=True)
class RandomSum:
    """A SUM with its first weights, one draw of them, published as a trained one is: from the
    `aggregates` of the day before, in float16, pooled with the two days before that.

    Its numeric features are standardised by the first batch of `first_day`, as those of a trained
    one are by the batches that it was trained on.

    Args:
        lake, dataset: of the aggregates.
        users: (n,) int64 ids of those who are asked about.
        first_day: of the aggregates that are read.
    """

    lake: Lake
    dataset: Dataset
    users: np.ndarray = field(repr=False)
    first_day: str
    name = "random_sum"
    per_moment = False

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """Versions of the partitions, and the model's shape."""
        read = sorted({day for ds in days for day in self._days(ds)})
        return {**self.lake.require("aggregates", read), "model": to_plain(self._preset)}

    def of(self, ds: str, items: Sequence[Loaded]) -> list[Published]:
        """(R, K, D) each."""
        today, *before = [self._raw(day) for day in self._days(ds)]
        mean, _ = pooled(today.ids, today.values, before)
        return looked_up(replace(today, kind=EmbeddingKind.POOLED, values=mean), items)

    def _days(self, ds: str) -> list[str]:
        """Newest first, as publishing pools them."""
        return [shift(ds, -i) for i in range(1, 1 + POOLED_DAYS)]

    @cached_property
    def _preset(self) -> Preset:
        return preset(self.dataset, "sum")

    @cached_property
    def _learner(self) -> Learner:
        torch.manual_seed(seed_of("init", self.dataset.name, self.name))
        learner = Learner(self.dataset, self._preset, choose_device())
        rows = UserRows.of(self.lake, self._preset, self.first_day)
        _, batch = next(user_batches(self.dataset, rows.batches(self.lake, self._preset)))
        with torch.no_grad():
            learner.model.train().user_embeddings(batch.to(learner.device))
        return learner

    @cached_property
    def _made(self) -> dict[str, UserEmbeddings]:
        return {}

    def _raw(self, ds: str) -> UserEmbeddings:
        """Of those of `users` who have aggregates of `ds`."""
        if ds not in self._made:
            found = made(self._learner, self.lake, ds, self.users)
            self._made[ds] = replace(found, values=found.values.astype(np.float16))
        return self._made[ds]


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


@dataclass(frozen=True, kw_only=True)
class Unrounded:
    """What a model published the day before its target's, raw, in float32: made again by its snapshot."""

    lake: Lake
    snapshots: Snapshots
    users: np.ndarray = field(repr=False)
    per_moment = False

    @property
    def name(self) -> str:
        """The model's and the type."""
        return f"{self.snapshots.model}_float32"

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """Snapshots by day, and versions of the partitions."""
        before = [shift(ds, -1) for ds in days]
        rows = [UserRows.of(self.lake, self.snapshots.preset, ds).inputs for ds in before]
        return {**self.snapshots.pins(before), **{k: v for of in rows for k, v in of.items()}}

    def of(self, ds: str, items: Sequence[Loaded]) -> list[Published]:
        """(R, K, D) each."""
        before = shift(ds, -1)
        if before not in self._made:
            learner = self.snapshots.learner(before)
            self._made[before] = made(learner, self.lake, before, self.users)
        return looked_up(self._made[before], items)

    @cached_property
    def _made(self) -> dict[str, UserEmbeddings]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """What the snapshot of the day before makes of the events that were available `lag_hours` before
    the target's `as_of`. That snapshot was trained on prefixes that end at midnight less `serve_delay`.

    Raises:
        SpecError: the model does not read events.
    """

    snapshots: Snapshots
    lag_hours: int
    per_moment = True

    def __post_init__(self) -> None:
        if not self.snapshots.preset.history:
            raise SpecError(
                f"Fresh.snapshots are of {self.snapshots.model!r}, which reads no events: name another"
            )

    @property
    def name(self) -> str:
        """The model's and the hours."""
        return f"{self.snapshots.model}_{self.lag_hours}h"

    def pins(self, days: Sequence[str]) -> dict[str, Any]:
        """Snapshots by day."""
        return self.snapshots.pins([shift(ds, -1) for ds in days])

    def of(self, ds: str, items: Sequence[Loaded]) -> list[Published]:
        """(M, K, D) each, of batches of M moments."""
        learner = self.snapshots.learner(shift(ds, -1))
        return [self._published(learner, item) for item in items]

    @torch.no_grad()
    def _published(self, learner: Learner, item: Loaded) -> Published:
        # what is known of pairs of items is read by no user embedding, and costs the most
        batch = replace(item.rows, together=None).batch(item.lo, item.hi)
        row, as_of, _ = moments(batch)
        at = as_of - self.lag_hours * HOUR_US
        seen = available_before(batch, row, at).to(learner.device)
        end = seen.event_offsets.diff()
        model = learner.model.eval()
        values = model.user_embeddings(seen, end, at.to(end.device)).cpu()
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


def looked_up(found: UserEmbeddings, items: Sequence[Loaded]) -> list[Published]:
    """What `found`, which is by int64 id, has of the users of each batch's rows."""
    out = []
    for item in items:
        values, present = found.lookup(item.batch.user_id.numpy())
        out.append(Published(torch.from_numpy(values).float(), torch.from_numpy(present)))
    return out


def events_of(batch: Batch, event: Tensor, sizes: Tensor) -> dict[str, Any]:
    """The fields of a batch whose rows have `sizes` (R,) of the events `event`, row by row."""
    return {
        "event_offsets": F.pad(sizes.cumsum(0), (1, 0)),
        "event_stream": batch.event_stream[event],
        "event_time": batch.event_time[event],
        "event_available": batch.event_available[event],
        "event_ids": {k: v[event] for k, v in batch.event_ids.items()},
        "event_floats": {k: v[event] for k, v in batch.event_floats.items()},
    }


def moments(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The M instants at which rows have targets: row (M,), as_of (M,) and each target's moment (T,)."""
    row, as_of = batch.row_of_target, batch.as_of
    first = F.pad((row.diff() != 0) | (as_of.diff() != 0), (1, 0), value=True)[: len(row)]
    return row[first], as_of[first], first.cumsum(0) - 1


def by_moment(batch: Batch) -> Batch:
    """The same targets in M rows, one for each moment, without events and user features."""
    row, _, of_target = moments(batch)
    sizes = torch.bincount(of_target, minlength=len(row))
    return replace(
        batch,
        user_id=batch.user_id[row],
        row_of_target=of_target,
        target_offsets=F.pad(sizes.cumsum(0), (1, 0)),
        history_end=torch.zeros_like(of_target),
        has_aggregates=torch.zeros(len(row)),
        user_ids={},
        sparse={},
        dense=torch.zeros(len(row), 0),
        **events_of(batch, of_target[:0], torch.zeros_like(row)),
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
        **events_of(batch, pairs.event[known], sizes),
    )
