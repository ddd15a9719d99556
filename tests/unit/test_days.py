"""Days are cut in the dataset's zone; instants are UTC microseconds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.days import (
    DAY_US,
    add_days,
    day_of,
    day_range,
    end_us,
    micros,
    parse_day,
    start_us,
)
from feature_store.errors import DataError

OFFSETS = st.integers(-14 * 4, 14 * 4).map(lambda quarters: timedelta(minutes=15 * quarters))


@pytest.mark.parametrize(
    "day", ["None", "", "2024-5-1", "20240501", "2024-02-30", "2024-05-01T00:00", None, 20240501]
)
def test_what_is_not_a_day_is_refused_with_the_remedy(day: object) -> None:
    with pytest.raises(DataError, match=r"expected YYYY-MM-DD: start the run with a partition key"):
        parse_day(day)  # type: ignore[arg-type]


def test_days_go_over_months_and_leap_days() -> None:
    assert add_days("2024-02-28", 1) == "2024-02-29"
    assert add_days("2024-03-01", -1) == "2024-02-29"
    assert day_range("2023-12-31", "2024-01-02") == ["2023-12-31", "2024-01-01", "2024-01-02"]
    assert day_range("2024-01-02", "2024-01-01") == []


def test_a_day_west_of_greenwich_starts_later_in_utc() -> None:
    start = datetime(2017, 10, 2, 3, tzinfo=UTC)
    assert start_us("2017-10-02", timedelta(hours=-3)) == int(start.timestamp()) * 1_000_000
    assert micros(timedelta(milliseconds=1)) == 1000


@given(st.dates().map(str).filter(lambda d: "0002" < d < "9998"), OFFSETS)
def test_a_day_holds_its_first_and_last_instant_and_no_other(day: str, offset: timedelta) -> None:
    first, after = start_us(day, offset), end_us(day, offset)
    assert after - first == DAY_US
    assert day_of(first, offset) == day
    assert day_of(after - 1, offset) == day
    assert day_of(after, offset) == add_days(day, 1)
    assert day_of(first - 1, offset) == add_days(day, -1)
