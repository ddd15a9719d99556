"""The parts that a spec is made of: attributes, event streams, targets, features, labels, tasks.

Each checks what it can know alone; `spec.Dataset` checks that they fit together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from feature_store.errors import SpecError

MAX_FLOAT32 = 3.4028234663852886e38
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST_FOLDER = 100  # beside what else stands in a path
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
    SUM = "sum"  # of a numeric attribute; what float32 cannot hold is its largest number
    RATE = "rate"  # events of `stream` per event of `per`; 0 where there is none of `per`
    RECENCY = "recency"  # hours from the newest event to the cutoff; the window's length if none


def check(ok: bool, field_name: str, value: object, remedy: str) -> None:
    if not ok:
        raise SpecError(f"{field_name} is {value!r}: {remedy}")


def check_name(field_name: str, value: str) -> None:
    check(
        isinstance(value, str) and _NAME.fullmatch(value) is not None,
        field_name,
        value,
        "use lower-case words joined by single underscores ('__' separates parts of a column name)",
    )


def check_folder_name(field_name: str, value: str) -> None:
    check_name(field_name, value)
    check(
        len(value) <= _LONGEST_FOLDER,
        field_name,
        value,
        f"it names folders and files: use at most {_LONGEST_FOLDER} letters",
    )


def check_dataset_name(field_name: str, value: str) -> None:
    """Refuse what names no folder, and what could give a DAG the id of another dataset's."""
    check_folder_name(field_name, value)
    check(
        "downstream" not in value.split("_")[1:],
        field_name,
        value,
        "a DAG of it could have the id of another dataset's, <dataset>_downstream_<task>: name it "
        "without the word 'downstream', or begin with that word",
    )


