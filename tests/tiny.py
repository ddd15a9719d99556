"""A dataset that is small enough to check by hand and has one of everything, and random worlds of it.

Instants lie on a coarse grid, so that events and targets often fall on the same one; some events
come late, some are delivered again on a later day, and some users are busy enough to be cut into
parts and to lose their oldest events.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import timedelta

import pyarrow as pa
from hypothesis import strategies as st

from feature_store.columns import label_column
from feature_store.days import HOUR_US, day_of, day_range, end_us, micros, start_us
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
from feature_store.tables import contract

DAYS = day_range("2024-03-01", "2024-03-05")
_GRID_US = HOUR_US // 2

TINY = Dataset(
    name="tiny",
    first_day=DAYS[0],
    utc_offset=timedelta(hours=-3),
    serve_delay=timedelta(hours=1),
    max_part_rows=5,
    base_days=3,
    streams=(
        EventStream(
            name="click",
            max_events=3,
            delay=timedelta(minutes=30),
            attributes=(
                Attribute(name="article", vocabulary="item"),
                Attribute(name="query", id_type=IdType.STRING),
                Attribute(name="price", kind=Kind.NUMERIC),
                Attribute(name="topic", kind=Kind.VECTOR, dim=2),
            ),
        ),
        EventStream(
            name="view",
            max_events=4,
            attributes=(Attribute(name="article", vocabulary="item"), Attribute(name="device")),
        ),
    ),
    targets=(
        Target(
            name="ad",
            context=(Attribute(name="place"), Attribute(name="bid", kind=Kind.NUMERIC)),
        ),
        Target(name="visit", has_item=False, context=(Attribute(name="place"),)),
    ),
    tasks=(
        Task(name="clicked", label=GivenLabel(column="clicked"), targets=("ad",)),
        Task(
            name="bought",
            label=GivenLabel(column="bought"),
            targets=("ad",),
            matures_after=1,
            domain=1,
        ),
        Task(
            name="click_6h",
            label=EventLabel(
                stream="click", within=timedelta(hours=6), match=(("item_id", "article"),)
            ),
            targets=("ad",),
            matures_after=1,
        ),
        Task(
            name="back",
            label=EventLabel(stream="view", within=timedelta(hours=20)),
            targets=("visit", "ad"),
            matures_after=1,
        ),
    ),
    user_attributes=(
        UserAttribute(name="device", stream="view", attribute="device"),
        UserAttribute(name="query", stream="click", attribute="query"),
    ),
    sparse_features=(
        SparseFeature(
            name="clicked", stream="click", attribute="article", window_days=2, max_ids=3
        ),
        SparseFeature(name="queries", stream="click", attribute="query", window_days=1, max_ids=2),
        SparseFeature(
            name="viewed", stream="view", attribute="article", window_days=3, max_ids=2, scored=True
        ),
        SparseFeature(
            name="asked", stream="click", attribute="query", window_days=3, max_ids=3, scored=True
        ),
    ),
    dense_features=(
        DenseFeature(name="views_1d", stream="view", aggregate=Aggregate.COUNT, window_days=1),
        DenseFeature(
            name="spent", stream="click", aggregate=Aggregate.SUM, window_days=3, attribute="price"
        ),
        DenseFeature(
            name="ctr", stream="click", aggregate=Aggregate.RATE, window_days=2, per="view"
        ),
        DenseFeature(name="last_click", stream="click", aggregate=Aggregate.RECENCY, window_days=2),
    ),
    item_features=ItemFeatures(
        streams=(("click", "article"), ("view", "article")),
        windows_hours=(2, 30),
        co_occurrence=CoOccurrence(
            stream="click", attribute="article", before=("article", "query"), lags=(1, 2)
        ),
    ),
    domain="place",
)

Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class World:
    """Rows of `events` and `impressions` by day, as an ingest would have published them."""

    events: dict[str, list[Row]] = field(default_factory=lambda: {d: [] for d in DAYS})
    impressions: dict[str, list[Row]] = field(default_factory=lambda: {d: [] for d in DAYS})


def event(
    number: int, stream: str, user: int, at: int, *, ingest: int | None = None, **values: object
) -> Row:
    """An event row of the contract; attributes that are not given are null."""
    ingest = at if ingest is None else ingest
    available = max(at, ingest) + micros(TINY.stream(stream).delay)
    empty = {a.name: None for a in TINY.event_attributes}
    row = {
        "event_id": number,
        "stream": stream,
        "user_id": user,
        "event_time": at,
        "ingest_time": ingest,
    }
    return {
        **row,
        "available_time": available,
        **empty,
        **values,
        "ds": day_of(available, TINY.utc_offset),
    }


def target(
    number: int, kind: str, user: int, as_of: int, *, time: int | None = None, **values: object
) -> Row:
    """An impression row of the contract; columns that are not given are null."""
    empty = {"item_id": None, **{c.name: None for c in TINY.context_features}}
    empty |= {label_column(n): None for n in TINY.given_labels}
    row = {
        "target_id": number,
        "target": kind,
        "user_id": user,
        "time": as_of if time is None else time,
    }
    return {**row, "as_of": as_of, **empty, **values, "ds": day_of(as_of, TINY.utc_offset)}


def make_world(*, seed: int, users: int, events: int, targets: int) -> World:
    """A random world over `DAYS`, the same for the same arguments."""
    rng = random.Random(seed)
    first, end = start_us(DAYS[0], TINY.utc_offset), end_us(DAYS[-1], TINY.utc_offset)
    steps = (end - first) // _GRID_US
    world = World()
    pick_user = lambda: min(rng.randrange(1, users + 1), rng.randrange(1, users + 1))  # noqa: E731

    def add(row: Row) -> None:
        day = world.events.get(str(row["ds"]))
        if day is not None and all(e["event_id"] != row["event_id"] for e in day):
            day.append(row)

    for number in range(events):
        at = first + rng.randrange(steps) * _GRID_US
        late = rng.choice((0, 0, 0, 0, 1, 30)) * HOUR_US
        article = rng.choice((None, -1, *range(1, 7)))
        user, stream = pick_user(), rng.choice(("click", "view", "view"))
        values: Row = {"article": article}
        if stream == "click":
            values["query"] = rng.choice((None, "", "a", "b", "c"))
            values["price"] = rng.choice((None, float("nan"), 0.1, 2.5, 1e6, 3.3333))
            values["topic"] = rng.choice((None, [0.5, -1.0], [2.0, 0.25]))
        else:
            values["device"] = rng.choice((None, -1, 1, 2))
        add(event(number, stream, user, at, ingest=at + late, **values))
        if rng.random() < 0.15:  # delivered again
            add(
                event(
                    number,
                    stream,
                    user,
                    at,
                    ingest=at + late + rng.choice((1, 20, 50)) * HOUR_US,
                    **values,
                )
            )
    for number in range(targets):
        as_of = first + rng.randrange(steps) * _GRID_US
        time = as_of + rng.choice((0, 0, 1, 3)) * HOUR_US
        kind = rng.choice(("ad", "ad", "visit"))
        values = {"place": rng.choice((None, 1, 2))}
        if kind == "ad":
            values |= {
                "item_id": rng.choice((None, *range(1, 7))),
                "bid": rng.choice((None, 0.5, 1.5)),
            }
            values |= {label_column(n): rng.choice((None, 0, 1)) for n in TINY.given_labels}
        row = target(1000 + number, kind, pick_user(), as_of, time=time, **values)
        world.impressions[str(row["ds"])].append(row)
    return world


def worlds() -> st.SearchStrategy[World]:
    """Random worlds, from nearly empty ones to users with many parts a day."""
    return st.builds(
        make_world,
        seed=st.integers(0, 2**32),
        users=st.integers(1, 6),
        events=st.integers(0, 150),
        targets=st.integers(0, 100),
    )


def arrow(rows: list[Row], table: str, dataset: Dataset = TINY) -> pa.Table:
    """`rows` in the contract's types."""
    return pa.Table.from_pylist(rows, schema=contract(dataset, table).schema)
