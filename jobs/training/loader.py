"""Delta partitions at pinned versions, through Arrow, to jagged batches: no JVM, bounded memory.

Record batches of `examples` fill a buffer of at most `buffer_bytes`; the buffer's rows are ordered
by a seeded hash of (user, part), joined with their labels, decoded once (`rows.py`), and cut into
consecutive batches that end before `max_targets` or `max_events` would be passed. The order within
a buffer does not depend on how the files lie, so a day that fits one buffer is trained on in the
same order however it was written.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.days import add_days
from feature_store.ledger import pin
from feature_store.spec import Dataset
from jobs.training.co_occurrence import CoOccurrences, days_read
from jobs.training.ids import held_out, in_share, int64_ids, mix
from jobs.training.labels import Labels
from jobs.training.rows import Rows, columns_of, unpacked_rows

if TYPE_CHECKING:
    from feature_store.lake import Lake
    from models.batch import Batch

# Arrow's buffers are read-only and tensors over them are only read.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

_SAMPLE = 0x73616D706C65


class Users(StrEnum):
    """Whose rows are read."""

    ALL = "all"
    TRAINING = "training"
    HELD_OUT = "held_out"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds memory.

    Args:
        max_targets, max_events: of one batch; a row that has more is a batch of its own (rows are
            bounded by the spec).
        buffer_bytes: Arrow bytes that are decoded, and shuffled, at once.
        read_rows: rows of one record batch.
    """

    max_targets: int = 4096
    max_events: int = 131_072
    buffer_bytes: int = 256 << 20
    read_rows: int = 8192


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The rows shown on one day, with those of their labels that became final on the day `final`, and what
    was counted about pairs of items by then."""

    ds: str
    final: str
    version: int
    labels: Labels
    together: CoOccurrences | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledDay:
    """Everything whose labels became final on `ds`, or on earlier days that were asked for beside it, at
    pinned versions.

    `inputs` is {"<table>/<ds>": version} of every partition that it reads.
    """

    ds: str
    shown: tuple[Shown, ...]
    inputs: dict[str, int]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Per task: positives and labels, held-out users included."""
        found: dict[str, tuple[int, int]] = {}
        for s in self.shown:
            for task, (positives, labels) in s.labels.counts().items():
                before = found.get(task, (0, 0))
                found[task] = (before[0] + positives, before[1] + labels)
        return found

    @property
    def today(self) -> tuple[Shown, ...]:
        """Of `shown`, what became final on `ds` itself."""
        return tuple(s for s in self.shown if s.final == self.ds)

    @property
    def final_days(self) -> list[str]:
        """The days whose labels are read, ascending."""
        return label_days(self.inputs)


def share_within(days: Iterable[LabelledDay], task: str, most: int) -> float:
    """Share of users whose labels of `task` on `days` are about `most`; 1 where all have no more."""
    total = sum(day.counts().get(task, (0, 0))[1] for day in days)
    return min(1.0, most / max(total, 1))


