"""Random specs, with names that could meet ours, and the values that their attributes take."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hypothesis import strategies as st

from feature_store.spec import (
    Aggregate,
    Attribute,
    CoOccurrence,
    Dataset,
    DenseFeature,
    EventLabel,
    EventStream,
    GivenLabel,
    IdType,
    ItemFeatures,
    Kind,
    SparseFeature,
    Target,
    Task,
    UserAttribute,
)

FIRST_DAY = "2024-02-28"

# Words that a job, a table or an engine might use for something of its own.
_WORDS = """
    hour value late problem outside position rank index order at id text number kind key row rows
    count counts score scores struct element item user items users window start end first last seen
    first_seen history history_end history_id targets context label labels task day date timestamp
    select from group where null true false array map case table partition over by lag lead not class
    lambda def none self new again carried earlier known source event events stream_id target_index
    total share age_h cutoff recency part_id has_aggregates shown_ds probability snapshot embeddings
    asked answer before beside lags together n t s x k v e i s_x shift base touched states state spark
    frame ds_1 day_1 model pairs pair left right values column struct_1 with as is in and or like
    limit join on using union interval current_date row_number monotonically_increasing_id
"""
NAMES = (*_WORDS.split(), "a" * 60)
INTS = (0, 1, 2, 3, 2**53 + 1)
TEXTS = ("0", "1", "b", "B", "é", "a b")
NUMBERS = (0.5, 0.1, -2.25, 1e6, 0.0)  # 0.1 is no float32: it has to be rounded once


Draw = Callable[[st.SearchStrategy[Any]], Any]


def _some(draw: Draw, values: Any, *, least: int = 0, most: int | None = None) -> tuple[Any, ...]:
    values = list(values)
    most = len(values) if most is None else min(most, len(values))
    if most < least or not values:
        return ()
    picked = draw(st.lists(st.sampled_from(values), min_size=least, max_size=most, unique_by=repr))
    return tuple(picked)


@st.composite
def _attributes(draw: Draw, names: list[str], item_type: IdType) -> list[Attribute]:
    """An attribute that is an item, and some others."""
    found = [Attribute(name=names.pop(), vocabulary="item", id_type=item_type)]
    for _ in range(draw(st.integers(1, 4))):
        name = names.pop()
        kind = draw(st.sampled_from((Kind.CATEGORICAL, Kind.NUMERIC, *Kind)))
        found.append(
            Attribute(
                name=name,
                kind=kind,
                id_type=draw(st.sampled_from(IdType)) if kind is Kind.CATEGORICAL else IdType.INT64,
                vocabulary="own_" + name,
                dim=2 if kind is Kind.VECTOR else None,
            )
        )
    return found


@st.composite
def datasets(draw: Draw) -> Dataset:
    """Specs with one to three streams and one or two kinds of target."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=32, max_size=32))
    id_types = st.sampled_from(IdType)
    item_type, user_type, target_type = draw(id_types), draw(id_types), draw(id_types)
    pool = draw(_attributes(names, item_type))
    half_hours = st.integers(0, 3).map(lambda n: timedelta(minutes=30 * n))

    streams = []
    for _ in range(draw(st.integers(1, 3))):
        attributes = _some(draw, pool, least=1, most=4)
        plain = [a.name for a in attributes if a.kind is not Kind.VECTOR]
        id_from: tuple[str, ...] = ()
        if draw(st.booleans()):
            id_from = _some(draw, ("user_id", "event_time", "event_id", *plain), least=1, most=4)
        streams.append(
            EventStream(
                name=names.pop(),
                attributes=attributes,
                max_events=draw(st.integers(1, 4)),
                delay=draw(half_hours),
                id_from=id_from,
            )
        )
    shared = [a for a in pool if a.kind is not Kind.VECTOR and a.vocabulary != "item"]
    bid, place = names.pop(), names.pop()
    contexts = [
        *shared,
        Attribute(name=bid, kind=Kind.NUMERIC),
        Attribute(name=place, vocabulary="own_" + place),
    ]
    targets = []
    for _ in range(draw(st.integers(1, 2))):
        context = _some(draw, contexts, most=3)
        own = target_type is IdType.STRING or draw(st.booleans())
        targets.append(
            Target(
                name=names.pop(),
                has_item=draw(st.booleans()),
                context=context,
                id_from=()
                if own
                else _some(draw, ("user_id", "time", "as_of", *(c.name for c in context)), least=1),
            )
        )
    ids_of = [(s, a) for s in streams for a in s.attributes if a.kind is Kind.CATEGORICAL]
    known = {c.name: c for t in targets for c in t.context}
    domains = [c for c in known.values() if c.kind is Kind.CATEGORICAL]
    domain = draw(st.sampled_from(domains)) if domains and draw(st.booleans()) else None
    tasks = draw(_tasks(names, streams, targets, domain, item_type, target_type))
    return Dataset(
        name="world",
        first_day=FIRST_DAY,
        streams=tuple(streams),
        targets=tuple(targets),
        tasks=tasks,
        utc_offset=draw(st.sampled_from([timedelta(hours=h) for h in (0, -3, 5.5)])),
        user_id_type=user_type,
        item_id_type=item_type,
        target_id_type=target_type,
        user_attributes=tuple(
            UserAttribute(name=names.pop(), stream=s.name, attribute=a.name)
            for s, a in _some(draw, ids_of, most=1)
        ),
        sparse_features=tuple(
            SparseFeature(
                name=names.pop(),
                stream=s.name,
                attribute=a.name,
                window_days=draw(st.integers(1, 3)),
                max_ids=draw(st.integers(1, 3)),
                scored=draw(st.booleans()),
            )
            for s, a in _some(draw, ids_of, most=2)
        ),
        dense_features=draw(_dense(names, streams)),
        item_features=draw(_item_features(streams, known, item_type)),
        domain=domain.name if domain else None,
        serve_delay=draw(half_hours),
        max_part_rows=draw(st.sampled_from((2, 3, 5, 1024))),
        base_days=draw(st.integers(1, 3)),
    )


