"""Histories as they are, and what takes something away from them, to ask what it was worth.

    unseen         no event at all: what is left are item and context and, in a model that reads them,
                   the nightly features of the user
    stale          cut where the nightly job of the day before stopped reading, as aggregates are: what
                   is lost against the whole history is what freshness is worth
    shuffled       the same events at the same times, but which event was when is drawn at random: what
                   is lost is what their order is worth
    <stream>=<n>   with n for the stream's `max_events`; 0: without the stream
    without=<attribute>   the attribute missing in every event

Only events that enter and leave every target's sight together change places, so that nobody sees
an event that they did not see before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_store.errors import SpecError
from models.attention_inputs import first_pairs
from models.batch import Batch
from models.event import event_positions, event_rows
from models.features import FeaturePlan
from models.history import target_pairs
from models.sequence import served_prefix

Seen = Callable[[Batch, FeaturePlan], Batch]


def unseen(batch: Batch, plan: FeaturePlan) -> Batch:
    """The batch without any event."""
    return _only(batch, torch.zeros(batch.events, dtype=torch.bool))


def stale(batch: Batch, plan: FeaturePlan) -> Batch:
    """The batch with every target's history cut at the cutoff of the day before."""
    end, _ = served_prefix(batch, plan)
    kept = torch.minimum(batch.history_end, end.index_select(0, batch.row_of_target))
    pairs = target_pairs(batch)
    first = first_pairs(batch.history_end)
    nth = torch.arange(len(pairs.query)) - first.index_select(0, pairs.query)
    visible = nth < kept.index_select(0, pairs.query)
    return replace(batch, history_end=kept, pair_numbers=batch.pair_numbers[visible])


def shuffled(batch: Batch, plan: FeaturePlan) -> Batch:
    """The batch with what its events were about exchanged among events that are seen together.

    Times, and with them how long ago something happened, stay where they are. The draw depends on
    the users and their events only.
    """
    order = _orders(batch)
    moved = replace(
        batch,
        event_stream=batch.event_stream[order],
        event_ids={k: v[order] for k, v in batch.event_ids.items()},
        event_floats={k: v[order] for k, v in batch.event_floats.items()},
    )
    pairs = target_pairs(batch)
    # the pair of (query, event at place p) is now that of the event that moved to p
    first = first_pairs(batch.history_end)
    start = batch.event_offsets.index_select(0, batch.row_of_target)
    place = (first - start).index_select(0, pairs.query) + order[pairs.event]
    return replace(moved, pair_numbers=batch.pair_numbers[place])


def shortened(batch: Batch, plan: FeaturePlan, *, stream: str, n: int) -> Batch:
    """The batch as a stream's `max_events` of n would have it.

    Of what a row's first target sees, the stream's newest n are kept; what came later in the row stays,
    as the row's own events do. With 0 none of the stream is kept.
    """
    of_stream = batch.event_stream == plan.streams.index(stream)
    if n == 0:
        return _only(batch, ~of_stream)
    end = torch.zeros(batch.rows, dtype=torch.int64)
    end = end.scatter_reduce(
        0, batch.row_of_target, batch.history_end, reduce="amin", include_self=False
    )
    row = event_rows(batch)
    before = of_stream & (event_positions(batch) < end.index_select(0, row))
    so_far = F.pad(before.to(torch.int64).cumsum(0), (1, 0))
    newer = so_far.index_select(0, batch.event_offsets[1:]).index_select(0, row) - so_far[1:]
    return _only(batch, ~before | (newer < n))


def without(batch: Batch, plan: FeaturePlan, *, attribute: str) -> Batch:
    """The batch with an attribute missing in every event; what the loader has found of pairs stays."""
    if attribute in batch.event_ids:
        ids = torch.full_like(batch.event_ids[attribute], -1)
        return replace(batch, event_ids=batch.event_ids | {attribute: ids})
    missing = 0.0 if attribute in dict(plan.event_vectors) else torch.nan
    floats = torch.full_like(batch.event_floats[attribute], missing)
    return replace(batch, event_floats=batch.event_floats | {attribute: floats})


def _only(batch: Batch, keep: Tensor) -> Batch:
    """The batch with some of its events, (N,) bool."""
    so_far = F.pad(keep.to(torch.int64).cumsum(0), (1, 0))
    start = batch.event_offsets.index_select(0, batch.row_of_target)
    end = so_far.index_select(0, start + batch.history_end) - so_far.index_select(0, start)
    return replace(
        batch,
        history_end=end,
        pair_numbers=batch.pair_numbers[keep[target_pairs(batch).event]],
        **events_of(batch, keep, so_far.index_select(0, batch.event_offsets).diff()),
    )


def events_of(batch: Batch, event: Tensor, sizes: Tensor) -> dict[str, Any]:
    """The fields of a batch whose rows have `sizes` (R,) of the events `event`, indices or a mask, row by
    row."""
    return {
        "event_offsets": F.pad(sizes.cumsum(0), (1, 0)),
        "event_stream": batch.event_stream[event],
        "event_time": batch.event_time[event],
        "event_available": batch.event_available[event],
        "event_ids": {k: v[event] for k, v in batch.event_ids.items()},
        "event_floats": {k: v[event] for k, v in batch.event_floats.items()},
    }


def _orders(batch: Batch) -> Tensor:
    """(N,) int64: which event comes to each place, within the segments between targets' ends."""
    ends = batch.event_offsets.index_select(0, batch.row_of_target) + batch.history_end
    borders = torch.zeros(batch.events + 1, dtype=torch.int64)
    borders[ends] = 1
    borders[batch.event_offsets] = 1
    segment = borders[: batch.events].cumsum(0)
    seed = int((batch.user_id.sum() + batch.event_available.sum()) % (1 << 31))
    draw = torch.rand(batch.events, generator=torch.Generator().manual_seed(seed))
    by_draw = draw.argsort()
    return by_draw[segment[by_draw].argsort(stable=True)]


_NAMED: dict[str, Seen] = {"unseen": unseen, "stale": stale, "shuffled": shuffled}


def histories(text: str, plan: FeaturePlan) -> Seen | None:
    """What `text` makes of a batch; None: it does not speak of histories.

    Raises:
        SpecError: it does, of ones that there are not.
    """
    name, given, value = text.partition("=")
    if not given:
        if name in _NAMED:
            return _NAMED[name]
        raise SpecError(f"--models: there are no histories {text!r}; known are {', '.join(_NAMED)}")
    if name in plan.streams:
        if not value.isdecimal():
            raise SpecError(f"--models: {text!r} is not a number of events; name one from 0 on")
        return partial(shortened, stream=name, n=int(value))
    if name == "without":
        known = [
            *(c.name for c in plan.event_ids), *plan.event_numbers, *dict(plan.event_vectors)
        ]  # fmt: skip
        if value not in known:
            raise SpecError(
                f"--models: {text!r} is no attribute of an event; known are {', '.join(known)}"
            )
        return partial(without, attribute=value)
    return None
