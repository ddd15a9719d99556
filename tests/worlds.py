"""Random small worlds: a spec with names that could meet ours, and the log of a few days.

Instants lie on a grid of half an hour, so that events, cutoffs and targets often fall on the same one.
A log holds what happened and every delivery of it: late ones, the same event again on the same day or
a later one, and other versions of it. A *conflict*, two rows of one id that reached the log together
and differ, is in the worlds of `conflicts` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from feature_store.days import HOUR_US, day_range, end_us, start_us
from feature_store.spec import (
    Dataset,
    EventStream,
    IdType,
)
from tests import oracle
from tests.specs import FIRST_DAY, Draw, datasets, ids, values

Row = dict[str, Any]
GRID_US = HOUR_US // 2


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

    @property
    def rows(self) -> int:
        """How many rows the log has."""
        return sum(map(len, self.events.values())) + len(self.impressions)

    def given(self, ds: str) -> tuple[dict[str, list[Row]], list[Row]]:
        """Events by stream and targets, as the source gives them for `ds`."""
        if self.overlapping:
            return self.events, self.impressions
        start, end = oracle.bounds(self.dataset, ds)
        events = {
            s.name: [e for e in self.events[s.name] if start <= oracle.available_time(s, e) < end]
            for s in self.dataset.streams
        }
        return events, [t for t in self.impressions if start <= (t["as_of"] or t["time"]) < end]


def _many(draw: Draw, one: st.SearchStrategy[list[Row]], most: int) -> list[Row]:
    """The rows of up to `most` of `one`: nearly as many where nothing fails, few once it is shrunk."""
    least = draw(st.sampled_from((0, *[most * 3 // 4] * 7)))
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
        **{a.name: draw(values(a)) for a in stream.attributes},
    }
    if draw(st.integers(0, 4)) < 4:
        return [row]
    later = draw(st.sampled_from((0, 1, 20, 50))) * HOUR_US
    again = {**row, "ingest_time": oracle.arrival(row) + later}
    if draw(st.booleans()):  # another version of it
        a = draw(st.sampled_from(stream.attributes))
        again[a.name] = draw(values(a))
    return [row, again] if draw(st.booleans()) else [again, row]


@st.composite
def _target(draw: Draw, dataset: Dataset, days: list[str], users: list[Any]) -> list[Row]:
    """One target, delivered once or twice."""
    kind = draw(st.sampled_from(dataset.targets))
    as_of = draw(_instants(dataset, days))
    number = draw(st.integers(0, 8))  # several users' and kinds' targets have the same
    text = dataset.target_id_type is IdType.STRING
    unseen = 99 if dataset.item_id_type is IdType.INT64 else "unseen"
    row = {
        "target": kind.name,
        "user_id": draw(st.sampled_from(users)),
        "target_id": str(number) if text else number,
        "time": as_of + draw(st.sampled_from((0, 0, 1, 30))) * HOUR_US,
        "as_of": as_of,
        "item_id": draw(st.sampled_from((*ids(dataset.item_id_type), unseen)))
        if kind.has_item
        else None,
        **{c.name: None for c in dataset.context_features},
        **{c.name: draw(values(c)) for c in kind.context},
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
    names = (7, 11, 2**40, 0) if dataset.user_id_type is IdType.INT64 else ("u", "U", "é 1", "0")
    users = list(names[: draw(st.integers(2, 4))])
    rows = _many(draw, _event(dataset, span, users[:-1]), 45)
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

    impressions = _agreeing(shown, target_keys)
    quiet = draw(st.sampled_from((None, None, *span)))  # a day on which nothing reaches the log
    if quiet is not None:
        start, end = oracle.bounds(dataset, quiet)
        events = {
            s.name: [e for e in events[s.name] if not start <= oracle.available_time(s, e) < end]
            for s in dataset.streams
        }
        impressions = [t for t in impressions if not start <= (t["as_of"] or t["time"]) < end]
    return World(
        dataset=dataset,
        events=events,
        impressions=impressions,
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


@st.composite
def conflicts(draw: Draw) -> World:
    """A world of one day in which two rows of one id arrive together and differ in one column."""
    world = draw(worlds(days=1))
    events, shown = replace(world, overlapping=False).given(world.days[0])
    pairs: list[tuple[list[Row], Row, Row]] = []
    for stream in world.dataset.streams:
        ids = [oracle.event_id(stream, e) for e in events[stream.name]]
        free = [a for a in stream.attributes if a.name not in stream.id_from]
        for row in events[stream.name]:
            if free and ids.count(oracle.event_id(stream, row)) == 1:
                other = draw(values(free[0]).filter(lambda v: v not in ("", None)))
                changed = {**row, free[0].name: None if row[free[0].name] == other else other}
                pairs.append((world.events[stream.name], row, changed))
    for row in shown:
        kind = next(t for t in world.dataset.targets if t.name == row["target"])
        if "time" not in kind.id_from:
            as_of = row["as_of"] or row["time"]
            changed = {**row, "as_of": as_of, "time": row["time"] + HOUR_US}
            pairs.append((world.impressions, row, changed))
    assume(pairs)
    rows, row, changed = draw(st.sampled_from(pairs))
    assume(repr(row) != repr(changed))
    rows.append(changed)
    return world
