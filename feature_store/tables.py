"""The tables' contracts, derived from the spec: columns, types, grain and partitioning.

Column names are flat and say where a value belongs; `__` separates the parts, so that a reader can
prune to what it needs:

    history__<stream>__<attribute>   a user's events of one stream, arrays in order of availability
    user__<name>, sparse__<name>, dense__<name>   the nightly user features
    targets__<...>                   arrays over a row's targets

Packed arrays hold no nulls (an Arrow list of them *is* a values/offsets pair): a missing id is -1
("" for strings), a missing number NaN, a missing vector zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from feature_store.errors import SpecError
from feature_store.spec import Attribute, Dataset, IdType, Kind

MISSING_ID = -1
MISSING_STRING = ""
NO_LABEL = -1  # in `labels`: the task is not asked of this target


@dataclass(frozen=True, kw_only=True)
class Table:
    """One Delta table.

    Args:
        name: folder name under the dataset's lake.
        schema: Arrow schema, partition columns included; `nullable` is part of the contract.
        key: the columns that identify a row (the grain).
        partitioned_by: `("ds",)`, or `("model", "ds")`.
        grain: one sentence.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    partitioned_by: tuple[str, ...] = ("ds",)
    grain: str = ""


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


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _packed(name: str, kind: pa.DataType) -> pa.Field:
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


def _event_fields(dataset: Dataset) -> list[pa.Field]:
    """Columns of `events` that every dataset has."""
    return [
        _required("event_id", pa.int64()),
        _required("stream", pa.string()),
        _required("user_id", id_type(dataset.user_id_type)),
        _required("event_time", pa.int64()),
        _required("ingest_time", pa.int64()),
        _required("available_time", pa.int64()),
    ]


def _target_fields(dataset: Dataset) -> list[pa.Field]:
    """Columns of `impressions` that every dataset has."""
    return [
        _required("target_id", id_type(dataset.target_id_type)),
        _required("target", pa.string()),
        _required("user_id", id_type(dataset.user_id_type)),
        _required("time", pa.int64()),
        _required("as_of", pa.int64()),
        pa.field("item_id", id_type(dataset.item_id_type)),
    ]


def reserved_names(dataset: Dataset) -> set[str]:
    """Names that no attribute, context feature or given label can have: columns beside them."""
    return {"ds", *(f.name for f in (*_event_fields(dataset), *_target_fields(dataset)))}


def _history(dataset: Dataset, *, event_id: bool) -> list[pa.Field]:
    columns = []
    for stream in dataset.streams:
        names = (
            ("event_id", "event_time", "available_time")
            if event_id
            else ("event_time", "available_time")
        )
        columns += [_packed(history_column(stream.name, n), pa.int64()) for n in names]
        columns += [
            _packed(history_column(stream.name, a.name), value_type(a)) for a in stream.attributes
        ]
    return columns


def _user_features(dataset: Dataset) -> list[pa.Field]:
    columns = []
    for ua in dataset.user_attributes:
        attribute = dataset.stream(ua.stream).attribute(ua.attribute)
        columns.append(_required(user_attribute_column(ua.name), value_type(attribute)))
    for sf in dataset.sparse_features:
        attribute = dataset.stream(sf.stream).attribute(sf.attribute)
        columns.append(_packed(sparse_column(sf.name), value_type(attribute)))
        if sf.scored:
            columns.append(_packed(scores_column(sf.name), pa.float32()))
    columns += [_required(dense_column(df.name), pa.float32()) for df in dataset.dense_features]
    return columns


def _targets(dataset: Dataset) -> list[pa.Field]:
    columns = [
        _packed("targets__target_id", id_type(dataset.target_id_type)),
        _packed("targets__target", pa.int32()),  # index into dataset.targets
        _packed("targets__time", pa.int64()),
        _packed("targets__as_of", pa.int64()),
        _packed("targets__item_id", id_type(dataset.item_id_type)),
    ]
    columns += [_packed(context_column(c.name), value_type(c)) for c in dataset.context_features]
    if dataset.item_features is not None:
        columns += [
            _packed(item_feature_column(n), pa.float32()) for n in dataset.item_features.names
        ]
    columns += [_packed(history_end_column(s.name), pa.int32()) for s in dataset.streams]
    return columns


def co_occurrence_columns(dataset: Dataset) -> dict[str, Attribute]:
    """Columns of `item_aggregates` that hold values, beside first, and the attribute of each."""
    found: dict[str, Attribute] = {}
    pairs = dataset.co_occurrence
    if pairs is not None:
        stream = dataset.stream(pairs.stream)
        found |= {beside_column(n): stream.attribute(n) for n in pairs.beside}
        found |= {
            before_column(n, lags): stream.attribute(n) for n in pairs.before for lags in pairs.lags
        }
    return found


