"""How a history is read for a target: attention pooling, what relates the two, a mix tower.

    target -> M queries; attention pooling over the target's visible prefix -> M embeddings
    M embeddings, unpooled, + what is counted and known of the pairs + the newest events as they are
    + item and context -> logits

A model may have several readers (`SequenceConfig.members`) over the same events and embedding tables.
Each has a loss of its own and their logits are averaged: an ensemble with a shared trunk (Lee et al.,
"Why M heads are better than one", arXiv 1511.06314). What differs between trainings of a network is
worth as much on the click tasks of Globo as anything that we know to tell it (docs/decisions.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from models.attention import RecencyBias, prefix_attention
from models.attention_inputs import Null
from models.axes import Blocks, blocks, linear, numbered
from models.batch import Batch
from models.features import FeaturePlan
from models.history import Pairs, match_blocks, match_numbers, stream_blocks, stream_numbers
from models.interactions import DENSE
from models.numbers import Standardise, hinged, hinges
from models.pairs import PairEncoder, PairNumbers
from models.towers import MixTower, TargetEncoder, mlp

if TYPE_CHECKING:
    from models.upstream.sequence import SequenceConfig


class AttentionPooling(nn.Module):
    """Multi-headed attention pooling of a prefix of event embeddings to M embeddings.

    Args:
        width: E.
        dim: D, of the M outputs.
        queries, heads, head_dim: M, H and d.
    """

    def __init__(self, width: int, dim: int, *, queries: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.queries, self.heads, self.head_dim = queries, heads, head_dim
        self.kv = nn.Linear(width, 2 * heads * head_dim)
        self.null = nn.Parameter(torch.randn(2, heads, head_dim) * 0.1)
        self.recency = RecencyBias(heads * queries)
        self.out = nn.Linear(heads * head_dim, dim)

    @classmethod
    def of(cls, config: SequenceConfig) -> AttentionPooling:
        """Of the shape that a model's configuration gives."""
        return cls(
            config.width, config.dim,
            queries=config.queries, heads=config.heads, head_dim=config.head_dim,
        )  # fmt: skip

    @property
    def query_width(self) -> int:
        """H M d, of what a target (or a parameter) has to give."""
        return self.heads * self.queries * self.head_dim

    def forward(
        self,
        events: Tensor,
        query: Tensor,
        *,
        batch: Batch,
        q_offsets: Tensor,
        end: Tensor,
        at: Tensor,
        pair_bias: Tensor | None = None,
    ) -> Tensor:
        """Pool.

        Args:
            events: (N, E).
            query: (Q, H M d), head-major.
            q_offsets: (R+1,) int64, the queries of each row.
            end: (Q,) int64, events of its row that a query sees.
            at: (Q,) int64 microseconds, now as the query sees it.
            pair_bias: (P, H M) float, head-major, added to the score of each query and visible event.

        Returns:
            (Q, M, D).
        """
        shape = (self.heads, self.head_dim)
        k, v = self.kv(events).chunk(2, dim=1)
        pooled = prefix_attention(
            query.unflatten(1, (self.heads * self.queries, self.head_dim)),
            k.unflatten(1, shape),
            v.unflatten(1, shape),
            q_offsets=q_offsets,
            kv_offsets=batch.event_offsets,
            kv_end=end,
            recency=self.recency(at, batch.event_time),
            pair_bias=pair_bias,
            null=Null(self.null[0], self.null[1]),
        )
        # (Q, H M, d) -> (Q, M, H d)
        pooled = pooled.unflatten(1, (self.heads, self.queries)).transpose(1, 2).flatten(2)
        return self.out(pooled)


