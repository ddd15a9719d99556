"""A candidate and each event that it sees: what relates them, for the attention and beside it.

Attention compares a candidate's and an event's embeddings. That does not say what is known about
the two of them: that they share an id, how often one came after the other so far, how far apart
their ids are, how old the event is. `PairNumbers` gathers these, and an MLP (`PairEncoder`) reads
them per pair and gives

    bias (P, G)    added to the attention's scores: which events this candidate should look at
    related (T, V) log(1 + sum over a target's pairs of exp(value)): a soft maximum that also counts,
                   and 0 where there is no event

P pairs (targets with their visible events, `models.history.visible_pairs`), T targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.axes import Blocks, blocks, embedding, linear, roles
from models.batch import Batch
from models.features import TARGET_ITEM, FeaturePlan
from models.history import Pairs, equal_ids, match_name, pair_ids
from models.numbers import Standardise, hinged, hinges

_LARGEST = 30.0  # of a value, before exp
_SECOND_US = 1_000_000
_NEWEST = 3
# in which ways a number of the pairs becomes one of the target
_REDUCED = ("newest", "lately", "largest", "least", "mean")


class PairInputs(NamedTuple):
    """of_pairs (P, F), what an MLP reads of each pair, `PairNumbers.inputs`; summaries (T, G) of all
    pairs of a target, `PairNumbers.summaries`; float32."""

    of_pairs: Tensor
    summaries: Tensor


class PairNumbers(nn.Module):
    """The numbers of pairs: standardised, and summarised per target. Nothing is learned.

    Args:
        plan: the features.
    """

    def __init__(self, plan: FeaturePlan) -> None:
        super().__init__()
        self.plan = plan
        self.distant = [
            m for m in plan.matches if plan.ordered_items and m.candidate == TARGET_ITEM
        ]
        self.carriers = [m.name for m in plan.matches if m.candidate == TARGET_ITEM]
        known = roles("pair", plan.pair_numbers)
        numbers = (*known, *roles("distance", map(match_name, self.distant)), "age", "newer")
        self.standardise = Standardise(blocks(numbers))
        self.sums = Standardise(blocks(known))
        equal = roles("equal", map(match_name, plan.matches))
        self.inputs: Blocks = (*hinged(blocks(numbers)), *blocks(equal))
        self.summaries: Blocks = ()
        if self.carriers:
            reduced = [f"{name} {how}" for how in _REDUCED for name in numbers]
            self.summaries = hinged(blocks([*reduced, *(f"{name} sum" for name in known)]))

    def forward(self, batch: Batch, pairs: Pairs) -> PairInputs:
        """What is known of the pairs and, in sum, of each target."""
        numbers = self.standardise(self.raw(batch, pairs))
        of_pairs = torch.cat([hinges(numbers), self._equal(batch, pairs)], dim=1)
        return PairInputs(of_pairs, self._summaries(batch, pairs, numbers))

    def raw(self, batch: Batch, pairs: Pairs) -> Tensor:
        """(P, numbers) float32: co-occurrence, distances of ids (NaN where missing), the event's age in
        seconds, and how many visible events are newer."""
        columns = [batch.pair_numbers]
        for match in self.distant:
            wanted, found = pair_ids(batch, pairs, match)
            far = (wanted - found).abs().to(torch.float32)
            missing = (wanted == -1) | (found == -1)
            columns.append(far.masked_fill(missing, float("nan"))[:, None])
        as_of = batch.as_of.index_select(0, pairs.query)
        age = as_of - batch.event_time.index_select(0, pairs.event)
        newer = _newer(pairs.query, batch.history_end)
        columns += [(age.to(torch.float32) / _SECOND_US)[:, None], newer.to(torch.float32)[:, None]]
        return torch.cat(columns, dim=1)

    def _equal(self, batch: Batch, pairs: Pairs) -> Tensor:
        """(P, matches) float32: 1 where candidate and event have the same id."""
        columns = [torch.zeros(len(pairs.query), 0, device=pairs.query.device)]
        for match in self.plan.matches:
            columns.append(equal_ids(batch, pairs, match).to(torch.float32)[:, None])
        return torch.cat(columns, dim=1)

    def _summaries(self, batch: Batch, pairs: Pairs, numbers: Tensor) -> Tensor:
        """(T, summaries) float32 of the events that carry an item: of each number that of the newest of
        them, the largest of the 3 newest, the largest, the least and the mean; and sums of what is
        known of co-occurrence. A sum of lifts is how naive Bayes adds up what the events say."""
        if not self.carriers:
            return numbers.new_zeros(pairs.queries, 0)
        ids = torch.stack([batch.event_ids[name] for name in self.carriers])
        carries = (ids != -1).any(0).index_select(0, pairs.event)
        mine = carries.nonzero().squeeze(1)
        query, values = pairs.query.index_select(0, mine), numbers.index_select(0, mine)
        counts = torch.bincount(query, minlength=pairs.queries)
        newer = _newer(query, counts)
        recent = (newer < _NEWEST).nonzero().squeeze(1)
        empty = values.new_zeros(pairs.queries, values.shape[1])
        largest, least = (_extremes(query, values, pairs.queries, how) for how in ("amax", "amin"))
        lately = _extremes(query[recent], values[recent], pairs.queries, "amax")
        mean = empty.index_add(0, query, values) / counts.clamp(min=1)[:, None]
        ends = (newer == 0).nonzero().squeeze(1)
        newest = empty.index_copy(0, query[ends], values[ends])
        known = batch.pair_numbers.nan_to_num().index_select(0, mine)
        sums = known.new_zeros(pairs.queries, known.shape[1]).index_add(0, query, known)
        found = [newest, lately, largest, least, mean, self.sums(sums)]
        return hinges(torch.cat(found, dim=1))


def _newer(query: Tensor, counts: Tensor) -> Tensor:
    """(n,) int64: how many of its query's `counts` pairs come after each of the pairs, in their order."""
    last = counts.cumsum(0).index_select(0, query) - 1
    return last - torch.arange(len(query), device=query.device)


