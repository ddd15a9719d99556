"""Which hourly files hold a day, whether they can be trusted, and their lines of that day.

`clicks_hour_NNN.csv[.gz]` holds the whole of each session that *started* in hour NNN, so a day's
clicks lie in its own files and, thinly, in those of any day before (0.25 % come more than a day
after their session began, the last ones after four weeks). Every file is therefore read once,
checked, and remembered with the days that its clicks fall on (`index_files`); a day then reads all
the files that hold a click of it and no others (`stage`), and loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from feature_store.days import SECOND_US, add_days, parse_day
from feature_store.errors import DataError

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
SESSION_END_US = 30 * 60 * SECOND_US  # a session has ended this long after its final click

_FILE = re.compile(r"clicks_hour_(\d+)\.csv(\.gz)?")
_MS_RANGE = (1_262_304_000_000, 2_051_222_400_000)  # 2010 to 2035: outside, the unit is not ms
_VERSION = 1  # of what is cached


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


def folder_of(source: str | None) -> Path:
    """The folder that SOURCE names.

    Raises:
        DataError: it names none.
    """
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
    kept = cache / f"index_{_hash(folder, utc_offset)}.json"
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


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr((_VERSION, *map(str, parts))).encode()).hexdigest()[:16]


def _known_files(kept: Path) -> dict[str, HourFile]:
    try:
        return {f["name"]: HourFile(**f) for f in json.loads(kept.read_text())}
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # absent or not ours: the files are read again


def _lines(path: Path) -> pa.Table:
    """All lines of one file, int64 columns, refusing what the jobs could not stand on."""
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
    for name in COLUMNS if len(table) else ():
        column = table[name]
        if column.null_count:
            raise DataError(f"{path}: {name} is empty in {column.null_count} lines: mend the file")
        lowest, highest = pc.min(column).as_py(), pc.max(column).as_py()
        if lowest < 0:
            raise DataError(f"{path}: {name} has {lowest}, expected 0 or more: mend the file")
        if name == "click_timestamp" and not _MS_RANGE[0] <= lowest <= highest < _MS_RANGE[1]:
            worst = highest if lowest >= _MS_RANGE[0] else lowest
            raise DataError(f"{path}: {name} has {worst}, not milliseconds since 1970: convert it")
    return table


def _examine(path: Path, stat: os.stat_result, utc_offset: timedelta) -> HourFile:
    table = _lines(path)
    different = table.group_by(["session_id", "click_article_id", "click_timestamp"]).aggregate([])
    sizes = table.group_by("session_id").aggregate([("session_size", "max"), ([], "count_all")])
    cut = pc.sum(pc.not_equal(sizes["session_size_max"], sizes["count_all"])).as_py() or 0
    return HourFile(
        name=path.name,
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        rows=len(table),
        duplicates=len(table) - len(different),
        cut_sessions=cut,
        days=_clicks_by_day(table["click_timestamp"].to_numpy(), utc_offset),
    )


def _clicks_by_day(times_ms: np.ndarray, utc_offset: timedelta) -> dict[str, int]:
    local_ms = times_ms + utc_offset // timedelta(milliseconds=1)
    day_ms = 24 * 3600 * 1000
    days, counts = np.unique(local_ms // day_ms, return_counts=True)
    by_day = {int(d): int(n) for d, n in zip(days, counts, strict=True)}
    # a session whose final click comes just before midnight ends, and is scored, on the next day
    for ends in np.unique((local_ms + SESSION_END_US // 1000) // day_ms):
        by_day.setdefault(int(ends), 0)
    return {add_days("1970-01-01", d): n for d, n in sorted(by_day.items())}


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


def missing_hours(files: list[HourFile], day: str, first_day: str) -> int:
    """How many of the hourly files of `day` are not there, though files of later hours are."""
    first = 24 * (parse_day(day) - parse_day(first_day)).days
    there = {f.hour for f in files}
    return len([h for h in range(first, first + 24) if h not in there and h < max(there)])


def stage(
    folder: Path, files: list[HourFile], day: str, span: tuple[int, int], cache: Path
) -> Path:
    """A Parquet file of the lines that `day` needs: of the sessions that click, or end, on it.

    It stays in `cache`, named by its inputs, so that the queries of a day, and a second run of it,
    parse no text again. The workers of a Spark cluster have to reach it, like the lake.

    Args:
        files: as `files_of_day` gives them; read one at a time.
        span: the day's first instant and the first one after it, UTC microseconds.
    """
    staged = cache / f"{day}_{_hash(folder, span, [asdict(f) for f in files])}.parquet"
    if staged.exists():
        return staged
    first_ms, after_ms = (span[0] - SESSION_END_US) // 1000, span[1] // 1000
    schema = pa.schema([(c, pa.int64()) for c in COLUMNS])
    cache.mkdir(parents=True, exist_ok=True)
    temporary = staged.with_suffix(f".{os.getpid()}")
    with pq.ParquetWriter(temporary, schema) as writer:
        for file in files:
            table = _lines(folder / file.name)
            times = table["click_timestamp"]
            touched = pc.and_(pc.greater_equal(times, first_ms), pc.less(times, after_ms))
            sessions = table.filter(touched)["session_id"].unique()
            writer.write_table(table.filter(pc.is_in(table["session_id"], sessions)))
    temporary.replace(staged)
    return staged
