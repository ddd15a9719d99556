"""The one layout that models read: a batch of user-days, jagged, nothing padded.

A batch holds R rows (user-days, or parts of one), the N events of their histories, all streams
merged, and their T targets. A row's events are consecutive, ordered by (available_time, stream
index in `dataset.streams`, position in the stream), so what a target may see is a prefix of its
row's events and a prefix is one integer, `history_end`. Three rows, eight events, five targets;
row 1 has no history at all:

    event            0    1    2    3    4  |       |  5    6    7
    event_stream   [ 0    0    1    0    1  |       |  1    0    1 ]
    row               ----- row 0 --------   (row 1)   -- row 2 --
    event_offsets  [ 0,                       5,       5,            8 ]          (R+1,)

    target           0    1    2       |  3   |  4
    history_end    [ 2    4    5       |  0   |  1 ]                              (T,)
    target_offsets [ 0,                   3,     4,     5 ]                       (R+1,)
    row_of_target  [ 0    0    0       |  1   |  2 ]                              (T,)

Target 1 sees events 0..3; target 3 sees none; target 4 sees event 5 alone. Formally, with
`o = event_offsets` and `r = row_of_target[t]`, target t sees the events
`o[r] <= n < o[r] + history_end[t]`, and `0 <= history_end[t] <= o[r + 1] - o[r]`. Within a row
targets are ordered by `as_of`, so `history_end` does not decrease there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Histories(Protocol):
    """The events of R rows, as the encoders of events read them: a `Batch`, or one of events alone."""

    @property
    def rows(self) -> int:
        """R."""

    @property
    def events(self) -> int:
        """N."""

    @property
    def event_offsets(self) -> Tensor:
        """(R+1,) int64."""

    @property
    def event_time(self) -> Tensor:
        """(N,) int64 microseconds."""


class Sparse(NamedTuple):
    """One sparse feature of R users: the ids of row r are `values[offsets[r]:offsets[r + 1]]`.

    values (L,) int64; offsets (R+1,) int64; scores (L,) float32 where the feature is scored.
    """

    values: Tensor
    offsets: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """R rows, N events, T targets, in the order of the spec that they were made from.

    Ids are raw (string ids hashed to int64 by the loader); -1 stands for a missing id, NaN for a
    missing number, zeros for a missing vector. Times are UTC microseconds.

    Args:
        user_id: (R,) int64.
        row_of_target: (T,) int64, ascending.
        target_offsets: (R+1,) int64.
        event_offsets: (R+1,) int64.
        event_stream: (N,) int64, index into `dataset.streams`.
        event_time, event_available: (N,) int64.
        event_ids: categorical attribute -> (N,) int64; -1 too where the stream lacks it.
        event_floats: numeric attribute -> (N,) float32, vector attribute -> (N, dim) float32.
        history_end: (T,) int64, how many of its row's events the target may see.
        target_kind: (T,) int64, index into `dataset.targets`.
        time, as_of: (T,) int64.
        item_id: (T,) int64.
        context_ids, context_floats: context feature -> (T,) int64, (T,) float32.
        item_features: (T, F) float32, in the order of `FeaturePlan.item_numbers`.
        pair_numbers: (P, C) float32 in the order of `FeaturePlan.pair_numbers`, P the sum of
            `history_end`: what is known of each target and each event that it sees, target by
            target, events in order.
        has_aggregates: (R,) float32; 0 where every user feature below is missing.
        user_ids: user attribute -> (R,) int64.
        sparse: sparse feature -> `Sparse`.
        dense: (R, Nd) float32, in the order of `dataset.dense_features`.
        labels: (T, n_tasks) int32 in the order of `dataset.tasks`; 1, 0 or NO_LABEL (-1).
    """

    user_id: Tensor
    row_of_target: Tensor
    target_offsets: Tensor
    event_offsets: Tensor
    event_stream: Tensor
    event_time: Tensor
    event_available: Tensor
    event_ids: dict[str, Tensor]
    event_floats: dict[str, Tensor]
    history_end: Tensor
    target_kind: Tensor
    time: Tensor
    as_of: Tensor
    item_id: Tensor
    context_ids: dict[str, Tensor]
    context_floats: dict[str, Tensor]
    item_features: Tensor
    pair_numbers: Tensor
    has_aggregates: Tensor
    user_ids: dict[str, Tensor]
    sparse: dict[str, Sparse]
    dense: Tensor
    labels: Tensor

    @property
    def rows(self) -> int:
        """R."""
        return self.user_id.shape[0]

    @property
    def events(self) -> int:
        """N."""
        return self.event_stream.shape[0]

    @property
    def targets(self) -> int:
        """T."""
        return self.row_of_target.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {f.name: _to(getattr(self, f.name), device, non_blocking) for f in fields(self)}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, so that `to` can copy beside the computation."""
        return replace(self, **{f.name: _pin(getattr(self, f.name)) for f in fields(self)})


def _to(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    return _map(value, lambda x: x.to(device, non_blocking=non_blocking))


def _pin(value: Any) -> Any:
    return _map(value, Tensor.pin_memory)


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: _map(v, function) for k, v in value.items()}
    if isinstance(value, Sparse):
        return Sparse(*(None if v is None else function(v) for v in value))
    return value
