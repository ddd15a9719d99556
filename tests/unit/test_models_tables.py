"""Fused tables: lookups by hand, hashing, updates, and state that comes back by table name."""

from __future__ import annotations

import torch
from torch import Tensor

from models.features import member
from models.tables import Lookup, TableConfig, Tables, bag_weights, table_rows

CONFIG = TableConfig(dim=4, default_rows=16, item_rows=32, init_scale=1.0)


def weight(tables: Tables, name: str) -> Tensor:
    return tables.collection.embedding_bags[member(name)].weight.detach()


def test_lookups_are_the_rows_of_their_tables() -> None:
    tables = Tables(["item", "place", "item"], config=CONFIG)
    item, place = weight(tables, "item"), weight(tables, "place")
    assert item.shape == (32, 4) and place.shape == (16, 4)
    single, bags, other = tables(
        [
            Lookup("item", torch.tensor([3, -1, 5])),
            Lookup(
                "item",
                torch.tensor([1, 2, -1, 7]),
                torch.tensor([0, 3, 3, 4]),
                torch.tensor([0.5, 0.5, 9.0, 2.0]),
            ),
            Lookup("place", torch.tensor([0])),
        ]
    )
    zero = torch.zeros(4)
    torch.testing.assert_close(single, torch.stack([item[3], zero, item[5]]))
    expected = torch.stack([(item[1] + item[2]) / 2, zero, 2 * item[7]])
    torch.testing.assert_close(bags, expected)
    torch.testing.assert_close(other, place[:1])


def test_a_batch_without_any_id_gives_empty_or_zero_embeddings() -> None:
    tables = Tables(["item"], config=CONFIG)
    (none,) = tables([Lookup("item", torch.empty(0, dtype=torch.int64))])
    (missing,) = tables([Lookup("item", torch.tensor([-1, -1]))])
    assert none.shape == (0, 4)
    assert torch.equal(missing, torch.zeros(2, 4))


def test_small_ids_keep_their_row_and_large_ones_spread() -> None:
    rows = 1000
    assert torch.equal(table_rows(torch.arange(rows), rows), torch.arange(rows))
    far = torch.cat([torch.arange(10**6, 10**6 + 50_000), -torch.arange(2, 50_002)])
    hit = table_rows(far * 64, rows)  # multiples: a plain remainder would use 1 row in 8
    assert hit.min() >= 0 and hit.max() < rows
    counts = torch.bincount(hit, minlength=rows)
    assert counts.min() > 40 and counts.max() < 200  # 100 each on average


def test_backward_changes_the_rows_that_were_looked_up_and_no_others() -> None:
    tables = Tables(["item"], config=CONFIG)
    before = weight(tables, "item").clone()
    (found,) = tables([Lookup("item", torch.tensor([3, 3, 5]))])
    found.sum().backward()
    changed = (weight(tables, "item") != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [3, 5]


def test_row_wise_adagrad_steps_by_hand() -> None:
    tables = Tables(["item"], config=CONFIG)
    before = weight(tables, "item")[3].clone()
    gradient = torch.tensor([1.0, 2.0, 0.0, -1.0])
    (found,) = tables([Lookup("item", torch.tensor([3]))])
    (found * gradient).sum().backward()
    square = gradient.square().mean()
    step = CONFIG.learning_rate * gradient / (square.sqrt() + 1e-6)
    torch.testing.assert_close(weight(tables, "item")[3], before - step)
    torch.testing.assert_close(tables.optimizer_state()["item"][3], square)


def train(tables: Tables, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 40, (64,), generator=generator)
        found = torch.cat(tables([Lookup(name, ids) for name in tables.names]))
        (found * torch.randn(found.shape, generator=generator)).sum().backward()


def test_a_restored_table_goes_on_to_the_bit() -> None:
    ours, theirs = (Tables(["item", "place"], config=CONFIG) for _ in range(2))
    train(ours, 3, seed=1)
    theirs.load_state_dict({k: v.clone() for k, v in ours.state_dict().items()})
    assert theirs.load_optimizer_state(dict(ours.optimizer_state())) == []
    for tables in (ours, theirs):
        train(tables, 3, seed=2)
    for name in ours.names:
        assert torch.equal(weight(ours, name), weight(theirs, name))
        assert torch.equal(ours.optimizer_state()[name], theirs.optimizer_state()[name])


def test_optimizer_state_loads_by_table_name_whatever_the_order() -> None:
    old = Tables(["item", "place"], config=CONFIG)
    train(old, 2, seed=1)
    grown = Tables(["brand", "place", "item"], config=CONFIG)
    assert grown.load_optimizer_state(old.optimizer_state()) == ["brand"]
    assert torch.equal(grown.optimizer_state()["item"], old.optimizer_state()["item"])
    assert torch.equal(grown.optimizer_state()["place"], old.optimizer_state()["place"])


def test_bag_weights_add_up_to_one_and_favour_large_scores() -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    plain = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
    torch.testing.assert_close(bag_weights(offsets, None), plain)
    scored = bag_weights(offsets, torch.tensor([1.0, 9.0, 0.0, 3.0, 3.0]))
    torch.testing.assert_close(scored[:2].sum(), torch.tensor(1.0))
    assert scored[1] > scored[0] and scored[2] == 0
    torch.testing.assert_close(scored[3:], torch.tensor([0.5, 0.5]))
