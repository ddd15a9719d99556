"""Random batches of any dataset, straight to tensors: for tests of what reads batches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_store.days import DAY_US, HOUR_US
from feature_store.spec import Attribute, Dataset, Kind
from models.batch import Batch, Sparse
from models.event import event_rows
from models.features import feature_plan
from models.loss import multi_task_loss

NOON_US = 19_800 * DAY_US + 12 * HOUR_US


def _offsets(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


class _Draw:
    def __init__(self, seed: int, ids: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.max_id = ids

    def below(self, high: int, count: int) -> Tensor:
        return torch.randint(0, max(high, 1), (count,), generator=self.generator)

    def ids(self, count: int) -> Tensor:
        """Ids from 0, some of them missing."""
        return self.below(self.max_id + 1, count) - 1

    def numbers(self, *shape: int) -> Tensor:
        """Positive numbers, some of them missing."""
        found = torch.rand(shape, generator=self.generator) * 20
        missing = torch.rand(shape, generator=self.generator) < 0.1
        return found.masked_fill(missing, float("nan"))

    def vectors(self, count: int, dim: int) -> Tensor:
        return torch.randn(count, dim, generator=self.generator)


def random_batch(
    dataset: Dataset,
    *,
    rows: int = 6,
    events: int = 8,
    targets: int = 4,
    seed: int = 0,
    ids: int = 12,
) -> Batch:
    """A batch that obeys the layout; row 0 has no event and row 1 one (of rows >= 2).

    Args:
        events, targets: about so many per row on average.
    """
    draw = _Draw(seed, ids)
    event_counts = draw.below(2 * events + 1, rows)
    event_counts[: min(rows, 2)] = torch.tensor([0, 1])[: min(rows, 2)]
    target_counts = draw.below(2 * targets, rows) + 1 if targets else torch.zeros(rows).long()
    event_offsets, target_offsets = _offsets(event_counts), _offsets(target_counts)
    n, t = int(event_offsets[-1]), int(target_offsets[-1])
    event_row = torch.repeat_interleave(torch.arange(rows), event_counts)
    target_row = torch.repeat_interleave(torch.arange(rows), target_counts)

    span = 3 * DAY_US  # events of two days before and of the day itself
    raw = event_row * 2 * span + (draw.below(span // 1000, n) * 1000)
    available = raw.sort().values - event_row * 2 * span + NOON_US - 2 * DAY_US - 12 * HOUR_US
    as_of = target_row * 2 * DAY_US + draw.below(DAY_US // 1000, t) * 1000
    as_of = as_of.sort().values - target_row * 2 * DAY_US + NOON_US - 12 * HOUR_US
    seen = torch.stack(
        [((event_row == r) & (available < a)).sum() for r, a in zip(target_row, as_of, strict=True)]
    ) if t else torch.zeros(0).long()  # fmt: skip

    stream = draw.below(len(dataset.streams), n)

    def carried(attribute: Attribute) -> Tensor:
        having = [attribute.name in {a.name for a in s.attributes} for s in dataset.streams]
        return torch.tensor(having)[stream]

    ids_of: dict[str, Tensor] = {}
    floats_of: dict[str, Tensor] = {}
    for a in dataset.event_attributes:
        has = carried(a)
        if a.kind is Kind.CATEGORICAL:
            ids_of[a.name] = draw.ids(n).masked_fill(~has, -1)
        elif a.kind is Kind.NUMERIC:
            floats_of[a.name] = draw.numbers(n).masked_fill(~has, float("nan"))
        else:
            floats_of[a.name] = draw.vectors(n, a.dim or 0) * has[:, None]
    sparse = {}
    for s in dataset.sparse_features:
        lengths = draw.below(s.max_ids + 1, rows)
        total = int(lengths.sum())
        scores = (draw.below(9, total) + 1).float() if s.scored else None
        sparse[s.name] = Sparse(draw.below(ids, total), _offsets(lengths), scores)
    context = dataset.context_features
    plan = feature_plan(dataset)
    return Batch(
        user_id=torch.arange(rows),
        row_of_target=target_row,
        target_offsets=target_offsets,
        event_offsets=event_offsets,
        event_stream=stream,
        event_time=available - draw.below(HOUR_US, n),
        event_available=available,
        event_ids=ids_of,
        event_floats=floats_of,
        history_end=seen,
        target_kind=draw.below(len(dataset.targets), t),
        time=as_of,
        as_of=as_of,
        item_id=draw.ids(t),
        context_ids={c.name: draw.ids(t) for c in context if c.kind is Kind.CATEGORICAL},
        context_floats={c.name: draw.numbers(t) for c in context if c.kind is Kind.NUMERIC},
        item_features=draw.numbers(t, len(plan.item_numbers)),
        pair_numbers=draw.numbers(int(seen.sum()), len(plan.pair_numbers)),
        has_aggregates=torch.ones(rows),
        user_ids={u.name: draw.ids(rows) for u in dataset.user_attributes},
        sparse=sparse,
        dense=draw.numbers(rows, len(dataset.dense_features)),
        labels=torch.stack([draw.below(2, t) for _ in dataset.tasks], dim=1).int(),
    )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """What an upstream model is trained on: the loss of both kinds of logits."""
    found = model(batch)
    total = multi_task_loss(found.logits, batch.labels).total
    if found.user_logits is not None:
        total = total + multi_task_loss(found.user_logits, batch.labels).total
    return total


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All but the tables'."""
    fused = {id(p) for p in model.tables.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) not in fused}


def first_events(batch: Batch, count: Tensor) -> Batch:
    """The batch without targets, with the `count` (R,) oldest events of each row."""
    row = event_rows(batch)
    keep = torch.arange(batch.events) - batch.event_offsets[row] < count[row]
    return replace(
        batch,
        row_of_target=batch.row_of_target[:0],
        target_offsets=torch.zeros_like(batch.target_offsets),
        event_offsets=_offsets(count),
        event_stream=batch.event_stream[keep],
        event_time=batch.event_time[keep],
        event_available=batch.event_available[keep],
        event_ids={k: v[keep] for k, v in batch.event_ids.items()},
        event_floats={k: v[keep] for k, v in batch.event_floats.items()},
    )