def contracts(dataset: Dataset) -> dict[str, Table]:
    """Every table of `dataset` by name."""
    user = _required("user_id", id_type(dataset.user_id_type))
    item = id_type(dataset.item_id_type)
    ds = _required("ds", pa.string())
    tables = [
        Table(
            name="events",
            grain="one event that became available on ds",
            key=("event_id",),
            schema=pa.schema(
                [
                    *_event_fields(dataset),
                    *(pa.field(a.name, value_type(a)) for a in dataset.event_attributes),
                    ds,
                ]
            ),
        ),
        Table(
            name="impressions",
            grain="one target with its context, scored on ds",
            key=("user_id", "target", "target_id"),
            schema=pa.schema(
                [
                    *_target_fields(dataset),
                    *(pa.field(c.name, value_type(c)) for c in dataset.context_features),
                    *(pa.field(label_column(n), pa.int32()) for n in dataset.given_labels),
                    ds,
                ]
            ),
        ),
        Table(
            name="labels",
            grain="one row of examples x task: the answers that became final on ds",
            key=("user_id", "shown_ds", "part", "task"),
            schema=pa.schema(
                [
                    user,
                    _required("shown_ds", pa.string()),
                    _required("part", pa.int32()),
                    _required("task", pa.string()),
                    _packed(
                        "labels", pa.int32()
                    ),  # aligned with the row's targets; 1, 0 or NO_LABEL
                    ds,
                ]
            ),
        ),
        Table(
            name="sequences",
            grain="one user touched on ds (every base_days: each user): the last max_events of each stream",
            key=("user_id",),
            schema=pa.schema([user, *_history(dataset, event_id=True), ds]),
        ),
        Table(
            name="aggregates",
            grain="one user with events in the longest window that ends at the end of ds less serve_delay",
            key=("user_id",),
            schema=pa.schema([user, *_user_features(dataset), ds]),
        ),
        Table(
            name="examples",
            grain="one user-day (or part of one): its history once and every target of the day",
            key=("user_id", "part"),
            schema=pa.schema(
                [
                    user,
                    _required("part", pa.int32()),
                    _required("has_aggregates", pa.int32()),  # 0: the user features are all missing
                    *_user_features(dataset),
                    *_history(dataset, event_id=False),
                    *_targets(dataset),
                    ds,
                ]
            ),
        ),
        Table(
            name="user_embeddings",
            grain="one user of one model's snapshot, as served on the day after ds",
            key=("user_id",),
            partitioned_by=("model", "ds"),
            schema=pa.schema(
                [
                    user,
                    _required("snapshot", pa.string()),
                    _required("embeddings", pa.int32()),  # K
                    _required("dim", pa.int32()),  # D
                    _required("raw", pa.binary()),  # K*D little-endian float16
                    _required("pooled", pa.binary()),  # mean over the days that the user has
                    _required("pooled_days", pa.int32()),
                    _required("model", pa.string()),
                    ds,
                ]
            ),
        ),
    ]
    if dataset.item_features is not None:
        counts = [_required(f"events__{s}", pa.int64()) for s, _ in dataset.item_features.streams]
        for name, attribute in co_occurrence_columns(dataset).items():
            counts.append(_packed(name, value_type(attribute)))
            counts.append(_packed(counts_column(name), pa.int32()))
        tables.append(
            Table(
                name="item_aggregates",
                grain="one item x hour (by availability): events per stream, and what they come together with",
                key=("item_id", "hour"),
                schema=pa.schema(
                    [
                        _required("item_id", item),
                        _required("hour", pa.int64()),  # hours since the epoch, UTC
                        *counts,
                        _required(
                            "first_seen", pa.int64()
                        ),  # earliest available_time in the last 30 days
                        ds,
                    ]
                ),
            )
        )
    if dataset.simulated:
        tables.append(
            Table(
                name="truth",
                grain="the probability that a simulated label was drawn with; no feature can reach it",
                key=("target_id", "task"),
                schema=pa.schema(
                    [
                        _required("target_id", id_type(dataset.target_id_type)),
                        _required("task", pa.string()),
                        _required("probability", pa.float64()),
                        ds,
                    ]
                ),
            )
        )
    return {t.name: t for t in tables}


def contract(dataset: Dataset, table: str) -> Table:
    """The contract of one table.

    Raises:
        SpecError: the dataset has no such table.
    """
    tables = contracts(dataset)
    if table not in tables:
        raise SpecError(f"table is {table!r}: {dataset.name} has {', '.join(tables)}")
    return tables[table]


LEDGER = pa.schema(
    [
        _required("table", pa.string()),
        _required("model", pa.string()),  # "" unless the table is partitioned by model
        _required("ds", pa.string()),
        _required("version", pa.int64()),  # Delta version at which the partition reads as written
        _required("inputs", pa.string()),  # JSON: {"<table>/<ds>": version}
        _required("code_version", pa.string()),
        _required("spec_hash", pa.string()),
        _required("engine", pa.string()),
        _required("rows", pa.int64()),
        _required("bytes", pa.int64()),
        _required("seconds", pa.float64()),
        _required("written_at", pa.int64()),  # UTC microseconds
        _required(
            "notes", pa.string()
        ),  # JSON of counts worth keeping (duplicates dropped, coverage, drift)
    ]
)