def labelled_day(
    lake: Lake,
    dataset: Dataset,
    ds: str,
    *,
    also: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
    inputs: dict[str, int] | None = None,
) -> LabelledDay:
    """The labels of `ds` and the examples that they belong to.

    Args:
        also: days before `ds` whose labels are read beside its own.
        tasks: only these; default all.
        inputs: versions to read at, as an earlier `LabelledDay.inputs` recorded them; default the
            newest that the ledger knows.

    Raises:
        MissingPartitionError: labels, or examples that labels point to, have not been written.
        StalePartitionError: one of them is not current, so that they may not belong together.
    """
    names = [t.name for t in dataset.tasks] if tasks is None else list(tasks)
    days = [*also, ds]
    found = lake.require("labels", days) if inputs is None else inputs
    used: dict[str, int] = {}
    shown = []
    for final in days:
        key = pin("labels", final)
        used[key] = found[key]
        columns = ["user_id", "shown_ds", "part", "task", "labels"]
        table = lake.read("labels", days=[final], columns=columns, version=used[key])
        for day in sorted({add_days(final, -dataset.task(n).matures_after) for n in names}):
            mine = [n for n in names if add_days(final, -dataset.task(n).matures_after) == day]
            rows = table.filter(pc.equal(table["shown_ds"], day))
            labels = Labels(dataset, rows, tasks=mine)
            if not labels.tasks:  # before the first day, or a day without targets
                continue
            key = pin("examples", day)
            used[key] = lake.require("examples", [day])[key] if inputs is None else inputs[key]
            shown.append(Shown(ds=day, final=final, version=used[key], labels=labels))
    together = _co_occurrences(lake, dataset, [s.ds for s in shown], inputs)
    if together is not None:
        used |= {pin("item_aggregates", d): version for d, version in together.versions.items()}
        shown = [replace(s, together=together) for s in shown]
    return LabelledDay(ds=ds, shown=tuple(shown), inputs=used)


def label_days(inputs: Mapping[str, int]) -> list[str]:
    """The days of the partitions of `labels` in `inputs`, ascending."""
    prefix = pin("labels", "")
    return sorted(key.removeprefix(prefix) for key in inputs if key.startswith(prefix))


def _co_occurrences(
    lake: Lake, dataset: Dataset, shown: Sequence[str], inputs: dict[str, int] | None
) -> CoOccurrences | None:
    if dataset.co_occurrence is None:
        return None
    prefix = pin("item_aggregates", "")
    if inputs is None:
        days = days_read(dataset, list(lake.partitions("item_aggregates")), shown)
        inputs = lake.require("item_aggregates", days)
    known = {k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}
    days = days_read(dataset, list(known), shown)
    return CoOccurrences(lake, dataset, {day: known[day] for day in days})


def labelled_batches(
    lake: Lake,
    dataset: Dataset,
    shown: Sequence[Shown],
    *,
    users: Users,
    history: bool = True,
    user_features: bool = True,
    seed: int | None = None,
    limits: Limits | None = None,
    skip: int = 0,
) -> Iterator[Batch]:
    """Batches of the labelled targets of the days `shown`, mixed; their rows keep the whole history.

    Args:
        users: all, or one side of the held-out split.
        history, user_features: False leaves those columns unread.
        seed: of the order; None: by user, still the same every time.
        skip: leave out so many batches from the start (to resume).
    """
    limits = limits or Limits()
    for rows in labelled_rows(
        lake, dataset, shown, users=users, history=history, user_features=user_features,
        seed=seed, limits=limits,
    ):  # fmt: skip
        for lo, hi in cuts(rows, limits):
            if skip > 0:
                skip -= 1
                continue
            yield rows.batch(lo, hi)


def labelled_rows(
    lake: Lake,
    dataset: Dataset,
    shown: Sequence[Shown],
    *,
    users: Users,
    history: bool = True,
    user_features: bool = True,
    seed: int | None = None,
    limits: Limits | None = None,
    share: float = 1.0,
) -> Iterator[Rows]:
    """The same as `labelled_batches`, a decoded buffer at a time.

    Args:
        share: of the users, by a hash that is the same on every day.
    """
    limits = limits or Limits()
    columns = columns_of(dataset, "examples", history=history, user_features=user_features)
    streams = [
        _labelled(
            lake, dataset, s, users=users, columns=columns, index=i, limits=limits, share=share
        )
        for i, s in enumerate(shown)
    ]
    buffer: list[tuple[int, pa.RecordBatch]] = []
    held = 0
    while streams:
        for stream in list(streams):  # in turn, so that tasks that mature on other days mix
            item = next(stream, None)
            if item is None:
                streams.remove(stream)
                continue
            buffer.append(item)
            held += item[1].nbytes
            if held >= limits.buffer_bytes:
                yield _decoded(dataset, shown, buffer, seed=seed)
                buffer, held = [], 0
    if buffer:
        yield _decoded(dataset, shown, buffer, seed=seed)


