"""The hybrid: both sides reach its logits, and only events reach what it publishes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from feature_store.columns import NO_LABEL
from feature_store.spec import Dataset
from models.batch import Batch
from models.features import feature_plan
from models.loss import multi_task_loss
from models.tables import TableConfig
from models.upstream.hybrid import Hybrid, HybridConfig
from models.upstream.sequence import Sequence, SequenceConfig
from models.upstream.sum import Sum, SumConfig
from tests.batches import dense_parameters, first_events, loss_of, random_batch
from tests.synthetic import dataset
from tests.tiny import TINY

TABLES = TableConfig(dim=8, default_rows=64, item_rows=128)


def make(spec: Dataset = TINY, *, seed: int = 0, **more: Any) -> Hybrid:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = HybridConfig(tables=TABLES, width=16, head_dim=8, dense_tokens=2, **more)
    return Hybrid(feature_plan(spec), config)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("spec", [TINY, dataset()], ids=lambda s: s.name)
def test_shapes_and_every_parameter_learns(spec: Dataset, members: int) -> None:
    model, batch = make(spec, members=members), random_batch(spec, rows=12)
    tables = model.tables.collection.embedding_bags
    before = {n: t.weight.detach().clone() for n, t in tables.items()}
    found = model(batch)
    assert found.logits.shape == found.user_logits.shape == (batch.targets, len(spec.tasks))
    assert found.users.shape == (batch.rows, 2, 8)
    loss_of(model, batch).backward()
    for name, parameter in dense_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert all(not torch.equal(before[n], t.weight) for n, t in tables.items())


def test_members_read_for_themselves() -> None:
    model, batch = make(members=3).eval(), random_batch(TINY, rows=10)
    before = model(batch)
    assert torch.equal(before.logits, before.members.mean(0))
    assert len({m.sum().item() for m in before.members}) == 3
    with torch.no_grad():
        for parameter in model.readers[1].parameters():
            parameter.add_(0.1)
    same = [torch.equal(a, b) for a, b in zip(before.members, model(batch).members, strict=True)]
    assert same == [True, False, True]
    multi_task_loss(model(batch).members[0], batch.labels).total.backward()
    moved = [any(bool(p.grad.any()) for p in r.parameters()) for r in model.readers]
    assert moved == [True, False, False]


def both_sides(seed: int) -> Batch:
    """Labels that are the exclusive or of a bit of the user's features and one of their events."""
    batch = random_batch(TINY, rows=150, events=3, targets=1, seed=seed, ids=6)
    draw = torch.Generator().manual_seed(seed)
    feature, event = torch.randint(0, 2, (2, batch.rows), generator=draw)
    row_of_event = torch.repeat_interleave(torch.arange(batch.rows), batch.event_offsets.diff())
    answer = (feature ^ event)[batch.row_of_target]
    labels = torch.where(batch.history_end > 0, answer, NO_LABEL)
    return replace(
        batch,
        user_ids={**batch.user_ids, "device": feature},
        event_ids={**batch.event_ids, "article": event[row_of_event]},
        item_id=batch.item_id.clamp(min=2),
        labels=labels[:, None].expand(-1, len(TINY.tasks)).int().contiguous(),
    )


def without_numbers(model: Sequence) -> Sequence:
    """The model, deaf to what is counted and known: in a random batch this is noise, to be learned by heart."""
    for reader in model.readers:
        for layer in (reader.related, reader.pairs.bias, reader.numbers[-1][-1]):
            nn.init.zeros_(layer.weight).requires_grad_(False)
    return model


@pytest.mark.parametrize("side", ["hybrid", "sum", "sequence"])
def test_it_learns_what_neither_side_knows_alone(side: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plan = feature_plan(TINY)
    config = SequenceConfig(tables=TABLES, width=16, head_dim=8)
    model = {
        "hybrid": lambda: without_numbers(make()),
        "sum": lambda: Sum(plan, SumConfig(tables=TABLES, dense_tokens=2)),
        "sequence": lambda: without_numbers(Sequence(plan, config)),
    }[side]()
    adam = torch.optim.Adam(dense_parameters(model).values(), lr=0.01)
    days = [both_sides(seed) for seed in range(6)]
    for step in range(90):
        adam.zero_grad()
        loss_of(model, days[step % len(days)]).backward()
        adam.step()
    unseen = both_sides(100)
    loss = multi_task_loss(model.eval()(unseen).logits, unseen.labels).per_task
    if side == "hybrid":
        assert loss.max() < 0.2
    else:
        assert loss.min() > 0.6  # ln 2 = 0.69 is guessing


def test_events_after_a_target_do_not_move_its_logits_by_a_bit() -> None:
    model, batch = make().eval(), random_batch(TINY, rows=10)
    start = batch.event_offsets[batch.row_of_target]
    hidden = torch.ones(batch.events, dtype=torch.bool)
    for first, end in zip(start, batch.history_end, strict=True):
        hidden[first : first + end] = False
    assert hidden.sum() > 5
    other = replace(
        batch,
        event_ids={k: v.masked_fill(hidden, 5) for k, v in batch.event_ids.items()},
        event_time=batch.event_time.masked_fill(hidden, 10**17),
        event_stream=batch.event_stream.masked_fill(hidden, 1),
    )
    assert torch.equal(model(batch).logits, model(other).logits)
    assert torch.equal(model(batch).user_logits, model(other).user_logits)


def test_the_user_features_of_a_row_reach_the_logits_of_that_row_only() -> None:
    model, batch = make().eval(), random_batch(TINY, rows=10)
    dense = batch.dense.clone()
    dense[3] = dense[3] * 3 + 1
    moved = (model(replace(batch, dense=dense)).logits != model(batch).logits).any(dim=1)
    assert torch.equal(moved, batch.row_of_target == 3)


def test_what_is_published_reads_the_prefix_of_the_events_and_no_user_feature() -> None:
    model, batch = make().eval(), random_batch(TINY, rows=10)
    users = model.user_embeddings(batch)
    torch.testing.assert_close(users, model(batch).users)
    without = replace(
        batch,
        dense=torch.full_like(batch.dense, float("nan")),
        has_aggregates=torch.zeros(batch.rows),
        user_ids={k: torch.full_like(v, -1) for k, v in batch.user_ids.items()},
    )
    assert torch.equal(model(without).user_logits, model(batch).user_logits)
    assert torch.equal(model(without).users, model(batch).users)
    assert not torch.equal(model(without).logits, model(batch).logits)
    assert model(without).logits.isfinite().all()

    states = random_batch(TINY, rows=10, targets=0)
    lengths = states.event_offsets.diff()
    at = torch.full_like(lengths, int(states.event_available.max()) + 1)
    whole = model.user_embeddings(states, at)
    assert not torch.equal(whole, model.user_embeddings(first_events(states, lengths // 2), at))


def test_a_batch_without_targets_or_events_works() -> None:
    model = make()
    for batch in (random_batch(TINY, events=0), random_batch(TINY, targets=0)):
        found = model(batch)
        assert found.logits.shape == (batch.targets, 4) and found.logits.isfinite().all()


def test_state_dict_holds_everything() -> None:
    model, batch = make(), random_batch(TINY)
    loss_of(model, batch).backward()
    fresh = make(seed=5)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(batch).logits, fresh.eval()(batch).logits)
