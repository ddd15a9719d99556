"""Flat rows as FuxiCTR's models read them: ids as indices of vocabularies, numbers standardised, padded
sequences, in batches of columns by name.

Index 0 is padding, 1 what is rare or not in the training rows, as in FuxiCTR's preprocessing. Numbers
are standardised by the training rows after `sign(x) log(1 + |x|)`; missing is the mean. A sequence
holds the newest events, oldest first; the age of an event is an id, its logarithm rounded down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from benchmarks.globo.data import Flat

_MINUTE_US = 60_000_000
_RARE = 1
AGES = 20
AGE = "age"
LABEL = "label"
SEQUENCE = "seq_"


class Pad(StrEnum):
    """On which side of a sequence its padding is."""

    LEFT = "left"
    RIGHT = "right"


def vocabulary(values: np.ndarray, least: int) -> np.ndarray:
    """The values (n,) int64, sorted, that come at least `least` times; -1 is none."""
    found, counts = np.unique(values, return_counts=True)
    return found[(counts >= least) & (found != -1)]


def index(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Of each value its place in `known`, from 2, or `_RARE`: int64."""
    if not len(known):
        return np.full(len(values), _RARE)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[place] == values, place + 2, _RARE)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What is learned from the training rows.

    Args:
        vocabularies: column of ids -> what `vocabulary` gave; an event attribute that shares one
            with a column of the target is looked up there.
        shared: event attribute -> column of ids, its own name where it shares none.
        mean, scale: (C,) float32 of the numbers.
    """

    vocabularies: dict[str, np.ndarray]
    shared: dict[str, str]
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, rows: Flat, shared: dict[str, str], least: int) -> Encoder:
        """From training rows; ids that come less often than `least` times count as rare."""
        seen = {n: [rows.ids[:, i]] for i, n in enumerate(rows.names["ids"])}
        for attribute, column in shared.items():
            seen.setdefault(column, []).append(rows.events[attribute])
        numbers = _logarithmic(rows.numbers)
        known = ~np.isnan(numbers)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, numbers, 0).sum(0) / count
        square = (np.where(known, numbers - mean, 0) ** 2).sum(0) / count
        return cls(
            vocabularies={n: vocabulary(np.concatenate(v), least) for n, v in seen.items()},
            shared=shared,
            mean=mean.astype(np.float32),
            scale=(1 / np.sqrt(np.maximum(square, 1e-6))).astype(np.float32),
        )

    def size(self, column: str) -> int:
        """Rows of the table of a column."""
        return len(self.vocabularies[column]) + 2

    def encode(self, rows: Flat, task: str) -> Encoded:
        """The rows, all of which have a label of `task`."""
        numbers = (_logarithmic(rows.numbers) - self.mean) * self.scale
        names = rows.names["ids"]
        ids = [index(rows.ids[:, i], self.vocabularies[n]) for i, n in enumerate(names)]
        events = [index(rows.events[a], self.vocabularies[c]) for a, c in self.shared.items()]
        return Encoded(
            names=names, numbers_names=rows.names["numbers"], attributes=list(self.shared),
            ids=torch.from_numpy(np.stack(ids, axis=1)),
            numbers=torch.from_numpy(np.nan_to_num(numbers).clip(-5, 5)),
            events=torch.from_numpy(np.stack(events, axis=1)),
            event_time=torch.from_numpy(rows.events["time"]),
            as_of=torch.from_numpy(rows.as_of),
            start=torch.from_numpy(rows.start),
            end=torch.from_numpy(rows.end),
            label=torch.from_numpy(rows.label(task).astype(np.float32)),
        )  # fmt: skip


def _logarithmic(numbers: np.ndarray) -> np.ndarray:
    return np.sign(numbers) * np.log1p(np.abs(numbers))


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """T targets: ids (T, K), numbers (T, C), their events a slice of events (E, A); all tensors."""

    names: Sequence[str]
    numbers_names: Sequence[str]
    attributes: Sequence[str]
    ids: torch.Tensor
    numbers: torch.Tensor
    events: torch.Tensor
    event_time: torch.Tensor
    as_of: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    label: torch.Tensor

    def __len__(self) -> int:
        return len(self.label)

    def columns(self, chosen: torch.Tensor, window: int, pad: Pad, *, trim: bool) -> dict:
        """The targets `chosen` (B,) as columns by name; sequences are (B, window), or as long as the
        longest of them where `trim`."""
        start = torch.maximum(self.start[chosen], self.end[chosen] - window)
        length = self.end[chosen] - start
        width = max(int(length.max()), 1) if trim else window
        place = torch.arange(width) - (width - length if pad is Pad.LEFT else 0 * length)[:, None]
        there = (place >= 0) & (place < length[:, None])
        event = torch.where(there, start[:, None] + place, 0)
        minutes = (self.as_of[chosen][:, None] - self.event_time[event]) / _MINUTE_US
        age = minutes.clamp(min=0).add(1).log2().long().clamp(max=AGES - 3) + 2
        numbers, ids = self.numbers[chosen], self.ids[chosen]
        found = {n: ids[:, i] for i, n in enumerate(self.names)}
        found |= {n: numbers[:, i] for i, n in enumerate(self.numbers_names)}
        events = self.events[event]  # (B, width, A)
        for i, name in enumerate(self.attributes):
            found[SEQUENCE + name] = torch.where(there, events[:, :, i], 0)
        found[SEQUENCE + AGE] = torch.where(there, age, 0)
        found[LABEL] = self.label[chosen]
        return found


class Batches:
    """Batches of an `Encoded`, as FuxiCTR's fit and predict iterate over them.

    Args:
        rows: what is cut into batches.
        size: targets of a batch.
        window, pad, trim: of the sequences, as `Encoded.columns` says.
        seed: of the order, which is another one every time; None: as the rows lie.
    """

    def __init__(
        self, rows: Encoded, *, size: int, window: int, pad: Pad, trim: bool, seed: int | None
    ) -> None:
        self.rows, self.size, self.window, self.pad, self.trim = rows, size, window, pad, trim
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __iter__(self) -> Iterator[dict]:
        order = torch.arange(len(self.rows))
        if self.generator is not None:
            order = torch.randperm(len(self.rows), generator=self.generator)
        parts = list(order.split(self.size))
        if self.trim and self.generator is not None:
            parts = self._alike(order)
        for chosen in parts:
            yield self.rows.columns(chosen, self.window, self.pad, trim=self.trim)

    def _alike(self, order: torch.Tensor) -> list[torch.Tensor]:
        """Batches of sequences about equally long, so that trimming leaves little padding: within 32
        batches' worth of shuffled rows, in an order that is shuffled again. Targets without events are
        spread over the batches: DIEN cannot read a batch that has none."""
        length = self.rows.end - self.rows.start
        anywhere = torch.randint(1, self.window + 1, length.shape, generator=self.generator)
        length = torch.where(length == 0, anywhere, length)
        found = []
        for some in order.split(32 * self.size):
            by_length = some[length[some].argsort(stable=True)]
            found += by_length.split(self.size)
        return [found[i] for i in torch.randperm(len(found), generator=self.generator).tolist()]