def _labelled(
    lake: Lake,
    dataset: Dataset,
    shown: Shown,
    *,
    users: Users,
    columns: list[str],
    index: int,
    limits: Limits,
    share: float,
) -> Iterator[tuple[int, pa.RecordBatch]]:
    for batch in lake.batches(
        "examples", days=[shown.ds], columns=columns, version=shown.version,
        batch_rows=limits.read_rows,
    ):  # fmt: skip
        ids = int64_ids(batch.column("user_id"))
        keep = shown.labels.labelled(ids, batch.column("part").to_numpy().astype(np.int64))
        if users is not Users.ALL:
            keep &= held_out(ids, dataset.held_out_share) == (users is Users.HELD_OUT)
        keep &= in_share(ids, share, _SAMPLE)
        if keep.any():
            yield index, batch if keep.all() else batch.filter(pa.array(keep))


def _decoded(
    dataset: Dataset,
    shown: Sequence[Shown],
    buffer: list[tuple[int, pa.RecordBatch]],
    *,
    seed: int | None,
) -> Rows:
    schema = buffer[0][1].schema
    table = pa.Table.from_batches([b.cast(schema) for _, b in buffer]).combine_chunks()
    day = np.concatenate([np.full(b.num_rows, i, np.int64) for i, b in buffer])
    ids = int64_ids(table["user_id"].combine_chunks())
    part = table["part"].combine_chunks().to_numpy().astype(np.int64)
    key = ids if seed is None else mix(mix(ids, seed).view(np.int64) ^ (part << 8) ^ day, seed)
    order = np.lexsort((part, day, ids, key))
    table = table.take(pa.array(order))
    # every day's counts are in each of them, and what a target may see of them follows from its as_of
    rows = replace(unpacked_rows(dataset, table), together=shown[0].together)
    labels = rows.labels
    day, ids, part = day[order], ids[order], part[order]
    lengths = np.diff(rows.target_offsets)
    for index, s in enumerate(shown):
        mine = day == index
        if not mine.any():
            continue
        offsets = np.zeros(int(mine.sum()) + 1, np.int64)
        np.cumsum(lengths[mine], out=offsets[1:])
        labels[np.repeat(mine, lengths)] = s.labels.of_rows(ids[mine], part[mine], offsets)
    return rows.labelled()


def cuts(rows: Rows, limits: Limits) -> list[tuple[int, int]]:
    """Consecutive row ranges of at most `max_targets` targets and `max_events` events."""
    out = []
    lo = 0
    while lo < len(rows):
        by_target = np.searchsorted(
            rows.target_offsets, rows.target_offsets[lo] + limits.max_targets, "right"
        )
        by_event = np.searchsorted(
            rows.event_offsets, rows.event_offsets[lo] + limits.max_events, "right"
        )
        hi = max(lo + 1, min(int(by_target), int(by_event)) - 1)
        hi = min(hi, len(rows), lo + limits.max_targets)
        out.append((lo, hi))
        lo = hi
    return out


def user_batches(
    dataset: Dataset,
    batches: Iterable[pa.RecordBatch],
    *,
    limits: Limits | None = None,
    cutoff: int | None = None,
) -> Iterator[tuple[pa.Array, Batch]]:
    """Rows of `aggregates` or `sequences` as batches without targets, with their `user_id` as stored.

    Args:
        cutoff: events with `available_time >= cutoff` are dropped (UTC microseconds).
    """
    limits = limits or Limits()
    for batch in batches:
        if batch.num_rows == 0:
            continue
        rows = unpacked_rows(dataset, pa.Table.from_batches([batch]), cutoff=cutoff)
        for lo, hi in cuts(rows, limits):
            yield batch.column("user_id").slice(lo, hi - lo), rows.batch(lo, hi)
