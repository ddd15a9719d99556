"""What a target may know of pairs: counted one by one from the table's rows, and not a row later."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch

from feature_store.days import DAY_US, HOUR_US, add_days, start_us
from feature_store.errors import SpecError
from feature_store.spec import IdType
from feature_store.tables import contract
from jobs.training import rows as decoding
from jobs.training.co_occurrence import CoOccurrences, Seen, days_read, known_of
from jobs.training.loader import (
    Limits,
    Users,
    cuts,
    labelled_batches,
    labelled_day,
    labelled_rows,
)
from models.features import feature_plan
from tests.synthetic import FIRST_DAY, MemoryLake, dataset, tables

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

DAYS = [add_days(FIRST_DAY, i) for i in range(6)]
SPEC = dataset()


def _lake(days=6, seed=0):
    return MemoryLake(SPEC, tables(SPEC, days=days, users=8, seed=seed))


def _naive(lake, column: str, item: int, value: int, as_of: int) -> list[float]:
    """together, lift, seen and share by going through every row of the table."""
    day = as_of - (as_of + SPEC.utc_offset.total_seconds() * 1e6) % DAY_US
    first = (day - SPEC.item_features.co_occurrence.window_days * DAY_US) // HOUR_US
    both = ours = theirs = everything = 0
    for rows in lake.rows["item_aggregates"].values():
        for row in rows.to_pylist():
            if not first <= row["hour"] < as_of // HOUR_US:
                continue
            for v, n in zip(row[column], row[f"{column}__counts"], strict=True):
                everything += n
                ours += n * (row["item_id"] == item)
                theirs += n * (v == value)
                both += n * (row["item_id"] == item and v == value)
    expected = ours * theirs / max(everything, 1)
    lift = math.log((1 + both) / (1 + expected))
    return [math.log1p(both), lift, math.log1p(theirs), both / (theirs + 20)]


def test_numbers_are_what_the_rows_add_up_to():
    lake = _lake()
    known = CoOccurrences(lake, SPEC, dict.fromkeys(DAYS, 1))
    rng = np.random.default_rng(0)
    m = 60
    items, values = rng.integers(0, 24, m), rng.integers(0, 24, m)
    start = start_us(DAYS[0], SPEC.utc_offset)
    as_of = start + rng.integers(0, 6 * 24 * 60, m) * (HOUR_US // 60)
    for column in ("beside__category", "before_20__ad"):
        found = known.numbers(column, items, as_of, values)
        wanted = [
            _naive(lake, column, *map(int, x)) for x in zip(items, values, as_of, strict=True)
        ]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert (found[:, 0] > 0).any()


def test_the_hour_of_as_of_and_everything_after_it_change_nothing():
    lake = _lake()
    as_of = start_us(DAYS[2], SPEC.utc_offset) + 9 * HOUR_US + 17
    before = CoOccurrences(lake, SPEC, dict.fromkeys(DAYS, 1))
    items, values = np.repeat(np.arange(24), 24), np.tile(np.arange(24), 24)
    moments = np.full(len(items), as_of)
    clean = before.numbers("before_20__ad", items, moments, values)
    for ds, rows in lake.rows["item_aggregates"].items():
        poisoned = [
            row | {"before_20__ad": list(range(24)), "before_20__ad__counts": [10**6] * 24}
            if row["hour"] >= as_of // HOUR_US
            else row
            for row in rows.to_pylist()
        ]
        schema = contract(SPEC, "item_aggregates").schema
        lake.rows["item_aggregates"][ds] = pa.Table.from_pylist(poisoned, schema=schema)
    after = CoOccurrences(lake, SPEC, dict.fromkeys(DAYS, 1))
    assert np.array_equal(after.numbers("before_20__ad", items, moments, values), clean)
    assert not np.array_equal(
        after.numbers("before_20__ad", items, moments + HOUR_US, values), clean
    )


def test_missing_ids_and_no_days_are_zeros():
    lake = _lake()
    known = CoOccurrences(lake, SPEC, dict.fromkeys(DAYS, 1))
    as_of = np.full(2, start_us(DAYS[3], SPEC.utc_offset))
    ids = np.array([-1, 3])
    assert not known.numbers("before_20__ad", ids, as_of, ids[::-1]).any()
    nothing = CoOccurrences(lake, SPEC, {})
    assert not nothing.numbers("before_20__ad", ids, as_of, ids).any()


def test_days_reach_back_as_far_as_the_window():
    assert days_read(SPEC, DAYS, [DAYS[4]]) == DAYS[1:5]
    assert days_read(SPEC, DAYS, [DAYS[0], DAYS[1]]) == DAYS[:2]
    bare = replace(SPEC, item_features=replace(SPEC.item_features, co_occurrence=None))
    assert days_read(bare, DAYS, DAYS) == []


def test_batches_carry_the_numbers_of_their_targets_and_pairs():
    lake, plan = _lake(days=4), feature_plan(SPEC)
    day = labelled_day(lake, SPEC, DAYS[3])
    of_items, of_pairs = len(SPEC.item_features.names), 0
    assert plan.item_numbers[of_items:] == ("beside_category", "beside_category_lift")
    for batch in labelled_batches(
        lake, SPEC, day.shown, users=Users.ALL, limits=Limits(max_targets=30)
    ):
        assert batch.pair_numbers.shape == (int(batch.history_end.sum()), len(plan.pair_numbers))
        pair = 0
        for t in range(batch.targets):
            item, as_of = int(batch.item_id[t]), int(batch.as_of[t])
            category = int(batch.context_ids["category"][t])
            beside = _naive(lake, "beside__category", item, category, as_of)[:2]
            assert batch.item_features[t, of_items:].tolist() == pytest.approx(beside, abs=1e-5)
            start = int(batch.event_offsets[batch.row_of_target[t]])
            for n in range(start, start + int(batch.history_end[t])):
                ad = int(batch.event_ids["ad"][n])
                wanted = [0.0] * 9
                if ad != -1:
                    wanted = _naive(lake, "before_1__ad", item, ad, as_of)
                    wanted += _naive(lake, "before_20__ad", item, ad, as_of)
                    wanted += _naive(lake, "before_20__ad", ad, item, as_of)[:1]
                assert batch.pair_numbers[pair, :9].tolist() == pytest.approx(wanted, abs=1e-5)
                pair += 1
        of_pairs += pair
        if of_pairs > 60:  # each is counted by going through the whole table
            break
    assert of_pairs


@pytest.mark.parametrize("pairs", [1, 7, 10**6])
def test_however_many_pairs_are_looked_up_at_once_a_batch_is_the_same(monkeypatch, pairs):
    lake = _lake(days=4)
    day = labelled_day(lake, SPEC, DAYS[3])
    (decoded,) = labelled_rows(lake, SPEC, day.shown, users=Users.ALL)
    ranges = cuts(decoded, Limits(max_targets=5))
    wanted = [replace(decoded).batch(lo, hi) for lo, hi in ranges]  # each looks up anew
    monkeypatch.setattr(decoding, "_PAIRS", pairs)
    (again,) = labelled_rows(lake, SPEC, day.shown, users=Users.ALL)
    for place in [*range(len(ranges)), *reversed(range(len(ranges)))]:
        batch = again.batch(*ranges[place])
        assert torch.equal(batch.pair_numbers, wanted[place].pair_numbers)
        np.testing.assert_array_equal(batch.item_features, wanted[place].item_features)


def test_pairs_of_two_local_days_in_one_hour_are_two():
    """Where days begin at half past, an hour of UTC has targets of two days, which look back less far."""
    shifted = replace(SPEC, utc_offset=timedelta(hours=5, minutes=30))
    lake = MemoryLake(shifted, tables(shifted, days=6, users=8, seed=0))
    known = CoOccurrences(lake, shifted, dict.fromkeys(DAYS, 1))
    midnight = start_us(DAYS[5], shifted.utc_offset)
    window = known.hours(np.array([midnight - 1, midnight]))
    assert window[0, 0] < window[0, 1] and window[1, 0] == window[1, 1]
    items = np.arange(24)
    seen = Seen(
        items=np.repeat(items, 2),
        as_of=np.tile([midnight - 1, midnight], 24),
        contexts={"category": np.zeros(48, np.int64)},
        first=np.zeros(48, np.int64),
        end=np.full(48, 24),
        events={"ad": items, "category": items},
    )
    numbers = known_of(shifted, seen, known).numbers.reshape(24, 2, 24, -1)
    for item in range(24):
        for day in range(2):
            one = np.full(24, item), np.full(24, midnight - 1 + day), items
            np.testing.assert_array_equal(
                numbers[item, day, :, :4], known.numbers("before_1__ad", *one)
            )
    assert (numbers[:, 0] != numbers[:, 1]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stream": "views"}, "CoOccurrence.stream is 'views'"),
        ({"attribute": "category"}, "CoOccurrence.attribute is 'category'"),
        ({"beside": ("ad",)}, "CoOccurrence.beside is 'ad': not declared; known are category"),
        ({"before": ("price",)}, "CoOccurrence.before is 'price'"),
        ({"before": (), "beside": ()}, r"CoOccurrence.before is \(\)"),
        ({"lags": (0, 2)}, r"CoOccurrence.lags is \(0, 2\)"),
        ({"lags": ()}, r"CoOccurrence.lags is \(\)"),
        ({"lags": (20, 1)}, r"CoOccurrence.lags is \(20, 1\)"),
        ({"lags": (1, 1000)}, r"CoOccurrence.lags is \(1, 1000\)"),
        ({"window_days": 0}, "CoOccurrence.window_days is 0"),
    ],
)
def test_a_wrong_declaration_names_the_field(change, message):
    items = SPEC.item_features
    with pytest.raises(SpecError, match=message):
        replace(
            SPEC, item_features=replace(items, co_occurrence=replace(items.co_occurrence, **change))
        )


def test_only_numbers_have_an_order():
    def text(attribute):
        return replace(attribute, id_type=IdType.STRING) if attribute.name == "ad" else attribute

    likes, clicks = SPEC.streams
    clicks = replace(clicks, attributes=tuple(map(text, clicks.attributes)))
    with pytest.raises(SpecError, match="ordered_ids is True: item ids are string"):
        replace(SPEC, item_id_type=IdType.STRING, streams=(likes, clicks))