@st.composite
def _dense(draw: Draw, names: list[str], streams: list[EventStream]) -> tuple[DenseFeature, ...]:
    found = []
    for aggregate in _some(draw, Aggregate, most=3):
        stream = draw(st.sampled_from(streams))
        numbers = [a.name for a in stream.attributes if a.kind is Kind.NUMERIC]
        if aggregate is Aggregate.SUM and not numbers:
            continue
        found.append(
            DenseFeature(
                name=names.pop(),
                stream=stream.name,
                aggregate=aggregate,
                window_days=draw(st.integers(1, 3)),
                attribute=numbers[0] if aggregate is Aggregate.SUM else None,
                per=draw(st.sampled_from(streams)).name if aggregate is Aggregate.RATE else None,
            )
        )
    return tuple(found)


@st.composite
def _item_features(
    draw: Draw, streams: list[EventStream], context: dict[str, Attribute], item_type: IdType
) -> ItemFeatures | None:
    with_items = [(s, a) for s in streams for a in s.attributes if a.vocabulary == "item"]
    if not with_items or not draw(st.booleans()):
        return None
    counted = _some(draw, with_items, least=1)
    pairs = None
    if draw(st.booleans()):
        stream, item = draw(st.sampled_from(counted))
        named = [a for a in stream.attributes if a.kind is Kind.CATEGORICAL]
        beside = _some(draw, [a.name for a in named if context.get(a.name) == a])
        before = _some(draw, [a.name for a in named], least=0 if beside else 1, most=2)
        pairs = CoOccurrence(
            stream=stream.name,
            attribute=item.name,
            beside=beside,
            before=before,
            lags=draw(st.sampled_from(((1,), (1, 2), (3,), (2, 20)))),
        )
    return ItemFeatures(
        streams=tuple((s.name, a.name) for s, a in counted),
        windows_hours=draw(st.sampled_from(((1,), (2, 30)))),
        co_occurrence=pairs,
    )


@st.composite
def _tasks(
    draw: Draw,
    names: list[str],
    streams: list[EventStream],
    targets: list[Target],
    domain: Attribute | None,
    item_type: IdType,
    target_type: IdType,
) -> tuple[Task, ...]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        asked = _some(draw, targets, least=1)
        label: GivenLabel | EventLabel
        if draw(st.booleans()):
            label, within = GivenLabel(column="given_" + draw(st.sampled_from("ab"))), 0
        else:
            stream = draw(st.sampled_from(streams))
            within = draw(st.sampled_from((1, 24)))
            types = {"item_id": item_type} if all(t.has_item for t in asked) else {}
            if not any(t.id_from for t in asked):
                types["target_id"] = target_type
            for c in asked[0].context:
                if c.kind is Kind.CATEGORICAL and all(c in t.context for t in asked):
                    types[c.name] = c.id_type
            match = [
                (ours, a.name)
                for ours, kind in types.items()
                for a in stream.attributes
                if a.kind is Kind.CATEGORICAL and a.id_type is kind
            ]
            label = EventLabel(
                stream=stream.name,
                within=timedelta(hours=within),
                match=_some(draw, match, most=2),
            )
        only = None
        if domain is not None and draw(st.booleans()):
            only = draw(st.sampled_from(ids(domain.id_type)))
        found.append(
            Task(
                name=names.pop(),
                label=label,
                targets=tuple(t.name for t in asked),
                matures_after=draw(st.integers(1 if within else 0, 2)),
                domain=only,
            )
        )
    return tuple(found)


def ids(kind: IdType) -> tuple[Any, ...]:
    return INTS if kind is IdType.INT64 else TEXTS


def values(attribute: Attribute) -> st.SearchStrategy[Any]:
    if attribute.kind is Kind.CATEGORICAL:
        empty = () if attribute.id_type is IdType.INT64 else ("",)
        return st.sampled_from((None, *ids(attribute.id_type), *empty))
    if attribute.kind is Kind.NUMERIC:
        return st.none() | st.sampled_from(NUMBERS)
    return st.none() | st.lists(st.sampled_from(NUMBERS), min_size=2, max_size=2)
