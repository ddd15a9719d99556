"""With what items come together, as it was known at a moment: `item_aggregates` held for lookups.

The table counts by (item, value, hour). An index holds the days that a training reads as two sorted
arrays, keys (pair, hour) and running totals of the counts, so that the events of a pair between two
hours are a difference of two binary searches. Keys are hashes of 48 bits beside 16 bits of hour: of
ten million pairs one lookup in thirty million meets another pair's count.

Of an item a and a value b, of the pairs in `[start of the day of as_of - window_days, hour of as_of)`:

    together = log(1 + n(a, b))
    lift     = log((1 + n(a, b)) / (1 + n(a) n(b) / n))       0 where nothing is known
    seen     = log(1 + n(b))
    share    = n(a, b) / (n(b) + 20)                          how many who had b had a next
    after    = log(1 + n(b, a))                               of items alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.columns import MISSING_ID, before_column, beside_column, counts_column
from feature_store.days import DAY_US, HOUR_US, add_days, micros, start_us
from feature_store.spec import Dataset
from jobs.training.ids import int64_ids, mix
from models.features import ITEM, pair_number_names

if TYPE_CHECKING:
    from feature_store.lake import Lake

NUMBERS = 4  # together, lift, seen, share
_SMOOTHING = 20.0  # added to n(b): of few events a share says little
_HOUR_BITS = 16


class _Counter:
    """Counts by key and hour, for differences of running totals.

    Args:
        keys: (n,) uint64, any order, any number of times.
        hours: (n,) int64, 0 up to 2^16 - 1.
        counts: (n,) int64.
    """

    def __init__(self, keys: np.ndarray, hours: np.ndarray, counts: np.ndarray) -> None:
        whole = _with_hour(keys, hours)
        order = np.argsort(whole)
        sums = np.cumsum(counts[order])
        whole = whole[order]
        last = np.flatnonzero(np.append(whole[1:] != whole[:-1], len(whole) > 0))
        self.keys, self.totals = whole[last], np.concatenate([[0], sums[last]])

    def between(self, keys: np.ndarray, first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """(m,) int64 counts of `keys` (m,) in hours `first` up to, not with, `end`, (m,) each."""
        # searched in order, neighbours share cache lines: several times faster than as they come
        order = np.argsort(keys)
        keys, first, end = keys[order], first[order], end[order]
        low = np.searchsorted(self.keys, _with_hour(keys, first))
        high = np.searchsorted(self.keys, _with_hour(keys, end))
        found = np.empty(len(keys), np.int64)
        found[order] = self.totals[high] - self.totals[low]
        return found


def _with_hour(keys: np.ndarray, hours: np.ndarray) -> np.ndarray:
    shift = np.uint64(_HOUR_BITS)
    return (keys >> shift << shift) | hours.astype(np.uint64)


def _pair(items: np.ndarray, values: np.ndarray) -> np.ndarray:
    return mix(mix(items, 1).view(np.int64) ^ values, 2)


@dataclass(frozen=True)
class _Index:
    """The counts of one column: n(a, b), n(a), n(b) and n."""

    pairs: _Counter
    items: _Counter
    values: _Counter
    all: _Counter

    def numbers(
        self, items: np.ndarray, values: np.ndarray, hours: np.ndarray, of: np.ndarray
    ) -> np.ndarray:
        """Of m pairs (m, NUMBERS) float32; zeros where an id is missing.

        Args:
            items: (T,) int64, of targets.
            values: (m,) int64.
            hours: (2, T) int64, from when up to when each target looks.
            of: (m,) int64, each pair's target.
        """
        first, end = hours
        item = self.items.between(mix(items, 1), first, end)
        rate = item / np.maximum(self.all.between(np.zeros(len(items), np.uint64), first, end), 1)
        first, end, items = first[of], end[of], items[of]
        both = self.pairs.between(_pair(items, values), first, end)
        value = self.values.between(mix(values, 2), first, end)
        found = np.empty((len(values), NUMBERS), np.float32)
        found[:, 0] = np.log1p(both)
        found[:, 1] = np.log((1 + both) / (1 + rate[of] * value))
        found[:, 2] = np.log1p(value)
        found[:, 3] = both / (value + _SMOOTHING)
        found[(items == MISSING_ID) | (values == MISSING_ID)] = 0.0
        return found


@dataclass(frozen=True)
class CoOccurrences:
    """What `item_aggregates` of some days knows about pairs.

    Args:
        lake: where the table is.
        dataset: the spec, with co-occurrence.
        versions: day -> version of the partitions to read; days that are not in it count nothing.
    """

    lake: Lake
    dataset: Dataset
    versions: dict[str, int]

    @cached_property
    def _first_hour(self) -> int:
        return (
            start_us(min(self.versions, default="1970-01-01"), self.dataset.utc_offset) // HOUR_US
        )

    @cached_property
    def _indices(self) -> dict[str, _Index]:
        return {}

    def numbers(
        self,
        column: str,
        items: np.ndarray,
        as_of: np.ndarray,
        values: np.ndarray,
        of: np.ndarray | None = None,
    ) -> np.ndarray:
        """What was known of pairs of a target's item and a value at the target's moment.

        Args:
            column: of `item_aggregates`.
            items: (T,) int64 ids of targets, strings hashed.
            as_of: (T,) int64 microseconds.
            values: (m,) int64 ids.
            of: (m,) int64, each pair's target; None: m = T, one each.

        Returns:
            (m, NUMBERS) float32: together, lift, seen, share.
        """
        of = np.arange(len(items)) if of is None else of
        return self._index(column).numbers(items, values, self.hours(as_of), of)

    def after(
        self, column: str, items: np.ndarray, as_of: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        """(T,) float32: log(1 + n(b, a)), how often the value, an item too, came after the target's."""
        both = self._index(column).pairs.between(_pair(values, items), *self.hours(as_of))
        both[(items == MISSING_ID) | (values == MISSING_ID)] = 0
        return np.log1p(both).astype(np.float32)

    def hours(self, as_of: np.ndarray) -> np.ndarray:
        """(2, T) int64: the hours from which and up to which targets look, counted from the first that is
        read."""
        pairs = self.dataset.co_occurrence
        assert pairs is not None
        day = as_of - (as_of + micros(self.dataset.utc_offset)) % DAY_US
        moments = np.stack([day - pairs.window_days * DAY_US, as_of])
        return np.maximum(moments // HOUR_US - self._first_hour, 0)

    def _index(self, column: str) -> _Index:
        if column not in self._indices:
            self._indices[column] = self._load(column)
        return self._indices[column]

    def _load(self, column: str) -> _Index:
        names = ["item_id", "hour", column, counts_column(column)]
        days = list(self.versions)
        pins = {f"item_aggregates/{day}": version for day, version in self.versions.items()}
        table = self.lake.read("item_aggregates", days=days, columns=names, version=pins)
        lists = table[column].combine_chunks()
        sizes = pc.fill_null(lists.value_lengths(), 0).to_numpy()  # null: before the column was
        items = np.repeat(int64_ids(_whole(table["item_id"])), sizes)
        hours = np.repeat(_whole(table["hour"]).to_numpy() - self._first_hour, sizes)
        values = int64_ids(lists.flatten())
        counts = _whole(table[counts_column(column)]).flatten().to_numpy().astype(np.int64)
        whole = np.bincount(hours, counts).astype(np.int64)
        return _Index(
            pairs=_Counter(_pair(items, values), hours, counts),
            items=_Counter(mix(items, 1), hours, counts),
            values=_Counter(mix(values, 2), hours, counts),
            all=_Counter(np.zeros(len(whole), np.uint64), np.arange(len(whole)), whole),
        )


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else column.combine_chunks()


def days_read(dataset: Dataset, known: Sequence[str], shown: Sequence[str]) -> list[str]:
    """Which of the days `known` the targets of the days `shown` look at."""
    pairs = dataset.co_occurrence
    if pairs is None or not shown:
        return []
    first = add_days(min(shown), -pairs.window_days)
    return [day for day in sorted(known) if first <= day <= max(shown)]


class Known(NamedTuple):
    """What is known of T targets and their P pairs with the events that they see, in their order.

    beside (T, 2 B) float32, of each of B attributes together and lift; numbers (P, C) float32, as
    `models.features.pair_number_names` names them.
    """

    beside: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Seen:
    """T targets with the events that each of them sees.

    Args:
        items, as_of: (T,) int64, ids (strings hashed) and microseconds.
        contexts: by context feature, (T,) int64 ids.
        first, end: (T,) int64: each sees the events `first` up to, not with, `first + end`.
        events: by attribute, (N,) int64 ids.
    """

    items: np.ndarray
    as_of: np.ndarray
    contexts: Mapping[str, np.ndarray]
    first: np.ndarray
    end: np.ndarray
    events: Mapping[str, np.ndarray]

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) int64 each: the target of every pair, and its event; by target, then event."""
        of = np.repeat(np.arange(len(self.end)), self.end)
        start = np.cumsum(self.end) - self.end
        return of, np.arange(len(of)) + (self.first - start)[of]


def known_of(dataset: Dataset, seen: Seen, together: CoOccurrences | None) -> Known:
    """What is known of the targets and their pairs; zeros where `together` is None.

    Users who look at the same items in the same hour share most of their pairs: each pair of an hour is
    looked up once.
    """
    declared = dataset.co_occurrence
    beside = np.zeros((len(seen.items), 2 * len(declared.beside) if declared else 0), np.float32)
    numbers = np.zeros((int(seen.end.sum()), len(pair_number_names(dataset))), np.float32)
    if declared is None or together is None:
        return Known(beside, numbers)
    for i, name in enumerate(declared.beside):
        of_pairs = together.numbers(
            beside_column(name), seen.items, seen.as_of, seen.contexts[name]
        )
        beside[:, 2 * i : 2 * i + 2] = of_pairs[:, :2]
    if not numbers.size:  # a model without histories does not need the largest of the indices
        return Known(beside, numbers)
    of, event = seen.pairs()
    items, (first, end) = seen.items[of], together.hours(seen.as_of)[:, of]
    filled = 0
    for name in declared.before:
        values = seen.events[name][event]
        keys = _with_hour(_pair(items, values), end)
        one, place = _distinct(keys, items, values, first, end)
        pairs = seen.items[of[one]], seen.as_of[of[one]], values[one]
        columns = [together.numbers(before_column(name, lags), *pairs) for lags in declared.lags]
        if dataset.stream(declared.stream).attribute(name).vocabulary == ITEM:
            column = before_column(name, max(declared.lags))
            columns.append(together.after(column, *pairs)[:, None])
        width = sum(c.shape[1] for c in columns)
        numbers[:, filled : filled + width] = np.concatenate(columns, axis=1)[place]
        filled += width
    return Known(beside, numbers)


def _distinct(keys: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of which no two are equal in all `columns`, and for each row (m,) the place among them of its
    equal. `keys` (m,) brings equal rows together; where it errs some rows are chosen twice."""
    order = np.argsort(keys)
    new = np.zeros(len(keys), bool)
    new[:1] = True
    for column in columns:
        ordered = column[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    place = np.empty(len(keys), np.int64)
    place[order] = np.cumsum(new) - 1
    return order[new], place
