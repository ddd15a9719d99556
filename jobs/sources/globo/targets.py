"""A day's clicks and sessions, and the three kinds of target that are scored on it.

Every rule that keeps out of one of the log's traps (docs/globo.md) is marked "Trap". All of it is
DataFrame code that gives the same rows on any engine: what is random is a hash.
"""

from __future__ import annotations

from datetime import timedelta
from functools import reduce
from typing import TYPE_CHECKING

from feature_store.days import HOUR_US, SECOND_US, micros
from jobs.sources.globo.files import SESSION_END_US

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

SCORED_USER_DAYS = 125
"""Of 1000 user-days (by hash of user and day), how many have their clicks and sessions scored.

A day has up to 318 k clicks and nine candidates each; one user-day in eight leaves about 250 k
candidates, which a laptop trains on in a minute. Whole user-days are kept, so that a row of
`examples` is a person's whole day. Histories, aggregates and item counts use every click.
"""

NEGATIVES = 4
POOL_CLICKS = 500  # `click`: negatives come from this many clicks before and after
MATCHED_POOL_CLICKS = 250  # `click_matched`: of those by the same referrer type
_DRAWS = 16  # tries for 4 different articles that the session does not have

TOPIC_IDS = 256
SECTION_IDS = 2048
MAX_POSITION = 20


def impressions(
    sessions: DataFrame, span: tuple[int, int], day: str, utc_offset: timedelta
) -> DataFrame:
    """Everything that is scored on `day`, with the hour of the local day at `as_of`."""
    from pyspark.sql import DataFrame
    from pyspark.sql import functions as F

    kinds = (make(sessions, span, day) for make in (candidates, positions, session_ends))
    local = F.pmod(F.col("as_of") + micros(utc_offset), F.lit(24 * HOUR_US))
    hour = F.floor(local / HOUR_US).cast("bigint")
    return reduce(DataFrame.unionByName, kinds).withColumn("hour", hour)


def sessions_of(lines: DataFrame) -> DataFrame:
    """One row per session: `user_id`, `session_id` and `clicks`, an array by (time, article).

    A repeated line counts once. Times become microseconds.
    """
    from pyspark.sql import functions as F

    click = F.struct(
        (F.col("click_timestamp") * 1000).alias("time"),
        F.col("click_article_id").alias("article_id"),
        F.col("click_referrer_type").alias("referrer"),
        F.col("click_deviceGroup").alias("device"),
        F.col("click_os").alias("os"),
        F.col("click_region").alias("region"),
        F.col("click_country").alias("country"),
        F.col("click_environment").alias("environment"),
    )
    return lines.groupBy("user_id", "session_id").agg(
        F.array_distinct(F.sort_array(F.collect_list(click))).alias("clicks")
    )


def _exploded(sessions: DataFrame) -> DataFrame:
    """One row per click: `index` from 0, the `click`, and its session's `clicks`."""
    from pyspark.sql import functions as F

    return sessions.select(
        "user_id", "session_id", "clicks", F.posexplode("clicks").alias("index", "click")
    )


def _within(time: Column, span: tuple[int, int]) -> Column:
    return (time >= span[0]) & (time < span[1])


def _scored(day: str) -> Column:
    from pyspark.sql import functions as F

    return (
        F.pmod(F.xxhash64(F.lit(f"scored {day}"), F.col("user_id")), F.lit(1000)) < SCORED_USER_DAYS
    )


def _block(article: Column, ids: int) -> Column:
    from pyspark.sql import functions as F

    return F.floor(article / ids).cast("bigint")


def _position(index: Column) -> Column:
    from pyspark.sql import functions as F

    return F.least(index + 1, F.lit(MAX_POSITION)).cast("bigint")


def clicks(sessions: DataFrame, span: tuple[int, int]) -> DataFrame:
    """The clicks of the day."""
    from pyspark.sql import functions as F

    click = F.col("click")
    return (
        _exploded(sessions)
        .where(_within(click.time, span))
        .select(
            F.xxhash64(F.lit("click"), "session_id", click.time, click.article_id).alias(
                "event_id"
            ),
            "user_id",
            click.time.alias("event_time"),
            click.article_id.alias("article_id"),
            _block(click.article_id, TOPIC_IDS).alias("topic"),
            _block(click.article_id, SECTION_IDS).alias("section"),
            click.referrer.alias("referrer"),
            _position(F.col("index")).alias("session_position"),
            *(click[c].alias(c) for c in ("device", "os", "region", "country", "environment")),
        )
    )