def _extremes(query: Tensor, values: Tensor, queries: int, how: str) -> Tensor:
    """(Q, C): the largest or least of each query's values (n, C), 0 where it has none."""
    index = query[:, None].expand(-1, values.shape[1])
    empty = values.new_zeros(queries, values.shape[1])
    return empty.scatter_reduce(0, index, values, how, include_self=False)


class PairEncoder(nn.Module):
    """What relates a candidate and an event to attention biases and a summary per target.

    Args:
        plan: the features.
        inputs: of a pair, `PairNumbers.inputs`.
        heads: G, biases of a pair.
        width: V, of the summary.
        hidden: width of the MLP.
    """

    def __init__(
        self, plan: FeaturePlan, inputs: Blocks, *, heads: int, width: int = 32, hidden: int = 48
    ) -> None:
        super().__init__()
        self.width = width
        self.numbers = linear(inputs, hidden)
        self.stream = embedding(roles("stream", plan.streams), hidden)
        nn.init.normal_(self.stream.weight, std=0.1)
        self.hidden = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.bias = nn.Linear(hidden, heads, bias=False)
        nn.init.zeros_(self.bias.weight)
        self.value = nn.Linear(hidden, width)

    def forward(self, batch: Batch, pairs: Pairs, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Of inputs (P, inputs): bias (P, G) and related (T, V)."""
        stream = self.stream(batch.event_stream.index_select(0, pairs.event))
        found = self.hidden(self.numbers(inputs) + stream)
        value = self.value(found).float().clamp(max=_LARGEST).exp()
        related = value.new_zeros(pairs.queries, value.shape[1]).index_add(0, pairs.query, value)
        return self.bias(found), related.log1p()
