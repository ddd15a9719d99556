"""The expectations of Great Expectations that several tables have, with what to do where one fails."""

from __future__ import annotations

from typing import Any

_MICROSECONDS = (
    "times are UTC microseconds; look at their unit, and at the day that the rows are sent to"
)


class Expect:
    """Makes expectations. Great Expectations has to be imported before (`quality.warm_up`)."""

    def __init__(self) -> None:
        from great_expectations import expectations

        self._kinds = expectations

    def between(self, column: str, low: float | None, high: float | None, remedy: str) -> Any:
        """Values from `low` to `high`; None: no bound."""
        return self._kinds.ExpectColumnValuesToBeBetween(
            column=column, min_value=low, max_value=high, meta={"remedy": remedy}
        )

    def instants(self, column: str, first: int, last: int) -> Any:
        """UTC microseconds from `first` to `last`."""
        return self.between(column, first, last, _MICROSECONDS)

    def names(self, column: str, known: list[str]) -> Any:
        """Names that the spec declares."""
        remedy = "declare the name in the spec, or drop the rows"
        return self._kinds.ExpectColumnValuesToBeInSet(
            column=column, value_set=known, meta={"remedy": remedy}
        )

    def not_after(self, first: str, second: str, remedy: str) -> Any:
        """Column `first` is at most column `second`."""
        return self._kinds.ExpectColumnPairValuesAToBeGreaterThanB(
            column_A=second, column_B=first, or_equal=True, meta={"remedy": remedy}
        )

    def one(self, column: str) -> Any:
        """One value in the whole partition."""
        return self._kinds.ExpectColumnUniqueValueCountToBeBetween(
            column=column, max_value=1, meta={"remedy": "publish one snapshot per partition"}
        )
