"""The K user embeddings that a model which reads events publishes: a history at an instant, for no target.

    learned queries, attention pooling over the prefix -> M embeddings --------+
    per attribute that candidates share: recency-weighted bag of its ids ------+-> K user embeddings
    how much of each stream is visible, how long ago the newest was -----------+

A bag is made of the very rows that a candidate is looked up in, and the K embeddings begin in the bags'
directions: their dot product hints from the first step on whether the user has met what the candidate is.
Through the event model, pooling and an MLP the same has to be found, and in ten small days is not
(docs/decisions.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.axes import blocks, linear, named, numbered, roles
from models.batch import Batch
from models.clock import DAY_US
from models.features import FeaturePlan
from models.history import Pairs, match_name, stream_blocks, stream_numbers, visible_pairs
from models.numbers import Standardise
from models.reader import AttentionPooling
from models.towers import mlp

if TYPE_CHECKING:
    from models.upstream.sequence import SequenceConfig


class RecencyBags(nn.Module):
    """Means of embeddings by attribute, of newer events and of some streams more than of others.

    An event of stream s that is t days old counts exp(w_s - r t) in the bag of an attribute, with w and
    r > 0 of that attribute, learned; the sum is divided by 1 + all that counts, so that few events make a
    small vector. Missing ids count nothing.

    Args:
        plan: the features; one bag for each of its matches.
        scale: of the bags.
    """

    def __init__(self, plan: FeaturePlan, *, scale: float) -> None:
        super().__init__()
        index = {c.name: i for i, c in enumerate(plan.event_ids)}
        self.attributes = [(m.name, index[m.name]) for m in plan.matches]
        self.scale = scale
        self.stream = nn.Parameter(torch.zeros(len(self.attributes), len(plan.streams)))
        self.log_rate = nn.Parameter(torch.full((len(self.attributes),), -1.0))
        self.tokens = roles("bag", map(match_name, plan.matches))
        streams = blocks(roles("stream", plan.streams))
        bags = blocks(self.tokens)
        named(self, stream={0: bags, 1: streams}, log_rate={0: bags})

    def forward(self, batch: Batch, embeddings: list[Tensor], pairs: Pairs, at: Tensor) -> Tensor:
        """Bags.

        Args:
            embeddings: (N, D) of each categorical attribute of the events.
            pairs: the events that each row sees.
            at: (R,) int64 microseconds, now as a row sees it.

        Returns:
            (R, B, D) float32.
        """
        row, event = pairs.query, pairs.event
        age = at.index_select(0, row) - batch.event_time.index_select(0, event)
        days = age.clamp(min=0).float() / DAY_US
        stream = batch.event_stream.index_select(0, event)
        found = []
        for (name, i), of_stream, log_rate in zip(
            self.attributes, self.stream, self.log_rate, strict=True
        ):
            known = batch.event_ids[name].index_select(0, event) != -1
            weight = torch.exp(of_stream.index_select(0, stream) - days * log_rate.exp()) * known
            ids = embeddings[i].float().index_select(0, event) * weight[:, None]
            total = ids.new_zeros(pairs.queries, ids.shape[1]).index_add(0, row, ids)
            count = weight.new_ones(pairs.queries).index_add(0, row, weight)
            found.append(self.scale * total / count[:, None])
        return torch.stack(found, dim=1)


class UserHead(nn.Module):
    """What is published of a history.

    Args:
        plan: the features.
        config: its shape.
    """

    def __init__(self, plan: FeaturePlan, config: SequenceConfig) -> None:
        super().__init__()
        self.plan, self.shape = plan, (config.embeddings, config.dim)
        self.pooling = AttentionPooling.of(config)
        self.query = nn.Parameter(torch.randn(self.pooling.query_width) * 0.1)
        history = stream_blocks(plan)
        self.history = Standardise(history)
        self.bags, tokens = None, numbered("pooled", config.queries)
        if config.bags and plan.matches:
            # rows of the tables start uniform: a bag of one id then has unit size, as what is pooled has
            self.bags = RecencyBags(plan, scale=3**0.5 / config.tables.init_scale)
            tokens += self.bags.tokens
        inputs, n_out = blocks(tokens, config.dim), config.embeddings * config.dim
        self.mixed = mlp((*inputs, *history), 2 * config.width, n_out)
        # a straight way: through the MLP alone what was pooled is found several times later
        self.straight = linear(inputs, n_out, bias=False)
        with torch.no_grad():
            ways = self.straight.weight.view(config.embeddings, config.dim, len(tokens), config.dim)
            for i, bag in enumerate(range(config.queries, len(tokens))):
                ways[i % config.embeddings, :, bag] += torch.eye(config.dim)
        self.norm = nn.LayerNorm(config.dim)

    def forward(
        self, batch: Batch, events: Tensor, embeddings: list[Tensor], end: Tensor, at: Tensor
    ) -> Tensor:
        """The K embeddings of each row's user.

        Args:
            events: (N, E), event embeddings.
            embeddings: (N, D) of each categorical attribute of the events.
            end: (R,) int64, events of its row that are seen.
            at: (R,) int64 microseconds, now.

        Returns:
            (R, K, D) float32.
        """
        rows = torch.arange(batch.rows + 1, device=end.device)
        tokens = self.pooling(
            events,
            self.query.expand(batch.rows, -1),
            batch=batch,
            q_offsets=rows,
            end=end,
            at=at,
        )
        pairs = visible_pairs(batch.event_offsets, rows[:-1], end)
        if self.bags is not None:
            tokens = torch.cat([tokens, self.bags(batch, embeddings, pairs, at)], dim=1)
        flat = tokens.flatten(1)
        numbers = self.history(stream_numbers(batch, pairs, at, self.plan))
        mixed = self.mixed(torch.cat([flat, numbers], dim=1)) + self.straight(flat)
        return self.norm(mixed.unflatten(1, self.shape))
