"""Names of a spec that are attributes of modules, or of what holds them, or a feature of ours."""

from __future__ import annotations

import pytest
import torch

from jobs.training.downstream import arms, features, permuted
from models.downstream import Downstream, DownstreamConfig, Published, PublishedSource
from models.features import feature_plan
from models.loss import multi_task_loss
from models.tables import TableConfig
from models.upstream.sequence import Sequence, SequenceConfig
from models.upstream.sum import Sum, SumConfig
from tests.batches import loss_of, random_batch
from tests.names import free_names, member_names, plain, renaming, under

TABLES = TableConfig(dim=8, default_rows=8, item_rows=8)
CONFIGS = {
    Sum: SumConfig(tables=TABLES),
    Sequence: SequenceConfig(tables=TABLES, width=16, head_dim=8),
}
MEMBERS = tuple(n for n in ("item", "user", *member_names()) if n in free_names())
SPEC = under(plain(len(MEMBERS)), renaming(plain(len(MEMBERS)), MEMBERS, seed=0))


@pytest.mark.parametrize("model", list(CONFIGS), ids=lambda m: m.__name__)
def test_a_model_of_such_names_learns_and_loads_by_name(model) -> None:
    torch.manual_seed(0)
    ours, other = (model(feature_plan(SPEC), CONFIGS[model]) for _ in range(2))
    batch = random_batch(SPEC, rows=5)
    loss_of(ours, batch).backward()
    other.load_state_dict(ours.state_dict())
    other.tables.load_optimizer_state(ours.tables.optimizer_state())
    assert set(ours.tables.optimizer_state()) == set(ours.tables.names)
    ours.eval(), other.eval()
    assert torch.equal(ours(batch).logits, other(batch).logits)


def test_a_context_feature_called_item_is_not_the_targets_item() -> None:
    name = "item"
    assert name in {c.name for c in SPEC.context_features}
    torch.manual_seed(0)
    model, batch = Sum(feature_plan(SPEC), CONFIGS[Sum]).eval(), random_batch(SPEC, rows=5)
    before = model(batch).logits
    batch.context_ids[name] += 1
    assert not torch.equal(model(batch).logits, before)


def test_a_downstream_model_of_such_names_learns_and_every_feature_is_shuffled_alone() -> None:
    plan, batch = feature_plan(SPEC), random_batch(SPEC, rows=6)
    arm = next(a for a in arms(["sum"]) if a.user_features and a.sources)
    sources = (PublishedSource(name="sum", embeddings=2, dim=8),)
    torch.manual_seed(0)
    model = Downstream(plan, {arm.name: DownstreamConfig(sources=sources, tables=TABLES)})
    given = {"sum": Published(torch.randn(6, 2, 8), torch.ones(6, dtype=torch.bool))}
    multi_task_loss(model(batch, given), batch.labels[:, :1]).total.backward()
    titles = features(plan, arm)
    assert len(set(titles)) == len(titles)
    for title in titles:
        generator = torch.Generator().manual_seed(1)
        moved, published = permuted(batch, given, title, generator, plan)
        changed = [
            field
            for field in ("item_id", "as_of", "item_features", "dense")
            if getattr(moved, field) is not getattr(batch, field)
        ]
        for field in ("context_ids", "context_floats", "user_ids", "sparse"):
            old, new = getattr(batch, field), getattr(moved, field)
            changed += [f"{field}/{n}" for n in old if new[n] is not old[n]]
        changed += ["published"] if published["sum"] is not given["sum"] else []
        assert len(changed) == 1, (title, changed)
        if title in {*batch.context_ids, *batch.context_floats}:
            assert changed[0].startswith("context_")
