"""Globo.com news clicks: hourly CSV files, gzipped or not, to clicks, sessions and what is scored.

`clicks_hour_NNN.csv[.gz]` holds the whole of each session that *started* in hour NNN, so a day's
clicks lie in its own files and, thinly, in those of any day before (0.25 % come more than a day
after their session began, the last ones after four weeks). Every file is therefore read once,
checked, and remembered with the days that its clicks fall on (`index_files`); a day then reads all
the files that hold a click of it and no others, and loses nothing.

docs/globo.md says what the tasks are and which traps the log holds; each rule below that keeps out
of one is marked "Trap".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store.days import HOUR_US, SECOND_US, end_us, micros, parse_day, shift, start_us
from feature_store.errors import DataError
from feature_store.spec import Dataset
from jobs.sources import SourceDay

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

NEEDS_SOURCE = True

COLUMNS = (
    "user_id",
    "session_id",
    "session_start",
    "session_size",
    "click_article_id",
    "click_timestamp",
    "click_environment",
    "click_deviceGroup",
    "click_os",
    "click_country",
    "click_region",
    "click_referrer_type",
)

SCORED_USER_DAYS = 125
"""Of 1000 user-days (by hash of user and day), how many have their clicks and sessions scored.

A day has up to 300 k clicks and nine candidates each; one user-day in eight leaves about 250 k
candidates, which a laptop trains on in seconds. Whole user-days are kept, so that a row of
`examples` is a person's whole day. Histories, aggregates and item counts use every click.
"""

NEGATIVES = 4
POOL_CLICKS = 500  # `click`: negatives come from this many clicks before and after
MATCHED_POOL_CLICKS = 250  # `click_matched`: of those by the same referrer type
_DRAWS = 24  # tries for 4 different articles that nobody of the session clicked

TOPIC_IDS = 256
SECTION_IDS = 2048
MAX_POSITION = 20
SESSION_END_US = 30 * 60 * SECOND_US

_FILE = re.compile(r"clicks_hour_(\d+)\.csv(\.gz)?")
_MS_RANGE = (1_262_304_000_000, 2_051_222_400_000)  # 2010 to 2035: outside, the unit is not ms
_INDEX_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class HourFile:
    """What is remembered of one hourly file.

    Args:
        name: file name; size and mtime_ns: the file has to be read again when they change.
        rows: lines below the header.
        duplicates: lines that repeat a click of the same session.
        cut_sessions: sessions with fewer or more clicks than their `session_size`.
        days: day -> number of clicks in it, a session also counting on the day it ends.
    """

    name: str
    size: int
    mtime_ns: int
    rows: int
    duplicates: int
    cut_sessions: int
    days: dict[str, int]

    @property
    def hour(self) -> int:
        """Hours since the first day began."""
        match = _FILE.fullmatch(self.name)
        assert match is not None
        return int(match.group(1))


def read(spark: SparkSession, source: str | None, day: str, dataset: Dataset) -> SourceDay:
    """Clicks and sessions that became available on `day`, and what was scored on it.

    Args:
        source: folder of the hourly files, readable here and by the Spark workers.

    Raises:
        DataError: no such folder or files, a file that is unreadable or not of the format, or a
            day outside of what the files hold.
    """
    from jobs.settings import Settings

    folder = _folder(source)
    files = index_files(folder, Path(Settings.from_env().home) / "cache", dataset.utc_offset)
    chosen = files_of_day(files, day, folder)
    sessions = sessions_of(read_files(spark, folder, chosen))
    span = (start_us(day, dataset.utc_offset), end_us(day, dataset.utc_offset))
    impressions = candidates(sessions, span, day)
    for more in (positions(sessions, span, day), session_ends(sessions, span, day)):
        impressions = impressions.unionByName(more, allowMissingColumns=True)
    return SourceDay(
        events={"clicks": clicks(sessions, span), "sessions": ended_sessions(sessions, span)},
        impressions=_with_hour(impressions, dataset.utc_offset),
        notes={
            "hour_files": len(chosen),
            "hour_files_missing": missing_hours(files, day, dataset),
            "duplicate_lines": sum(f.duplicates for f in chosen),
            "cut_sessions": sum(f.cut_sessions for f in chosen),
            "scored_user_days_per_1000": SCORED_USER_DAYS,
        },
    )


# --- the files ---------------------------------------------------------------------------------


def _folder(source: str | None) -> Path:
    if not source:
        raise DataError("SOURCE is not set: name the folder of the clicks_hour_NNN.csv[.gz] files")
    folder = Path(source).expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"SOURCE is {source!r}, not a folder: name the one of the hourly files")
    return folder


def index_files(folder: Path, cache: Path, utc_offset: timedelta) -> list[HourFile]:
    """Every hourly file of `folder`, by name, read and checked unless it is unchanged since.

    Args:
        cache: folder in which the index is kept between runs.

    Raises:
        DataError: there is no such file, or the one named is unreadable or not of the format.
    """
    paths = sorted(p for p in folder.iterdir() if _FILE.fullmatch(p.name))
    if not paths:
        raise DataError(
            f"SOURCE is {str(folder)!r}: it has no clicks_hour_NNN.csv or .csv.gz; name the folder "
            "that has them"
        )
    hours: dict[str, str] = {}
    for path in paths:
        hour = path.name.split(".")[0]
        if hour in hours:
            raise DataError(f"{folder} has {hours[hour]} and {path.name}: remove one of the two")
        hours[hour] = path.name
    key = hashlib.sha256(f"{_INDEX_VERSION} {folder} {utc_offset}".encode()).hexdigest()[:16]
    kept = cache / f"globo_files_{key}.json"
    known = _known_files(kept)
    files = []
    for path in paths:
        stat = path.stat()
        old = known.get(path.name)
        if old is None or (old.size, old.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            old = _examine(path, stat, utc_offset)
        files.append(old)
    if {f.name: f for f in files} != known:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps([asdict(f) for f in files]))
        temporary.replace(kept)  # whole or not at all: a day may be read by two processes at once
    return files


def _known_files(kept: Path) -> dict[str, HourFile]:
    try:
        return {f["name"]: HourFile(**f) for f in json.loads(kept.read_text())}
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # absent or not ours: the files are read again


def _examine(path: Path, stat: os.stat_result, utc_offset: timedelta) -> HourFile:
    """Reads one file to the end and refuses what the jobs could not stand on."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    types = csv.ConvertOptions(column_types={c: pa.int64() for c in COLUMNS})
    try:
        table = csv.read_csv(path, convert_options=types)
    except (OSError, EOFError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read ({reason}): fetch the file again") from error
    if tuple(table.column_names) != COLUMNS:
        raise DataError(
            f"{path} has the columns {', '.join(table.column_names)}, expected "
            f"{', '.join(COLUMNS)}: give the files as they are distributed"
        )
    for name in COLUMNS:
        column = table[name]
        if column.null_count:
            raise DataError(f"{path}: {name} is empty in {column.null_count} lines: mend the file")
        if len(table) and pc.min(column).as_py() < 0:
            raise DataError(f"{path}: {name} has {pc.min(column)}, expected 0 or more: mend the file")
    times = table["click_timestamp"]
    for worst in (pc.min(times).as_py(), pc.max(times).as_py()) if len(table) else ():
        if not _MS_RANGE[0] <= worst < _MS_RANGE[1]:
            raise DataError(
                f"{path}: click_timestamp has {worst}, not milliseconds since 1970: convert it"
            )
    clicks_ = table.group_by(["session_id", "click_article_id", "click_timestamp"]).aggregate([])
    sizes = table.group_by("session_id").aggregate([("session_size", "max"), ([], "count_all")])
    cut = pc.sum(pc.not_equal(sizes["session_size_max"], sizes["count_all"])).as_py() or 0
    return HourFile(
        name=path.name,
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        rows=len(table),
        duplicates=len(table) - len(clicks_),
        cut_sessions=cut,
        days=_clicks_by_day(times, utc_offset),
    )


def _clicks_by_day(times_ms: object, utc_offset: timedelta) -> dict[str, int]:
    import numpy as np

    local_ms = times_ms.to_numpy() + utc_offset // timedelta(milliseconds=1)  # type: ignore[attr-defined]
    day_ms = 24 * 3600 * 1000
    days, counts = np.unique(local_ms // day_ms, return_counts=True)
    by_day = {int(d): int(n) for d, n in zip(days, counts, strict=True)}
    # a session whose final click comes just before midnight ends, and is scored, on the next day
    for ends in np.unique((local_ms + SESSION_END_US // 1000) // day_ms):
        by_day.setdefault(int(ends), 0)
    return {shift("1970-01-01", d): n for d, n in sorted(by_day.items())}


def files_of_day(files: list[HourFile], day: str, folder: Path) -> list[HourFile]:
    """The files that hold a click of `day`, or a session that ends on it.

    Raises:
        DataError: `day` lies before the first or after the last click.
    """
    parse_day(day)
    days = sorted({d for f in files for d, n in f.days.items() if n})
    if not days or not days[0] <= day <= days[-1]:
        held = f"from {days[0]} to {days[-1]}" if days else "no clicks at all"
        raise DataError(f"day is {day}, but {folder} holds {held}: choose a day that it holds")
    return [f for f in files if day in f.days]


def missing_hours(files: list[HourFile], day: str, dataset: Dataset) -> int:
    """How many of the hourly files of `day` are not there, though files of later hours are."""
    first = 24 * (parse_day(day) - parse_day(dataset.first_day)).days
    there = {f.hour for f in files}
    return len([h for h in range(first, first + 24) if h not in there and h < max(there)])


def read_files(spark: SparkSession, folder: Path, files: list[HourFile]) -> DataFrame:
    """The lines of `files` as they are, every column int64. Empty where there are no files."""
    schema = ", ".join(f"`{c}` bigint" for c in COLUMNS)
    lines = spark.createDataFrame([], schema)
    for zipped in (True, False):  # engines tell compression by the extension, of one kind at a time
        paths = [str(folder / f.name) for f in files if f.name.endswith(".gz") == zipped]
        if paths:
            lines = lines.union(spark.read.schema(schema).option("header", True).csv(paths))
    return lines


# --- sessions, and what is read off them -------------------------------------------------------


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

    return F.pmod(F.xxhash64(F.lit(f"scored {day}"), F.col("user_id")), F.lit(1000)) < SCORED_USER_DAYS


def _block(article: Column, ids: int) -> Column:
    from pyspark.sql import functions as F

    return F.floor(article / ids).cast("bigint")


def _position(index: Column) -> Column:
    from pyspark.sql import functions as F

    return F.least(index + 1, F.lit(MAX_POSITION)).cast("bigint")


def _with_hour(impressions: DataFrame, utc_offset: timedelta) -> DataFrame:
    from pyspark.sql import functions as F

    local = F.col("as_of") + micros(utc_offset)
    hour = F.floor(F.pmod(local, F.lit(24 * HOUR_US)) / HOUR_US).cast("bigint")
    return impressions.withColumn("hour", hour)


def clicks(sessions: DataFrame, span: tuple[int, int]) -> DataFrame:
    """The clicks of the day."""
    from pyspark.sql import functions as F

    click = F.col("click")
    return (
        _exploded(sessions)
        .where(_within(click.time, span))
        .select(
            F.xxhash64(F.lit("click"), "session_id", click.time, click.article_id).alias("event_id"),
            "user_id",
            click.time.alias("event_time"),
            click.article_id.alias("article_id"),
            _block(click.article_id, TOPIC_IDS).alias("topic"),
            _block(click.article_id, SECTION_IDS).alias("section"),
            click.referrer.alias("referrer"),
            _position(F.col("index")).alias("position"),
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
        *(last[c].alias(c) for c in ("device", "os", "region")),
        _position(F.size("clicks") - 1).alias("position"),
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
            F.xxhash64(F.lit("position"), "session_id", click.time, click.article_id).alias("target_id"),
            F.lit("position").alias("target"),
            "user_id",
            as_of.alias("time"),
            as_of.alias("as_of"),
            click.article_id.alias("item_id"),
            *(before[c].alias(c) for c in ("device", "os", "region")),
            _position(index).alias("position"),
            _block(click.article_id, TOPIC_IDS).alias("topic"),
            _block(click.article_id, SECTION_IDS).alias("section"),
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
    order = ("time", "session_id", "index")
    day_clicks = (
        _exploded(sessions)
        .where(_within(click.time, span))
        .select("user_id", "session_id", "clicks", "index", "click", click.time.alias("time"))
    )

    def ranked(group: Column, pool_clicks: int) -> DataFrame:
        """The day's clicks with their `rank` in their `group` and how `far` a draw may go."""
        return day_clicks.withColumn("pool", group).select(
            "*",
            F.row_number().over(Window.partitionBy("pool").orderBy(*order)).alias("rank"),
            F.count(F.lit(1)).over(Window.partitionBy("pool")).alias("clicks_in_pool"),
            F.lit(pool_clicks).alias("far"),
        )

    # pool -1 is everybody's clicks, the others those of one referrer type (1 or more)
    pools = ranked(F.lit(-1).cast("bigint"), POOL_CLICKS).unionByName(
        ranked(click.referrer, MATCHED_POOL_CLICKS)
    )
    lowest = F.greatest(F.col("rank") - F.col("far"), F.lit(1))
    highest = F.least(F.col("rank") + F.col("far"), F.col("clicks_in_pool"))
    random = F.xxhash64(
        F.lit("draw"), "session_id", click.time, click.article_id, (F.col("pool") < 0).cast("int"), "draw"
    )
    draws = (
        pools.where(_scored(day))
        .select("*", F.explode(F.sequence(F.lit(1), F.lit(_DRAWS))).alias("draw"))
        .select(
            *("user_id", "session_id", "clicks", "index", "click", "pool", "draw"),
            (lowest + F.pmod(random, highest - lowest + 1)).cast("int").alias("rank"),
        )
    )
    others = pools.select(
        "pool", "rank", F.col("user_id").alias("other"), click.article_id.alias("drawn")
    )
    clicked = F.array_contains(F.transform("clicks", lambda c: c.article_id), F.col("drawn"))
    # A draw that is refused stays in the frame as null: a click with no negative is still a target.
    good = (F.col("other") != F.col("user_id")) & ~clicked
    drawn = F.when(good, F.struct("draw", "drawn"))

    def first_four(which: Column) -> Column:
        ordered = F.sort_array(F.collect_list(F.when(which, drawn)))
        articles = F.array_distinct(F.transform(ordered, lambda d: d.drawn))
        return F.slice(articles, 1, NEGATIVES)

    anchors = (
        draws.join(others, ["pool", "rank"])
        .groupBy("session_id", "index")
        .agg(
            F.first("user_id").alias("user_id"),
            F.first("click").alias("click"),
            first_four(F.col("pool") < 0).alias("any"),
            first_four(F.col("pool") >= 0).alias("matched"),
        )
    )
    own = click.article_id
    item = F.col("item_id")

    def label(negatives: str) -> Column:
        given = F.when(item == own, 1).when(F.array_contains(negatives, item), 0)
        return given.cast("int")

    return anchors.select(
        "*", F.explode(F.concat(F.array(own), F.array_union("any", "matched"))).alias("item_id")
    ).select(
        F.xxhash64(F.lit("candidate"), "session_id", click.time, own, item).alias("target_id"),
        F.lit("candidate").alias("target"),
        "user_id",
        click.time.alias("time"),
        click.time.alias("as_of"),
        "item_id",
        *(click[c].alias(c) for c in ("device", "os", "region")),
        _position(index).alias("position"),
        _block(item, TOPIC_IDS).alias("topic"),
        _block(item, SECTION_IDS).alias("section"),
        label("any").alias("click"),
        label("matched").alias("click_matched"),
    )
