"""The simulated ads world as a source: what became available on a day, and each impression's truth.

SOURCE may describe another world than the default one: `SOURCE=users=500,seed=3`; see `World`.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from feature_store.days import DAY_US, HOUR_US, start_us
from feature_store.spec import Dataset
from jobs.sources import SourceDay
from jobs.sources.simulated_draws import draw, identifier, normal, uniform
from jobs.sources.simulated_world import COUNTRIES, Impressions, Likes, World

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

NEEDS_SOURCE = False
CLICK, CONVERSION = "click", "conversion"


def read(spark: SparkSession, source: str | None, day: str, dataset: Dataset) -> SourceDay:
    """The day, in memory.

    Raises:
        DataError: `source` describes no world.
    """
    # the command line takes SOURCE for a folder and makes an absolute path of it
    world = World.parse(PurePath(source).name if source else None)
    events, impressions, truth = tables(world, day, dataset)
    return SourceDay(
        events=events,
        impressions=impressions,
        truth=truth,
        notes={"simulated_users": world.users, "seed": world.seed},
    )


def tables(
    world: World, day: str, dataset: Dataset
) -> tuple[dict[str, pa.Table], pa.Table, pa.Table]:
    """Events by stream that became available on `day`, its impressions, and their truth.

    An event reaches the log within a day, so `day` and the day before are drawn, and nothing else.
    """
    start = start_us(day, dataset.utc_offset)
    number = start // DAY_US
    before, today = world.days([number - 1, number])
    parts = [_events(world, *drawn) for drawn in (before, today)]
    events = {}
    for stream in dataset.streams:
        both = pa.concat_tables([part[stream.name] for part in parts])
        available = np.maximum(both["event_time"].to_numpy(), both["ingest_time"].to_numpy())
        events[stream.name] = both.filter(
            pa.array((available >= start) & (available < start + DAY_US))
        )
    shown = today[1]
    impressions = pa.table(
        {
            "target_id": shown.target_id,
            "user_id": world.user_id(shown.user),
            "time": shown.time,
            "item_id": shown.ad,
            "surface": shown.surface,
            "hour": shown.hour,
            "position": shown.position,
            "category": shown.category,
            "advertiser": shown.advertiser,
            "clicked": shown.clicked.astype(np.int32),
        }
    )
    return events, impressions, truth_of(shown)


def truth_of(shown: Impressions) -> pa.Table:
    """The probability that each label was drawn with: `target_id`, `task`, `probability`.

    A conversion needs a click first, and its truth is known before it: P(click) P(buy | click). Both
    depend on the past alone, through likes and impressions that no click changes, and a purchase
    that comes always comes within the label's 24 hours: no predictor does better in expectation.
    """
    return pa.table(
        {
            "target_id": np.concatenate([shown.target_id, shown.target_id]),
            "task": [CLICK] * len(shown.time) + [CONVERSION] * len(shown.time),
            "probability": np.concatenate([shown.p_click, shown.p_click * shown.p_buy]),
        }
    )


def _events(world: World, likes: Likes, shown: Impressions) -> dict[str, pa.Table]:
    """Everything that happened on one day, by stream, with the time at which the log had it."""
    seed = world.seed
    clicked, bought = np.nonzero(shown.clicked)[0], np.nonzero(shown.bought)[0]
    country = (uniform(seed, "country", shown.user) ** 2 * COUNTRIES).astype(np.int64)
    # people pay for what an advertiser sells; what one of its ads costs varies a little
    sold, of = shown.ad[bought], shown.advertiser[bought]
    price = np.exp(3 + 0.7 * normal(seed, "price", of) + 0.2 * normal(seed, "offer", sold))

    def ad(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "ad": shown.ad[rows],
            "category": shown.category[rows],
            "advertiser": shown.advertiser[rows],
        }

    every = np.arange(len(shown.time))
    return {
        "page_likes": _logged(
            world, "page_likes", likes.user, likes.time,
            {"page": likes.page, "category": likes.category},
        ),
        "ad_impressions": _logged(
            world, "ad_impressions", shown.user, shown.time,
            {"event_id": identifier(seed, "seen", shown.target_id), **ad(every),
             "surface": shown.surface, "country": country},
        ),
        "ad_clicks": _logged(
            world, "ad_clicks", shown.user[clicked], shown.click_time[clicked], ad(clicked)
        ),
        "purchases": _logged(
            world, "purchases", shown.user[bought], shown.buy_time[bought],
            {**ad(bought), "price": price.astype(np.float32)}, sure=True,
        ),
    }  # fmt: skip


def _logged(
    world: World,
    stream: str,
    user: np.ndarray,
    time: np.ndarray,
    attributes: dict[str, np.ndarray],
    *,
    sure: bool = False,
) -> pa.Table:
    """Rows as a log would have them: some come late, some twice. `sure`: a log that is exact (payments)."""
    late = uniform(world.seed, f"{stream}/late", user, time) < (0 if sure else world.late_share)
    # exponential of mean 5 h, cut at 20 h
    cut = 1 - np.exp(-4.0)
    hours = -5.0 * np.log1p(-cut * uniform(world.seed, f"{stream}/hours", user, time))
    ingest = time + np.where(late, hours * HOUR_US, 0).astype(np.int64)
    rows = pa.table(
        {"user_id": world.user_id(user), "event_time": time, "ingest_time": ingest, **attributes}
    )
    twice = draw(world.seed, f"{stream}/twice", user, time) % np.uint64(10**6)
    copies = np.nonzero(twice < (0 if sure else world.duplicate_share * 10**6))[0]
    return pa.concat_tables([rows, rows.take(pa.array(copies))]) if len(copies) else rows
