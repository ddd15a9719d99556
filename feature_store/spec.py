"""The spec: one frozen description of a dataset, from which everything else is derived.

Table schemas and contracts (`tables.py`), quality suites (`quality.py`), the loader's batches, the
models' feature keys and their order, and the DAGs all read a `Dataset`; none of them declares a
column again. A contradiction fails here, when the spec is built, naming the field, the value and
the remedy. How a table is sized or a task is weighted is model configuration and is not here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import timedelta
from enum import StrEnum
from functools import cached_property

from feature_store.errors import SpecError

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_ONE_DAY = timedelta(days=1)


class IdType(StrEnum):
    """How an id is stored in the tables. Hashing to embedding rows belongs to the model."""

    INT64 = "int64"
    STRING = "string"


class Kind(StrEnum):
    """What an attribute's values are."""

    CATEGORICAL = "categorical"  # an id; missing is -1 ("" for strings) once packed
    NUMERIC = "numeric"  # float32; missing is NaN once packed
    VECTOR = "vector"  # `dim` float32; missing is a vector of zeros once packed


class Aggregate(StrEnum):
    """What a dense feature computes over its window."""

    COUNT = "count"  # events
    SUM = "sum"  # of a numeric attribute
    RATE = "rate"  # events of `stream` per event of `per`; 0 where there is none of `per`
    RECENCY = "recency"  # hours from the newest event to the cutoff; the window's length if none


def _check(ok: bool, field_name: str, value: object, remedy: str) -> None:
    if not ok:
        raise SpecError(f"{field_name} is {value!r}: {remedy}")


def _check_name(field_name: str, value: str) -> None:
    _check(
        isinstance(value, str) and _NAME.fullmatch(value) is not None,
        field_name,
        value,
        "use lower-case words joined by single underscores ('__' separates parts of a column name)",
    )


