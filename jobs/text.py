"""Figures as people read them, in logs and on the report's page: what is missing is said in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TOO_FEW = "too few"


def number(value: float | None, digits: int = 4, *, missing: str = TOO_FEW) -> str:
    """`value` with that many digits; `missing` where it is None."""
    return missing if value is None else f"{value:.{digits}f}"


def percent(value: float | None, *, missing: str = TOO_FEW) -> str:
    """`value` as a percentage; `missing` where it is None."""
    return missing if value is None else f"{100 * value:.1f} %"


def interval(value: Mapping[str, float] | None, *, missing: str = TOO_FEW) -> str:
    """A difference with its interval; `missing` where it is None."""
    if value is None:
        return missing
    return f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"


def headline(task: Mapping[str, Any]) -> str:
    """What a report says of a task in one line; "" where it compares nothing."""
    if not task["arms"]:
        return ""
    arms = [f"{arm['title']} {number(arm['ne'])}" for arm in task["arms"]]
    return f"{task['name']}, {days_text(task['days'])}, NE: {', '.join(arms)}"


def days_text(days: Sequence[str]) -> str:
    """The first and the last day."""
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
