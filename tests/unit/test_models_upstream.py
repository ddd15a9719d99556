"""SUM and the sequence model: shapes, gradients, learning, and what may not reach what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from feature_store.columns import NO_LABEL
from feature_store.spec import Dataset
from jobs.training.presets import preset
from models.batch import Batch, Sparse
from models.encoders import Encoder, layer
from models.event import event_positions
from models.features import feature_plan
from models.loss import multi_task_loss
from models.tables import TableConfig
from models.towers import MixConfig, MixTower
from models.upstream.sequence import Sequence, SequenceConfig
from models.upstream.sum import Sum, SumConfig
from tests.batches import dense_parameters, first_events, loss_of, random_batch
from tests.synthetic import dataset
from tests.tiny import TINY

TABLES = TableConfig(dim=8, default_rows=64, item_rows=128)
SPECS = [TINY, dataset()]
DIRECT = MixConfig(sizes=(4,), interactions=("dot",), direct=True)


def make_sum(spec: Dataset = TINY, **changes: Any) -> Sum:
    torch.manual_seed(0)
    return Sum(feature_plan(spec), SumConfig(tables=TABLES, **changes))


def make_sequence(
    spec: Dataset = TINY, *, tables: TableConfig = TABLES, **changes: Any
) -> Sequence:
    torch.manual_seed(0)
    config = SequenceConfig(tables=tables, width=16, head_dim=8, **changes)
    return Sequence(feature_plan(spec), config)


MAKERS = {
    "sum": make_sum,
    "sum with direct dot products": lambda spec=TINY: make_sum(spec, mix=DIRECT),
    "sequence": make_sequence,
    "sequence with bags": lambda spec=TINY: make_sequence(spec, bags=True),
    "sequence with layers": lambda spec=TINY: make_sequence(spec, layers=2),
    "sequence with HSTU layers": lambda spec=TINY: make_sequence(spec, layers=2, encoder="hstu"),
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("name", list(MAKERS))
def test_shapes_and_every_parameter_learns(name: str, spec: Dataset) -> None:
    model = MAKERS[name](spec)
    batch = random_batch(spec, rows=12)
    assert model(batch).logits.shape == (batch.targets, len(spec.tasks))
    tables = {
        n: w.weight.detach().clone() for n, w in model.tables.collection.embedding_bags.items()
    }
    loss_of(model, batch).backward()
    for parameter_name, parameter in dense_parameters(model).items():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, parameter_name
    for table, before in tables.items():
        after = model.tables.collection.embedding_bags[table].weight
        assert not torch.equal(after, before), table


@pytest.mark.parametrize("name", list(MAKERS))
def test_it_overfits_a_small_batch(name: str) -> None:
    model = MAKERS[name]()
    batch = random_batch(TINY, rows=8, ids=50)
    adam = torch.optim.Adam(dense_parameters(model).values(), lr=0.01)
    for _ in range(120):
        adam.zero_grad()
        loss_of(model, batch).backward()
        adam.step()
    loss = multi_task_loss(model(batch).logits, batch.labels)
    assert loss.per_task.max() < 0.2  # ln 2 = 0.69 is guessing


def with_other_user_features(batch: Batch) -> Batch:
    sparse = {
        k: Sparse(v.values + 3, v.offsets, None if v.scores is None else v.scores * 2)
        for k, v in batch.sparse.items()
    }
    return replace(
        batch,
        user_id=batch.user_id + 7,
        user_ids={k: v + 1 for k, v in batch.user_ids.items()},
        sparse=sparse,
        dense=batch.dense * 3 + 1,
        has_aggregates=1 - batch.has_aggregates,
        event_ids={k: v + 1 for k, v in batch.event_ids.items()},
        event_time=batch.event_time - 10**9,
        history_end=batch.history_end * 0,
    )


def test_no_user_input_but_the_embeddings_reaches_the_mix_tower() -> None:
    model = make_sum().eval()
    batch = random_batch(TINY)
    users = model.user_embeddings(batch)
    other = with_other_user_features(batch)
    assert torch.equal(model.mix(batch, users), model.mix(other, users))
    assert torch.equal(model.mix(batch, users), model(batch).logits)
    assert not torch.equal(model.user_embeddings(other), users)
    assert not torch.equal(model.mix(batch, users.flip(0)), model.mix(batch, users))


def test_direct_dot_products_are_a_factorization_machine_beside_the_modules() -> None:
    torch.manual_seed(0)
    tower = MixTower("xyz", 8, ["a", "b"], config=DIRECT).eval()
    tokens, dense = torch.randn(5, 3, 8), torch.randn(5, 8)
    modules = tower.head(tower.pyramid(tokens, dense).flatten(1))
    weight = torch.randn(2, 3)
    with torch.no_grad():
        tower.pairs.weight.copy_(weight)
    x, y, z = tokens.unbind(1)
    dots = torch.stack([(x * y).sum(1), (x * z).sum(1), (y * z).sum(1)], dim=1) / 8**0.5
    torch.testing.assert_close(tower(tokens, dense), modules + dots @ weight.T)


def test_user_embeddings_of_sum_read_no_target_and_no_event() -> None:
    model = make_sum().eval()
    batch = random_batch(TINY)
    empty = random_batch(TINY, events=0, targets=0)
    users_only = replace(empty, user_ids=batch.user_ids, sparse=batch.sparse, dense=batch.dense)
    torch.testing.assert_close(model.user_embeddings(users_only), model.user_embeddings(batch))


def test_a_user_without_aggregates_is_one_and_the_same_to_sum() -> None:
    model = make_sum().eval()
    batch = random_batch(TINY)
    nothing = {
        k: Sparse(
            v.values[:0], torch.zeros_like(v.offsets), None if v.scores is None else v.scores[:0]
        )
        for k, v in batch.sparse.items()
    }
    missing = replace(
        batch,
        has_aggregates=torch.zeros(batch.rows),
        user_ids={k: torch.full_like(v, -1) for k, v in batch.user_ids.items()},
        sparse=nothing,
        dense=torch.full_like(batch.dense, float("nan")),
    )
    users = model.user_embeddings(missing)
    assert users.isfinite().all()
    # not to the bit: some CPUs sum the rows at a matrix product's edge in another order
    torch.testing.assert_close(users, users[:1].expand_as(users), rtol=1e-6, atol=1e-6)
    assert model(missing).logits.isfinite().all()


@pytest.mark.parametrize(("layers", "encoder"), [(0, "softmax"), (2, "softmax"), (2, "hstu")])
def test_events_after_a_target_do_not_move_its_logits_by_a_bit(layers: int, encoder: str) -> None:
    model = make_sequence(layers=layers, encoder=encoder).eval()
    batch = random_batch(TINY, rows=10)
    start = batch.event_offsets[batch.row_of_target]
    seen = torch.zeros(batch.events, dtype=torch.bool)
    for first, end in zip(start, batch.history_end, strict=True):
        seen[first : first + end] = True
    hidden = ~seen
    assert hidden.sum() > 5

    def poison(x: Tensor, value: float) -> Tensor:
        mask = hidden.view(-1, *[1] * (x.dim() - 1))
        return torch.where(mask, torch.as_tensor(value, dtype=x.dtype), x)

    other = replace(
        batch,
        event_ids={k: poison(v, 5) for k, v in batch.event_ids.items()},
        event_floats={k: poison(v, 1e9) for k, v in batch.event_floats.items()},
        event_time=poison(batch.event_time, 10**17),
        event_stream=poison(batch.event_stream, 1),
    )
    assert torch.equal(model(batch).logits, model(other).logits)
    assert torch.equal(model(batch).user_logits, model(other).user_logits)


def test_the_position_bias_of_a_layer_counts_back_from_the_event_itself() -> None:
    batch = random_batch(TINY, rows=10)
    softmax = layer(Encoder.SOFTMAX, 8, 4)
    q, k, v = torch.randn(3, batch.events, 8)
    with torch.no_grad():
        softmax.position_bias[1:] = -1e9
        torch.testing.assert_close(softmax.attend(q, k, v, batch), v)
        softmax.position_bias[1] = 1e9  # the event before, where there is one
        attended = softmax.attend(q, k, v, batch)
    later = event_positions(batch) > 0
    torch.testing.assert_close(attended[later], v.roll(1, 0)[later])
    torch.testing.assert_close(attended[~later], v[~later])


@pytest.mark.parametrize("bags", [False, True])
def test_published_embeddings_see_the_prefix_and_nothing_after_it(bags: bool) -> None:
    model = make_sequence(bags=bags).eval()
    batch = random_batch(TINY, rows=10, targets=0)
    lengths = batch.event_offsets.diff()
    at = torch.full_like(lengths, int(batch.event_available.max()) + 1)
    all_of_it = model.user_embeddings(batch, at)
    assert all_of_it.shape == (10, 2, 8) and all_of_it.isfinite().all()
    assert not torch.equal(all_of_it, model.user_embeddings(first_events(batch, lengths // 2), at))
    none = model.user_embeddings(first_events(batch, lengths * 0), at)
    torch.testing.assert_close(none, none[:1].expand_as(none))


@pytest.mark.parametrize("bags", [False, True])
def test_published_embeddings_are_the_ones_that_were_trained(bags: bool) -> None:
    model = make_sequence(bags=bags).eval()
    batch = random_batch(TINY, rows=10)
    users = model.user_embeddings(batch)
    lookups = model.target.lookups(batch)
    tokens, dense = model.target(batch, model.tables(lookups))
    mixed = torch.cat([tokens, users[batch.row_of_target]], dim=1)
    torch.testing.assert_close(model.user_mix_tower(mixed, dense), model(batch).user_logits)


def test_an_embedding_begins_in_the_direction_of_what_the_user_met() -> None:
    model = make_sequence(bags=True, tables=replace(TABLES, item_init_scale=0.3)).eval()
    batch = random_batch(TINY, rows=40)
    end = batch.event_offsets.diff().clamp(max=1)  # the oldest event of each user
    at = batch.event_time.index_select(0, batch.event_offsets[:-1])
    first = batch.event_offsets[:-1][end > 0]
    rows = model.tables(model.event.lookups(batch))[0].index_select(0, first)
    known = batch.event_ids["article"].index_select(0, first) != -1
    users = model.user_embeddings(first_events(batch, end), at)[end > 0][:, 0]
    alike = torch.cosine_similarity(users, rows, dim=1)
    assert known.sum() > 10 and alike[known].mean() > 0.4 > alike[~known].abs().mean()


def test_the_pooled_embeddings_are_keyed_by_the_item() -> None:
    model = make_sequence().eval()
    batch = random_batch(TINY, rows=10)
    asked = {}
    model.readers[0].pooling.register_forward_hook(lambda _m, _i, out: asked.update(out=out))
    model(batch)
    first = asked["out"]
    model(replace(batch, item_id=batch.item_id.roll(1)))
    moved = (first != asked["out"]).flatten(1).any(dim=1)
    changed = (batch.item_id != batch.item_id.roll(1)) & (batch.history_end > 0)
    assert torch.equal(moved, changed)


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_batch_without_targets_or_events_works(name: str) -> None:
    model = MAKERS[name]()
    for batch in (random_batch(TINY, events=0), random_batch(TINY, targets=0)):
        found = model(batch)
        assert found.logits.shape == (batch.targets, 4) and found.logits.isfinite().all()


def test_the_paper_preset_is_the_papers_shape() -> None:
    config = preset(TINY, "sum_paper").shape
    assert (len(config.user.sizes), config.embeddings, config.dim) == (4, 2, 96)
    assert set(config.user.interactions) == {"mlp", "dot", "dcn", "mixer"}
    small = replace(config.tables, default_rows=16, item_rows=16)
    model = Sum(feature_plan(TINY), replace(config, tables=small))
    batch = random_batch(TINY)
    assert model.user_embeddings(batch).shape == (batch.rows, 2, 96)


def test_the_loss_is_the_mean_over_labels_and_skips_the_missing() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0]], requires_grad=True)
    labels = torch.tensor([[1, NO_LABEL], [NO_LABEL, NO_LABEL]], dtype=torch.int32)
    loss = multi_task_loss(logits, labels, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(loss.total, torch.tensor(3 * 0.6931472))
    assert loss.counts.tolist() == [1, 0] and loss.per_task[1].isnan()
    loss.total.backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == [-1.5, 0.0, 0.0, 0.0]


def test_members_have_their_own_losses_which_are_averaged() -> None:
    logits, weights = torch.randn(3, 5, 2), torch.tensor([3.0, 1.0])
    labels = torch.tensor([[1, NO_LABEL], [0, 0], [1, 1], [0, NO_LABEL], [1, 0]], dtype=torch.int32)
    together = multi_task_loss(logits, labels, weights)
    alone = [multi_task_loss(member, labels, weights) for member in logits]
    torch.testing.assert_close(together.total, torch.stack([m.total for m in alone]).mean())
    assert together.counts.tolist() == [5, 3]
    assert together.total > multi_task_loss(logits.mean(0), labels, weights).total


def test_state_dict_holds_everything() -> None:
    """A fresh model with the state of another gives its logits to the bit."""
    for name, maker in MAKERS.items():
        model, batch = maker(), random_batch(TINY)
        loss_of(model, batch).backward()
        torch.manual_seed(5)
        fresh = type(model)(model.plan, model.config)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(batch).logits, fresh.eval()(batch).logits), name
