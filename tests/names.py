"""Names that a spec may have and that mean something to somebody else; one dataset under any names.

`plain(n)` has one of everything and n attributes and context features, all under names that nobody
else uses; `under(dataset, names)` is the same dataset under others. Tables of both have the same columns
in the same order, so that they can be compared column by column.
"""

from __future__ import annotations

import ast
import dataclasses
import keyword
import random
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from feature_store.days import DAY_US, HOUR_US, day_range, start_us
from feature_store.errors import SpecError
from feature_store.spec import (
    Aggregate,
    Attribute,
    CoOccurrence,
    Dataset,
    DenseFeature,
    EventLabel,
    EventStream,
    GivenLabel,
    IdType,
    ItemFeatures,
    Kind,
    SparseFeature,
    Target,
    Task,
    UserAttribute,
)
from feature_store.spec_parts import check_name
from feature_store.tables import contract

ROOT = Path(__file__).parents[1]
DAYS = day_range("2024-03-01", "2024-03-03")
SQL = """select from where group by order having join left right full inner outer cross natural on using
    union all distinct as case when then else end and or not in is null like between exists cast limit
    offset with values table insert update delete create drop alter column row rows range over partition
    window interval date timestamp time year month day hour minute second true false int bigint string
    array struct map element explode unnest lateral pivot set grant revoke any some first last default
    primary key foreign references check unique index view function begin commit desc asc current_date
    current_user session_user current_timestamp"""
_PLAIN = "plain_"


