"""A snapshot is loaded by the names of its inputs and tasks, whatever order or number the spec gives them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from feature_store.spec import Aggregate, Attribute, Dataset, DenseFeature, IdType, Kind
from jobs.training.by_name import Taken
from jobs.training.config import TrainingConfig
from jobs.training.learner import Learner
from jobs.training.presets import Preset
from models.axes import Aligned, aligned, axes_of, blocks
from models.batch import Batch
from models.features import feature_plan
from models.interactions import INTERACTIONS, InteractionConfig
from models.tables import TableConfig
from models.towers import MixConfig, TowerConfig
from models.upstream.hybrid import HybridConfig
from models.upstream.sequence import SequenceConfig
from models.upstream.sum import SumConfig
from tests.batches import random_batch
from tests.tiny import TINY

MODELS = ("sum", "sequence", "hybrid")
_T = TypeVar("_T")


def _rich() -> Dataset:
    """TINY, with two or more of everything whose order can change."""
    click, view = TINY.streams
    more = (
        Attribute(name="length", kind=Kind.NUMERIC),
        Attribute(name="image", kind=Kind.VECTOR, dim=3),
    )
    ad, visit = TINY.targets
    shown = (
        Attribute(name="wanted", vocabulary="query", id_type=IdType.STRING),
        Attribute(name="size", kind=Kind.NUMERIC),
    )
    return replace(
        TINY,
        streams=(replace(click, attributes=(*click.attributes, *more)), view),
        targets=(replace(ad, context=(*ad.context, *shown)), visit),
        item_features=replace(TINY.item_features, ordered_ids=True),
    )


SPEC = _rich()


def small(model: str) -> Preset:
    """All kinds of parts, and narrow."""
    tables = TableConfig(dim=8, default_rows=32, item_rows=32)
    shape = InteractionConfig(hidden=16, compressed=64, cross_rank=8)
    inside = {"interactions": tuple(INTERACTIONS), "inside": shape}
    tower, mix = TowerConfig(sizes=(8, 6), **inside), MixConfig(sizes=(6,), direct=True, **inside)
    events = {
        "tables": tables, "width": 16, "head_dim": 8, "heads": 1, "queries": 2, "layers": 1,
        "bags": True, "members": 2, "numbers": 24, "mix": mix, "user_mix": mix,
    }  # fmt: skip
    return Preset(
        architecture=model,
        shape={
            "sum": SumConfig(tables=tables, user=tower, mix=mix, dense_tokens=2),
            "sequence": SequenceConfig(**events),
            "hybrid": HybridConfig(**events, user=tower, dense_tokens=2),
        }[model],
        training=TrainingConfig(muon=True),
    )


def shuffled(spec: Dataset, seed: int) -> Dataset:
    """The same spec, declared in another order."""
    rng = random.Random(seed)

    def some(things: Sequence[_T]) -> tuple[_T, ...]:
        return tuple(rng.sample(things, len(things)))

    items = spec.item_features
    assert items is not None and items.co_occurrence is not None
    together = items.co_occurrence
    return replace(
        spec,
        streams=some([replace(s, attributes=some(s.attributes)) for s in spec.streams]),
        targets=some([replace(t, context=some(t.context)) for t in spec.targets]),
        tasks=some(spec.tasks),
        user_attributes=some(spec.user_attributes),
        sparse_features=some(spec.sparse_features),
        dense_features=some(spec.dense_features),
        item_features=replace(
            items,
            streams=some(items.streams),
            co_occurrence=replace(together, before=some(together.before)),
        ),
    )


def told(batch: Batch, of: Dataset, spec: Dataset) -> Batch:
    """The batch of `of` as `spec` lays it out; what only `spec` has is missing."""
    old, new = feature_plan(of), feature_plan(spec)

    def moved(values: Tensor, before: Sequence[str], now: Sequence[str], missing: float) -> Tensor:
        padded = torch.cat([values, torch.full_like(values[:, :1], missing)], dim=1)
        at = [before.index(n) if n in before else len(before) for n in now]
        return padded[:, at]

    def index(values: Tensor, before: Sequence[str], now: Sequence[str]) -> Tensor:
        return torch.tensor([now.index(n) for n in before])[values]

    nan = float("nan")
    return replace(
        batch,
        event_stream=index(batch.event_stream, old.streams, new.streams),
        target_kind=index(batch.target_kind, old.target_kinds, new.target_kinds),
        item_features=moved(batch.item_features, old.item_numbers, new.item_numbers, nan),
        pair_numbers=moved(batch.pair_numbers, old.pair_numbers, new.pair_numbers, nan),
        dense=moved(batch.dense, old.user_numbers, new.user_numbers, nan),
        labels=moved(batch.labels, old.tasks, new.tasks, -1),
    )


def made(model: str, spec: Dataset = SPEC, state: dict[str, Any] | None = None) -> Learner:
    torch.set_num_threads(1)
    torch.manual_seed(0 if state is None else 1)
    return Learner(spec, small(model), torch.device("cpu"), state)


def trained(model: str, spec: Dataset = SPEC) -> Learner:
    """No weight is where it started, also not those that start at 0."""
    return made(model, spec, _state(model, spec))


@cache
def _state(model: str, spec: Dataset) -> dict[str, Any]:
    learner = made(model, spec)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    learner.average.train()
    for seed in range(2):
        learner.step(random_batch(spec, seed=seed))
    learner.average.serve()
    return learner.state()


def answers(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """Predictions by task, and the embeddings."""
    found = learner.probabilities(batch)
    names = [t.name for t in learner.dataset.tasks]
    return {**dict(zip(names, found.T, strict=True)), "users": learner.user_embeddings(batch)}


def same(one: dict[str, Tensor], other: dict[str, Tensor], *, within: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=0, atol=within, msg=name)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model", MODELS)
def test_a_spec_in_another_order_gives_the_same_model(model: str, seed: int) -> None:
    spec = shuffled(SPEC, seed)
    first = trained(model)
    other = made(model, spec, first.state())
    assert other.taken == Taken()
    batch = random_batch(SPEC, seed=9, rows=12)
    same(answers(first, batch), answers(other, told(batch, SPEC, spec)))
    # and it learns on as the first does: the optimizers and the average came along
    first.average.train(), other.average.train()
    for seed_of_batch in range(2):
        batch = random_batch(SPEC, seed=20 + seed_of_batch, rows=12)
        first.step(batch)
        other.step(told(batch, SPEC, spec))
    same(answers(first, batch), answers(other, told(batch, SPEC, spec)), within=1e-3)
    first.average.serve(), other.average.serve()
    same(answers(first, batch), answers(other, told(batch, SPEC, spec)), within=1e-3)


def _without(spec: Dataset, what: str) -> Dataset:
    click, view = spec.streams
    ad, visit = spec.targets

    def but(things: Sequence[_T], name: str) -> tuple[_T, ...]:
        return tuple(x for x in things if x.name != name)

    if what == "stream":
        assert spec.item_features is not None
        return replace(
            spec,
            streams=(click,),
            tasks=but(spec.tasks, "back"),
            user_attributes=but(spec.user_attributes, "device"),
            sparse_features=but(spec.sparse_features, "viewed"),
            dense_features=but(but(spec.dense_features, "views_1d"), "ctr"),
            item_features=replace(spec.item_features, streams=(("click", "article"),)),
        )
    return {
        "dense": lambda: replace(spec, dense_features=but(spec.dense_features, "spent")),
        "sparse": lambda: replace(spec, sparse_features=but(spec.sparse_features, "queries")),
        "user": lambda: replace(spec, user_attributes=but(spec.user_attributes, "device")),
        "task": lambda: replace(spec, tasks=but(spec.tasks, "click_6h")),
        "context": lambda: replace(spec, targets=(replace(ad, context=but(ad.context, "size")), visit)),
        "candidate": lambda: replace(spec, targets=(replace(ad, context=but(ad.context, "wanted")), visit)),
        "number": lambda: replace(spec, streams=(replace(click, attributes=but(click.attributes, "length")), view)),
        "vector": lambda: replace(spec, streams=(replace(click, attributes=but(click.attributes, "image")), view)),
        "kind": lambda: replace(spec, targets=(ad,), tasks=(*spec.tasks[:3], replace(spec.tasks[3], targets=("ad",)))),
        "lag": lambda: _with_lags(spec, (1,)),
    }[what]()  # fmt: skip


def _with_lags(spec: Dataset, lags: tuple[int, ...]) -> Dataset:
    items = spec.item_features
    assert items is not None and items.co_occurrence is not None
    return replace(
        spec, item_features=replace(items, co_occurrence=replace(items.co_occurrence, lags=lags))
    )


PARTS = (
    "stream", "dense", "sparse", "user", "task", "context", "candidate", "number", "vector", "kind",
    "lag",
)  # fmt: skip
# what each model reads of them; a task is not read
READS = {
    "sum": {"stream", "dense", "sparse", "user", "context", "candidate", "kind"},
    "sequence": set(PARTS) - {"dense", "sparse", "user", "task"},
    "hybrid": set(PARTS) - {"task"},
}


def pieces(learner: Learner, values: dict[str, Tensor]) -> dict[tuple[str, ...], Tensor]:
    """Of every tensor what belongs to one combination of names."""
    found: dict[tuple[str, ...], Tensor] = {}
    axes = axes_of(learner.model)
    for tensor, whole in values.items():
        parts = {(tensor,): whole}
        for axis, named in axes.get(tensor, {}).items():
            sizes = [n for _, n in named]
            parts = {
                (*key, name): piece
                for key, part in parts.items()
                for (name, _), piece in zip(named, part.split(sizes, dim=axis), strict=True)
            }
        found |= parts
    return found


@pytest.mark.parametrize("what", PARTS)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_added_or_removed_leaves_every_other_weight(model: str, what: str) -> None:
    less = _without(SPEC, what)
    for before, now in ((SPEC, less), (less, SPEC)):
        old = trained(model, before)
        new = made(model, now, old.state())
        theirs = pieces(old, old.weights())
        ours = pieces(new, new.weights())
        both = [k for k in ours if k in theirs and ours[k].shape == theirs[k].shape]
        assert len(both) > 50
        for key in both:
            assert torch.equal(ours[key], theirs[key]), key
        assert bool(new.taken.misfit()) == (what in READS[model]), new.taken
        assert (new.taken.unknown_tasks() != set()) == (len(now.tasks) > len(before.tasks))
        verb = "lacks" if now is SPEC else "was trained with"
        assert new.taken.misfit().startswith(verb) or what not in READS[model]
        new.step(random_batch(now, seed=3))  # the optimizers' state has the new shapes
        for kind, optimizer in new.optimizers.items():
            for name, parameter in new.dense.items():
                slots = optimizer.state.get(parameter, {})
                assert all(v.ndim == 0 or v.shape == parameter.shape for v in slots.values()), (
                    kind,
                    name,
                )


@pytest.mark.parametrize("model", MODELS)
def test_without_a_task_the_others_and_the_embeddings_stay_the_same(model: str) -> None:
    less = _without(SPEC, "task")
    for before, now in ((SPEC, less), (less, SPEC)):
        old = trained(model, before)
        batch = random_batch(before, seed=4)
        found = answers(made(model, now, old.state()), told(batch, before, now))
        common = {k: v for k, v in answers(old, batch).items() if k in found}
        same(common, {k: found[k] for k in common})


def test_new_columns_are_those_of_first_weights_and_begin_without_momentum() -> None:
    less = _without(SPEC, "dense")
    state = trained("sum", less).state()
    new = made("sum", SPEC, state)
    torch.manual_seed(1)  # as `made` does where there is a state
    first = Learner(SPEC, small("sum"), torch.device("cpu"))
    names = [d.name for d in SPEC.dense_features]
    weight, column = "user.dense.0.weight", names.index("spent")
    assert torch.equal(new.weights()[weight][:, column], first.weights()[weight][:, column])
    assert new.taken.lacking[weight] == ("dense:spent",)
    assert not new.taken.dropped and new.taken.misfit() == "lacks dense:spent"
    slots = new.optimizers["adam"].state[new.dense[weight]]
    assert (slots["exp_avg"][:, column] == 0).all() and (slots["exp_avg"][:, 0] != 0).any()


def test_a_table_of_another_size_starts_anew_and_is_named() -> None:
    old = trained("sum")
    tables = TableConfig(dim=8, default_rows=32, item_rows=64)
    usual = small("sum")
    bigger = replace(usual, shape=replace(usual.shape, tables=tables))
    new = Learner(SPEC, bigger, torch.device("cpu"), old.state())
    assert [n.rsplit(".", 2)[-2].removeprefix("of_") for n in new.taken.lacking] == ["item"]
    assert "item" in new.taken.misfit()
    assert (new.model.tables.optimizer_state()["item"] == 0).all()
    assert (new.model.tables.optimizer_state()["device"] != 0).any()


def test_a_feature_that_moves_to_another_vocabulary_is_another_feature() -> None:
    ad, visit = SPEC.targets
    wanted = Attribute(name="wanted", vocabulary="place")
    moved = tuple(wanted if c.name == "wanted" else c for c in ad.context)
    spec = replace(SPEC, targets=(replace(ad, context=moved), visit))
    taken = made("sum", spec, trained("sum").state()).taken
    assert taken.misfit() == (
        "lacks candidate:wanted@place and was trained with candidate:wanted@query"
    )


def test_many_names_are_not_all_told() -> None:
    taken = Taken({"w": tuple(f"dense:{i}" for i in range(9))}, {"w": ("task:click",)})
    assert taken.misfit() == "lacks dense:0, dense:1, dense:2, dense:3, dense:4 and 4 more"


def test_aligning_is_by_name_and_length() -> None:
    theirs, ours = torch.arange(6.0).view(2, 3), torch.full((2, 4), -1.0)
    axes, other = {1: (("b", 1), ("new", 1), ("a", 2))}, {1: (("a", 2), ("b", 1))}
    found = aligned(ours, axes, theirs, other)
    assert isinstance(found, Aligned)
    assert found.tensor.tolist() == [[2, -1, 0, 1], [5, -1, 3, 4]]
    assert (found.lacking, found.dropped) == (("new",), ())
    wider = aligned(ours, {1: (("b", 1), ("a", 3))}, theirs, other)
    assert wider is not None and (wider.lacking, wider.dropped) == (("a",), ("a",))
    assert aligned(torch.zeros(3, 4), axes, theirs, other) is None  # of another width inside
    assert aligned(ours, {}, theirs, other) is None
    assert aligned(torch.zeros(3), {0: blocks("abc")}, theirs, other) is None


def test_a_new_dense_feature_is_named_as_the_spec_names_it() -> None:
    more = DenseFeature(name="views_3d", stream="view", aggregate=Aggregate.COUNT, window_days=3)
    spec = replace(SPEC, dense_features=(more, *SPEC.dense_features))
    for model in ("sum", "hybrid"):
        assert made(model, spec, trained(model).state()).taken.misfit() == "lacks dense:views_3d"
    assert made("sequence", spec, trained("sequence").state()).taken == Taken()
