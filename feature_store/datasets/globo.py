"""Globo.com news clicks, 1-16 October 2017, as distributed: hourly CSV files.

`jobs/sources/globo.py` reads them; docs/globo.md explains the tasks and the traps in the data.
Nothing was shown to people in this log as far as it tells: the candidates that were not clicked are
sampled, and so are the metrics of the tasks that use them.
"""

from __future__ import annotations

from datetime import timedelta

from feature_store.spec import (
    Aggregate,
    Attribute,
    CoOccurrence,
    Dataset,
    DenseFeature,
    EventLabel,
    EventStream,
    GivenLabel,
    ItemFeatures,
    Kind,
    SparseFeature,
    Target,
    Task,
    UserAttribute,
)

ARTICLE = Attribute(name="article_id", vocabulary="item")
# Article ids are ordered by category, which the log does not give: blocks of ids stand in for it.
TOPIC = Attribute(name="topic")  # article_id div 256
SECTION = Attribute(name="section")  # article_id div 2048
DEVICE = Attribute(name="device")
OS = Attribute(name="os")
REGION = Attribute(name="region")
REFERRER = Attribute(name="referrer")
POSITION = Attribute(name="session_position")  # of the click in its session, from 1, capped
HOUR = Attribute(name="hour")  # of the local day, at as_of

_WINDOWS_DAYS = (1, 3, 7, 14)
_CLICKS_BY = (("topic", 64), ("section", 32), ("referrer", 8), ("region", 8))


def _sparse() -> tuple[SparseFeature, ...]:
    counted = [
        SparseFeature(
            name=f"clicked_{attribute}s_{days}d",
            stream="clicks",
            attribute=attribute,
            window_days=days,
            max_ids=max_ids,
            scored=True,
        )
        for attribute, max_ids in _CLICKS_BY
        for days in (3, 14)
    ]
    articles = SparseFeature(
        name="clicked_articles_7d",
        stream="clicks",
        attribute="article_id",
        window_days=7,
        max_ids=64,
    )
    return (articles, *counted)


def _dense() -> tuple[DenseFeature, ...]:
    longest = max(_WINDOWS_DAYS)
    features: list[DenseFeature] = []
    for days in _WINDOWS_DAYS:
        for stream in ("clicks", "sessions"):
            features.append(
                DenseFeature(
                    name=f"{stream}_{days}d",
                    stream=stream,
                    aggregate=Aggregate.COUNT,
                    window_days=days,
                )
            )
        features.append(
            DenseFeature(
                name=f"clicks_per_session_{days}d",
                stream="clicks",
                aggregate=Aggregate.RATE,
                window_days=days,
                per="sessions",
            )
        )
        features.append(
            DenseFeature(
                name=f"session_minutes_{days}d",
                stream="sessions",
                aggregate=Aggregate.SUM,
                window_days=days,
                attribute="session_minutes",
            )
        )
    features += [
        DenseFeature(
            name=f"hours_since_{what}",
            stream=stream,
            aggregate=Aggregate.RECENCY,
            window_days=longest,
        )
        for what, stream in (("click", "clicks"), ("session", "sessions"))
    ]
    return tuple(features)


DATASET = Dataset(
    name="globo",
    description=(
        "Clicks on Globo.com news articles, 1-16 October 2017. There is no log of what was shown: "
        "`click` and `click_matched` compare a click with sampled articles."
    ),
    first_day="2017-10-01",
    utc_offset=timedelta(hours=-3),
    streams=(
        EventStream(
            name="clicks",
            attributes=(
                ARTICLE,
                TOPIC,
                SECTION,
                REFERRER,
                POSITION,
                DEVICE,
                OS,
                REGION,
                Attribute(name="country"),
                Attribute(name="environment"),
            ),
            max_events=64,
        ),
        EventStream(
            name="sessions",
            attributes=(
                Attribute(name="session_clicks", kind=Kind.NUMERIC),
                Attribute(name="session_minutes", kind=Kind.NUMERIC),
                REFERRER,  # of its first click
            ),
            max_events=32,
            delay=timedelta(minutes=30),  # event_time is its final click
        ),
    ),
    targets=(
        Target(name="candidate", context=(DEVICE, OS, REGION, HOUR, POSITION, TOPIC, SECTION)),
        Target(name="position", context=(DEVICE, OS, REGION, HOUR, POSITION, TOPIC, SECTION)),
        Target(name="session_end", context=(DEVICE, OS, REGION, HOUR, POSITION), has_item=False),
    ),
    tasks=(
        Task(
            name="click",
            label=GivenLabel(column="click"),
            targets=("candidate",),
            sampled=True,
            description=(
                "The article clicked against 4 sampled from what other people clicked at about "
                "the same time (within 500 clicks)."
            ),
        ),
        Task(
            name="click_matched",
            label=GivenLabel(column="click_matched"),
            targets=("candidate",),
            sampled=True,
            description=(
                "As click, the 4 sampled from the clicks (within 250) that came by the same "
                "referrer type."
            ),
        ),
        Task(
            name="continue",
            label=GivenLabel(column="continue"),
            targets=("position",),
            matures_after=1,
            description="Another click follows this one in its session, asked at the click before.",
        ),
        Task(
            name="return_24h",
            label=EventLabel(stream="clicks", within=timedelta(hours=24)),
            targets=("session_end",),
            matures_after=1,
            description="Any click within 24 hours, asked 30 minutes after a session's final click.",
        ),
    ),
    user_attributes=tuple(
        UserAttribute(name=name, stream="clicks", attribute=name)
        for name in ("device", "os", "region", "country", "environment")
    ),
    sparse_features=_sparse(),
    dense_features=_dense(),
    item_features=ItemFeatures(
        streams=(("clicks", "article_id"),),
        windows_hours=(1, 3, 6, 24, 72),
        co_occurrence=CoOccurrence(
            stream="clicks",
            attribute="article_id",
            beside=("region", "os", "device", "session_position"),
            before=("article_id",),
        ),
        ordered_ids=True,
    ),
    domain="device",
    serve_delay=timedelta(hours=1),
    held_out_share=0.1,
)
