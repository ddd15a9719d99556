"""The downstream model: its arms differ in what they read and in nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from jobs.training.config import DownstreamTraining
from jobs.training.downstream import DownstreamTrainer
from jobs.training.trainer import train
from models.batch import Batch
from models.downstream import Downstream, DownstreamConfig, Published, PublishedSource
from models.features import feature_plan, member
from models.loss import multi_task_loss
from models.tables import TableConfig
from tests.batches import random_batch
from tests.embedded import reads_embeddings
from tests.tiny import TINY

TABLES = TableConfig(dim=8, default_rows=64, item_rows=128)
SOURCE = PublishedSource(name="sum", embeddings=2, dim=32)
ARMS = {
    "context": DownstreamConfig(use_user_features=False, tables=TABLES),
    "aggregates": DownstreamConfig(tables=TABLES),
    "embeddings": DownstreamConfig(sources=(SOURCE,), tables=TABLES),
    "context and embeddings": DownstreamConfig(
        use_user_features=False, sources=(SOURCE,), tables=TABLES
    ),
}


def make(arm: str) -> Downstream:
    torch.manual_seed(0)
    return Downstream(feature_plan(TINY), {arm: ARMS[arm]})


def reading(arm: str) -> Downstream:
    return reads_embeddings(make(arm))


def published(batch: Batch, seed: int = 0) -> dict[str, Published]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch.rows, 2, 32, generator=generator)
    return {"sum": Published(values, torch.arange(batch.rows) % 3 != 0)}


def dense(model: Any) -> list[torch.nn.Parameter]:
    fused = {id(p) for p in model.tables.parameters()}
    return [p for p in model.parameters() if id(p) not in fused]


@pytest.mark.parametrize("arm", list(ARMS))
def test_each_arm_overfits_and_every_parameter_learns(arm: str) -> None:
    model, batch = make(arm), random_batch(TINY, rows=8, ids=50)
    adam = torch.optim.Adam(dense(model), lr=0.01)
    for step in range(150):
        adam.zero_grad()
        logits = model(batch, published(batch))
        assert logits.shape == (batch.targets, 1)
        loss = multi_task_loss(logits, batch.labels[:, :1]).total
        loss.backward()
        if step == 0:
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dense(model))
        adam.step()
    assert loss < 0.15


def test_the_context_arm_reads_nothing_of_the_user() -> None:
    model, batch = make("context").eval(), random_batch(TINY)
    other = replace(
        batch,
        user_ids={k: v + 1 for k, v in batch.user_ids.items()},
        sparse={k: v._replace(values=v.values + 1) for k, v in batch.sparse.items()},
        dense=batch.dense + 1,
        has_aggregates=1 - batch.has_aggregates,
    )
    assert torch.equal(model(batch), model(other))
    assert not torch.equal(make("aggregates").eval()(batch), make("aggregates").eval()(other))


def test_a_missing_embedding_is_known_to_be_missing_whatever_lies_there() -> None:
    model, batch = reading("context and embeddings").eval(), random_batch(TINY)
    with torch.no_grad():
        next(iter(model.arms.values())).missing[member("sum")].fill_(0.3)
    values, present = published(batch)["sum"]
    junk = torch.where(present[:, None, None], values, float("nan"))
    first = model(batch, {"sum": Published(values, present)})
    assert torch.equal(first, model(batch, {"sum": Published(junk, present)}))
    zeros = torch.where(present[:, None, None], values, 0.0)
    all_there = model(batch, {"sum": Published(zeros, torch.ones_like(present))})
    assert not torch.equal(first, all_there)  # missing is not the same as zero


def test_what_all_users_have_in_common_of_an_embedding_is_taken_out() -> None:
    batch = random_batch(TINY, rows=30)
    values, present = published(batch)["sum"]

    def logits(values: torch.Tensor) -> torch.Tensor:
        model = reading("context and embeddings")
        given = {"sum": Published(values, present)}
        model(batch, given)  # a batch that counts
        return model.eval()(batch, given)

    torch.testing.assert_close(logits(values * 3 - 20), logits(values), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(logits(values.flip(0)), logits(values), atol=1e-2)


def test_nothing_is_read_of_an_embedding_before_something_is_learned() -> None:
    model, batch = make("embeddings").eval(), random_batch(TINY)
    assert torch.equal(model(batch, published(batch)), model(batch, published(batch, seed=1)))
    model = reading("embeddings").eval()
    assert not torch.equal(model(batch, published(batch)), model(batch, published(batch, seed=1)))


def test_embeddings_that_are_not_as_configured_are_refused() -> None:
    model, batch = make("embeddings"), random_batch(TINY)
    with pytest.raises(ValueError, match="give the source 'sum'"):
        model(batch)
    wrong = Published(torch.zeros(batch.rows, 3, 32), torch.ones(batch.rows))
    with pytest.raises(ValueError, match=r"sum has shape \(6, 3, 32\), expected \(6, 2, 32\)"):
        model(batch, {"sum": wrong})


def trained(arms: dict[str, DownstreamConfig], batches: list[Batch]) -> Downstream:
    """Two passes over the batches, from seed 0."""
    torch.manual_seed(0)
    model = Downstream(feature_plan(TINY), arms)
    trainer = DownstreamTrainer(
        model,
        DownstreamTraining(tables=TABLES, epochs=2),
        torch.device("cpu"),
        labels=[b.labels[:, :1] for b in batches],
        inputs=[model.inputs(b) for b in batches],
        published=[published(b, seed=i) for i, b in enumerate(batches)],
    )
    done = train(trainer, lambda epoch, skip: range(skip, len(batches)), seed=0)
    assert done.steps == 2 * len(batches) and done.targets == 2 * sum(b.targets for b in batches)
    return model.eval()


def test_arms_side_by_side_are_what_each_is_alone() -> None:
    batches = [random_batch(TINY, rows=8, seed=seed, ids=50) for seed in range(6)]
    test = random_batch(TINY, rows=20, seed=9, ids=50)
    together = trained(ARMS, batches)
    both = together(test, published(test))
    for i, (name, config) in enumerate(ARMS.items()):
        alone = trained({name: config}, batches)
        # not to the bit: the fused kernel adds up by where a row lies
        torch.testing.assert_close(
            alone(test, published(test)), both[:, i : i + 1], atol=1e-6, rtol=1e-5
        )
        assert torch.equal(together(test, published(test), only=name), both[:, i : i + 1])
    assert len({tuple(column.tolist()) for column in both.T}) == len(ARMS)


def test_what_reads_embeddings_learns_at_its_own_rate() -> None:
    model = make("embeddings")
    trainer = DownstreamTrainer(
        model, DownstreamTraining(published_learning_rate=0.5), torch.device("cpu"),
        labels=[], inputs=[], published=[],
    )  # fmt: skip
    groups = trainer.optimizers["adam"].param_groups
    fast = {id(p) for g in groups if g["lr"] == 0.5 for p in g["params"]}
    arm = next(iter(model.arms.values()))
    assert fast == {id(p) for p in (*arm.published.parameters(), *arm.missing.parameters())}
