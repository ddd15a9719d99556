"""Packed user-days, unpacked, are what a naive join per target gives; parts lose nothing."""

from __future__ import annotations

from hypothesis import given, settings

from feature_store.days import HOUR_US, add_days, start_us
from jobs import build_examples, build_sequences
from jobs.build_examples import Unusual
from tests import oracle_tables
from tests.frames import assert_same, build_examples_of, frame, typed, want
from tests.tiny import DAYS, TINY, World, event, make_world, target, worlds

DS = DAYS[3]


@settings(max_examples=5)
@given(world=worlds())
def test_examples_are_those_of_the_oracle(spark, world):
    examples = want(world, "examples", DS)
    assert_same(build_examples_of(spark, world, DS), examples, "examples")
    assert_same(build_examples_of(spark, world, DS, look_first=True), examples, "examples")


@settings(max_examples=4)
@given(world=worlds())
def test_every_target_sees_the_newest_of_all_events_before_it(spark, world):
    """Against a join per target that knows nothing of parts, states or packing."""
    state = oracle_tables.state(TINY, typed(world.events), add_days(DS, -1))
    shown = {t["target_id"]: t for t in world.impressions[DS]}
    for row in build_examples_of(spark, world, DS):
        user = row["user_id"]
        held = state.get(user, {s.name: [] for s in TINY.streams})
        new = oracle_tables.first_deliveries(held, oracle_tables.of_user(world.events[DS], user))
        for i, target_id in enumerate(row["targets__target_id"]):
            as_of = shown.pop(target_id)["as_of"]
            for stream in TINY.streams:
                line = [*held[stream.name], *(e for e in new if e["stream"] == stream.name)]
                known = [e["event_time"] for e in line if e["available_time"] < as_of]
                end = row[f"targets__history_end__{stream.name}"][i]
                seen = row[f"history__{stream.name}__event_time"][:end]
                assert end == len(seen)
                assert seen == known[len(known) - end :]
                assert end >= min(stream.max_events, len(known))
    assert not shown, "targets without a row"


def test_a_busy_day_becomes_parts_and_a_part_without_targets_none(spark):
    start = start_us(DS, TINY.utc_offset)
    world = World()
    world.events[DS] = [event(i, "view", 1, start + i * HOUR_US // 4, article=1) for i in range(16)]
    world.impressions[DS] = [target(i, "ad", 1, start + i * 4 * HOUR_US, item_id=1) for i in (0, 1)]
    rows = sorted(build_examples_of(spark, world, DS), key=lambda r: r["part"])
    # timeline: target 0, events 0..3 | events 4..8 | ... | events 14, 15, target 1
    assert [r["part"] for r in rows] == [0, 3]
    assert [r["targets__target_id"] for r in rows] == [[0], [1]]
    assert [r["targets__history_end__view"] for r in rows] == [[0], [6]]
    times = [e["event_time"] for e in world.events[DS]]
    assert rows[1]["history__view__event_time"] == times[10:]  # 4 before the part, its own 2


def test_what_is_unusual_about_a_day_is_found_before_it_is_packed(spark, monkeypatch):
    yesterday, today = (start_us(d, TINY.utc_offset) for d in (DAYS[0], DAYS[1]))
    held = [event(1, "view", 1, yesterday, article=1), event(2, "view", 2, yesterday, article=1)]
    busy = [event(10 + i, "view", 3, today + i, article=1) for i in range(TINY.max_part_rows)]
    again = event(2, "view", 2, yesterday, ingest=today, article=1)
    state = build_sequences.rebuild(frame(spark, held, "events"), TINY, DAYS[0], base=True)

    def found(shown):
        events = frame(spark, [*busy, again], "events")
        impressions = frame(spark, shown, "impressions")
        return build_examples.unusual_of(events, impressions, state, TINY)

    assert found([]) == Unusual(busy_users=[], delivered_again=[2])
    assert found([target(1, "visit", 3, today)]) == Unusual(busy_users=[3], delivered_again=[2])
    monkeypatch.setattr(build_examples, "_MOST_NAMED", 1)  # too much for the one, not for the other
    assert found([target(1, "visit", 3, today)]) == Unusual(busy_users=[3], delivered_again=None)


def test_a_user_with_one_event_and_a_user_with_none(spark):
    start = start_us(DS, TINY.utc_offset)
    world = World()
    world.events[DAYS[0]] = [event(1, "click", 1, start_us(DAYS[0], TINY.utc_offset), query=None)]
    world.impressions[DS] = [target(i, "visit", i, start + HOUR_US) for i in (1, 2)]
    one, none = sorted(build_examples_of(spark, world, DS), key=lambda r: r["user_id"])
    assert one["history__click__query"] == [""]
    assert one["history__click__article"] == [-1]
    assert one["history__click__topic"] == [[0.0, 0.0]]
    assert (one["targets__history_end__click"], none["targets__history_end__click"]) == ([1], [0])
    assert (one["has_aggregates"], none["has_aggregates"]) == (1, 0)
    assert none["history__click__event_time"] == []
    assert none["targets__item_id"] == [-1]


def test_a_day_without_events_or_without_targets(spark):
    world = make_world(seed=1, users=3, events=60, targets=40)
    quiet = World(events={**world.events, DS: []}, impressions=world.impressions)
    assert_same(build_examples_of(spark, quiet, DS), want(quiet, "examples", DS), "examples")
    assert build_examples_of(spark, World(events=world.events), DS) == []
