"""The simulated ads world: any day of it, alone, from the seed in closed form. docs/simulated.md has the story.

Nothing is carried from day to day. Every draw is a hash of (seed, what is drawn, who, when), so a
user-day does not depend on which other users or days are drawn with it, or in what order.
What people like and which ads they are shown do not depend on what they click, so the state that a
click depends on can be worked out again from the days before it.

Shapes: U people, S sessions, A actions (likes or impressions), C categories. Times are UTC
microseconds; days are counted from the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from feature_store.days import DAY_US, HOUR_US, SECOND_US
from feature_store.errors import DataError
from jobs.sources.simulated_draws import Array, draw, identifier, normal, sigmoid, uniform

CATEGORIES = 16  # 2j and 2j + 1 are rivals
ADVERTISERS = 96  # advertiser a sells category a % CATEGORIES
PAGES = 960  # page p is about category p % CATEGORIES
COUNTRIES = 12
MAX_SESSIONS = 3
MAX_ACTIONS = 16
AD_LIFE_DAYS = 10
MEMORY_DAYS = 7  # then a like is forgotten
CALM_HOURS = 96.0  # the heat of a like falls by e in this time
FEED, STORIES = 0, 1


class Sessions(NamedTuple):
    """One row per session, (S,)."""

    user: Array  # index of the person
    number: Array  # of the day, from 0
    start: Array
    interests: Array  # (S, C)


class Likes(NamedTuple):
    """One row per page liked, (A,)."""

    user: Array
    time: Array
    category: Array
    page: Array


class Impressions(NamedTuple):
    """One row per ad shown, (A,), with what came of it."""

    user: Array
    time: Array
    target_id: Array
    ad: Array
    category: Array
    advertiser: Array
    surface: Array
    hour: Array
    position: Array  # in the session, from 1
    p_click: Array
    p_buy: Array  # given a click
    clicked: Array  # bool
    bought: Array  # bool
    click_time: Array
    buy_time: Array


class Ads(NamedTuple):
    """The ads that run on a day, sorted by category."""

    ad: Array
    category: Array
    advertiser: Array
    quality: Array
    weight_end: Array  # running sum of delivery weights
    first: Array  # (C + 1,) where each category begins


@dataclass(frozen=True, kw_only=True)
class World:
    """One simulated world.

    Args:
        seed: two worlds of one seed and size are the same.
        users: people alive on any one day; 1 in 90 leaves and is replaced each day.
        ads_per_day: ads born each day.
        late_share: share of likes, impressions and clicks that reach the log hours later.
        duplicate_share: share of the same that the log holds twice.
    """

    seed: int = 7
    users: int = 3000
    ads_per_day: int = 80
    late_share: float = 0.06
    duplicate_share: float = 0.003

    def __post_init__(self) -> None:
        for name, low, high in (("users", 10, 10**8), ("ads_per_day", 4 * CATEGORIES, 10**6),
                                ("late_share", 0, 0.5), ("duplicate_share", 0, 0.5)):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise DataError(
                    f"SOURCE: {name} is {value}: give the simulated world {low} to {high}"
                )

    @classmethod
    def parse(cls, source: str | None) -> World:
        """The world that `source` describes: `users=500,seed=3`; the default one where it is empty.

        Raises:
            DataError: an unknown name, or a value that is no number.
        """
        types = {f.name: float if f.name.endswith("share") else int for f in fields(cls)}
        values: dict[str, int | float] = {}
        for part in filter(None, (source or "").split(",")):
            name, _, value = part.partition("=")
            if name.strip() not in types:
                raise DataError(
                    f"SOURCE has {part!r}: the simulated world takes no files, only {', '.join(types)}, "
                    "written as SOURCE=users=500,seed=3"
                )
            try:
                values[name.strip()] = types[name.strip()](value)
            except ValueError:
                raise DataError(f"SOURCE has {part!r}: {name.strip()} has to be a number") from None
        return cls(**values)  # type: ignore[arg-type]

    # People -------------------------------------------------------------------------------------

    def user_id(self, user: Array) -> Array:
        """The id in the log of person `user`."""
        return identifier(self.seed, "user", user)

    def people(self, day: int) -> Array:
        """(U,) indices of the people alive on `day`: a place of `users` is taken by one after another."""
        # Place p changes hands every 90 days, on a day of its own; so any day's people are known at once.
        place = np.arange(self.users, dtype=np.int64)
        moved = (draw(self.seed, "place", place) % np.uint64(90)).astype(np.int64)
        return (day + moved) // 90 * self.users + place

    def interests(self, user: Array, time: Array) -> Array:
        """(S, C) float64 of standard deviation 1: a constant and two slow waves for each category.

        `z_uc(t) = (m + 0.8 sin(2 pi t / P1 + a) + sin(2 pi t / P2 + b)) / 1.35`, m normal, P1 in
        5..10 and P2 in 15..40 days.
        """
        user, days = user[:, None], time[:, None] / DAY_US
        c = np.arange(CATEGORIES)[None, :]
        z = normal(self.seed, "mean", user, c)
        for what, short, long, height in (("fast", 5.0, 10.0, 0.8), ("slow", 15.0, 40.0, 1.0)):
            period = short + (long - short) * uniform(self.seed, what + "/p", user, c)
            phase = uniform(self.seed, what + "/f", user, c)
            z = z + height * np.sin(2 * np.pi * (days / period + phase))
        return z / 1.35

    def _choose(self, interests: Array, what: str, *keys: Array | int) -> Array:
        """A category by softmax(2 z), drawn as the largest of z plus Gumbel noise."""
        u = uniform(self.seed, what, *(k[:, None] if isinstance(k, np.ndarray) else k for k in keys),
                    np.arange(CATEGORIES)[None, :])  # fmt: skip
        return np.argmax(2.0 * interests - np.log(-np.log(u)), axis=1)

    def sessions(self, day: int) -> Sessions:
        """The sessions of everybody who is there on `day`."""
        people = self.people(day)
        activity = 0.1 + 0.8 * uniform(self.seed, "activity", people)
        here = people[uniform(self.seed, "here", people, day) < activity]
        count = 1 + (uniform(self.seed, "sessions", here, day) * MAX_SESSIONS).astype(np.int64)
        user = np.repeat(here, count)
        number = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
        hour = (
            9.0 + 5.0 * normal(self.seed, "habit", user) + 5.0 * number
            + 2.0 * normal(self.seed, "hour", user, day, number)
        ) % 23.4  # fmt: skip
        start = day * DAY_US + (hour * HOUR_US).astype(np.int64)
        return Sessions(user, number, start, self.interests(user, start))

    def _actions(self, day: int, sessions: Sessions) -> tuple[Array, Array, Array, Array]:
        """(A,) each: the session's row, the slot in it, the time, and whether it is a like."""
        length = 4 + (uniform(self.seed, "length", sessions.user, day, sessions.number)
                      * (MAX_ACTIONS - 3)).astype(np.int64)  # fmt: skip
        slot = np.arange(MAX_ACTIONS)[None, :]
        keys = (sessions.user[:, None], day, sessions.number[:, None], slot)
        gaps = 5.0 - 50.0 * np.log(uniform(self.seed, "gap", *keys))
        time = sessions.start[:, None] + (np.cumsum(gaps, axis=1) * SECOND_US).astype(np.int64)
        like = uniform(self.seed, "like", *keys) < 0.11
        before_midnight = time < (day + 1) * DAY_US - 60 * SECOND_US
        row, column = np.nonzero((slot < length[:, None]) & before_midnight)
        return row, column, time[row, column], like[row, column]

    def likes(self, day: int, sessions: Sessions) -> Likes:
        """Pages liked on `day`, of the session's intent or of any interest, at 1 : 1.

        Of five likes three close a comparison: a page of the rival is liked 3 seconds before. Both
        are counted alike; which one came last tells what the person settled on.
        """
        row, slot, time, like = self._actions(day, sessions)
        row, slot, time = row[like], slot[like], time[like]
        user, keys = sessions.user[row], (sessions.user[row], day, sessions.number[row], slot)
        intent = self._choose(sessions.interests, "intent", sessions.user, day, sessions.number)
        anything = self._choose(sessions.interests[row], "any", *keys)
        settled = np.where(uniform(self.seed, "liked", *keys) < 0.5, intent[row], anything)
        compared = uniform(self.seed, "compare", *keys) < 0.6
        category = np.concatenate([settled, settled[compared] ^ 1])
        which = uniform(self.seed, "page", *keys)
        which = np.concatenate([which, 1 - which[compared]])
        rank = (which**2 * (PAGES // CATEGORIES)).astype(np.int64)
        return Likes(
            np.concatenate([user, user[compared]]),
            np.concatenate([time, time[compared] - 3 * SECOND_US]),
            category,
            rank * CATEGORIES + category,
        )

    # Ads ----------------------------------------------------------------------------------------

    def ads(self, day: int) -> Ads:
        """The ads that run on `day`: born on one of the last days and not yet ended."""
        born = np.repeat(np.arange(day - AD_LIFE_DAYS + 1, day + 1), self.ads_per_day)
        number = np.tile(np.arange(self.ads_per_day), AD_LIFE_DAYS)
        life = 2 + (uniform(self.seed, "life", born, number) * (AD_LIFE_DAYS - 1)).astype(np.int64)
        age = day - born
        # the first of every day, one of each category, run their full time: no category is ever empty
        runs = (age < life) | (number < CATEGORIES)
        born, number, age = born[runs], number[runs], age[runs]
        drawn = draw(self.seed, "advertiser", born, number)
        advertiser = (drawn % np.uint64(ADVERTISERS)).astype(np.int64)
        of_category = advertiser - advertiser % CATEGORIES + number
        advertiser = np.where(number < CATEGORIES, of_category, advertiser)
        order = np.lexsort((number, born, advertiser % CATEGORIES))
        born, number, age, advertiser = born[order], number[order], age[order], advertiser[order]
        quality = (
            0.35 * normal(self.seed, "brand", advertiser)
            + 0.35 * normal(self.seed, "quality", born, number) - 0.06 * age
        )  # fmt: skip
        weight = np.exp(0.8 * normal(self.seed, "budget", born, number))
        return Ads(
            ad=identifier(self.seed, "ad", born, number),
            category=advertiser % CATEGORIES,
            advertiser=advertiser,
            quality=quality,
            weight_end=np.concatenate([[0.0], np.cumsum(weight)]),
            first=np.searchsorted(advertiser % CATEGORIES, np.arange(CATEGORIES + 1)),
        )

    def _deliver(self, ads: Ads, user: Array, day: int, category: Array, keys: tuple) -> Array:
        """Row of `ads` for each slot, or -1: an ad is shown to a person every other day at most, once a day."""
        low, high = ads.weight_end[ads.first[category]], ads.weight_end[ads.first[category + 1]]
        chosen = np.full(len(user), -1)
        for attempt in range(3):
            at = low + (high - low) * uniform(self.seed, "ad", *keys, attempt)
            row = np.searchsorted(ads.weight_end, at, side="right") - 1
            parity = draw(self.seed, "turn", user, ads.ad[row]) % np.uint64(2)
            turn = parity == np.uint64(day % 2)
            chosen = np.where((chosen < 0) & turn, row, chosen)
        return chosen

    # A day --------------------------------------------------------------------------------------

    def impressions(self, day: int, sessions: Sessions, likes: Likes) -> Impressions:
        """Ads shown on `day`, given the likes of that day and the days before it that are remembered."""
        row, slot, time, like = self._actions(day, sessions)
        row, slot, time = row[~like], slot[~like], time[~like]
        user, number = sessions.user[row], sessions.number[row]
        keys = (user, day, number, slot)
        memory = Memory(likes)
        anything = self._choose(sessions.interests[row], "shown", *keys)
        how = uniform(self.seed, "retrieval", *keys)
        broad = (uniform(self.seed, "broad", *keys) * CATEGORIES).astype(np.int64)
        recent = memory.newest(user, time)
        recent = np.where(recent < 0, broad, recent ^ (uniform(self.seed, "which", *keys) < 0.5))
        category = np.where(how < 0.35, broad, np.where(how < 0.8, anything, recent))
        ads = self.ads(day)
        chosen = self._deliver(ads, user, day, category, keys)
        order = np.lexsort((time, chosen, user))
        repeat = np.zeros(len(user), dtype=bool)
        repeat[order[1:]] = (np.diff(user[order]) == 0) & (np.diff(chosen[order]) == 0)
        keep = np.nonzero((chosen >= 0) & ~repeat)[0]
        keep = keep[np.lexsort((slot[keep], row[keep]))]
        row, slot, time, user, number, category, chosen = (
            a[keep] for a in (row, slot, time, user, number, category, chosen)
        )
        keys = (user, day, number, slot)
        first = np.searchsorted(row, row)  # rows are ascending: where the session begins
        position = np.arange(len(row)) - first + 1
        advertiser = ads.advertiser[chosen]
        hour = (time % DAY_US) // HOUR_US
        taste = uniform(self.seed, "surface", user)
        surface = (uniform(self.seed, "on", user, day, number) < taste).astype(np.int64)
        heat, turned = memory.heat(user, time, category)
        z = sessions.interests[row, category]
        logit = (
            -3.5 + 0.9 * z + 1.3 * heat + ads.quality[chosen]
            + np.where(surface == STORIES, 0.9 * (taste - 0.5) - 0.25, 0.0)
            + 0.25 * np.cos(2 * np.pi * (hour - 20) / 24) - 0.05 * (position - 1)
            - 0.45 * seen_before(user, advertiser, time)
        )  # fmt: skip
        buy = (
            -2.0 + 0.8 * normal(self.seed, "buyer", user) + 1.0 * np.maximum(heat, 0) + 1.6 * turned
        )
        p_click, p_buy = sigmoid(logit), sigmoid(buy)
        clicked = uniform(self.seed, "click", *keys) < p_click
        bought = clicked & (uniform(self.seed, "buy", *keys) < p_buy)
        dwell = 1 + 15 * uniform(self.seed, "dwell", *keys)
        click_time = time + (dwell * SECOND_US).astype(np.int64)
        # exponential of mean 3 h, cut at 23 h: nobody buys later than a day after the impression
        cut = 1 - np.exp(-23.0 / 3.0)
        hours = -3.0 * np.log1p(-cut * uniform(self.seed, "thinks", *keys))
        return Impressions(
            user, time, identifier(self.seed, "impression", *keys), ads.ad[chosen], category,
            advertiser, surface, hour, position, p_click, p_buy, clicked, bought, click_time,
            click_time + (hours * HOUR_US).astype(np.int64),
        )  # fmt: skip

    def days(self, days: Sequence[int]) -> list[tuple[Likes, Impressions]]:
        """Everything that happens on each of `days`: the same as if each were drawn alone, in less time."""
        needed = sorted({d - back for d in days for back in range(MEMORY_DAYS + 1)})
        sessions = {d: self.sessions(d) for d in needed}
        likes = {d: self.likes(d, sessions[d]) for d in needed}

        def known(day: int) -> Likes:
            parts = [likes[d] for d in range(day - MEMORY_DAYS, day + 1)]
            return Likes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

        return [(likes[d], self.impressions(d, sessions[d], known(d))) for d in days]


def seen_before(user: Array, advertiser: Array, time: Array) -> Array:
    """How many ads of this advertiser the person has seen earlier on the day, 4 at most."""
    order = np.lexsort((time, advertiser, user))
    group = np.empty(len(user), dtype=np.int64)
    group[order] = user[order] * ADVERTISERS + advertiser[order]
    sorted_groups = group[order]
    count = np.empty(len(user), dtype=np.int64)
    count[order] = np.arange(len(user)) - np.searchsorted(sorted_groups, sorted_groups)
    return np.minimum(count, 4)


class Memory:
    """What a person's likes of the last 7 days leave behind, for a click at a later moment."""

    def __init__(self, likes: Likes) -> None:
        order = np.lexsort((likes.category, likes.time, likes.user))
        self._all = _Last(likes.user[order], likes.time[order], likes.category[order])
        pair = likes.user * (CATEGORIES // 2) + likes.category // 2
        order = np.lexsort((likes.category, likes.time, pair))
        self._pairs = _Last(pair[order], likes.time[order], likes.category[order])

    def newest(self, user: Array, time: Array) -> Array:
        """Category of the newest like before `time`, -1 where there is none."""
        at = self._all.before(user, time)
        return np.where(at >= 0, self._all.category[at], -1)

    def heat(self, user: Array, time: Array, category: Array) -> tuple[Array, Array]:
        """How hot a person is for `category`, -1..1, and whether they turned to it from its rival.

        The newest like of the pair {category, its rival} decides: `+exp(-age / 96 h)` if it was the
        category, `-exp(-age / 96 h)` if it was the rival, 0 without one. Turned: the newest was the
        category and the one before it the rival.
        """
        last, pair = self._pairs, user * (CATEGORIES // 2) + category // 2
        at = last.before(pair, time)
        age_hours = (time - last.time[at]) / HOUR_US
        same = last.category[at] == category
        heat = np.where(at >= 0, np.where(same, 1.0, -1.0) * np.exp(-age_hours / CALM_HOURS), 0.0)
        previous = at - 1
        turned = (
            (at > 0) & same & (last.group[previous] == pair) & (last.category[previous] != category)
            & (time - last.time[previous] <= MEMORY_DAYS * DAY_US)
        )  # fmt: skip
        return heat, turned


class _Last:
    """Rows sorted by (group, time), asked for the last one of a group before a moment."""

    def __init__(self, group: Array, time: Array, category: Array) -> None:
        self.group, self.time, self.category = group, time, category
        self._groups, self._first = np.unique(group, return_index=True)
        self._base = int(time.min()) if len(time) else 0
        self._key = np.searchsorted(self._groups, group) * (1 << 40) + (time - self._base)

    def before(self, group: Array, time: Array) -> Array:
        """Row of the last one strictly before `time` and at most 7 days old, -1 where there is none."""
        if not len(self.group):
            return np.full(len(group), -1)
        code = np.minimum(np.searchsorted(self._groups, group), len(self._groups) - 1)
        at = np.searchsorted(self._key, code * (1 << 40) + (time - self._base), side="left") - 1
        ok = (at >= 0) & (self.group[at] == group)
        ok &= time - self.time[at] <= MEMORY_DAYS * DAY_US
        return np.where(ok, at, -1)
