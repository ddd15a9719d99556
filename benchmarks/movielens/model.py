"""A next-item model around the encoders of `models`, and its loss over the whole catalogue.

Shapes: N events, E their width, V items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.movielens.data import Batch
from models.attention_inputs import RECENCY_BUCKETS, recency_bucket
from models.encoders import Encoder, layer
from models.event import event_positions

_INIT = 0.02


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Args:
    encoder: kind of the layers.
    layers: how many.
    width: E; the embedding of an item, in and out.
    head_dim: of a head.
    window: most inputs that a user has.
    dropout: of the inputs and of what each layer adds.
    temperature: cosines are divided by it.
    asked: the time at which the next item is asked for is an input, as in HSTU's public code, where
        the time bias of a query is by the age of a key then.
    """

    encoder: Encoder = Encoder.HSTU
    layers: int = 4
    width: int = 64
    head_dim: int = 32
    window: int = 200
    dropout: float = 0.2
    temperature: float = 0.05
    asked: bool = True


class Recommender(nn.Module):
    """Events to what may come next: a direction (N, E) that is compared with the items' by cosine.

    An event is its item, its place in the window and, where asked for, how long after it the next
    item was wanted. Items have one embedding, in and out.
    """

    def __init__(self, config: ModelConfig, items: int) -> None:
        super().__init__()
        self.config = config
        self.item = nn.Embedding(items, config.width)
        self.position = nn.Embedding(config.window, config.width)
        if config.asked:
            self.wait = nn.Embedding(RECENCY_BUCKETS, config.width)
        for table in self.children():
            nn.init.normal_(table.weight, std=_INIT)
        self.layers = nn.ModuleList(
            layer(config.encoder, config.width, config.head_dim) for _ in range(config.layers)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, batch: Batch) -> Tensor:
        """(N, E) of unit length over the temperature: times `directions()` it is the logits."""
        events = self.item(batch.item) * math.sqrt(self.config.width)
        events = events + self.position(event_positions(batch))
        if self.config.asked:
            events = events + self.wait(recency_bucket(batch.asked - batch.event_time))
        events = self.dropout(events)
        for encode in self.layers:
            events = events + self.dropout(encode(events, batch) - events)
        return F.normalize(events.float(), dim=1) / self.config.temperature

    def directions(self) -> Tensor:
        """(V, E) of unit length."""
        return F.normalize(self.item.weight, dim=1)


def catalogue_loss(hidden: Tensor, items: Tensor, target: Tensor, *, chunk: int) -> Tensor:
    """Mean cross-entropy of softmax(hidden items^T) at `target`; never holds all logits.

    Args:
        hidden: (N, E) float32.
        items: (V, E) float32.
        target: (N,) int64.
        chunk: rows whose logits are held at a time; on a CPU, what fits its cache.
    """
    return _CatalogueLoss.apply(hidden, items, target, chunk)


class _CatalogueLoss(torch.autograd.Function):
    """Makes both gradients while a chunk's logits are there: each is computed once, none is kept.

    p = exp(logit - max); d/dhidden = p items / sum(p) - items[target], and in d/ditems the division
    by sum(p) is done on the rows of `hidden`, which are much narrower than those of p.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, items: Tensor, target: Tensor, chunk: int) -> Tensor:
        d_hidden, d_items = torch.empty_like(hidden), torch.zeros_like(items)
        total = hidden.new_zeros(())
        for h, t, d in zip(*(x.split(chunk) for x in (hidden, target, d_hidden)), strict=True):
            logits = h @ items.T  # (c, E) x (E, V) -> (c, V)
            own = logits.gather(1, t[:, None])
            top = logits.amax(1, keepdim=True)
            weights = logits.sub_(top).exp_()
            whole = weights.sum(1, keepdim=True)
            total += (whole.log() + top - own).sum()
            torch.mm(weights, items, out=d)
            d.div_(whole).sub_(items[t])
            d_items.addmm_(weights.T, h / whole)
        d_items.index_add_(0, target, hidden, alpha=-1.0)
        share = 1.0 / max(len(hidden), 1)
        ctx.save_for_backward(d_hidden.mul_(share), d_items.mul_(share))
        return total * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_items = ctx.saved_tensors
        return d_hidden * grad, d_items * grad, None, None
