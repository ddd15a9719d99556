"""Nothing at or after a moment reaches what is known before it: it does not move by a bit."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from feature_store.days import HOUR_US, end_us, micros, start_us
from feature_store.spec import GivenLabel, IdType
from feature_store.tables.item_aggregates import co_occurrence_columns
from jobs import build_aggregates
from jobs.training.co_occurrence import CoOccurrences
from jobs.training.ids import int64_ids
from tests.differential import bits
from tests.frames import build_examples_of, build_items_of, frame, items_before, rows_of
from tests.synthetic import MemoryLake
from tests.tiny import DAYS, TINY, Row, World, arrow, event, target, worlds

DS = DAYS[2]


def _features(rows: list[Row], target_id: int) -> Row:
    """Everything that a model may see of one target: its row cut at its `history_end`."""
    for row in rows:
        if target_id not in row["targets__target_id"]:
            continue
        i = row["targets__target_id"].index(target_id)
        seen = {k: bits(v[i]) for k, v in row.items() if k.startswith("targets__")}
        for stream in TINY.streams:
            prefix = f"history__{stream.name}__"
            end = row[f"targets__history_end__{stream.name}"][i]
            seen |= {k: bits(v[:end]) for k, v in row.items() if k.startswith(prefix)}
        users = ("user__", "sparse__", "dense__", "has_")
        return seen | {k: bits(v) for k, v in row.items() if k.startswith(users)}
    raise AssertionError(f"target {target_id} is in no row")


def _poisoned_events(
    world: World, moment: int, rng: random.Random, touched: list[tuple[object, object]]
) -> dict[str, list[Row]]:
    """`world`'s events, with all that were not available before `moment` deleted or changed, and new ones.

    Args:
        touched: (user, item) of the new events.
    """
    events: dict[str, list[Row]] = {day: [] for day in world.events}
    number = 10_000
    poison = {"price": 9e9, "query": "poison", "user_id": 1}
    for row in (r for rows in world.events.values() for r in rows):
        if row["available_time"] < moment:
            events[row["ds"]].append(row)
        elif rng.random() < 0.6:
            events[row["ds"]].append({**row, "article": rng.randrange(1, 7), **poison})
    for user, item in touched:
        for delay in (0, 0, 0, 1, HOUR_US, 5 * HOUR_US, 24 * HOUR_US):
            for stream in TINY.streams:  # as early as it can be while being at or after `moment`
                number += 1
                at = moment + delay - micros(stream.delay)
                row = event(number, stream.name, user, at, article=item, device=7)
                events.get(row["ds"], []).append(row)
    return events


def _poisoned(world: World, fixed: Row, seed: int) -> World:
    """`world` with everything that is not known at the target's `as_of` deleted, changed or added to."""
    rng, as_of = random.Random(seed), fixed["as_of"]
    other = World(
        events=_poisoned_events(world, as_of, rng, [(fixed["user_id"], fixed["item_id"])])
    )
    number = 20_000
    for row in (r for rows in world.impressions.values() for r in rows):
        later = (row["as_of"], row["target_id"]) > (as_of, fixed["target_id"])
        if not later:
            other.impressions[row["ds"]].append(row)
        elif rng.random() < 0.5:
            other.impressions[row["ds"]].append({**row, "place": 2, "label__clicked": 1})
    for _ in range(rng.randrange(8)):
        number += 1
        at = as_of + rng.randrange(1, 10) * HOUR_US
        row = target(number, "ad", fixed["user_id"], at, item_id=1, place=1)
        other.impressions.get(row["ds"], []).append(row)
    return other


@settings(max_examples=5)
@given(world=worlds(), choice=st.integers(0, 2**16), seed=st.integers(0, 2**16))
def test_features_of_a_target_do_not_move_when_what_came_later_does(spark, world, choice, seed):
    targets = world.impressions[DS]
    assume(targets)
    fixed = targets[choice % len(targets)]
    before = _features(build_examples_of(spark, world, DS), fixed["target_id"])
    after = _features(
        build_examples_of(spark, _poisoned(world, fixed, seed), DS), fixed["target_id"]
    )
    assert before == after


def _closed(rows: list[Row], moment: int) -> list[Row]:
    """Rows of hours that closed before `moment` or with it."""
    closed = [r for r in rows if (r["hour"] + 1) * HOUR_US <= moment]
    return sorted(closed, key=lambda r: (r["item_id"], r["hour"]))


def _known_pairs(world: World, counted: list[Row], moments: np.ndarray) -> list[bytes]:
    """What `CoOccurrences` says of every pair of an item and a value at each of `moments`."""
    rows = [*items_before(world, DS), *counted]
    of_day = {d: arrow([r for r in rows if r["ds"] == d], "item_aggregates") for d in DAYS[:3]}
    lake = MemoryLake(TINY, {"item_aggregates": of_day})
    known = CoOccurrences(lake, TINY, dict.fromkeys(of_day, 1))
    texts = int64_ids(pa.array(["a", "b", "c", "poison"]))
    found = []
    for column, attribute in co_occurrence_columns(TINY).items():
        ids = np.arange(1, 7) if attribute.id_type is IdType.INT64 else texts
        grid = np.meshgrid(np.arange(1, 7), ids, moments)
        items, values, at = (axis.ravel() for axis in grid)
        found.append(known.numbers(column, items, at, values).tobytes())
        found.append(known.after(column, items, at, values).tobytes())
    return found


