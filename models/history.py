"""What can be counted about a visible history: exact, cheap, and hard for attention to learn.

A softmax averages and does not count, so the sequence models get, beside the attention, how many
events of each stream are visible and how old the newest is; and for each id that a candidate
shares with the events (its item, its category), how often and how recently the history has it.
All of it is computed from the merged events of the batch at training time: no table stores it.

Queries (targets, or rows) and the events that they see are expanded into P = sum(end) pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.attention_inputs import first_pairs
from models.batch import Batch
from models.features import TARGET_ITEM, FeaturePlan, Match

_MINUTE_US = 60_000_000
_NEVER = torch.iinfo(torch.int64).min


class Pairs(NamedTuple):
    """Every (query, event) with the event visible to the query: (P,) int64 each, and Q."""

    query: Tensor
    event: Tensor
    queries: int


def visible_pairs(event_offsets: Tensor, row: Tensor, end: Tensor) -> Pairs:
    """Expand prefixes into pairs.

    Args:
        event_offsets: (R+1,) int64.
        row, end: (Q,) int64, each query's row and how many of its events it sees.
    """
    query = torch.repeat_interleave(torch.arange(len(end), device=end.device), end)
    shift = event_offsets.index_select(0, row) - first_pairs(end)
    event = torch.arange(len(query), device=end.device) + shift.index_select(0, query)
    return Pairs(query, event, len(end))


def target_pairs(batch: Batch) -> Pairs:
    """The pairs of the batch's targets."""
    return visible_pairs(batch.event_offsets, batch.row_of_target, batch.history_end)


def candidate_ids(batch: Batch, name: str) -> Tensor:
    """(T,) raw ids of a candidate feature."""
    return batch.item_id if name == TARGET_ITEM else batch.context_ids[name]


def pair_ids(batch: Batch, pairs: Pairs, match: Match) -> tuple[Tensor, Tensor]:
    """The candidate's and the event's id of each pair, (P,) int64 each."""
    wanted = candidate_ids(batch, match.candidate).index_select(0, pairs.query)
    return wanted, batch.event_ids[match.name].index_select(0, pairs.event)


def equal_ids(batch: Batch, pairs: Pairs, match: Match) -> Tensor:
    """(P,) bool, whether candidate and event have the same id; a missing one is no one's."""
    wanted, found = pair_ids(batch, pairs, match)
    return (wanted == found) & (wanted != -1)


def stream_numbers(batch: Batch, pairs: Pairs, at: Tensor, plan: FeaturePlan) -> Tensor:
    """Per stream: visible events, and minutes since the newest of them (NaN where none).

    Args:
        at: (Q,) int64 microseconds, now as the query sees it.

    Returns:
        (Q, 2 S) float32.
    """
    everything = torch.arange(len(pairs.query), device=pairs.query.device)
    return torch.cat(_count(batch, pairs, everything, at, len(plan.streams)), dim=1)


def match_numbers(batch: Batch, pairs: Pairs, plan: FeaturePlan) -> Tensor:
    """Per match and stream: visible events with the candidate's id, and minutes since the newest.

    Returns:
        (T, 2 x sum of the matches' streams) float32; minutes are NaN where there is none.
    """
    columns = [torch.zeros(pairs.queries, 0, device=pairs.query.device)]
    for match in plan.matches:
        hits = equal_ids(batch, pairs, match).nonzero().squeeze(1)
        for part in _count(batch, pairs, hits, batch.as_of, len(plan.streams)):
            columns.append(part[:, list(match.streams)])
    return torch.cat(columns, dim=1)


def match_width(plan: FeaturePlan) -> int:
    """Columns of `match_numbers`."""
    return 2 * sum(len(m.streams) for m in plan.matches)


def _count(
    batch: Batch, pairs: Pairs, chosen: Tensor, at: Tensor, streams: int
) -> tuple[Tensor, Tensor]:
    event = pairs.event.index_select(0, chosen)
    stream = batch.event_stream.index_select(0, event)
    cell = pairs.query.index_select(0, chosen) * streams + stream
    cells = pairs.queries * streams
    count = torch.bincount(cell, minlength=cells).view(-1, streams)
    newest = torch.full((cells,), _NEVER, dtype=torch.int64, device=cell.device)
    newest.scatter_reduce_(0, cell, batch.event_time.index_select(0, event), "amax")
    newest = newest.view(-1, streams)
    minutes = (at[:, None] - newest).to(torch.float32) / _MINUTE_US
    never = torch.full_like(minutes, float("nan"))
    return count.to(torch.float32), torch.where(newest == _NEVER, never, minutes)


def bag_match_numbers(batch: Batch, plan: FeaturePlan) -> Tensor:
    """Per match of a candidate with a sparse feature of its user: is it there, where, what score.

    Returns:
        (T, 3 x bag matches) float32: 1 or 0; the position in the list and the score (1 where the
        feature has none), both NaN where it is not there.
    """
    columns = [torch.zeros(batch.targets, 0, device=batch.row_of_target.device)]
    for match in plan.bag_matches:
        values, offsets, scores = batch.sparse[match.name]
        end = offsets.diff().index_select(0, batch.row_of_target)
        pairs = visible_pairs(offsets, batch.row_of_target, end)
        ids = candidate_ids(batch, match.candidate).index_select(0, pairs.query)
        hits = (values.index_select(0, pairs.event) == ids) & (ids != -1)
        hit = hits.nonzero().squeeze(1)
        place = torch.full((batch.targets,), float("nan"), device=values.device)
        score = place.clone()
        query, value = pairs.query[hit], pairs.event[hit]
        start = offsets.index_select(0, batch.row_of_target)
        place[query] = (value - start[query]).to(torch.float32)
        score[query] = 1.0 if scores is None else scores[value]
        columns += [(~place.isnan()).to(torch.float32)[:, None], place[:, None], score[:, None]]
    return torch.cat(columns, dim=1)


def bag_match_width(plan: FeaturePlan) -> int:
    """Columns of `bag_match_numbers`."""
    return 3 * len(plan.bag_matches)
