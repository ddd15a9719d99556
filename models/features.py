"""Which features a model reads, in which order, and which embedding table serves each.

Derived from the spec and from nothing else, so that a checkpoint, a batch and a model agree on
feature names. Categorical features of one vocabulary share one table: an article that was clicked
and an article that is scored are the same row.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from feature_store.spec import Attribute, Dataset, Kind

ITEM = "item"  # the vocabulary
TARGET_ITEM = "_item"  # a target's item as a feature, beside context features of any name

_ONE_US = timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True)
class Category:
    """A categorical feature and the vocabulary whose table it is looked up in."""

    name: str
    vocabulary: str


@dataclass(frozen=True, kw_only=True)
class Bag:
    """A sparse feature: a list of ids per user, with scores or without."""

    name: str
    vocabulary: str
    scored: bool


@dataclass(frozen=True, kw_only=True)
class Match:
    """A candidate's id that the history carries too.

    Args:
        candidate: TARGET_ITEM or a context feature.
        name: an event attribute, or a sparse feature, of the same vocabulary.
        streams: indices of the streams that have the attribute; empty for a sparse feature.
    """

    candidate: str
    name: str
    streams: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FeaturePlan:
    """Every feature of a dataset in the order in which models read it.

    Args:
        streams, target_kinds, tasks: names, in spec order.
        event_ids, event_numbers, event_vectors: attributes of the events (vectors with their dim).
        candidates: categorical features of a target; TARGET_ITEM first, where any kind of target has one.
        context_numbers, item_numbers: numeric features of a target.
        pair_numbers: numeric features of a target and an event that it sees.
        ordered_items: near item ids are alike.
        user_ids, bags, user_numbers: features of a user: attributes, sparse, dense.
        matches: pairs of a candidate and an event attribute of the same vocabulary.
        bag_matches: pairs of a candidate and a sparse feature of the same vocabulary.
        utc_offset_us, serve_delay_us: of the dataset.
    """

    streams: tuple[str, ...]
    target_kinds: tuple[str, ...]
    tasks: tuple[str, ...]
    event_ids: tuple[Category, ...]
    event_numbers: tuple[str, ...]
    event_vectors: tuple[tuple[str, int], ...]
    candidates: tuple[Category, ...]
    context_numbers: tuple[str, ...]
    item_numbers: tuple[str, ...]
    pair_numbers: tuple[str, ...]
    ordered_items: bool
    user_ids: tuple[Category, ...]
    bags: tuple[Bag, ...]
    user_numbers: tuple[str, ...]
    matches: tuple[Match, ...]
    bag_matches: tuple[Match, ...]
    utc_offset_us: int
    serve_delay_us: int


def feature_plan(dataset: Dataset) -> FeaturePlan:
    """The features of `dataset`, each list in the order in which the spec declares it."""
    candidates = _categories(dataset.context_features)
    if any(t.has_item for t in dataset.targets):
        candidates = (Category(name=TARGET_ITEM, vocabulary=ITEM), *candidates)
    event_ids = _categories(dataset.event_attributes)
    carriers = {
        e.name: tuple(
            i for i, s in enumerate(dataset.streams) if e.name in {a.name for a in s.attributes}
        )
        for e in event_ids
    }
    bags = tuple(
        Bag(
            name=s.name,
            vocabulary=dataset.stream(s.stream).attribute(s.attribute).vocabulary,
            scored=s.scored,
        )
        for s in dataset.sparse_features
    )
    items = dataset.item_features
    beside = () if dataset.co_occurrence is None else dataset.co_occurrence.beside
    together = [f"beside_{name}{what}" for name in beside for what in ("", "_lift")]
    return FeaturePlan(
        streams=tuple(s.name for s in dataset.streams),
        target_kinds=tuple(t.name for t in dataset.targets),
        tasks=tuple(t.name for t in dataset.tasks),
        event_ids=event_ids,
        event_numbers=_named(dataset.event_attributes, Kind.NUMERIC),
        event_vectors=tuple(
            (a.name, a.dim or 0) for a in dataset.event_attributes if a.kind is Kind.VECTOR
        ),
        candidates=candidates,
        context_numbers=_named(dataset.context_features, Kind.NUMERIC),
        item_numbers=() if items is None else (*items.names, *together),
        pair_numbers=pair_number_names(dataset),
        ordered_items=items is not None and items.ordered_ids,
        user_ids=tuple(
            Category(
                name=u.name, vocabulary=dataset.stream(u.stream).attribute(u.attribute).vocabulary
            )
            for u in dataset.user_attributes
        ),
        bags=bags,
        user_numbers=tuple(d.name for d in dataset.dense_features),
        matches=tuple(
            Match(candidate=c.name, name=e.name, streams=carriers[e.name])
            for c in candidates
            for e in event_ids
            if c.vocabulary == e.vocabulary
        ),
        bag_matches=tuple(
            Match(candidate=c.name, name=b.name)
            for c in candidates
            for b in bags
            if c.vocabulary == b.vocabulary
        ),
        utc_offset_us=dataset.utc_offset // _ONE_US,
        serve_delay_us=dataset.serve_delay // _ONE_US,
    )


def pair_number_names(dataset: Dataset) -> tuple[str, ...]:
    """What is known of a target's item and a value before it, in the order of `Batch.pair_numbers`."""
    pairs = dataset.co_occurrence
    if pairs is None:
        return ()
    names: list[str] = []
    for name in pairs.before:
        for lags in pairs.lags:
            names += [f"{name}_{lags}{what}" for what in ("", "_lift", "_seen", "_share")]
        if dataset.stream(pairs.stream).attribute(name).vocabulary == ITEM:
            names.append(f"{name}_after")  # the other way round: the value came after the item
    return tuple(names)


def member(name: str) -> str:
    """What a part of a module that belongs to `name` is called there: `keys`, `type` and `float` may be
    names of a spec, and are attributes of modules."""
    return f"of_{name}"


def _categories(attributes: tuple[Attribute, ...]) -> tuple[Category, ...]:
    return tuple(
        Category(name=a.name, vocabulary=a.vocabulary)
        for a in attributes
        if a.kind is Kind.CATEGORICAL
    )


def _named(attributes: tuple[Attribute, ...], kind: Kind) -> tuple[str, ...]:
    return tuple(a.name for a in attributes if a.kind is kind)