@cache
def names() -> tuple[str, ...]:
    """Every string in the jobs' source that a spec may take for a name, or that a name is made of; keywords
    of Python and SQL; names of lambdas; names of 60 characters."""
    found: set[str] = {"x" * 60, "a_" * 29 + "ab", *SQL.split()}
    found |= {f"{letter}_{i}" for letter in "xyz" for i in range(4)} | {"x", "y", "z"}
    found |= {w.lower() for w in (*keyword.kwlist, *keyword.softkwlist)}
    for folder in ("jobs", "feature_store"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found |= {node.value, *node.value.split("__"), node.value.strip("_")}
    return tuple(sorted(n for n in found if len(n) <= 60 and _legal(n)))


def _legal(name: str) -> bool:
    try:
        check_name("name", name)
    except SpecError:
        return False
    return True


@cache
def member_names() -> tuple[str, ...]:
    """What modules and dictionaries have for attributes."""
    kinds = (nn.Module(), nn.ModuleDict(), nn.ParameterDict(), {})
    return tuple(sorted({n for kind in kinds for n in dir(kind) if _legal(n)}))


@cache
def free_names() -> tuple[str, ...]:
    """Of `names`, those that an attribute, a context feature and a label may have."""
    return tuple(n for n in names() if _accepted(n))


def _accepted(name: str) -> bool:
    try:
        under(plain(1), {f"{_PLAIN}attribute_0": name, f"{_PLAIN}context_0": name})
    except SpecError:
        return False
    return True


def _attribute(role: str, i: int) -> Attribute:
    name, vocabulary = f"{_PLAIN}{role}_{i}", f"{_PLAIN}vocabulary_{role}_{i}"
    if i % 4 == 2:
        return Attribute(name=name, kind=Kind.NUMERIC)
    if i % 4 == 3 and role == "attribute":
        return Attribute(name=name, kind=Kind.VECTOR, dim=2)
    kind = IdType.STRING if i % 4 == 1 else IdType.INT64
    return Attribute(name=name, id_type=kind, vocabulary=vocabulary)


@cache
def plain(count: int) -> Dataset:
    """One of everything, and `count` attributes and context features, user attributes, sparse and dense
    features among them."""
    attributes = tuple(_attribute("attribute", i) for i in range(count))
    contexts = tuple(_attribute("context", i) for i in range(count))
    item = Attribute(name=f"{_PLAIN}item", vocabulary="item")
    both = Attribute(name=f"{_PLAIN}both", vocabulary=f"{_PLAIN}vocabulary_both")
    place = Attribute(name=f"{_PLAIN}place", vocabulary=f"{_PLAIN}vocabulary_place")
    first, second = f"{_PLAIN}stream_0", f"{_PLAIN}stream_1"
    ids = [a for a in attributes if a.kind is Kind.CATEGORICAL]
    before = (item.name, ids[min(1, len(ids) - 1)].name)
    features = range(min(count, 6))
    return Dataset(
        name="names",
        first_day=DAYS[0],
        max_part_rows=6,
        streams=(
            EventStream(name=first, attributes=(item, both, *attributes), max_events=4),
            EventStream(name=second, attributes=(item, *attributes[:4]), max_events=6),
        ),
        targets=(
            Target(name=f"{_PLAIN}target_0", context=(place, both, *contexts)),
            Target(name=f"{_PLAIN}target_1", context=(place,), has_item=False),
        ),
        tasks=(
            Task(name=f"{_PLAIN}task_0", label=GivenLabel(column=f"{_PLAIN}label_0"),
                 targets=(f"{_PLAIN}target_0",), domain=1),
            Task(name=f"{_PLAIN}task_1", label=GivenLabel(column=f"{_PLAIN}label_1"),
                 targets=(f"{_PLAIN}target_0", f"{_PLAIN}target_1")),
            Task(name=f"{_PLAIN}task_2", matures_after=1, targets=(f"{_PLAIN}target_0",),
                 label=EventLabel(stream=first, within=timedelta(hours=20),
                                  match=(("item_id", item.name), (both.name, both.name)))),
        ),
        user_attributes=tuple(
            UserAttribute(name=f"{_PLAIN}user_{i}", stream=first, attribute=ids[i % len(ids)].name)
            for i in features
        ),
        sparse_features=tuple(
            SparseFeature(name=f"{_PLAIN}sparse_{i}", stream=first, window_days=1 + i % 2, max_ids=3,
                          attribute=ids[i % len(ids)].name, scored=i % 2 == 0)
            for i in features
        ),
        dense_features=tuple(
            DenseFeature(name=f"{_PLAIN}dense_{i}", stream=first, window_days=1 + i % 2,
                         aggregate=Aggregate.RATE if i % 2 else Aggregate.COUNT,
                         per=second if i % 2 else None)
            for i in features
        ),
        item_features=ItemFeatures(
            streams=((first, item.name), (second, item.name)),
            windows_hours=(2, 30),
            co_occurrence=CoOccurrence(
                stream=first, attribute=item.name, beside=(both.name,), before=before, lags=(1, 3)
            ),
        ),
        domain=place.name,
    )  # fmt: skip


def under(part: Any, by: dict[str, str]) -> Any:
    """A spec, or a part of one, with its names replaced by those that `by` has for them."""
    if isinstance(part, tuple):
        return tuple(under(p, by) for p in part)
    if dataclasses.is_dataclass(part):
        fields = [f.name for f in dataclasses.fields(part) if f.init]
        return dataclasses.replace(part, **{n: under(getattr(part, n), by) for n in fields})
    return by.get(part, part) if type(part) is str else part


def all_names(part: Any) -> list[str]:
    """The names of a spec that `under` replaces, each once."""
    if isinstance(part, tuple):
        return list(dict.fromkeys(n for p in part for n in all_names(p)))
    if dataclasses.is_dataclass(part):
        fields = [getattr(part, f.name) for f in dataclasses.fields(part) if f.init]
        return all_names(tuple(fields))
    return [part] if type(part) is str and part.startswith(_PLAIN) else []


def renaming(dataset: Dataset, wanted: Sequence[str], *, seed: int) -> dict[str, str]:
    """Names for `dataset`: attributes and context features take `wanted` in turn, the rest any of all.

    Names of one kind differ; streams, tasks or features may well have the name of an attribute.
    """
    rng = random.Random(seed)

    def pool(known: Sequence[str]) -> list[str]:
        return rng.sample(known, len(known))

    columns = pool(free_names())
    attributes = list(dict.fromkeys([*wanted, *columns]))
    contexts, features = attributes.copy(), pool(names())
    vocabularies = [n for n in pool(names()) if n not in ("item", "user")]
    others = {role: pool(names()) for role in ("stream", "target", "task")}
    by = {f"{_PLAIN}both": attributes.pop(0)}
    contexts.remove(by[f"{_PLAIN}both"])
    for name in all_names(dataset):
        role = name.removeprefix(_PLAIN).split("_")[0]
        if name in by:
            continue
        if role in ("attribute", "item"):
            by[name] = attributes.pop(0)
        elif role in ("context", "place"):
            by[name] = contexts.pop(0)
        elif role == "label":  # no context feature, whose columns it stands beside in a source
            by[name] = contexts.pop()
        elif role in ("user", "sparse", "dense"):
            by[name] = features.pop()
        else:
            by[name] = (vocabularies if role == "vocabulary" else others[role]).pop()
    return by


def _value(rng: random.Random, attribute: Attribute) -> object:
    if rng.random() < 0.2:
        return None
    if attribute.kind is Kind.VECTOR:
        return [rng.random() for _ in range(attribute.dim or 0)]
    if attribute.kind is Kind.NUMERIC:
        return rng.choice((0.5, 2.25, 1e6))
    number = rng.randrange(1, 4)
    return f"v{number}" if attribute.id_type is IdType.STRING else number


def world(dataset: Dataset, *, users: int, seed: int) -> tuple[pa.Table, pa.Table]:
    """Rows of `events` and of `impressions` over `DAYS`. No two instants are equal."""
    rng = random.Random(seed)
    events, impressions = [], []
    number = 0
    for ds in DAYS:
        for user in range(1, users + 1):
            for _ in range(9):
                number += 1
                at = (
                    start_us(ds, dataset.utc_offset)
                    + rng.randrange(DAY_US // 10**6) * 10**6
                    + number
                )
                if rng.random() < 0.6:
                    stream = rng.choice(dataset.streams)
                    values = {a.name: None for a in dataset.event_attributes}
                    values |= {a.name: _value(rng, a) for a in stream.attributes}
                    events.append(
                        {"event_id": number, "stream": stream.name, "user_id": user, "event_time": at,
                         "ingest_time": at, "available_time": at, **values, "ds": ds}
                    )  # fmt: skip
                    continue
                kind = rng.choice(dataset.targets)
                values = {c.name: None for c in dataset.context_features}
                values |= {c.name: _value(rng, c) for c in kind.context}
                labels = {f"label__{n}": rng.choice((0, 1)) for n in dataset.given_labels}
                impressions.append(
                    {"target_id": number, "target": kind.name, "user_id": user, "time": at,
                     "as_of": at - rng.randrange(1, 2) * HOUR_US // 3600, **values, **labels,
                     "item_id": rng.randrange(1, 4) if kind.has_item else None, "ds": ds}
                )  # fmt: skip
    shapes = (contract(dataset, t).schema for t in ("events", "impressions"))
    rows = (events, impressions)
    return tuple(pa.Table.from_pylist(r, schema=s) for r, s in zip(rows, shapes, strict=True))  # type: ignore[return-value]


def under_names(table: pa.Table, name: str, dataset: Dataset, by: dict[str, str]) -> pa.Table:
    """A table called `name` as `dataset`, which has the names that `by` gives, would have it."""
    return _renamed(table, name, dataset, by, back=False)


def back(table: pa.Table, name: str, dataset: Dataset, by: dict[str, str]) -> pa.Table:
    """A table under the names that `by` gives as the plain `dataset` would have it."""
    return _renamed(table, name, dataset, by, back=True)


def _renamed(
    table: pa.Table, name: str, dataset: Dataset, by: dict[str, str], *, back: bool
) -> pa.Table:
    table = table.rename_columns(contract(dataset, name).schema.names)
    column = {"events": "stream", "impressions": "target", "labels": "task"}.get(name)
    if column is not None:
        role = {k: v for k, v in by.items() if k.startswith(f"{_PLAIN}{column}_")}
        role = {v: k for k, v in role.items()} if back else role
        values = pa.array([role[v] for v in table[column].to_pylist()], pa.string())
        table = table.set_column(table.schema.get_field_index(column), column, values)
    return table
