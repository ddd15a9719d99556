"""A candidate and each event that it sees: what relates them, for the attention and beside it.

Attention compares a candidate's and an event's embeddings. That does not say what is known about
the two of them: that they share an id, how often one came after the other so far, how far apart
their ids are, how old the event is. An MLP reads these per pair and gives

    bias (P, G)    added to the attention's scores: which events this candidate should look at
    related (T, V) log(1 + sum over a target's pairs of exp(value)): a soft maximum that also counts,
                   and 0 where there is no event

P pairs (targets with their visible events, `models.history.visible_pairs`), T targets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.batch import Batch
from models.features import ITEM, FeaturePlan
from models.history import Pairs, equal_ids, pair_ids
from models.numbers import HINGES, Standardise, hinges

_LARGEST = 30.0  # of a value, before exp
_SECOND_US = 1_000_000


class PairEncoder(nn.Module):
    """What relates a candidate and an event to attention biases and a summary per target.

    Args:
        plan: the features.
        heads: G, biases of a pair.
        width: V, of the summary.
        hidden: width of the MLP.
    """

    def __init__(self, plan: FeaturePlan, *, heads: int, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.plan, self.width = plan, width
        self.distant = [m for m in plan.matches if plan.ordered_items and m.candidate == ITEM]
        numbers = len(plan.pair_numbers) + len(self.distant) + 2
        self.standardise = Standardise(numbers)
        self.numbers = nn.Linear(HINGES * numbers + len(plan.matches), hidden)
        self.stream = nn.Embedding(len(plan.streams), hidden)
        nn.init.normal_(self.stream.weight, std=0.1)
        self.hidden = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.bias = nn.Linear(hidden, heads, bias=False)
        nn.init.zeros_(self.bias.weight)
        self.value = nn.Linear(hidden, width)

    def forward(self, batch: Batch, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """bias (P, G) and related (T, V)."""
        numbers = hinges(self.standardise(self._numbers(batch, pairs)))
        inputs = torch.cat([numbers, self._equal(batch, pairs)], dim=1)
        stream = self.stream(batch.event_stream.index_select(0, pairs.event))
        found = self.hidden(self.numbers(inputs) + stream)
        value = self.value(found).float().clamp(max=_LARGEST).exp()
        related = value.new_zeros(pairs.queries, value.shape[1]).index_add(0, pairs.query, value)
        return self.bias(found), related.log1p()

    def _numbers(self, batch: Batch, pairs: Pairs) -> Tensor:
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
        last = batch.history_end.cumsum(0).index_select(0, pairs.query) - 1
        newer = last - torch.arange(len(pairs.query), device=last.device)
        columns += [(age.to(torch.float32) / _SECOND_US)[:, None], newer.to(torch.float32)[:, None]]
        return torch.cat(columns, dim=1)

    def _equal(self, batch: Batch, pairs: Pairs) -> Tensor:
        """(P, matches) float32: 1 where candidate and event have the same id."""
        columns = [torch.zeros(len(pairs.query), 0, device=pairs.query.device)]
        for match in self.plan.matches:
            columns.append(equal_ids(batch, pairs, match).to(torch.float32)[:, None])
        return torch.cat(columns, dim=1)
