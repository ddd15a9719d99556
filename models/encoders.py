"""Encoders of an event sequence: causal self-attention layers, from cheap to dear.

An event sees the events before it and itself, so that a row is encoded once for all of its targets.
Relative time and position enter as biases by the age of the key and by how many events came after
it (rab^{p,t} of HSTU, arXiv 2402.17152). O(N^2) in the length of a history, where the pooling above
is O(M N): a layer has to earn its cost.

Shapes: N events, E their width, d head dimension.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import RecencyBias, prefix_attention
from models.attention_inputs import POSITION_BUCKETS
from models.batch import Histories
from models.event import event_positions

_USUAL_LENGTH = 64.0  # events; HSTU divides its weights by a length, so that sums stay of unit size


class Encoder(StrEnum):
    """Kinds of layers."""

    SOFTMAX = "softmax"
    HSTU = "hstu"


class _CausalLayer(nn.Module):
    """What the layers share: heads, biases by relative time and position, a prefix for every event.

    Args:
        width: E, a multiple of head_dim.
        head_dim: d, of a head.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        if width % head_dim:
            raise ValueError(f"width {width} is no multiple of head_dim {head_dim}")
        self.shape = (width // head_dim, head_dim)
        self.norm = nn.LayerNorm(width)
        self.recency = RecencyBias(self.shape[0])
        self.position_bias = nn.Parameter(torch.zeros(POSITION_BUCKETS, self.shape[0]))
        self.out = nn.Linear(width, width)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Histories, *, pointwise: float | None = None
    ) -> Tensor:
        """(N, E) each -> (N, E)."""
        attended = prefix_attention(
            q.unflatten(1, self.shape),
            k.unflatten(1, self.shape),
            v.unflatten(1, self.shape),
            q_offsets=batch.event_offsets,
            kv_offsets=batch.event_offsets,
            kv_end=event_positions(batch) + 1,
            recency=self.recency(batch.event_time, batch.event_time),
            position_bias=self.position_bias,
            pointwise=pointwise,
        )
        return attended.flatten(1)


class SoftmaxLayer(_CausalLayer):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__(width, head_dim)
        self.qkv = nn.Linear(width, 3 * width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, events: Tensor, batch: Histories) -> Tensor:
        """(N, E) -> (N, E)."""
        q, k, v = self.qkv(self.norm(events)).chunk(3, dim=1)
        events = events + self.out(self.attend(q, k, v, batch))
        return events + self.feed(self.feed_norm(events))


class HstuLayer(_CausalLayer):
    """Pointwise aggregated attention, a layer of HSTU (arXiv 2402.17152, eq. 1 to 3).

        U, V, Q, K = split(SiLU(f1(X)))
        A V = SiLU(Q K^T + bias) V / length
        Y = f2(Norm(A V) * U) + X

    No softmax: how many events match is kept, not only which match best. No feed-forward half: U gates.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__(width, head_dim)
        self.uvqk = nn.Linear(width, 4 * width)
        self.attended_norm = nn.LayerNorm(width)

    def forward(self, events: Tensor, batch: Histories) -> Tensor:
        """(N, E) -> (N, E)."""
        u, v, q, k = F.silu(self.uvqk(self.norm(events))).chunk(4, dim=1)
        attended = self.attend(q, k, v, batch, pointwise=_USUAL_LENGTH)
        return events + self.out(self.attended_norm(attended) * u)


_LAYERS: dict[Encoder, type[nn.Module]] = {Encoder.SOFTMAX: SoftmaxLayer, Encoder.HSTU: HstuLayer}


def layer(encoder: Encoder, width: int, head_dim: int) -> nn.Module:
    """A layer of that kind, (N, E) and its batch -> (N, E)."""
    return _LAYERS[Encoder(encoder)](width, head_dim)