@settings(max_examples=8)
@given(
    world=worlds(),
    half_hours=st.integers(0, 48),
    odd=st.sampled_from((0, 0, 1)),
    seed=st.integers(0, 2**16),
)
def test_an_hour_that_closed_does_not_move_when_what_came_after_it_does(
    spark, world, half_hours, odd, seed
):
    moment = start_us(DS, TINY.utc_offset) + half_hours * HOUR_US // 2 + odd
    rng = random.Random(seed)
    users = [(rng.randrange(1, 7), rng.randrange(1, 7)) for _ in range(3)]
    other = World(events=_poisoned_events(world, moment, rng, users))
    ours, theirs = (rows_of(build_items_of(spark, w, DS)) for w in (world, other))
    assert _closed(ours, moment) == _closed(theirs, moment)
    begin = start_us(DS, TINY.utc_offset)
    moments = np.arange(begin, moment + 1, HOUR_US)
    assert _known_pairs(world, ours, moments) == _known_pairs(other, theirs, moments)


def test_a_busy_users_early_hours_keep_what_falls_out_of_the_days_history(spark):
    first = start_us(DS, TINY.utc_offset)
    most = TINY.stream("click").max_events
    world = World()
    for i in range(4 * most):
        row = event(i, "click", 1, first + i * HOUR_US, article=1 + i % 6, query="a")
        world.events[row["ds"]].append(row)
    rows = rows_of(build_items_of(spark, world, DS))
    pairs = {(r["item_id"], r["hour"]): r["before_1__query__counts"] for r in rows}
    assert len(pairs) == 4 * most
    assert sorted(map(len, pairs.values())) == [0] + [1] * (4 * most - 1)


def test_an_event_delivered_again_is_not_counted_again_as_a_pair(spark):
    before, first = (start_us(d, TINY.utc_offset) for d in DAYS[1:3])
    world = World()
    world.events[DAYS[1]] = [event(i, "click", 1, before + i * HOUR_US, article=i) for i in (1, 2)]
    world.events[DS] = [
        event(2, "click", 1, before + 2 * HOUR_US, ingest=first, article=2),
        event(3, "click", 1, first + HOUR_US, article=3),
    ]
    rows = {r["item_id"]: r for r in rows_of(build_items_of(spark, world, DS))}
    assert rows[2]["before_2__article"] == [] and rows[2]["events__click"] == 1
    assert rows[3]["before_1__article"] == [2] and rows[3]["before_2__article"] == [1, 2]


def test_an_event_available_at_as_of_is_not_seen_and_one_a_microsecond_earlier_is(spark):
    as_of = start_us(DS, TINY.utc_offset) + 10 * HOUR_US
    world = World()
    world.impressions[DS] = [target(1, "ad", 1, as_of, item_id=5)]
    for number, at in ((10, as_of - 1), (11, as_of)):
        world.events[DS].append(event(number, "view", 1, at, article=5))
    (row,) = build_examples_of(spark, world, DS)
    assert row["history__view__available_time"] == [as_of - 1, as_of]
    assert row["targets__history_end__view"] == [1]


def test_the_delay_of_a_stream_and_a_late_ingest_push_an_event_behind_as_of(spark):
    as_of = start_us(DS, TINY.utc_offset) + 10 * HOUR_US
    delay = micros(TINY.stream("click").delay)
    world = World()
    world.impressions[DS] = [target(1, "ad", 1, as_of, item_id=5)]
    world.events[DS] = [
        event(10, "click", 1, as_of - delay - 1, article=5),
        event(11, "click", 1, as_of - delay, article=5),
        event(12, "view", 1, as_of - 5 * HOUR_US, ingest=as_of, article=5),
    ]
    (row,) = build_examples_of(spark, world, DS)
    assert row["targets__history_end__click"] == [1]
    assert row["targets__history_end__view"] == [0]


def test_item_features_see_closed_hours_only(spark):
    hour = start_us(DS, TINY.utc_offset) + 10 * HOUR_US
    world = World()
    world.events[DS] = [event(10, "view", 2, hour, article=5)]
    world.impressions[DS] = [
        target(1, "ad", 1, hour + HOUR_US - 1, item_id=5),
        target(2, "ad", 1, hour + HOUR_US, item_id=5),
    ]
    (row,) = build_examples_of(spark, world, DS)
    assert row["targets__item__view_2h"][0] == 0
    assert row["targets__item__age_h"][0] == -1
    assert row["targets__item__view_2h"][1] > 0
    assert row["targets__item__age_h"][1] == pytest.approx(0.6931472)  # log(1 + one hour)


def test_user_features_stop_at_the_cutoff_of_the_nightly_job(spark):
    cutoff = end_us(DAYS[1], TINY.utc_offset) - micros(TINY.serve_delay)
    events = [event(i, "view", 1, cutoff + by, article=5) for i, by in enumerate((-1, 0, 1))]
    (row,) = rows_of(build_aggregates.transform(frame(spark, events, "events"), TINY, DAYS[1]))
    assert row["dense__views_1d"] == 1
    assert row["sparse__viewed__scores"] == [1.0]


def test_no_feature_reads_a_label(spark):
    as_of = start_us(DS, TINY.utc_offset) + 10 * HOUR_US
    columns = [t.label.column for t in TINY.tasks if isinstance(t.label, GivenLabel)]
    rows = []
    for answer in (None, 0, 1):
        world = World()
        labels = {f"label__{c}": answer for c in columns}
        world.impressions[DS] = [target(1, "ad", 1, as_of, item_id=5, **labels)]
        rows.append(build_examples_of(spark, world, DS))
    assert bits([list(r[0].values()) for r in rows[:1]]) == bits(
        [list(r[0].values()) for r in rows[1:2]]
    )
    assert bits(list(rows[1][0].values())) == bits(list(rows[2][0].values()))
