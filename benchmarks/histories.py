"""Histories as they are, and what takes something away from them, to ask what it was worth.

    unseen     no event at all: what is left are item and context and, in a model that reads them,
               the nightly features of the user
    stale      cut where the nightly job of the day before stopped reading, as aggregates are: what is
               lost against the whole history is what freshness is worth
    shuffled   the same events at the same times, but which event was when is drawn at random: what
               is lost is what their order is worth

Only events that enter and leave every target's sight together change places, so that nobody sees
an event that they did not see before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from models.attention import first_pairs
from models.batch import Batch
from models.features import FeaturePlan
from models.history import target_pairs
from models.sequence import served_prefix


def unseen(batch: Batch, plan: FeaturePlan) -> Batch:
    """The batch without any event."""
    return replace(
        batch,
        event_offsets=torch.zeros_like(batch.event_offsets),
        event_stream=batch.event_stream[:0],
        event_time=batch.event_time[:0],
        event_available=batch.event_available[:0],
        event_ids={k: v[:0] for k, v in batch.event_ids.items()},
        event_floats={k: v[:0] for k, v in batch.event_floats.items()},
        history_end=torch.zeros_like(batch.history_end),
        pair_numbers=batch.pair_numbers[:0],
    )


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


HISTORIES: dict[str, Callable[[Batch, FeaturePlan], Batch]] = {
    "unseen": unseen,
    "stale": stale,
    "shuffled": shuffled,
}