def ended_sessions(sessions: DataFrame, span: tuple[int, int]) -> DataFrame:
    """The sessions whose final click was 30 minutes ago at some moment of the day.

    `event_time` is that click; the stream's delay makes the event available 30 minutes later.
    """
    from pyspark.sql import functions as F

    first, last = F.element_at("clicks", 1), F.element_at("clicks", -1)
    return sessions.where(_within(last.time + SESSION_END_US, span)).select(
        F.xxhash64(F.lit("session"), "session_id").alias("event_id"),
        "user_id",
        last.time.alias("event_time"),
        F.size("clicks").cast("float").alias("session_clicks"),
        ((last.time - first.time) / (60 * SECOND_US)).cast("float").alias("session_minutes"),
        first.referrer.alias("referrer"),
    )


def session_ends(sessions: DataFrame, span: tuple[int, int], day: str) -> DataFrame:
    """Targets of `return_24h`: 30 minutes (and 1 us) after a session's final click."""
    from pyspark.sql import functions as F

    last = F.element_at("clicks", -1)
    as_of = last.time + SESSION_END_US + 1  # + 1: the session's own event is known by then
    return sessions.where(_within(as_of, span) & _scored(day)).select(
        F.xxhash64(F.lit("session_end"), "session_id").alias("target_id"),
        F.lit("session_end").alias("target"),
        "user_id",
        as_of.alias("time"),
        as_of.alias("as_of"),
        *(F.lit(None).cast("bigint").alias(c) for c in ("item_id", "topic", "section")),
        *(last[c].alias(c) for c in ("device", "os", "region")),
        _position(F.size("clicks") - 1).alias("session_position"),
        *(F.lit(None).cast("int").alias(c) for c in ("click", "click_matched", "continue")),
    )


def positions(sessions: DataFrame, span: tuple[int, int], day: str) -> DataFrame:
    """Targets of `continue`: the second and later clicks of a session, asked at the one before.

    Trap: a session's final click is made up, 30.000 s after the one before it and with its
    referrer, so nothing of the current click may be seen but its article and its position: even
    `time` is the click before (+ 1 us), and device, os and region are of that click. A click
    whose predecessor lies on another day is not scored. A session goes on if its next click comes
    by the end of the day after, when the answer is final.
    """
    from pyspark.sql import functions as F

    day_us = span[1] - span[0]
    index = F.col("index")
    before = F.get("clicks", index - 1)
    after = F.get("clicks", index + 1)
    click = F.col("click")
    as_of = before.time + 1
    return (
        _exploded(sessions)
        .where((index >= 1) & _scored(day))
        .where(_within(before.time, span) & _within(click.time, span))
        .select(
            F.xxhash64(F.lit("position"), "session_id", "index").alias("target_id"),
            F.lit("position").alias("target"),
            "user_id",
            as_of.alias("time"),
            as_of.alias("as_of"),
            click.article_id.alias("item_id"),
            *(before[c].alias(c) for c in ("device", "os", "region")),
            _position(index).alias("session_position"),
            _block(click.article_id, TOPIC_IDS).alias("topic"),
            _block(click.article_id, SECTION_IDS).alias("section"),
            *(F.lit(None).cast("int").alias(c) for c in ("click", "click_matched")),
            F.coalesce(after.time < span[1] + day_us, F.lit(False)).cast("int").alias("continue"),
        )
    )


