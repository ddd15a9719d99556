"""Days and instants. A day is a `YYYY-MM-DD` string in the dataset's zone; an instant is UTC int64 microseconds."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

from feature_store.errors import DataError

SECOND_US = 1_000_000
HOUR_US = 3600 * SECOND_US
DAY_US = 24 * HOUR_US


def parse_day(day: str) -> date:
    """The date that `day` names.

    Raises:
        DataError: `day` is not `YYYY-MM-DD` (a run without a partition key arrives as "None").
    """
    try:
        parsed = datetime.strptime(day, "%Y-%m-%d").date()
    except (TypeError, ValueError):
        parsed = None
    if parsed is None or parsed.isoformat() != day:
        raise DataError(
            f"day is {day!r}, expected YYYY-MM-DD: start the run with a partition key, or pass --ds"
        )
    return parsed


def add_days(day: str, days: int) -> str:
    """The day that is `days` after `day` (before it where negative)."""
    return (parse_day(day) + timedelta(days=days)).isoformat()


def day_range(first: str, last: str) -> list[str]:
    """Every day from `first` to `last`, both included, ascending; empty where `last` is before `first`."""
    count = (parse_day(last) - parse_day(first)).days + 1
    return [add_days(first, i) for i in range(count)]


def start_us(day: str, utc_offset: timedelta) -> int:
    """The first instant of `day` in a zone `utc_offset` ahead of UTC, in UTC microseconds."""
    midnight = datetime.combine(parse_day(day), datetime.min.time(), tzinfo=UTC)
    return int(midnight.timestamp()) * SECOND_US - utc_offset // timedelta(microseconds=1)


def end_us(day: str, utc_offset: timedelta) -> int:
    """The first instant after `day`, in UTC microseconds."""
    return start_us(day, utc_offset) + DAY_US


def day_of(instant_us: int, utc_offset: timedelta) -> str:
    """The day that holds `instant_us`."""
    local = instant_us // SECOND_US + utc_offset // timedelta(seconds=1)
    return datetime.fromtimestamp(local, tz=UTC).date().isoformat()


def micros(span: timedelta) -> int:
    """`span` in microseconds."""
    return span // timedelta(microseconds=1)
