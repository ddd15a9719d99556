"""Sequences, aggregates, item counts and labels are those of the oracle; incremental equals full."""

from __future__ import annotations

from hypothesis import given, settings

from feature_store.days import HOUR_US, add_days, end_us, start_us
from feature_store.tables.aggregates import event_days
from jobs import build_aggregates, build_labels, build_sequences
from jobs.frames import newest
from tests.frames import (
    assert_same,
    build_examples_of,
    build_items_of,
    frame,
    rows_of,
    until,
    want,
)
from tests.tiny import DAYS, TINY, Row, World, event, target, worlds


@settings(max_examples=3)
@given(world=worlds())
def test_incremental_sequences_equal_a_full_rebuild_on_every_day(spark, world):
    written: dict[str, list[Row]] = {}
    for day in DAYS:
        base = day == DAYS[0] or build_sequences.is_base_day(TINY, day)
        state = newest(frame(spark, until(written, day), "sequences"))
        today = frame(spark, world.events[day], "events")
        incremental = build_sequences.transform(today, state, TINY, day, base=base)
        everything = frame(spark, until(world.events, day), "events")
        full = build_sequences.rebuild(everything, TINY, day, base=base)
        written[day] = rows_of(incremental)
        rows = want(world, "sequences", day, base=base)
        assert_same(written[day], rows, "sequences")
        assert_same(rows_of(full), rows, "sequences")


def test_an_event_delivered_again_is_dropped_while_the_state_holds_it(spark):
    first, second = (start_us(d, TINY.utc_offset) for d in DAYS[:2])
    days = {
        DAYS[0]: [event(i, "click", 1, first + i * HOUR_US, article=i) for i in range(5)],
        DAYS[1]: [
            event(4, "click", 1, first + 4 * HOUR_US, ingest=second, article=4),  # still held
            event(0, "click", 1, first, ingest=second, article=0),  # fell out of the last 3
        ],
    }
    state = build_sequences.rebuild(frame(spark, days[DAYS[0]], "events"), TINY, DAYS[0], base=True)
    today = frame(spark, days[DAYS[1]], "events")
    (row,) = rows_of(build_sequences.transform(today, state.drop("ds"), TINY, DAYS[1]))
    everything = frame(spark, until(days, DAYS[1]), "events")
    full = rows_of(build_sequences.rebuild(everything, TINY, DAYS[1]))
    assert row["history__click__event_id"] == [3, 4, 0]
    assert_same(full, [row], "sequences")


@settings(max_examples=5)
@given(world=worlds())
def test_aggregates_are_those_of_the_oracle(spark, world):
    day = DAYS[3]
    events = [e for d in event_days(TINY, day) for e in world.events.get(d, [])]
    got = build_aggregates.transform(frame(spark, events, "events"), TINY, day)
    assert_same(rows_of(got), want(world, "aggregates", day), "aggregates")


@settings(max_examples=5)
@given(world=worlds())
def test_item_counts_by_the_hour_are_those_of_the_oracle(spark, world):
    for day in DAYS[:3]:
        rows = want(world, "item_aggregates", day)
        assert_same(rows_of(build_items_of(spark, world, day)), rows, "item_aggregates")


def _labels(spark, world: World, examples: dict[str, list[Row]], ds: str) -> list[Row]:
    labels = build_labels.transform(
        examples={d: frame(spark, rows, "examples") for d, rows in examples.items()},
        impressions={d: frame(spark, world.impressions[d], "impressions") for d in examples},
        events=frame(spark, until(world.events, ds), "events"),
        dataset=TINY,
        ds=ds,
    )
    return [] if labels is None else rows_of(labels)


@settings(max_examples=5)
@given(world=worlds())
def test_labels_are_those_of_the_oracle(spark, world):
    ds = DAYS[3]
    examples = {d: want(world, "examples", d) for d in (add_days(ds, -1), ds)}
    assert_same(_labels(spark, world, examples, ds), want(world, "labels", ds), "labels")


def _one_target_and_a_click(available: int) -> tuple[World, dict[str, list[Row]]]:
    end = end_us(DAYS[1], TINY.utc_offset)
    world = World()
    labels = {"label__clicked": 0, "label__bought": 1}
    as_of = end - 2 * HOUR_US
    world.impressions[DAYS[1]] = [target(1, "ad", 1, as_of, item_id=5, place=1, **labels)]
    delay = TINY.stream("click").delay.seconds * 1_000_000
    click = event(10, "click", 1, as_of + HOUR_US, ingest=available - delay, article=5)
    world.events[click["ds"]].append(click)
    return world, {DAYS[1]: want(world, "examples", DAYS[1])}


def test_labels_appear_on_the_day_they_are_final_and_on_no_other(spark):
    world, examples = _one_target_and_a_click(end_us(DAYS[1], TINY.utc_offset) - 1)
    by_day = {d: _labels(spark, world, examples, d) for d in DAYS}
    tasks = {d: sorted(r["task"] for r in rows) for d, rows in by_day.items()}
    assert tasks[DAYS[1]] == ["clicked"]
    assert tasks[DAYS[2]] == ["back", "bought", "click_6h"]
    assert not any(tasks[d] for d in (DAYS[0], DAYS[3], DAYS[4]))
    answers = {r["task"]: r["labels"] for d in DAYS for r in by_day[d]}
    assert answers == {"clicked": [0], "bought": [1], "click_6h": [1], "back": [0]}


def test_an_answer_that_becomes_available_after_the_label_is_final_does_not_count(spark):
    final = end_us(DAYS[2], TINY.utc_offset)
    for available, answer in ((final - 1, 1), (final, 0)):
        world, examples = _one_target_and_a_click(available)
        labels = {r["task"]: r["labels"] for r in _labels(spark, world, examples, DAYS[2])}
        assert labels["click_6h"] == [answer]


def test_an_event_at_the_target_itself_or_past_its_limit_is_no_answer(spark):
    as_of = start_us(DAYS[1], TINY.utc_offset) + HOUR_US
    for after, answer in ((0, 0), (1, 1), (6 * HOUR_US, 1), (6 * HOUR_US + 1, 0)):
        world = World()
        time = as_of + HOUR_US
        world.impressions[DAYS[1]] = [target(1, "ad", 1, as_of, time=time, item_id=5)]
        world.events[DAYS[1]] = [event(10, "click", 1, time + after, article=5)]
        examples = {DAYS[1]: want(world, "examples", DAYS[1])}
        labels = _labels(spark, world, examples, DAYS[2])
        assert {r["task"]: r["labels"] for r in labels}["click_6h"] == [answer]


def test_a_missing_item_matches_no_event(spark):
    as_of = start_us(DAYS[1], TINY.utc_offset) + HOUR_US
    world = World()
    world.impressions[DAYS[1]] = [target(1, "ad", 1, as_of, item_id=None)]
    world.events[DAYS[1]] = [
        event(10 + i, "click", 1, as_of + HOUR_US, article=a) for i, a in enumerate((None, -1))
    ]
    labels = _labels(spark, world, {DAYS[1]: want(world, "examples", DAYS[1])}, DAYS[2])
    assert {r["task"]: r["labels"] for r in labels}["click_6h"] == [0]
    assert build_examples_of(spark, world, DAYS[1])[0]["targets__item_id"] == [-1]