def _check_unique(field_name: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        _check(value not in seen, field_name, value, "the name is used twice; rename one")
        seen.add(value)


def _check_known(field_name: str, value: str, known: Sequence[str]) -> None:
    _check(value in known, field_name, value, f"not declared; known are {', '.join(known) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One attribute of an event, or one context feature of a target.

    Args:
        name: the column's name. Streams that share a name share the meaning and the type.
        kind: categorical id, numeric or vector.
        id_type: of a categorical attribute.
        vocabulary: the id space. Attributes of one vocabulary (say `item`) share an embedding
            table, so that a clicked article and a candidate article are the same thing to a model.
            Defaults to the name.
        dim: length of a vector attribute.
    """

    name: str
    kind: Kind = Kind.CATEGORICAL
    id_type: IdType = IdType.INT64
    vocabulary: str = ""
    dim: int | None = None

    def __post_init__(self) -> None:
        _check_name("Attribute.name", self.name)
        if not self.vocabulary:
            object.__setattr__(self, "vocabulary", self.name)
        if self.kind is Kind.VECTOR:
            _check(
                self.dim is not None and self.dim > 0,
                f"Attribute({self.name}).dim", self.dim, "a vector needs its length, 1 or more",
            )  # fmt: skip
        else:
            _check(
                self.dim is None,
                f"Attribute({self.name}).dim", self.dim, "only a vector attribute has a length",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EventStream:
    """One stream of events about users: an event-based feature (EBF) source.

    Args:
        name: the stream's name.
        attributes: what each event carries.
        max_events: how many of a user's last events a sequence holds.
        delay: how long after it happened (or was ingested) an event can be used:
            `available_time = max(event_time, ingest_time) + delay`.
        id_from: columns that the event id is hashed from; empty where the source has `event_id`.
    """

    name: str
    attributes: tuple[Attribute, ...]
    max_events: int
    delay: timedelta = timedelta(0)
    id_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_name("EventStream.name", self.name)
        where = f"EventStream({self.name})"
        _check(self.max_events >= 1, f"{where}.max_events", self.max_events, "keep at least one event")
        _check(self.delay >= timedelta(0), f"{where}.delay", self.delay, "a delay is not negative")
        _check_unique(f"{where}.attributes", (a.name for a in self.attributes))
        known = ("user_id", "event_time", *(a.name for a in self.attributes))
        for column in self.id_from:
            _check_known(f"{where}.id_from", column, known)

    def attribute(self, name: str) -> Attribute:
        """The attribute called `name`."""
        for attribute in self.attributes:
            if attribute.name == name:
                return attribute
        raise SpecError(f"EventStream({self.name}) has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of thing that is scored: a user, mostly with an item, at a moment.

    The source gives for each target `user_id`, `time` (when it happens), `as_of <= time` (the only
    clock that features may look at; absent means `time`), `item_id` where `has_item`, and the
    context features. Its `ds` is the day that holds `as_of`.

    Args:
        name: the kind's name, stored in the `target` column of `impressions`.
        has_item: whether an item is scored. Its id has vocabulary `item`.
        context: features of the moment and of the item that the source knows at `as_of`.
        id_from: columns that the target id is hashed from; empty where the source has `target_id`.
    """

    name: str
    context: tuple[Attribute, ...] = ()
    has_item: bool = True
    id_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_name("Target.name", self.name)
        where = f"Target({self.name})"
        _check_unique(f"{where}.context", (a.name for a in self.context))
        for attribute in self.context:
            _check(
                attribute.kind is not Kind.VECTOR,
                f"{where}.context", attribute.name, "context is categorical or numeric",
            )  # fmt: skip
        known = ("user_id", "time", "as_of", "item_id", *(a.name for a in self.context))
        for column in self.id_from:
            _check_known(f"{where}.id_from", column, known)


@dataclass(frozen=True, kw_only=True)
class UserAttribute:
    """A slowly changing fact about a user: the newest value of `attribute` in `stream`.

    It is known only while the user has such an event in the dataset's longest window.
    """

    name: str
    stream: str
    attribute: str

    def __post_init__(self) -> None:
        _check_name("UserAttribute.name", self.name)


@dataclass(frozen=True, kw_only=True)
class SparseFeature:
    """A legacy sparse feature: the ids of an attribute over a window, newest or largest first.

    Without `scored`: distinct ids by the time of their last event, newest first ("ads that a person
    clicked in the last N days"). With it: (id, number of events), largest count first ("pages that
    a person visited with a score of how many visits"). Ties by id, ascending.
    """

    name: str
    stream: str
    attribute: str
    window_days: int
    max_ids: int
    scored: bool = False

    def __post_init__(self) -> None:
        _check_name("SparseFeature.name", self.name)
        where = f"SparseFeature({self.name})"
        _check(self.window_days >= 1, f"{where}.window_days", self.window_days, "use 1 day or more")
        _check(self.max_ids >= 1, f"{where}.max_ids", self.max_ids, "use 1 id or more")


@dataclass(frozen=True, kw_only=True)
class DenseFeature:
    """One number about a user over a window that ends at the cutoff.

    Args:
        stream: whose events are counted.
        aggregate: count, sum, rate or recency.
        window_days: the window's length.
        attribute: what `sum` adds up.
        per: the stream that is a `rate`'s denominator.
    """

    name: str
    stream: str
    aggregate: Aggregate
    window_days: int
    attribute: str | None = None
    per: str | None = None

    def __post_init__(self) -> None:
        _check_name("DenseFeature.name", self.name)
        where = f"DenseFeature({self.name})"
        _check(self.window_days >= 1, f"{where}.window_days", self.window_days, "use 1 day or more")
        _check(
            (self.attribute is not None) == (self.aggregate is Aggregate.SUM),
            f"{where}.attribute", self.attribute, "sum needs the attribute it adds up, others none",
        )  # fmt: skip
        _check(
            (self.per is not None) == (self.aggregate is Aggregate.RATE),
            f"{where}.per", self.per, "rate needs the stream it is per, others none",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ItemFeatures:
    """What is counted about items by the hour, from streams whose `attribute` is an item.

    For each stream and window, two float32 features of a target's item, from the hours that closed
    before its `as_of`: `<stream>_<W>h` = log(1 + events on the item) and `<stream>_share_<W>h` =
    log(1 + 1e4 * its share of the stream's events on all items). And `age_h` = log(1 + hours since
    the item was first seen in any of the streams), -1 where it was not.

    Args:
        streams: stream -> the attribute of it that is an item (vocabulary `item`).
        windows_hours: lengths of the popularity windows.
    """

    streams: tuple[tuple[str, str], ...]
    windows_hours: tuple[int, ...]

    def __post_init__(self) -> None:
        _check(len(self.streams) >= 1, "ItemFeatures.streams", self.streams, "name a stream, or leave item_features out")
        for hours in self.windows_hours:
            _check(hours >= 1, "ItemFeatures.windows_hours", hours, "use 1 hour or more")

    @property
    def names(self) -> tuple[str, ...]:
        """Feature names in their stored order."""
        counted = [
            f"{stream}{share}_{hours}h"
            for stream, _ in self.streams
            for hours in self.windows_hours
            for share in ("", "_share")
        ]
        return (*counted, "age_h")


@dataclass(frozen=True, kw_only=True)
class EventLabel:
    """Positive where the target's user has an event of `stream` in `(time, time + within]`.

    Args:
        stream: the stream that answers.
        within: how long after the target's `time` (in event time) it may come.
        match: (column of the target, attribute of the event) pairs that must be equal; a target's
            columns are `target_id`, `item_id` and its context.
    """

    stream: str
    within: timedelta
    match: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class GivenLabel:
    """The source's impressions carry the answer in `column`: 1, 0, or null where it does not apply.

    The column is kept in `impressions` as `label__<column>` and no feature can reach it.
    """

    column: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A binary prediction task.

    Args:
        label: how the answer is found.
        targets: the kinds of target that it is asked of.
        matures_after: days from a target's `ds` until its answer is final (0: the same day's end).
        domain: value of the dataset's domain feature that the task is limited to; None: all.
        sampled: negatives were sampled, so every metric of it is a sampled metric and says so.
        description: one sentence for the report.
    """

    name: str
    label: EventLabel | GivenLabel
    targets: tuple[str, ...]
    matures_after: int = 0
    domain: int | str | None = None
    sampled: bool = False
    description: str = ""

    def __post_init__(self) -> None:
        _check_name("Task.name", self.name)
        _check(self.matures_after >= 0, f"Task({self.name}).matures_after", self.matures_after, "use 0 days or more")
        if isinstance(self.label, EventLabel):
            days = -(-self.label.within // _ONE_DAY)
            _check(
                self.matures_after >= days or self.label.within <= timedelta(0),
                f"Task({self.name}).matures_after", self.matures_after,
                f"an event may come {self.label.within} later; make it {days} days or more",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Everything that the system needs to know about one set of event logs.

    Args:
        name: prefixes every DAG id, asset, lake path and MLflow name.
        first_day: the first day that the source has.
        utc_offset: of the zone that days are cut in.
        user_id_type, item_id_type: how ids are stored.
        streams, targets, tasks: what happens, what is scored, what is asked.
        user_attributes, sparse_features, dense_features: of a user, built by the nightly job.
        item_features: of a target's item, by the hour.
        domain: the context feature whose values are domains (feed, stories), for per-domain metrics.
        serve_delay: how long before midnight the nightly job has to stop reading.
        held_out_share: share of users (by hash) whose labels only the gate and the reports see.
        max_part_rows: events plus targets of one user-day in one row of `examples`; more become parts.
        base_days: every so many days `sequences` holds all users.
        models: names of the upstream models that publish user embeddings.
        simulated: the data is made up; said wherever results appear.
    """

    name: str
    first_day: str
    streams: tuple[EventStream, ...]
    targets: tuple[Target, ...]
    tasks: tuple[Task, ...]
    utc_offset: timedelta = timedelta(0)
    user_id_type: IdType = IdType.INT64
    item_id_type: IdType = IdType.INT64
    user_attributes: tuple[UserAttribute, ...] = ()
    sparse_features: tuple[SparseFeature, ...] = ()
    dense_features: tuple[DenseFeature, ...] = ()
    item_features: ItemFeatures | None = None
    domain: str | None = None
    serve_delay: timedelta = timedelta(0)
    held_out_share: float = 0.1
    max_part_rows: int = 1024
    base_days: int = 7
    models: tuple[str, ...] = ("sum", "sequence")
    simulated: bool = False
    description: str = ""
    _streams: dict[str, EventStream] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("Dataset.name", self.name)
        where = f"Dataset({self.name})"
        from feature_store.days import parse_day  # days raises DataError; here it is the spec's fault

        try:
            parse_day(self.first_day)
        except Exception:
            raise SpecError(f"{where}.first_day is {self.first_day!r}: write it as YYYY-MM-DD") from None
        _check(len(self.streams) > 0, f"{where}.streams", self.streams, "declare at least one stream")
        _check(len(self.targets) > 0, f"{where}.targets", self.targets, "declare what is scored")
        _check(len(self.tasks) > 0, f"{where}.tasks", self.tasks, "declare at least one task")
        _check(len(self.models) > 0, f"{where}.models", self.models, "name at least one upstream model")
        _check(
            abs(self.utc_offset) < _ONE_DAY, f"{where}.utc_offset", self.utc_offset, "less than a day"
        )
        _check(
            timedelta(0) <= self.serve_delay < _ONE_DAY,
            f"{where}.serve_delay", self.serve_delay, "0 up to less than a day",
        )  # fmt: skip
        _check(
            0 < self.held_out_share < 0.5, f"{where}.held_out_share", self.held_out_share, "a share between 0 and 0.5"
        )
        _check(self.max_part_rows >= 2, f"{where}.max_part_rows", self.max_part_rows, "use 2 or more")
        _check(self.base_days >= 1, f"{where}.base_days", self.base_days, "use 1 day or more")
        for what in ("streams", "targets", "tasks", "user_attributes", "sparse_features", "dense_features"):
            _check_unique(f"{where}.{what}", (x.name for x in getattr(self, what)))
        _check_unique(f"{where}.models", self.models)
        _check_unique(
            f"{where} user features",
            [f.name for f in (*self.user_attributes, *self.sparse_features, *self.dense_features)],
        )
        for stream in self.streams:
            self._streams[stream.name] = stream
        self._check_shared_names()
        self._check_features()
        self._check_tasks()

    def _check_shared_names(self) -> None:
        reserved = {"user_id", "item_id", "event_id", "event_time", "ingest_time", "available_time",
                    "stream", "ds", "target", "target_id", "time", "as_of", "part"}  # fmt: skip
        for groups, what in ((self.streams, "streams"), (self.targets, "targets")):
            seen: dict[str, Attribute] = {}
            for group in groups:
                for a in group.attributes if isinstance(group, EventStream) else group.context:
                    where = f"Dataset({self.name}).{what}: {group.name}.{a.name}"
                    _check(a.name not in reserved, where, a.name, "the name is a column of ours; rename it")
                    _check(
                        seen.setdefault(a.name, a) == a,
                        where, a, f"declared otherwise before as {seen[a.name]}; one name, one meaning",
                    )  # fmt: skip
        vocabularies: dict[str, IdType] = {"item": self.item_id_type, "user": self.user_id_type}
        for a in (*self.event_attributes, *self.context_features):
            if a.kind is Kind.CATEGORICAL:
                known = vocabularies.setdefault(a.vocabulary, a.id_type)
                _check(
                    known is a.id_type,
                    f"Attribute({a.name}).id_type", a.id_type, f"vocabulary {a.vocabulary!r} has {known}",
                )  # fmt: skip
        if self.domain is not None:
            _check_known(f"Dataset({self.name}).domain", self.domain, [c.name for c in self.context_features])

    def _check_features(self) -> None:
        known = [s.name for s in self.streams]
        for f in (*self.user_attributes, *self.sparse_features, *self.dense_features):
            where = f"{type(f).__name__}({f.name})"
            _check_known(f"{where}.stream", f.stream, known)
            if isinstance(f, DenseFeature) and f.per is not None:
                _check_known(f"{where}.per", f.per, known)
            if f.attribute is None:
                continue
            stream = self.stream(f.stream)
            _check_known(f"{where}.attribute", f.attribute, [a.name for a in stream.attributes])
            wanted = Kind.NUMERIC if isinstance(f, DenseFeature) else Kind.CATEGORICAL
            _check(
                stream.attribute(f.attribute).kind is wanted,
                f"{where}.attribute", f.attribute, f"it has to be {wanted}",
            )  # fmt: skip
        if self.item_features is not None:
            for stream_name, attribute in self.item_features.streams:
                _check_known("ItemFeatures.streams", stream_name, known)
                names = [a.name for a in self.stream(stream_name).attributes if a.vocabulary == "item"]
                _check_known(f"ItemFeatures.streams[{stream_name}]", attribute, names)

    def _check_tasks(self) -> None:
        targets = {t.name: t for t in self.targets}
        for task in self.tasks:
            where = f"Task({task.name})"
            _check(len(task.targets) > 0, f"{where}.targets", task.targets, "name the targets it is asked of")
            for name in task.targets:
                _check_known(f"{where}.targets", name, list(targets))
            if task.domain is not None:
                _check(
                    self.domain is not None, f"{where}.domain", task.domain, "the dataset declares no domain feature"
                )
            if isinstance(task.label, EventLabel):
                _check_known(f"{where}.label.stream", task.label.stream, list(self._streams))
                events = [a.name for a in self.stream(task.label.stream).attributes]
                for ours, theirs in task.label.match:
                    for name in task.targets:
                        context = [c.name for c in targets[name].context]
                        _check_known(f"{where}.label.match", ours, ["target_id", "item_id", *context])
                    _check_known(f"{where}.label.match", theirs, events)

    def stream(self, name: str) -> EventStream:
        """The stream called `name`."""
        return self._streams[name]

    def task(self, name: str) -> Task:
        """The task called `name`.

        Raises:
            SpecError: there is none.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise SpecError(f"task is {name!r}: {self.name} has {', '.join(t.name for t in self.tasks)}")

    @cached_property
    def event_attributes(self) -> tuple[Attribute, ...]:
        """Attributes of all streams, each once, in order of first declaration."""
        return tuple({a.name: a for s in self.streams for a in s.attributes}.values())

    @cached_property
    def context_features(self) -> tuple[Attribute, ...]:
        """Context features of all targets, each once, in order of first declaration."""
        return tuple({a.name: a for t in self.targets for a in t.context}.values())

    @cached_property
    def given_labels(self) -> tuple[str, ...]:
        """Columns of the source's impressions that hold answers."""
        return tuple({t.label.column: None for t in self.tasks if isinstance(t.label, GivenLabel)})

    @cached_property
    def window_days(self) -> int:
        """The longest window of any user feature: the reach of `aggregates`."""
        windows = [f.window_days for f in (*self.sparse_features, *self.dense_features)]
        return max(windows, default=1)

    @cached_property
    def hash(self) -> str:
        """16 hex digits that change with anything that the tables depend on."""
        return hashlib.sha256(_canonical(self).encode()).hexdigest()[:16]


_NOT_IN_TABLES = {"description", "models", "held_out_share", "simulated", "_streams"}


def _canonical(value: object) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        inner = ",".join(
            f"{f.name}={_canonical(getattr(value, f.name))}" for f in fields(value) if f.name not in _NOT_IN_TABLES
        )
        return f"{type(value).__name__}({inner})"
    if isinstance(value, tuple):
        return "[" + ",".join(map(_canonical, value)) + "]"
    return repr(value)