def check_unique(field_name: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        check(value not in seen, field_name, value, "the name is used twice; rename one")
        seen.add(value)


def check_known(field_name: str, value: str, known: Sequence[str]) -> None:
    check(
        value in known, field_name, value, f"not declared; known are {', '.join(known) or 'none'}"
    )


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
        clip: lowest and highest number of a numeric or vector attribute. What lies outside, infinity
            included, is set to the nearer one and counted at ingestion. None: a number that float32
            cannot hold stops the day.
    """

    name: str
    kind: Kind = Kind.CATEGORICAL
    id_type: IdType = IdType.INT64
    vocabulary: str = ""
    dim: int | None = None
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_name("Attribute.name", self.name)
        if not self.vocabulary:
            object.__setattr__(self, "vocabulary", self.name)
        check_name(f"Attribute({self.name}).vocabulary", self.vocabulary)
        if self.clip is not None:
            where = f"Attribute({self.name}).clip"
            check(
                self.kind is not Kind.CATEGORICAL,
                where,
                self.clip,
                "ids are not clipped: leave it out",
            )
            check(
                len(self.clip) == 2 and -MAX_FLOAT32 <= self.clip[0] < self.clip[1] <= MAX_FLOAT32,
                where, self.clip, "give the lowest and the highest number, both finite in float32",
            )  # fmt: skip
        if self.kind is Kind.VECTOR:
            check(
                self.dim is not None and self.dim > 0,
                f"Attribute({self.name}).dim", self.dim, "a vector needs its length, 1 or more",
            )  # fmt: skip
        else:
            check(
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
        id_from: columns that tell a user's events apart; the event id is hashed from the stream, the
            user and them. Empty: the source's `event_id` does, which counts within a user. Where one
            `event_id` is of several events, name it here beside the attribute that tells them apart.
    """

    name: str
    attributes: tuple[Attribute, ...]
    max_events: int
    delay: timedelta = timedelta(0)
    id_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name("EventStream.name", self.name)
        where = f"EventStream({self.name})"
        check(
            self.max_events >= 1, f"{where}.max_events", self.max_events, "keep at least one event"
        )
        check(self.delay >= timedelta(0), f"{where}.delay", self.delay, "a delay is not negative")
        check_unique(f"{where}.attributes", (a.name for a in self.attributes))
        known = ("user_id", "event_time", "event_id", *(a.name for a in self.attributes))
        for column in self.id_from:
            check_known(f"{where}.id_from", column, known)

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
        id_from: columns that tell the kind's targets apart; the target id, an int64, is hashed from the
            kind and them. Empty: the source's `target_id` does, within a user and a kind.
    """

    name: str
    context: tuple[Attribute, ...] = ()
    has_item: bool = True
    id_from: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name("Target.name", self.name)
        where = f"Target({self.name})"
        check_unique(f"{where}.context", (a.name for a in self.context))
        for attribute in self.context:
            check(
                attribute.kind is not Kind.VECTOR,
                f"{where}.context", attribute.name, "context is categorical or numeric",
            )  # fmt: skip
        known = ("user_id", "time", "as_of", "item_id", *(a.name for a in self.context))
        for column in self.id_from:
            check_known(f"{where}.id_from", column, known)


@dataclass(frozen=True, kw_only=True)
class UserAttribute:
    """A slowly changing fact about a user: the newest value of `attribute` in `stream`.

    It is known only while the user has such an event in the dataset's longest window.
    """

    name: str
    stream: str
    attribute: str

    def __post_init__(self) -> None:
        check_name("UserAttribute.name", self.name)


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
        check_name("SparseFeature.name", self.name)
        where = f"SparseFeature({self.name})"
        check(self.window_days >= 1, f"{where}.window_days", self.window_days, "use 1 day or more")
        check(self.max_ids >= 1, f"{where}.max_ids", self.max_ids, "use 1 id or more")


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
        check_name("DenseFeature.name", self.name)
        where = f"DenseFeature({self.name})"
        check(self.window_days >= 1, f"{where}.window_days", self.window_days, "use 1 day or more")
        check(
            (self.attribute is not None) == (self.aggregate is Aggregate.SUM),
            f"{where}.attribute", self.attribute, "sum needs the attribute it adds up, others none",
        )  # fmt: skip
        check(
            (self.per is not None) == (self.aggregate is Aggregate.RATE),
            f"{where}.per", self.per, "rate needs the stream it is per, others none",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CoOccurrence:
    """With what an item's events come together, counted by the hour.

    Two counts, of the events of one stream whose `attribute` is an item. *Beside*: with which value
    of another attribute of the same event (readers of this article by region). *Before*: after which
    values of an attribute, among the 1, 2, .. of the user's events of the stream before it that `lags`
    names (readers of this article by what they read just before, and by what they read lately). The
    item itself is no value of an attribute with its vocabulary: reading it again counts nothing. A
    target's item gets from them, over the `window_days` days before its day and the day's hours that
    closed before its `as_of`, how much more often than by chance it comes beside the target's own
    context, and after each event of its user's history.

    Args:
        stream, attribute: the events, and which attribute of theirs is the item.
        beside: categorical attributes of the stream that are context features of targets too.
        before: categorical attributes of the stream.
        lags: how many earlier events an event is paired with; each number is a count of its own.
        window_days: whole days that the counts reach back; items that matter are younger.
    """

    stream: str
    attribute: str
    beside: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    lags: tuple[int, ...] = (1, 20)
    window_days: int = 3

    def __post_init__(self) -> None:
        where = "CoOccurrence"
        check(
            len(self.beside) + len(self.before) >= 1,
            f"{where}.before", self.before, "name an attribute here or in beside, or leave it out",
        )  # fmt: skip
        check_unique(f"{where}.beside", self.beside)
        check_unique(f"{where}.before", self.before)
        ascending = sorted(set(self.lags)) == list(self.lags)
        good = len(self.lags) >= 1 and ascending and self.lags[0] >= 1 and self.lags[-1] <= 256
        check(good, f"{where}.lags", self.lags, "give numbers from 1 to 256, ascending")
        check(self.window_days >= 1, f"{where}.window_days", self.window_days, "use 1 day or more")


@dataclass(frozen=True, kw_only=True)
class ItemFeatures:
    """What is counted about items by the hour, from streams whose `attribute` is an item.

    For each stream and window, two float32 features of a target's item, from the hours that closed
    before its `as_of`: `<stream>_<W>h` = log(1 + events on the item) and `<stream>_share_<W>h` =
    log(1 + 1e4 * its share of the stream's events on all items). And `age_h` = log(1 + hours from when
    the item was first seen in any of the streams to `as_of`), -1 where no such hour saw it.

    Args:
        streams: stream -> the attribute of it that is an item (vocabulary `item`).
        windows_hours: lengths of the popularity windows.
        co_occurrence: with what an item's events come together.
        ordered_ids: item ids are numbers, and near ones are alike (given by category, or by shelf):
            how far a history's items are from the candidate is a feature then.
    """

    streams: tuple[tuple[str, str], ...]
    windows_hours: tuple[int, ...]
    co_occurrence: CoOccurrence | None = None
    ordered_ids: bool = False

    def __post_init__(self) -> None:
        check(
            len(self.streams) >= 1,
            "ItemFeatures.streams",
            self.streams,
            "name a stream, or leave item_features out",
        )
        for hours in self.windows_hours:
            check(hours >= 1, "ItemFeatures.windows_hours", hours, "use 1 hour or more")

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
            columns are `target_id`, `item_id` and its context. Both are ids of one type.
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

    def __post_init__(self) -> None:
        check_name("GivenLabel.column", self.column)


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
        check_folder_name("Task.name", self.name)
        check(
            self.matures_after >= 0,
            f"Task({self.name}).matures_after",
            self.matures_after,
            "use 0 days or more",
        )
        if isinstance(self.label, EventLabel):
            days = -(-self.label.within // _ONE_DAY)
            check(
                self.matures_after >= days or self.label.within <= timedelta(0),
                f"Task({self.name}).matures_after", self.matures_after,
                f"an event may come {self.label.within} later; make it {days} days or more",
            )  # fmt: skip
