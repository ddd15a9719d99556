"""Globo.com news clicks: hourly CSV files, gzipped or not, to clicks, sessions and what is scored.

`files.py` finds and checks the lines of a day, `targets.py` makes of them what happened and what is
scored. docs/globo.md says what the tasks are and which traps the log holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from feature_store.days import end_us, start_us
from feature_store.spec import Dataset
from jobs.settings import Settings
from jobs.sources import SourceDay
from jobs.sources.globo import files, targets

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

NEEDS_SOURCE = True


def read(spark: SparkSession, source: str | None, day: str, dataset: Dataset) -> SourceDay:
    """Clicks and sessions that became available on `day`, and what was scored on it.

    Args:
        source: folder of the hourly files.

    Raises:
        DataError: no such folder or files, a file that is unreadable or not of the format, or a
            day outside of what the files hold.
    """
    folder = files.folder_of(source)
    cache = Path(Settings.from_env().home) / "cache" / "globo"
    index = files.index_files(folder, cache, dataset.utc_offset)
    chosen = files.files_of_day(index, day, folder)
    span = (start_us(day, dataset.utc_offset), end_us(day, dataset.utc_offset))
    lines = spark.read.parquet(str(files.stage(folder, chosen, day, span, cache)))
    sessions = targets.sessions_of(lines)
    return SourceDay(
        events={
            "clicks": targets.clicks(sessions, span),
            "sessions": targets.ended_sessions(sessions, span),
        },
        impressions=targets.impressions(sessions, span, day, dataset.utc_offset),
        notes={
            "hour_files": len(chosen),
            "hour_files_missing": files.missing_hours(index, day, dataset.first_day),
            "duplicate_lines": sum(f.duplicates for f in chosen),
            "cut_sessions": sum(f.cut_sessions for f in chosen),
            "scored_user_days_per_1000": targets.SCORED_USER_DAYS,
        },
    )