class HistoryNumbers(nn.Module):
    """What is counted and known of the history that a target sees, for all readers. Nothing is learned.

    Args:
        plan: the features.
    """

    def __init__(self, plan: FeaturePlan) -> None:
        super().__init__()
        self.plan = plan
        counts = stream_blocks(plan) + match_blocks(plan)
        self.counts = Standardise(counts)
        self.pairs = PairNumbers(plan)
        self.inputs: Blocks = hinged(counts) + self.pairs.summaries

    def forward(self, batch: Batch, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """(T, F) float32; and the inputs of `PairEncoder`, (P, W) float32."""
        exact = [
            stream_numbers(batch, pairs, batch.as_of, self.plan),
            match_numbers(batch, pairs, self.plan),
        ]
        counts = hinges(self.counts(torch.cat(exact, dim=1)))
        of_pairs, summaries = self.pairs(batch, pairs)
        return torch.cat([counts, summaries], dim=1), of_pairs


def newest_events(events: Tensor, batch: Batch, n: int) -> Tensor:
    """The n newest events that each target sees, newest first: (N, E) -> (T, n E), zeros where it
    sees fewer. What was read last, and how one came to it, a mean over a history only hints at."""
    start = batch.event_offsets.index_select(0, batch.row_of_target)
    at = (start + batch.history_end)[:, None] - 1 - torch.arange(n, device=start.device)
    seen = at >= start[:, None]
    found = events.new_zeros(*at.shape, events.shape[1])
    found[seen] = events.index_select(0, at[seen])
    return found.flatten(1)


class Read(NamedTuple):
    """What all readers read: events (N, E); tokens (T, n, D) and dense (T, D) of the targets; users
    (T, L, D), or None; newest (T, n E), of `newest_events`; known (T, F): the numbers of target, history
    and user, beside tokens and newest; the pairs, with of_pairs (P, W), of `HistoryNumbers`."""

    events: Tensor
    tokens: Tensor
    dense: Tensor
    users: Tensor | None
    newest: Tensor
    known: Tensor
    pairs: Pairs
    of_pairs: Tensor


class HistoryReader(nn.Module):
    """One reading of a history, to logits.

    Args:
        plan: the features.
        config: its shape.
        target: the encoder of targets, which is not a part of it.
        history: what is counted and known, neither.
        known: of `Read.known`.
        user_tokens: names of the L embeddings of the user's nightly features; none without.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        config: SequenceConfig,
        *,
        target: TargetEncoder,
        history: HistoryNumbers,
        known: Blocks,
        user_tokens: tuple[str, ...],
    ) -> None:
        super().__init__()
        dim, width = config.dim, config.width
        self.pooling = AttentionPooling.of(config)
        of_target = blocks((*target.tokens, DENSE), dim)
        self.query = mlp(of_target, 2 * width, self.pooling.query_width)
        self.pairs = PairEncoder(plan, history.pairs.inputs, heads=config.heads * config.queries)
        self.related = nn.Linear(self.pairs.width, dim)
        hidden = config.numbers
        self.numbers = nn.Sequential(linear(known, hidden), nn.ReLU(), mlp(hidden, hidden, dim))
        self.newest = nn.Linear(config.newest * width, dim)
        pooled = numbered("pooled", config.queries)
        tokens = (*target.tokens, "related", *pooled, "known", "newest", *user_tokens)
        self.mix_tower = MixTower(tokens, dim, plan.tasks, config=config.mix)

    def forward(self, batch: Batch, read: Read) -> Tensor:
        """Logits (T, n_tasks)."""
        bias, related = self.pairs(batch, read.pairs, read.of_pairs)
        pooled = self.pooling(
            read.events,
            self.query(torch.cat([read.tokens.flatten(1), read.dense], dim=1)),
            batch=batch,
            q_offsets=batch.target_offsets,
            end=batch.history_end,
            at=batch.as_of,
            pair_bias=bias,
        )
        mixed = [
            read.tokens,
            self.related(related)[:, None],
            pooled,
            self.numbers(read.known)[:, None],
            self.newest(read.newest)[:, None],
        ]
        if read.users is not None:
            mixed.append(read.users)
        return self.mix_tower(torch.cat(mixed, dim=1), read.dense)
