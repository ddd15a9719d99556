"""Names and types of columns, derived from the spec.

Column names are flat and say where a value belongs; `__` separates the parts, so that a reader can
prune to what it needs:

    history__<stream>__<attribute>   a user's events of one stream, arrays in order of availability
    user__<name>, sparse__<name>, dense__<name>   the nightly user features
    targets__<...>                   arrays over a row's targets

Packed arrays hold no nulls (an Arrow list of them *is* a values/offsets pair): a missing id is -1
("" for strings), a missing number NaN, a missing vector zeros.
"""

from __future__ import annotations

import pyarrow as pa

from feature_store.spec import Attribute, Dataset, IdType, Kind

MISSING_ID = -1
MISSING_STRING = ""
NO_LABEL = -1  # in `labels`: the task is not asked of this target


def id_type(kind: IdType) -> pa.DataType:
    """Arrow type of an id."""
    return pa.int64() if kind is IdType.INT64 else pa.string()


def value_type(attribute: Attribute) -> pa.DataType:
    """Arrow type of one value of `attribute`."""
    if attribute.kind is Kind.CATEGORICAL:
        return id_type(attribute.id_type)
    if attribute.kind is Kind.NUMERIC:
        return pa.float32()
    return pa.list_(pa.float32())


def missing_value(attribute: Attribute) -> object:
    """What stands for a missing value of `attribute` inside a packed array."""
    if attribute.kind is Kind.CATEGORICAL:
        return MISSING_ID if attribute.id_type is IdType.INT64 else MISSING_STRING
    if attribute.kind is Kind.NUMERIC:
        return float("nan")
    return [0.0] * (attribute.dim or 0)


def required(name: str, kind: pa.DataType) -> pa.Field:
    """A column without nulls."""
    return pa.field(name, kind, nullable=False)


def packed(name: str, kind: pa.DataType) -> pa.Field:
    """A column of arrays, none of them null."""
    return pa.field(name, pa.list_(kind), nullable=False)


def history_column(stream: str, column: str) -> str:
    """`history__<stream>__<column>`; column is an attribute, `event_time`, `available_time` or `event_id`."""
    return f"history__{stream}__{column}"


def history_end_column(stream: str) -> str:
    """Per target: how many of the row's events of `stream` it may see."""
    return f"targets__history_end__{stream}"


def context_column(name: str) -> str:
    """A target's context feature in `examples`."""
    return f"targets__context__{name}"


def item_feature_column(name: str) -> str:
    """A target's item feature in `examples`."""
    return f"targets__item__{name}"


def user_attribute_column(name: str) -> str:
    """A user attribute in `aggregates` and `examples`."""
    return f"user__{name}"


def sparse_column(name: str) -> str:
    """A sparse feature's ids in `aggregates` and `examples`."""
    return f"sparse__{name}"


def scores_column(name: str) -> str:
    """A scored sparse feature's scores, aligned with its ids."""
    return f"sparse__{name}__scores"


def dense_column(name: str) -> str:
    """A dense feature in `aggregates` and `examples`."""
    return f"dense__{name}"


def beside_column(name: str) -> str:
    """The values of an attribute that come beside an item in an hour, in `item_aggregates`."""
    return f"beside__{name}"


def before_column(name: str, lags: int) -> str:
    """The values of an attribute among the `lags` events before an item's, in `item_aggregates`."""
    return f"before_{lags}__{name}"


def counts_column(column: str) -> str:
    """How often each of the values in `column` does."""
    return f"{column}__counts"


def label_column(name: str) -> str:
    """A given label in `impressions`; no feature reads a column of this prefix."""
    return f"label__{name}"


def history_fields(dataset: Dataset, *, event_id: bool) -> list[pa.Field]:
    """A user's history, of `sequences` and `examples`."""
    columns = []
    for stream in dataset.streams:
        names = (
            ("event_id", "event_time", "available_time")
            if event_id
            else ("event_time", "available_time")
        )
        columns += [packed(history_column(stream.name, n), pa.int64()) for n in names]
        columns += [
            packed(history_column(stream.name, a.name), value_type(a)) for a in stream.attributes
        ]
    return columns


def user_feature_fields(dataset: Dataset) -> list[pa.Field]:
    """The nightly user features, of `aggregates` and `examples`."""
    columns = []
    for ua in dataset.user_attributes:
        attribute = dataset.stream(ua.stream).attribute(ua.attribute)
        columns.append(required(user_attribute_column(ua.name), value_type(attribute)))
    for sf in dataset.sparse_features:
        attribute = dataset.stream(sf.stream).attribute(sf.attribute)
        columns.append(packed(sparse_column(sf.name), value_type(attribute)))
        if sf.scored:
            columns.append(packed(scores_column(sf.name), pa.float32()))
    columns += [required(dense_column(df.name), pa.float32()) for df in dataset.dense_features]
    return columns
