"""The event model: a sequence of event-based features to a sequence of event embeddings.

An embedding per attribute, linearly compressed to one embedding per event, plus the stream's
embedding and a time encoding: phase of day and week, and the gaps to the event before and to the
one before of the same stream. What is encoded once for a row knows event times only; how long ago
an event was depends on the target and enters in the pooling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batch import Batch, Histories
from models.clock import PHASES, gap_bucket, phases
from models.features import FeaturePlan, member
from models.numbers import Standardise
from models.tables import Lookup

_GAP_BUCKETS = 32
_INIT_SCALE = 0.1
_NO_GAP = _GAP_BUCKETS  # the first event of its row


class EventEncoder(nn.Module):
    """Events of all streams, in one sequence, to embeddings.

    The compression is one matrix per attribute, by name, so that a checkpoint still loads when an
    attribute is added.

    Args:
        plan: the features.
        dim: D, of the tables.
        width: E, of an event embedding.
    """

    def __init__(self, plan: FeaturePlan, dim: int, width: int) -> None:
        super().__init__()
        self.plan = plan
        scale = dim**-0.5
        self.compress = nn.ParameterDict(
            {member(c.name): nn.Parameter(torch.randn(width, dim) * scale) for c in plan.event_ids}
        )
        if plan.event_numbers:
            self.standardise = Standardise(len(plan.event_numbers))
            self.numbers = nn.Linear(len(plan.event_numbers), width, bias=False)
        self.vectors = nn.ModuleDict(
            {member(name): nn.Linear(size, width, bias=False) for name, size in plan.event_vectors}
        )
        self.stream = nn.Embedding(len(plan.streams), width)
        self.phase = nn.Linear(PHASES, width)
        self.gap = nn.Embedding(_GAP_BUCKETS + 1, width)
        for table in (self.stream, self.gap):
            # at the usual unit size they would drown the attributes until those have grown
            nn.init.normal_(table.weight, std=_INIT_SCALE)
        self.norm = nn.LayerNorm(width)

    def lookups(self, batch: Batch) -> list[Lookup]:
        """One per categorical attribute, N embeddings each."""
        return [Lookup(c.vocabulary, batch.event_ids[c.name]) for c in self.plan.event_ids]

    def forward(self, batch: Batch, embeddings: list[Tensor]) -> Tensor:
        """Event embeddings (N, E)."""
        encoded = self.stream(batch.event_stream) + self.phase(phases(batch.event_time))
        encoded = encoded + self.gap(_gaps(batch))
        if embeddings:
            weights = [self.compress[member(c.name)] for c in self.plan.event_ids]
            encoded = encoded + F.linear(torch.cat(embeddings, dim=1), torch.cat(weights, dim=1))
        if self.plan.event_numbers:
            raw = torch.stack([batch.event_floats[n] for n in self.plan.event_numbers], dim=1)
            encoded = encoded + self.numbers(self.standardise(raw))
        for name, _ in self.plan.event_vectors:
            encoded = encoded + self.vectors[member(name)](batch.event_floats[name])
        return self.norm(encoded)


def event_rows(batch: Histories) -> Tensor:
    """(N,) int64, the row of each event."""
    rows = torch.arange(batch.rows, device=batch.event_offsets.device)
    return torch.repeat_interleave(rows, batch.event_offsets.diff())


def event_positions(batch: Histories) -> Tensor:
    """(N,) int64, the place of each event in its row, from 0."""
    first = batch.event_offsets.index_select(0, event_rows(batch))
    return torch.arange(batch.events, device=first.device) - first


def _gaps(batch: Batch) -> Tensor:
    """(N,) int64, bucket of the time since the event before in the row."""
    gap = F.pad(batch.event_time.diff(), (1, 0)) if batch.events else batch.event_time
    bucket = gap_bucket(gap, buckets=_GAP_BUCKETS)
    first = event_positions(batch) == 0
    return torch.where(first, torch.full_like(bucket, _NO_GAP), bucket)
