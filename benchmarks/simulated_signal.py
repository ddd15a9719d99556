"""How much of the simulated world's signal is where: what a boosted tree model reaches on each kind of feature.

    python -m benchmarks.simulated_signal

Trains on four days and tests on the fifth, with features made by numpy straight from the world. The
table of docs/simulated.md was made with it. NE: log loss over that of the base rate of
the training days.
"""

from __future__ import annotations

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

from feature_store import datasets
from feature_store.days import DAY_US, HOUR_US, start_us
from jobs.sources.simulated_world import (
    CALM_HOURS,
    CATEGORIES,
    Impressions,
    Likes,
    World,
    seen_before,
)
from models.metrics import normalized_entropy

WARM_UP_DAYS, TRAIN_DAYS = 8, 4
USERS = 6000  # more than `make run` has: the figures are steadier
WINDOWS_DAYS = (1, 3, 7)
CATEGORICAL = [3, 4]  # category and advertiser, in `context`
Array = np.ndarray


class Log:
    """Likes and impressions of the days before one, with what can be counted about them."""

    def __init__(self, days: list) -> None:
        self.likes = [np.concatenate(c) for c in zip(*(d[0] for d in days), strict=True)]
        self.shown = {
            name: np.concatenate([getattr(d[1], name) for d in days])
            for name in ("user", "time", "category", "ad", "clicked", "bought")
        }


def count(keys: Array, chosen: Array, asked: Array) -> Array:
    """How many of `keys`, where `chosen`, equal each of `asked`."""
    sorted_keys = np.sort(keys[chosen])
    right = np.searchsorted(sorted_keys, asked, "right")
    return right - np.searchsorted(sorted_keys, asked, "left")


def context(log: Log, shown: Impressions) -> Array:
    """What is known without the person: the place, the hour, the ad and how it did until yesterday."""
    ads, which = np.unique(log.shown["ad"], return_inverse=True)
    seen, clicks = np.bincount(which), np.bincount(which, log.shown["clicked"])
    at = np.minimum(np.searchsorted(ads, shown.ad), len(ads) - 1)
    known = ads[at] == shown.ad
    rate = np.where(known, (clicks[at] + 4) / (seen[at] + 50), 0.08)
    return np.stack(
        [shown.surface, shown.hour, shown.position, shown.category, shown.advertiser, rate,
         np.where(known, seen[at], 0)], axis=1,
    )  # fmt: skip


def counts(log: Log, shown: Impressions, cutoff: int) -> Array:
    """Counts of the person until the nightly cutoff: likes, clicks, purchases, by window and category."""
    user, time, category, _ = log.likes
    of = shown.user * CATEGORIES + shown.category
    rival = shown.user * CATEGORIES + (shown.category ^ 1)
    columns = []
    for days in WINDOWS_DAYS:
        inside = (time >= cutoff - days * DAY_US) & (time < cutoff)
        likes = user * CATEGORIES + category
        columns += [
            count(likes, inside, of),
            count(likes, inside, rival),
            count(user, inside, shown.user),
        ]
    past = log.shown
    week = (past["time"] >= cutoff - 7 * DAY_US) & (past["time"] < cutoff)
    seen = past["user"] * CATEGORIES + past["category"]
    for kind in (week, week & past["clicked"], week & past["bought"]):
        columns += [
            count(seen, kind, of),
            count(seen, kind, rival),
            count(past["user"], kind, shown.user),
        ]
    return np.stack(columns, axis=1)


def order(log: Log, today: Likes, shown: Impressions, cutoff: Array) -> Array:
    """The newest likes of the category's pair before `cutoff`: which way round, and how long ago."""
    user, time, category, _ = (np.concatenate(c) for c in zip(log.likes, today, strict=True))
    pair = user * (CATEGORIES // 2) + category // 2
    by = np.lexsort((category, time, pair))
    pair, time, category = pair[by], time[by], category[by]
    groups, first = np.unique(pair, return_index=True)
    base, wide = int(time.min()), 1 << 42
    key = np.repeat(np.arange(len(groups)), np.diff([*first, len(pair)])) * wide + time - base
    asked = shown.user * (CATEGORIES // 2) + shown.category // 2
    code = np.minimum(np.searchsorted(groups, asked), len(groups) - 1)
    at = np.searchsorted(key, code * wide + cutoff - base, "left") - 1
    columns, decayed = [], np.zeros(len(asked))
    for back in range(8):
        there = (at - back >= 0) & (pair[np.maximum(at - back, 0)] == asked)
        row = np.maximum(at - back, 0)
        hours = np.where(there, (shown.time - time[row]) / HOUR_US, 1e4)
        sign = np.where(there, np.where(category[row] == shown.category, 1.0, -1.0), 0.0)
        if back < 2:
            columns += [sign, hours, sign * np.exp(-hours / CALM_HOURS)]
        decayed += (sign > 0) * np.exp(-hours / 72)
    return np.stack([*columns, decayed], axis=1)


def features(days: dict[int, tuple], day: int) -> dict[str, Array]:
    """Each kind of feature of a day's impressions, their labels and their truth."""
    likes, shown = days[day]
    log = Log([days[d] for d in range(day - max(WINDOWS_DAYS), day)])
    cutoff = day * DAY_US - HOUR_US
    live = order(log, likes, shown, shown.time)
    fatigue = seen_before(shown.user, shown.advertiser, shown.time)
    return {
        "context": context(log, shown),
        "counts": counts(log, shown, cutoff),
        "nightly": order(log, likes, shown, np.full(len(shown.time), cutoff)),
        "live": np.concatenate([live, fatigue[:, None]], axis=1),
        "click": shown.clicked,
        "conversion": shown.bought,
        "click truth": shown.p_click,
        "conversion truth": shown.p_click * shown.p_buy,
    }


def main() -> None:
    """Print the table."""
    first = (
        start_us(datasets.get("simulated").first_day, datasets.get("simulated").utc_offset)
        // DAY_US
    )
    numbers = range(first, first + WARM_UP_DAYS + TRAIN_DAYS + 1)
    days = dict(zip(numbers, World(users=USERS).days(numbers), strict=True))
    made = [features(days, d) for d in numbers[WARM_UP_DAYS:]]
    train = {k: np.concatenate([m[k] for m in made[:-1]]) for k in made[0]}
    test = made[-1]
    print(f"{'features':34} {'click':>8} {'conversion':>11}")
    for title, kinds in (
        ("context and item", ("context",)),
        ("+ nightly counts", ("context", "counts")),
        ("+ order of likes, last night", ("context", "counts", "nightly")),
        ("+ order of likes, live", ("context", "counts", "nightly", "live")),
        ("the truth", ()),
    ):
        found = []
        for task in ("click", "conversion"):
            p = test[f"{task} truth"]
            if kinds:
                model = HistGradientBoostingClassifier(
                    max_iter=110, learning_rate=0.08, min_samples_leaf=100, l2_regularization=5,
                    categorical_features=CATEGORICAL, random_state=0,
                )  # fmt: skip
                model.fit(np.concatenate([train[k] for k in kinds], axis=1), train[task])
                p = model.predict_proba(np.concatenate([test[k] for k in kinds], axis=1))[:, 1]
            found.append(normalized_entropy(test[task], p, train[task].mean()))
        print(f"{title:34} {found[0]:8.3f} {found[1]:11.3f}", flush=True)
    for task in ("click", "conversion"):
        print(f"base rate of {task}: {train[task].mean():.4f}, {len(test[task])} impressions a day")


if __name__ == "__main__":
    main()
