"""The spec: one frozen description of a dataset, from which everything else is derived.

Table contracts and their checks (`tables/`), quality suites (`quality.py`), the loader's batches, the
models' feature keys and their order, and the DAGs all read a `Dataset`; none of them declares a
column again. A contradiction fails here, when the spec is built, naming the field, the value and
the remedy. How a table is sized or a task is weighted is model configuration and is not here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import timedelta
from functools import cached_property

from feature_store.days import parse_day
from feature_store.errors import DataError, SpecError
from feature_store.presets import check_models
from feature_store.spec_parts import (
    Aggregate,
    Attribute,
    CoOccurrence,
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
    check,
    check_dataset_name,
    check_known,
    check_unique,
)

__all__ = [
    "Aggregate",
    "Attribute",
    "CoOccurrence",
    "Dataset",
    "DenseFeature",
    "EventLabel",
    "EventStream",
    "GivenLabel",
    "IdType",
    "ItemFeatures",
    "Kind",
    "SparseFeature",
    "Target",
    "Task",
    "UserAttribute",
]

_ONE_DAY = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Everything that the system needs to know about one set of event logs.

    Args:
        name: prefixes every DAG id, asset, lake path and MLflow name. None of its words but the first is
            `downstream`, which stands between dataset and task in the id of a DAG.
        first_day: the first day that the source has.
        utc_offset: of the zone that days are cut in.
        user_id_type, item_id_type, target_id_type: how ids are stored. Text that is no number needs
            STRING, and is then the same text in every table and in predictions.
        streams, targets, tasks: what happens, what is scored, what is asked.
        user_attributes, sparse_features, dense_features: of a user, built by the nightly job.
        item_features: of a target's item, by the hour.
        domain: the context feature whose values are domains (feed, stories), for per-domain metrics.
        serve_delay: how long before midnight the nightly job has to stop reading.
        held_out_share: share of users (by hash) whose labels only the gate and the reports see.
        max_part_rows: events plus targets of one user-day in one row of `examples`; more become parts.
        base_days: every so many days `sequences` holds all users.
        models: names of the upstream models that publish user embeddings; entries of `presets/`.
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
    target_id_type: IdType = IdType.INT64
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
    _streams: dict[str, EventStream] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        check_dataset_name("Dataset.name", self.name)
        where = f"Dataset({self.name})"
        try:
            parse_day(self.first_day)
        except DataError:
            raise SpecError(
                f"{where}.first_day is {self.first_day!r}: write it as YYYY-MM-DD"
            ) from None
        check(
            len(self.streams) > 0, f"{where}.streams", self.streams, "declare at least one stream"
        )
        check(len(self.targets) > 0, f"{where}.targets", self.targets, "declare what is scored")
        check(len(self.tasks) > 0, f"{where}.tasks", self.tasks, "declare at least one task")
        check(
            len(self.models) > 0, f"{where}.models", self.models, "name at least one upstream model"
        )
        check(
            abs(self.utc_offset) < _ONE_DAY,
            f"{where}.utc_offset",
            self.utc_offset,
            "less than a day",
        )
        check(
            timedelta(0) <= self.serve_delay < _ONE_DAY,
            f"{where}.serve_delay", self.serve_delay, "0 up to less than a day",
        )  # fmt: skip
        check(
            0 < self.held_out_share < 0.5,
            f"{where}.held_out_share",
            self.held_out_share,
            "a share between 0 and 0.5",
        )
        check(
            self.max_part_rows >= 2, f"{where}.max_part_rows", self.max_part_rows, "use 2 or more"
        )
        check(self.base_days >= 1, f"{where}.base_days", self.base_days, "use 1 day or more")
        for what in (
            "streams",
            "targets",
            "tasks",
            "user_attributes",
            "sparse_features",
            "dense_features",
        ):
            check_unique(f"{where}.{what}", (x.name for x in getattr(self, what)))
        check_unique(f"{where}.models", self.models)
        check_models(f"{where}.models", self.models, self.name)
        check_unique(
            f"{where} user features",
            [f.name for f in self.user_features],
        )
        for stream in self.streams:
            self._streams[stream.name] = stream
        self._check_shared_names()
        self._check_features()
        self._check_tasks()
        self._check_columns()

    def _check_shared_names(self) -> None:
        from feature_store.tables import reserved_names  # noqa: PLC0415 tables are of a spec

        reserved = reserved_names(self)
        for groups, what in ((self.streams, "streams"), (self.targets, "targets")):
            seen: dict[str, Attribute] = {}
            for group in groups:
                for a in group.attributes if isinstance(group, EventStream) else group.context:
                    where = f"Dataset({self.name}).{what}: {group.name}.{a.name}"
                    check(
                        a.name not in reserved,
                        where,
                        a.name,
                        "the name is a column of ours; rename it",
                    )
                    check(
                        seen.setdefault(a.name, a) == a,
                        where, a, f"declared otherwise before as {seen[a.name]}; one name, one meaning",
                    )  # fmt: skip
        taken = reserved | {c.name for c in self.context_features}
        for column in self.given_labels:
            check(
                column not in taken,
                f"Dataset({self.name}): GivenLabel.column",
                column,
                "the name is a column of ours, or a context feature, which an answer cannot be; rename it",
            )
        vocabularies: dict[str, IdType] = {"item": self.item_id_type, "user": self.user_id_type}
        for a in (*self.event_attributes, *self.context_features):
            if a.kind is Kind.CATEGORICAL:
                known = vocabularies.setdefault(a.vocabulary, a.id_type)
                check(
                    known is a.id_type,
                    f"Attribute({a.name}).id_type", a.id_type, f"vocabulary {a.vocabulary!r} has {known}",
                )  # fmt: skip
        if self.domain is not None:
            ids = [c.name for c in self.context_features if c.kind is Kind.CATEGORICAL]
            check_known(f"Dataset({self.name}).domain", self.domain, ids)
        hashed = [t.name for t in self.targets if t.id_from]
        check(
            not hashed or self.target_id_type is IdType.INT64,
            f"Dataset({self.name}).target_id_type", self.target_id_type,
            f"Target({', '.join(hashed)}).id_from makes numbers; use INT64, or leave id_from out",
        )  # fmt: skip

    def _check_features(self) -> None:
        known = [s.name for s in self.streams]
        for f in self.user_features:
            where = f"{type(f).__name__}({f.name})"
            check_known(f"{where}.stream", f.stream, known)
            if isinstance(f, DenseFeature) and f.per is not None:
                check_known(f"{where}.per", f.per, known)
            if f.attribute is None:
                continue
            stream = self.stream(f.stream)
            check_known(f"{where}.attribute", f.attribute, [a.name for a in stream.attributes])
            wanted = Kind.NUMERIC if isinstance(f, DenseFeature) else Kind.CATEGORICAL
            check(
                stream.attribute(f.attribute).kind is wanted,
                f"{where}.attribute", f.attribute, f"it has to be {wanted}",
            )  # fmt: skip
        if self.item_features is not None:
            for stream_name, attribute in self.item_features.streams:
                check_known("ItemFeatures.streams", stream_name, known)
                names = [
                    a.name for a in self.stream(stream_name).attributes if a.vocabulary == "item"
                ]
                check_known(f"ItemFeatures.streams[{stream_name}]", attribute, names)
            check(
                not self.item_features.ordered_ids or self.item_id_type is IdType.INT64,
                "ItemFeatures.ordered_ids", True, f"item ids are {self.item_id_type}: only numbers have an order",
            )  # fmt: skip
            if self.co_occurrence is not None:
                self._check_co_occurrence(self.co_occurrence)

    def _check_co_occurrence(self, pairs: CoOccurrence) -> None:
        check_known("CoOccurrence.stream", pairs.stream, list(self._streams))
        ids = [a for a in self.stream(pairs.stream).attributes if a.kind is Kind.CATEGORICAL]
        items = [a.name for a in ids if a.vocabulary == "item"]
        check_known("CoOccurrence.attribute", pairs.attribute, items)
        shared = [a.name for a in ids if a in self.context_features]
        for name in pairs.beside:
            check_known("CoOccurrence.beside", name, shared)
        for name in pairs.before:
            check_known("CoOccurrence.before", name, [a.name for a in ids])

    def _check_tasks(self) -> None:
        targets = {t.name: t for t in self.targets}
        for task in self.tasks:
            where = f"Task({task.name})"
            check(
                len(task.targets) > 0,
                f"{where}.targets",
                task.targets,
                "name the targets it is asked of",
            )
            for name in task.targets:
                check_known(f"{where}.targets", name, list(targets))
            if task.domain is not None:
                check(
                    self.domain is not None,
                    f"{where}.domain",
                    task.domain,
                    "the dataset declares no domain feature",
                )
                domain = next(c for c in self.context_features if c.name == self.domain)
                wanted = str if domain.id_type is IdType.STRING else int
                check(
                    type(task.domain) is wanted,
                    f"{where}.domain", task.domain, f"{self.domain} is {domain.id_type}; write it as such",
                )  # fmt: skip
            if isinstance(task.label, EventLabel):
                check_known(f"{where}.label.stream", task.label.stream, list(self._streams))
                for name in task.targets:
                    self._check_match(f"{where}.label.match", targets[name], task.label)

    def _check_match(self, where: str, target: Target, label: EventLabel) -> None:
        types = {"target_id": self.target_id_type}
        if target.has_item:
            types["item_id"] = self.item_id_type
        types |= {c.name: c.id_type for c in target.context if c.kind is Kind.CATEGORICAL}
        stream = self.stream(label.stream)
        ids = [a.name for a in stream.attributes if a.kind is Kind.CATEGORICAL]
        for ours, theirs in label.match:
            check_known(where, ours, list(types))
            check_known(where, theirs, ids)
            found = stream.attribute(theirs).id_type
            check(
                types[ours] is found,
                where, (ours, theirs), f"{ours} is {types[ours]} and {theirs} {found}; store them alike",
            )  # fmt: skip

    def _check_columns(self) -> None:
        from feature_store.tables import contracts  # noqa: PLC0415 tables are of a spec

        for table in contracts(self).values():
            check_unique(f"Dataset({self.name}): a column of {table.name}", table.schema.names)

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
        raise SpecError(
            f"task is {name!r}: {self.name} has {', '.join(t.name for t in self.tasks)}"
        )

    @cached_property
    def event_attributes(self) -> tuple[Attribute, ...]:
        """Attributes of all streams, each once, in order of first declaration."""
        return tuple({a.name: a for s in self.streams for a in s.attributes}.values())

    @cached_property
    def context_features(self) -> tuple[Attribute, ...]:
        """Context features of all targets, each once, in order of first declaration."""
        return tuple({a.name: a for t in self.targets for a in t.context}.values())

    @cached_property
    def user_features(self) -> tuple[UserAttribute | SparseFeature | DenseFeature, ...]:
        """What the nightly job builds of a user: attributes, sparse, dense."""
        return (*self.user_attributes, *self.sparse_features, *self.dense_features)

    @cached_property
    def given_labels(self) -> tuple[str, ...]:
        """Columns of the source's impressions that hold answers."""
        return tuple({t.label.column: None for t in self.tasks if isinstance(t.label, GivenLabel)})

    @cached_property
    def co_occurrence(self) -> CoOccurrence | None:
        """What is counted about items and what they come together with, if anything is."""
        return None if self.item_features is None else self.item_features.co_occurrence

    @cached_property
    def window_days(self) -> int:
        """The longest window of any user feature: the reach of `aggregates`."""
        sparse = [f.window_days for f in self.sparse_features]
        return max([*sparse, *(f.window_days for f in self.dense_features)], default=1)

    @cached_property
    def hash(self) -> str:
        """16 hex digits that change with anything that a trained model depends on."""
        return hashlib.sha256(_canonical(self).encode()).hexdigest()[:16]


_NOT_IN_HASH = {"description", "models", "simulated", "_streams"}


def _canonical(value: object) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        inner = ",".join(
            f"{f.name}={_canonical(getattr(value, f.name))}"
            for f in fields(value)
            if f.name not in _NOT_IN_HASH
        )
        return f"{type(value).__name__}({inner})"
    if isinstance(value, tuple):
        return "[" + ",".join(map(_canonical, value)) + "]"
    return repr(value)