def candidates(sessions: DataFrame, span: tuple[int, int], day: str) -> DataFrame:
    """Targets of `click` and `click_matched`: the article clicked and sampled ones.

    A click at `t` gets up to 4 articles drawn from the 500 clicks before and the 500 after it on
    the day (`click`), and up to 4 from the 250 and 250 of its own referrer type
    (`click_matched`): clicks of other people, on articles that its session does not have. An
    article drawn by both is one target with both labels; otherwise the other task's label is null.
    Draws are by hash, the same on any engine.

    Trap: the referrer tells the clicked article from articles drawn without regard to it, so it is
    not in the context; all the candidates of a click share their whole context but the article's.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    click, index = F.col("click"), F.col("index")
    day_clicks = _exploded(sessions).where(_within(click.time, span))
    keys = ("user_id", "session_id", "index")
    slim = day_clicks.select(
        *keys,
        click.time.alias("time"),
        click.article_id.alias("article_id"),
        click.referrer.alias("pool"),
    )

    def ranked(clicks_of_pools: DataFrame, pool_clicks: int) -> DataFrame:
        """Each click's `rank` in its `pool` in order of time, and between which ranks it draws."""
        ordered = Window.partitionBy("pool").orderBy("time", "session_id", "index")
        rank, size = (
            F.row_number().over(ordered),
            F.count(F.lit(1)).over(Window.partitionBy("pool")),
        )
        return clicks_of_pools.select("*", rank.alias("rank"), size.alias("size")).select(
            *(*keys, "time", "article_id", "pool", "rank"),
            F.greatest(F.col("rank") - pool_clicks, F.lit(1)).alias("lowest"),
            F.least(F.col("rank") + pool_clicks, F.col("size")).alias("highest"),
        )

    # one pool of everybody's clicks, and one for each referrer type (0 or more)
    everybody = slim.withColumn("pool", F.lit(-1).cast("bigint"))
    pools = ranked(everybody, POOL_CLICKS).unionByName(ranked(slim, MATCHED_POOL_CLICKS))
    matched = F.col("pool") >= 0
    random = F.xxhash64(
        F.lit("draw"), "session_id", "time", "article_id", matched.cast("int"), "draw"
    )
    draws = (
        pools.where(_scored(day))
        .select("*", F.explode(F.sequence(F.lit(1), F.lit(_DRAWS))).alias("draw"))
        .withColumn(
            "rank", F.col("lowest") + F.pmod(random, F.col("highest") - F.col("lowest") + 1)
        )
        .select(*keys, "pool", "draw", F.col("rank").cast("int").alias("rank"))
    )
    others = pools.select(
        "pool", "rank", F.col("user_id").alias("other"), F.col("article_id").alias("drawn")
    )
    drawn = F.struct("draw", "drawn")
    of_click = (
        draws.join(others, ["pool", "rank"])
        .where(F.col("other") != F.col("user_id"))
        .groupBy("session_id", "index", "pool", "drawn")
        .agg(F.min("draw").alias("draw"))
        .groupBy("session_id", "index")
        .agg(
            F.sort_array(F.collect_list(F.when(~matched, drawn))).alias("any"),
            F.sort_array(F.collect_list(F.when(matched, drawn))).alias("matched"),
        )
    )

    def first_four(draws_: str) -> Column:
        """The first 4 articles of the draws that the session does not have."""
        new = F.filter(draws_, lambda d: ~F.array_contains(F.col("articles"), d.drawn))
        first = F.transform(F.slice(new, 1, NEGATIVES), lambda d: d.drawn)
        return F.coalesce(first, F.array().cast("array<bigint>"))

    own, item = click.article_id, F.col("item_id")

    def label(negatives: str) -> Column:
        given = F.when(item == own, 1).when(F.array_contains(negatives, item), 0)
        return given.cast("int")

    articles = F.transform("clicks", lambda c: c.article_id).alias("articles")
    scored = (
        sessions.where(_scored(day))
        .select("user_id", "session_id", articles, F.posexplode("clicks").alias("index", "click"))
        .where(_within(click.time, span))
        .join(of_click, ["session_id", "index"], "left")
    )
    return (
        scored.select(
            *keys, "click", first_four("any").alias("any"), first_four("matched").alias("matched")
        )
        .select(
            "*", F.explode(F.concat(F.array(own), F.array_union("any", "matched"))).alias("item_id")
        )
        .select(
            F.xxhash64(F.lit("candidate"), "session_id", click.time, own, item).alias("target_id"),
            F.lit("candidate").alias("target"),
            "user_id",
            click.time.alias("time"),
            click.time.alias("as_of"),
            "item_id",
            *(click[c].alias(c) for c in ("device", "os", "region")),
            _position(index).alias("session_position"),
            _block(item, TOPIC_IDS).alias("topic"),
            _block(item, SECTION_IDS).alias("section"),
            label("any").alias("click"),
            label("matched").alias("click_matched"),
            F.lit(None).cast("int").alias("continue"),
        )
    )
