"""Values of a source as the spec's types, and what is wrong with those that cannot be.

The same text is the same value on every engine: text is matched against one form per type before an
engine casts it, and what has no such form is a problem. Nothing is rounded, cut or guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import reduce

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from feature_store.columns import id_type, value_type
from feature_store.days import DAY_US
from feature_store.errors import DataError
from feature_store.spec import Attribute, IdType, Kind
from feature_store.spec_parts import MAX_FLOAT32
from jobs.frames import spark_type

_PLAUSIBLE_DAYS = 400  # a time that is this near to the day after a change of unit was in that unit
_BLANK = r"^[ \t\r\n]*$"
_PADDED = r"^[ \t\r\n]|[ \t\r\n]$"
_INTEGER = r"^[+-]?[0-9]+$"
_NUMBER = r"^[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?$"
_INFINITE = r"(?i)^[+-]?inf(inity)?$"
_INSTANT = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]{1,9})?)?"
    r" ?(Z|UTC|[+-][0-9]{2}:?[0-9]{2})?)?$"
)
_STANDS_FOR_NULL = ("null", "none", "nan", "<na>", "undefined", "\\n")
_WHOLE_IN_DOUBLE, _WHOLE_IN_FLOAT = 2**53, 2**24  # from here on, neighbours share a float
_INTEGERS = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)
_INEXACT = (T.FloatType, T.DoubleType)
_NUMBERS = (*_INTEGERS, *_INEXACT, T.DecimalType, T.BooleanType)


class Problem(StrEnum):
    """What can be wrong with a value; `jobs/ingest.py` has a sentence for each."""

    TYPE = "type"
    ID = "id"
    ROUNDED = "rounded"
    SPELLING = "spelling"
    PADDED = "padded"
    NULL = "null"
    NEGATIVE = "negative"
    RANGE = "range"
    LENGTH = "length"
    LABEL = "label"
    KIND = "kind"
    TIME = "time"
    DATE = "date"
    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    NANOSECONDS = "nanoseconds"
    FAR = "far"
    OUTSIDE = "outside"
    ORDER = "order"


class Values:
    """A raw frame whose columns are taken one by one, typed; collects what can be wrong with them.

    Attributes:
        columns: what was taken, by the name that it gets.
        clipped: per attribute that is clipped, whether a row's value was.
    """

    def __init__(self, frame: DataFrame, where: str) -> None:
        self.frame, self.where = frame, where
        self.types = {f.name: f.dataType for f in frame.schema.fields}
        self.columns: dict[str, Column] = {}
        self.clipped: list[Column] = []
        self._problems: list[Column] = []
        self._values: list[Column] = []

    def require(self, needed: Sequence[str], optional: Sequence[str]) -> None:
        """Refuse a frame that lacks a column, or has one that nobody asked for."""
        for name in needed:
            if name not in self.types:
                raise DataError(
                    f"{self.where}.{name} is missing from the source's columns ({', '.join(self.types)}): "
                    "add it, or leave it out of the spec"
                )
        for name in self.types:
            if name not in needed and name not in optional:
                raise DataError(
                    f"{self.where}.{name} is a column that the spec does not know: drop it in the source, "
                    f"or declare it (known are {', '.join([*needed, *optional])})"
                )

    def problem(
        self, condition: Column, name: str, code: Problem, value: Column | None = None
    ) -> None:
        """`code` is wrong with column `name` where `condition`."""
        shown = F.col(name).cast("string") if value is None else value.cast("string")
        text = F.substring(F.coalesce(shown, F.lit("null")), 1, 80)
        text = F.when(text.rlike(_BLANK), F.lit("blank")).otherwise(text)
        self._problems.append(F.when(condition, F.lit(f"{name}/{code}")))
        self._values.append(F.when(condition, text))

    @property
    def marks(self) -> list[Column]:
        """`_problem`, the first of each row, `_value`, and how many values were `_clipped`."""
        clipped = reduce(Column.__add__, (c.cast("int") for c in self.clipped), F.lit(0))
        return [
            F.coalesce(*self._problems).alias("_problem"),
            F.coalesce(*self._values).alias("_value"),
            clipped.alias("_clipped"),
        ]

    def refuse(self, name: str, wanted: str) -> DataError:
        """The error of a column that has no values of the type `wanted` at all."""
        given = self.types[name].simpleString()
        return DataError(
            f"{self.where}.{name} is {given}: the spec has it as {wanted}; convert it in the source"
        )

    def take_integer(self, name: str, *, kind: str, into: str = "", code: Problem) -> Column:
        """The column as `kind` (`bigint` or `int`); what is no integer of that size is `code`."""
        raw, given = _not_nan(F.col(name), self.types[name]), self.types[name]
        if isinstance(given, T.NullType):
            value = F.lit(None).cast(kind)
        elif isinstance(given, T.StringType):
            text = _trimmed(raw)
            value = F.when(text.rlike(_INTEGER), text.try_cast(kind))
            self.problem(_is_text(raw) & value.isNull(), name, code)
        elif isinstance(given, _NUMBERS):
            value = raw.try_cast(kind)
            wrong = raw.isNotNull() & value.isNull()
            if not isinstance(given, (*_INTEGERS, T.BooleanType)):
                wrong = wrong | (raw != value)
            self.problem(wrong, name, code)
            if isinstance(given, _INEXACT):
                most = _WHOLE_IN_FLOAT if isinstance(given, T.FloatType) else _WHOLE_IN_DOUBLE
                self.problem(F.abs(raw) > F.lit(float(most)), name, Problem.ROUNDED)
        else:
            raise self.refuse(name, kind)
        self.columns[into or name] = value
        return value

    def take_text(self, name: str) -> Column:
        """The column as text: text as it is, integers as their digits, null where it is blank."""
        raw, given = _not_nan(F.col(name), self.types[name]), self.types[name]
        value = raw.cast("string")
        if isinstance(given, T.StringType):
            value = F.when(_is_text(raw), raw)
            self.problem(value.rlike(_PADDED), name, Problem.PADDED)
        elif isinstance(given, (T.DecimalType, *_INEXACT)):
            self.problem(raw.isNotNull(), name, Problem.SPELLING)
        elif not isinstance(given, (T.NullType, *_INTEGERS)):
            raise self.refuse(name, "string")
        self.columns[name] = value
        return value

    def take_id(
        self, name: str, kind: IdType, *, needed: Column | bool = True, negative: bool = False
    ) -> Column:
        """An id: given where `needed`, and not below 0 unless `negative`."""
        if kind is IdType.STRING:
            value = self.take_text(name)
            absent = value.isNull() | F.lower(value).isin(*_STANDS_FOR_NULL)
        else:
            value = self.take_integer(name, kind=spark_type(id_type(kind)), code=Problem.ID)
            absent = value.isNull()
            if not negative:
                self.problem(value < 0, name, Problem.NEGATIVE)
        if needed is not False:
            self.problem(absent if needed is True else needed & absent, name, Problem.NULL)
        return value

    def take_attribute(self, attribute: Attribute) -> None:
        """An event attribute or context feature; null where it is missing."""
        if attribute.kind is Kind.CATEGORICAL:
            self.take_id(attribute.name, attribute.id_type, needed=False)
        elif attribute.kind is Kind.NUMERIC:
            self._take_number(attribute)
        else:
            self._take_vector(attribute)

    def _take_number(self, attribute: Attribute) -> None:
        name, given = attribute.name, self.types[attribute.name]
        raw = _not_nan(F.col(name), given)
        value = _double(raw, given)
        if value is None:
            raise self.refuse(name, "float")
        if isinstance(given, T.StringType):
            self.problem(_is_text(raw) & value.isNull(), name, Problem.TYPE)
        if attribute.clip is None:
            self.problem(F.abs(value) > F.lit(MAX_FLOAT32), name, Problem.RANGE)
        else:
            low, high = (F.lit(float(limit)) for limit in attribute.clip)
            self.clipped.append(F.coalesce((value < low) | (value > high), F.lit(False)))
            value = F.when(value < low, low).when(value > high, high).otherwise(value)
        self.columns[name] = value.cast("float")

    def _take_vector(self, attribute: Attribute) -> None:
        name, given = attribute.name, self.types[attribute.name]
        kind = spark_type(value_type(attribute))
        if isinstance(given, T.NullType):
            self.columns[name] = F.lit(None).cast(kind)
            return
        if not isinstance(given, T.ArrayType) or _double(F.lit(None), given.elementType) is None:
            raise self.refuse(name, kind)
        raw, element = F.col(name), given.elementType
        value = F.transform(raw, lambda x: _double(x, element))
        size = F.size(value)
        self.problem(raw.isNotNull() & (size != attribute.dim), name, Problem.LENGTH, size)
        shown = F.array_join(raw.cast("array<string>"), ", ", "null")
        if attribute.clip is None:
            bad = F.exists(value, lambda x: ~_holds(x, -MAX_FLOAT32, MAX_FLOAT32))
            self.problem(bad, name, Problem.RANGE, shown)
        else:
            low, high = attribute.clip
            unknown = F.exists(value, lambda x: x.isNull() | F.isnan(x))
            self.problem(unknown, name, Problem.RANGE, shown)
            beyond = F.exists(value, lambda x: ~_holds(x, low, high))
            self.clipped.append(F.coalesce(beyond, F.lit(False)))
            value = F.transform(
                value, lambda x: F.greatest(F.least(x, F.lit(float(high))), F.lit(float(low)))
            )
        self.columns[name] = value.cast(kind)

    def take_time(
        self, name: str, span: tuple[int, int], *, default: Column | None = None
    ) -> Column:
        """UTC microseconds; another unit near the day `span` is recognised. Null: `default`."""
        if default is not None and name not in self.types:
            self.columns[name] = default
            return default
        raw, given = F.col(name), self.types[name]
        if isinstance(given, T.TimestampType | T.TimestampNTZType):
            value = F.unix_micros(raw.cast("timestamp"))
        elif isinstance(given, T.StringType):
            text = _trimmed(raw)
            value = F.when(text.rlike(_INTEGER), text.try_cast("bigint"))
            instant = F.when(text.rlike(_INSTANT), text.try_cast("timestamp"))
            value = F.coalesce(value, F.unix_micros(instant))
            self.problem(_is_text(raw) & value.isNull(), name, Problem.TIME)
        else:
            value = self.take_integer(name, kind="bigint", code=Problem.TIME)
        if default is None:
            self.problem(value.isNull(), name, Problem.NULL)
        low, high = span[0] - _PLAUSIBLE_DAYS * DAY_US, span[1] + _PLAUSIBLE_DAYS * DAY_US
        for code, times, per in (
            (Problem.SECONDS, 1, 10**6),
            (Problem.MILLISECONDS, 1, 10**3),
            (Problem.NANOSECONDS, 10**3, 1),
        ):
            near = value.between(F.lit(low * times // per), F.lit(high * times // per))
            self.problem(near, name, code, value)
        # YYYYMMDD, with or without HH, MM and SS behind it
        for digits in (0, 2, 4, 6):
            low, high = 19000101 * 10**digits, 21001232 * 10**digits
            self.problem(value.between(F.lit(low), F.lit(high)), name, Problem.DATE, value)
        if default is not None:
            value = F.coalesce(value, default)
        self.columns[name] = value
        return value


def _not_nan(raw: Column, given: T.DataType) -> Column:
    """In a column of floats NaN is a missing value: what pandas writes for it."""
    return F.when(~F.isnan(raw), raw) if isinstance(given, _INEXACT) else raw


def _trimmed(text: Column) -> Column:
    return F.btrim(text, F.lit(" \t\r\n"))


def _is_text(raw: Column) -> Column:
    """Not missing: an empty field of a CSV file is."""
    return raw.isNotNull() & ~raw.rlike(_BLANK)


def _double(raw: Column, given: T.DataType) -> Column | None:
    """`raw` as double, null where it is no number; None where its type has none."""
    if isinstance(given, T.NullType):
        return F.lit(None).cast("double")
    if isinstance(given, T.StringType):
        text = _trimmed(raw)
        infinite = F.when(text.startswith("-"), F.lit(float("-inf"))).otherwise(float("inf"))
        number = F.when(text.rlike(_NUMBER), text.try_cast("double"))
        return F.when(text.rlike(_INFINITE), infinite).otherwise(number)
    return raw.cast("double") if isinstance(given, _NUMBERS) else None


def _holds(x: Column, low: float, high: float) -> Column:
    """Whether `x` is a number from `low` to `high`; never null."""
    between = ~F.isnan(x) & (x >= F.lit(float(low))) & (x <= F.lit(float(high)))
    return F.coalesce(between, F.lit(False))
