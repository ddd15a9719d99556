"""The simulated world: any day alone, deterministic, and labels that are drawn from the truth."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from feature_store import datasets
from feature_store.days import DAY_US, HOUR_US, start_us
from feature_store.errors import DataError
from jobs.sources import simulated
from jobs.sources.simulated_draws import normal, uniform
from jobs.sources.simulated_world import CATEGORIES, Likes, Memory, World

DATASET = datasets.get("simulated")
DAY, NEXT = "2024-03-05", "2024-03-06"
WORLD = World(users=400, seed=3)


def _number(day: str) -> int:
    return start_us(day, DATASET.utc_offset) // DAY_US


@pytest.fixture(scope="module")
def day() -> tuple[dict[str, pa.Table], pa.Table, pa.Table]:
    return simulated.tables(WORLD, DAY, DATASET)


def test_a_day_drawn_alone_equals_the_day_drawn_with_others() -> None:
    number = _number(DAY)
    alone = WORLD.days([number])[0]
    among = WORLD.days([number + 1, number, number - 1])[1]
    for one, other in zip((*alone[0], *alone[1]), (*among[0], *among[1]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_user_day_does_not_depend_on_who_else_is_there() -> None:
    # one place of a larger world holds another person, so the same people: drop half of the sessions
    sessions = WORLD.sessions(_number(DAY))
    half = type(sessions)(*(column[sessions.user % 2 == 0] for column in sessions))
    whole, part = WORLD.likes(_number(DAY), sessions), WORLD.likes(_number(DAY), half)
    kept = whole.user % 2 == 0
    for one, other in zip(whole, part, strict=True):
        assert sorted(one[kept].tolist()) == sorted(other.tolist())


def test_two_seeds_are_two_worlds(day: tuple) -> None:
    other = simulated.tables(World(users=400, seed=4), DAY, DATASET)
    assert not set(day[1]["target_id"].to_pylist()) & set(other[1]["target_id"].to_pylist())


def test_every_column_is_the_specs(day: tuple) -> None:
    events, impressions, _ = day
    for stream in DATASET.streams:
        assert {a.name for a in stream.attributes} <= set(events[stream.name].column_names)
        assert events[stream.name].num_rows > 0
    assert {c.name for c in DATASET.context_features} <= set(impressions.column_names)
    assert set(DATASET.given_labels) <= set(impressions.column_names)


def test_events_become_available_within_the_day_and_some_of_them_late(day: tuple) -> None:
    start = start_us(DAY, DATASET.utc_offset)
    late = 0
    for table in day[0].values():
        happened, logged = table["event_time"].to_numpy(), table["ingest_time"].to_numpy()
        assert (logged >= happened).all()
        assert ((logged >= start) & (logged < start + DAY_US)).all()
        late += int((happened < start).sum())
    assert late > 0
    shown = day[1]["time"].to_numpy()
    assert ((shown >= start) & (shown < start + DAY_US)).all()


def test_no_event_is_lost_between_two_days(day: tuple) -> None:
    following = simulated.tables(WORLD, NEXT, DATASET)
    drawn = simulated._events(WORLD, *WORLD.days([_number(DAY)])[0])
    for stream, table in drawn.items():
        keys = list(zip(*(table[c].to_pylist() for c in ("user_id", "event_time")), strict=True))
        both = pa.concat_tables([day[0][stream], following[0][stream]])
        logged = Counter(
            zip(*(both[c].to_pylist() for c in ("user_id", "event_time")), strict=True)
        )
        assert {k: logged[k] for k in keys} == Counter(keys)


def test_people_and_ads_come_and_go_every_day() -> None:
    number = _number(DAY)
    today, tomorrow = set(WORLD.people(number)), set(WORLD.people(number + 1))
    assert len(today) == len(tomorrow) == WORLD.users
    assert today - tomorrow and tomorrow - today
    ads, later = set(WORLD.ads(number).ad), set(WORLD.ads(number + 1).ad)
    assert ads - later and later - ads and ads & later


def test_ids_are_not_negative_and_people_have_one_each(day: tuple) -> None:
    ids = WORLD.user_id(WORLD.people(_number(DAY)))
    assert len(set(ids.tolist())) == WORLD.users
    assert ids.min() >= 0
    assert min(day[1]["target_id"].to_pylist()) >= 0


def test_clicks_and_purchases_are_drawn_with_the_probabilities_of_the_truth() -> None:
    shown = WORLD.days([_number(DAY)])[0][1]
    truth = simulated.truth_of(shown).to_pandas()
    for task, happened in (("click", shown.clicked), ("conversion", shown.bought)):
        p = truth[truth.task == task].probability.to_numpy()
        assert ((p > 0) & (p < 1)).all()
        spread = np.sqrt((p * (1 - p)).sum())
        assert abs(happened.sum() - p.sum()) < 4 * spread
        high = p > np.median(p)
        spread = np.sqrt((p * (1 - p))[high].sum())
        assert abs(happened[high].sum() - p[high].sum()) < 4 * spread


def test_a_purchase_answers_one_impression_only_and_within_its_label() -> None:
    number = _number(DAY)
    shown = [part[1] for part in WORLD.days([number, number + 1, number + 2])]
    seen: dict[tuple[int, int], list[int]] = {}
    for part in shown:
        for user, ad, time in zip(part.user, part.ad, part.time, strict=True):
            seen.setdefault((user, ad), []).append(time)
        waited = (part.buy_time - part.time)[part.bought]
        assert (waited > 0).all() and (waited < 24 * HOUR_US).all()
        assert not (part.bought & ~part.clicked).any()
    gaps = [
        b - a for times in seen.values() for a, b in zip(times, sorted(times)[1:], strict=False)
    ]
    assert gaps and min(gaps) >= 24 * HOUR_US


def test_heat_is_decided_by_the_order_of_the_likes() -> None:
    hour = HOUR_US
    user = np.array([1, 1, 2, 2])
    likes = Likes(user, np.array([0, hour, 0, hour]), np.array([4, 5, 5, 4]), user)
    at, category = np.full(2, 97 * hour), np.full(2, 4)
    heat, turned = Memory(likes).heat(np.array([1, 2]), at, category)
    np.testing.assert_allclose(heat, [-np.exp(-1), np.exp(-1)])  # 96 hours after the newest
    assert turned.tolist() == [False, True]
    heat, _ = Memory(likes).heat(np.array([1, 3]), np.full(2, hour), category)
    np.testing.assert_allclose(
        heat, [np.exp(-1 / 96), 0]
    )  # the like of that very moment is not past
    heat, _ = Memory(likes).heat(np.array([1]), np.array([200 * hour]), np.array([4]))
    assert heat[0] == 0


def test_interests_drift_and_have_unit_variance() -> None:
    user = np.arange(3000)
    now = WORLD.interests(user, np.full(3000, _number(DAY) * DAY_US))
    later = WORLD.interests(user, np.full(3000, (_number(DAY) + 20) * DAY_US))
    assert now.shape == (3000, CATEGORIES)
    assert 0.95 < now.std() < 1.05
    assert 0.2 < np.corrcoef(now.ravel(), later.ravel())[0, 1] < 0.8


def test_draws_are_uniform_normal_and_independent_of_each_other() -> None:
    key = np.arange(20_000)
    a, b = uniform(1, "what", key), uniform(1, "whatever", key)
    assert abs(a.mean() - 0.5) < 0.01 and abs(a.var() - 1 / 12) < 0.003
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03
    z = normal(1, "a name longer than eight bytes", key)
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03 and abs((z**3).mean()) < 0.1


def test_source_describes_the_world() -> None:
    assert World.parse(None) == World()
    assert World.parse("users=500,seed=3,late_share=0.1") == World(
        users=500, seed=3, late_share=0.1
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/data/logs", "takes no files"),
        ("users=many", "has to be a number"),
        ("users=1", "give the simulated world 10 to"),
        ("late_share=0.9", "give the simulated world 0 to 0.5"),
    ],
)
def test_source_that_describes_no_world_is_refused(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        World.parse(source)
