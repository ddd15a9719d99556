"""Random small worlds: a spec with names that could meet ours, and the log of a few days.

Instants lie on a grid of half an hour, so that events, cutoffs and targets often fall on the same one.
A log holds what happened and every delivery of it: late ones, the same event again on the same day or
a later one, and other versions of it. A *conflict*, two rows of one id that reached the log together
and differ, is left in only where the world says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from hypothesis import strategies as st

from feature_store.days import HOUR_US, day_range, end_us, start_us
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
from tests import oracle

Row = dict[str, Any]
FIRST_DAY = "2024-02-28"
GRID_US = HOUR_US // 2

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


@dataclass(frozen=True, kw_only=True)
class World:
    """A spec and what reached its logs.

    Args:
        events: stream -> raw rows, one per delivery.
        impressions: raw rows of targets.
        days: the days that are built, from `dataset.first_day`.
        overlapping: the source gives rows of the days around as well.
        text: the source gives text, as CSV files do.
    """

    dataset: Dataset
    events: dict[str, list[Row]]
    impressions: list[Row]
    days: list[str]
    overlapping: bool
    text: bool

    def given(self, ds: str) -> tuple[dict[str, list[Row]], list[Row]]:
        """Events by stream and targets, as the source gives them for `ds`."""
        if self.overlapping:
            return self.events, self.impressions
        start, end = oracle.bounds(self.dataset, ds)
        events = {
            s.name: [e for e in self.events[s.name] if start <= oracle.available_time(s, e) < end]
            for s in self.dataset.streams
        }
        return events, [
            t
            for t in self.impressions
            if start <= (t["time"] if t.get("as_of") is None else t["as_of"]) < end
        ]


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
    for _ in range(draw(st.integers(0, 4))):
        name = names.pop()
        kind = draw(st.sampled_from((Kind.CATEGORICAL, Kind.CATEGORICAL, *Kind)))
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
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=20, max_size=20))
    ids = st.sampled_from(IdType)
    item_type, user_type, target_type = draw(ids), draw(ids), draw(ids)
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
        ids = [a for a in stream.attributes if a.kind is Kind.CATEGORICAL]
        beside = _some(draw, [a.name for a in ids if context.get(a.name) == a])
        before = _some(draw, [a.name for a in ids], least=0 if beside else 1, most=2)
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
            only = draw(_values(domain).filter(lambda v: v is not None))
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


def _ids(kind: IdType) -> st.SearchStrategy[Any]:
    return st.sampled_from(INTS if kind is IdType.INT64 else TEXTS)


def _values(attribute: Attribute) -> st.SearchStrategy[Any]:
    if attribute.kind is Kind.CATEGORICAL:
        return st.none() | _ids(attribute.id_type)
    if attribute.kind is Kind.NUMERIC:
        return st.none() | st.sampled_from(NUMBERS)
    return st.none() | st.lists(st.sampled_from(NUMBERS), min_size=2, max_size=2)


def _many(draw: Draw, one: st.SearchStrategy[list[Row]], most: int) -> list[Row]:
    """The rows of up to `most` of `one`: nearly as many where nothing fails, few once it is shrunk."""
    least = draw(st.sampled_from((0, most // 2, most * 3 // 4, most * 3 // 4)))
    return [row for rows in draw(st.lists(one, min_size=least, max_size=most)) for row in rows]


@st.composite
def _event(draw: Draw, dataset: Dataset, days: list[str], users: list[Any]) -> list[Row]:
    """The deliveries of one event: one, or two that are alike but for when the log had them."""
    stream = draw(st.sampled_from(dataset.streams))
    at = draw(_instants(dataset, days))
    row = {
        "stream": stream.name,
        "user_id": draw(st.sampled_from(users)),
        "event_id": draw(st.integers(0, 20)),  # counts within a user
        "event_time": at,
        "ingest_time": draw(st.sampled_from((None, None, at, at + GRID_US, at + 30 * HOUR_US))),
        **{a.name: draw(_values(a)) for a in stream.attributes},
    }
    if draw(st.integers(0, 4)) < 4:
        return [row]
    later = draw(st.sampled_from((0, 1, 20, 50))) * HOUR_US
    again = {**row, "ingest_time": oracle.arrival(row) + later}
    if draw(st.booleans()):  # another version of it
        a = draw(st.sampled_from(stream.attributes))
        again[a.name] = draw(_values(a))
    return [row, again] if draw(st.booleans()) else [again, row]


@st.composite
def _target(draw: Draw, dataset: Dataset, days: list[str], users: list[Any]) -> list[Row]:
    """One target, delivered once or twice."""
    kind = draw(st.sampled_from(dataset.targets))
    as_of = draw(_instants(dataset, days))
    number = draw(st.integers(0, 8))  # several users' and kinds' targets have the same
    text = dataset.target_id_type is IdType.STRING
    row = {
        "target": kind.name,
        "user_id": draw(st.sampled_from(users)),
        "target_id": str(number) if text else number,
        "time": as_of + draw(st.sampled_from((0, 0, 1, 30))) * HOUR_US,
        "as_of": as_of,
        "item_id": draw(_ids(dataset.item_id_type)) if kind.has_item else None,
        **{c.name: None for c in dataset.context_features},
        **{c.name: draw(_values(c)) for c in kind.context},
        **{n: draw(st.sampled_from((None, 0, 1))) for n in dataset.given_labels},
    }
    if row["time"] == as_of and draw(st.booleans()):
        row["as_of"] = None
    return [row, dict(row)] if draw(st.integers(0, 9)) == 9 else [row]


def _instants(dataset: Dataset, days: list[str]) -> st.SearchStrategy[int]:
    start, end = start_us(days[0], dataset.utc_offset), end_us(days[-1], dataset.utc_offset)
    return st.integers(0, (end - start) // GRID_US - 1).map(lambda n: start + n * GRID_US)


@st.composite
def worlds(draw: Draw, *, days: int = 3) -> World:
    """Worlds of `days` days without conflicts."""
    dataset = draw(datasets())
    span = day_range(FIRST_DAY, "2024-03-10")[:days]
    names = (7, 11, 2**40) if dataset.user_id_type is IdType.INT64 else ("u", "U", "é 1")
    users = list(names[: draw(st.integers(1, 3))])
    rows = _many(draw, _event(dataset, span, users), 45)
    events = {
        s.name: _agreeing([r for r in rows if r["stream"] == s.name], _event_keys(s))
        for s in dataset.streams
    }
    shown = _many(draw, _target(dataset, span, users), 24)
    kinds = {t.name: t for t in dataset.targets}

    def target_keys(row: Row) -> tuple[Any, Row]:
        kind = kinds[row["target"]]
        as_of = row["time"] if row["as_of"] is None else row["as_of"]
        own = {**row, "as_of": as_of}
        id_of = tuple(own[c] for c in kind.id_from) or (row["target_id"],)
        return (row["user_id"], kind.name, id_of), own

    return World(
        dataset=dataset,
        events=events,
        impressions=_agreeing(shown, target_keys),
        days=span,
        overlapping=draw(st.booleans()),
        text=draw(st.booleans()),
    )


def _event_keys(stream: EventStream) -> Callable[[Row], tuple[Any, Row]]:
    def keys(row: Row) -> tuple[Any, Row]:
        ours = ("event_time", *(a.name for a in stream.attributes))
        content = {k: row[k] for k in ours}
        return (oracle.event_id(stream, row), oracle.arrival(row)), content

    return keys


def _agreeing(rows: list[Row], keys: Callable[[Row], tuple[Any, Row]]) -> list[Row]:
    """`rows` less those that have the key of an earlier one and other content."""
    first: dict[Any, Row] = {}
    kept = []
    for row in rows:
        key, content = keys(row)
        if oracle.same(first.setdefault(key, content), content):
            kept.append(row)
    return kept
