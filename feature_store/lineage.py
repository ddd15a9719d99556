"""What a partition was made from, and whether it still is what the lake and the spec would give.

A partition has an *identity*, 16 hex digits that the ledger keeps:

    events, impressions, truth   of the rows themselves, in any order
    every other table            of the identities of the source partitions that its rows can depend on

each together with the *definition* of its table: a hash of the parts of the spec that decide the
table's rows. Building a partition again from the same source gives the same identity, on whatever
engine or Delta version, incrementally or in full. A partition is *current* where the identity that
the ledger keeps is the one that it would get now; whoever reads several partitions together reads
current ones only, so that what is joined was made from the same sources under the same spec.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

from feature_store.days import DAY_US, day_of, day_range, end_us, micros, shift
from feature_store.errors import MissingPartitionError, StalePartitionError
from feature_store.ledger import Partition, command, pin, pins
from feature_store.spec import Dataset

SOURCES = ("events", "impressions", "truth")
FEATURES = ("sequences", "aggregates", "item_aggregates", "examples", "labels")
_BEGINNING = "0001-01-01"

# Raised when a job computes other rows from the same inputs, so that what older code made is rebuilt.
_REVISION = 1

# What says how a model reads a value, and not what the value is.
_NOT_IN_ROWS = {"vocabulary", "description", "sampled"}


@dataclass(frozen=True)
class Days:
    """Days of a source table: every one from `first` to `last`, or those of `only`."""

    table: str
    first: str = "9999-12-31"
    last: str = ""
    only: frozenset[str] = frozenset()

    def among(self, written: Mapping[str, Partition]) -> dict[str, Partition]:
        """Those of `written` that are meant, in its order."""
        return {d: p for d, p in written.items() if self.first <= d <= self.last or d in self.only}


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The days of source tables whose rows a partition can depend on."""

    events: Days = Days("events")
    impressions: Days = Days("impressions")


@dataclass(frozen=True)
class Stale:
    """A partition that is not current, and why, in words that follow its name."""

    partition: Partition
    reason: str


def cutoff_us(dataset: Dataset, ds: str) -> int:
    """Where the windows of `aggregates(ds)` end: features see `available_time < cutoff`."""
    return end_us(ds, dataset.utc_offset) - micros(dataset.serve_delay)


def event_days(dataset: Dataset, ds: str) -> list[str]:
    """The partitions of `events` that the windows of `aggregates(ds)` reach into."""
    first = cutoff_us(dataset, ds) - dataset.window_days * DAY_US
    return day_range(day_of(first, dataset.utc_offset), ds)


def definition(dataset: Dataset, table: str) -> str:
    """16 hex digits that change with whatever of the spec decides the rows of `table`, and with nothing
    else: the order of features, say, does not."""
    return _digest(_REVISION, table, *_parts(dataset, table))


def _parts(dataset: Dataset, table: str) -> list[object]:
    """What the rows of `table` depend on in the spec; other tables by their definition."""
    zone = dataset.utc_offset
    if table == "events":
        streams = [(s.name, s.delay, s.id_from, _sorted(s.attributes)) for s in dataset.streams]
        return [zone, dataset.user_id_type, _sorted(streams)]
    if table in ("impressions", "truth"):
        targets = [(t.name, t.has_item, t.id_from, _sorted(t.context)) for t in dataset.targets]
        ids = (dataset.user_id_type, dataset.item_id_type, dataset.target_id_type)
        return [zone, *ids, _sorted(targets), sorted(dataset.given_labels)]
    if table == "sequences":
        lengths = sorted((s.name, s.max_events) for s in dataset.streams)
        return [definition(dataset, "events"), lengths]
    if table == "aggregates":
        features = (dataset.user_attributes, dataset.sparse_features, dataset.dense_features)
        return [definition(dataset, "events"), dataset.serve_delay, *map(_sorted, features)]
    if table == "item_aggregates":
        counted = dataset.item_features
        if counted is None:
            return []
        pairs = counted.co_occurrence
        together: list[object] = []
        if pairs is not None:
            held = dataset.stream(pairs.stream).max_events
            together = [pairs.stream, pairs.attribute, sorted(pairs.beside), sorted(pairs.before)]
            together += [pairs.lags, held]
        return [definition(dataset, "events"), sorted(counted.streams), together]
    if table == "examples":
        items = dataset.item_features
        windows = () if items is None else tuple(sorted(items.windows_hours))
        made_from = ("sequences", "aggregates", "item_aggregates", "impressions")
        kinds = [t.name for t in dataset.targets], [s.name for s in dataset.streams]
        made = [definition(dataset, t) for t in made_from]
        return [*made, windows, dataset.max_part_rows, *kinds]
    if table == "labels":
        return [definition(dataset, "examples"), dataset.domain, _sorted(dataset.tasks)]
    assert table == "user_embeddings", table
    return [definition(dataset, "labels"), dataset.held_out_share]


def reach(dataset: Dataset, table: str, ds: str) -> Reach:
    """The days of source tables that the rows of partition `ds` of `table` can depend on."""
    events, impressions = Days("events", _BEGINNING, ds), Days("impressions", _BEGINNING, ds)
    if table == "aggregates":
        return Reach(events=Days("events", event_days(dataset, ds)[0], ds))
    if table in ("sequences", "item_aggregates"):
        return Reach(events=events)
    if table == "examples":
        return Reach(events=events, impressions=Days("impressions", only=frozenset([ds])))
    if table == "labels":
        shown = frozenset(shift(ds, -t.matures_after) for t in dataset.tasks)
        return Reach(events=events, impressions=Days("impressions", only=shown))
    assert table == "user_embeddings", table  # of a model that was trained on every day so far
    return Reach(events=events, impressions=impressions)


class Lineage:
    """The ledger's rows, and what each partition would be made from now.

    Args:
        dataset: the spec of this moment.
        rows: every row of the ledger about a table, oldest first; asked for once per table.
    """

    def __init__(self, dataset: Dataset, rows: Callable[[str], Iterable[Partition]]) -> None:
        self.dataset = dataset
        self._rows = rows
        self._newest: dict[str, dict[tuple[str, str], Partition]] = {}
        self._identities: dict[tuple[str, int], str] = {}  # of every version of a partition

    def days(self, table: str, model: str = "") -> dict[str, Partition]:
        """The newest row of each day of a table (and model), ascending by day."""
        return {ds: p for (m, ds), p in sorted(self._load(table).items()) if m == model}

    def get(self, table: str, ds: str, model: str = "") -> Partition | None:
        """The newest row of a partition; None where it was not written."""
        return self._load(table).get((model, ds))

    def identity(self, table: str, ds: str, content: str = "") -> str:
        """The identity that a partition would get if it was written now.

        Args:
            content: hash of the rows, for a source table.
        """
        made_from = content if table in SOURCES else self.sources(table, ds)
        return _digest(definition(self.dataset, table), made_from)

    def sources(self, table: str, ds: str) -> str:
        """Hash of the source partitions that partition `ds` of a table can depend on."""
        return _digest([(pin(p.table, p.ds), p.identity) for p in self._reached(table, ds)])

    def _reached(self, table: str, ds: str) -> list[Partition]:
        found = reach(self.dataset, table, ds)
        days = (found.events, found.impressions)
        return [p for d in days for p in d.among(self.days(d.table)).values()]

    def stale(self, table: str, ds: str, model: str = "") -> Stale | None:
        """What is wrong with a partition that was written; None where it is current."""
        partition = self.get(table, ds, model)
        assert partition is not None
        wanted = definition(self.dataset, table)
        if partition.definition != wanted:
            made = partition.definition or "of an earlier release"
            return Stale(partition, f"was made under definition {made}, and the spec's is {wanted}")
        if table in SOURCES or partition.identity == self.identity(table, ds):
            return None
        read = {key: self._pinned(key) for key in sorted(partition.inputs)}
        for key, now in read.items():
            version = partition.inputs[key]
            if now is not None and self._identities.get((key, version)) != now.identity:
                return Stale(
                    partition,
                    f"was made from {key} version {version}, which {now.version} replaced",
                )
        for now in read.values():
            if now is not None and (root := self.stale(now.table, now.ds, now.model)):
                return root
        written = [p for p in self._reached(table, ds) if p.written_at > partition.written_at]
        newer = ", ".join(pin(p.table, p.ds) for p in written[:3]) or "a day that is gone"
        return Stale(partition, f"was made without {newer}, on which it depends")

    def replaced(self, key: str, version: int) -> str:
        """What became of the partition that an input pins, in words; "" where it is what it was."""
        now = self._pinned(key)
        if now is None:
            return ""
        if now.version != version and self._identities.get((key, version)) != now.identity:
            return f"{key} version {version}, which {now.version} replaced"
        found = self.stale(now.table, now.ds, now.model)
        return "" if found is None else f"{key}, which {found.reason}"

    def identities(self, inputs: Mapping[str, int]) -> dict[str, str]:
        """The identity of each partition that `inputs` pin, as it was at its version."""
        for key in inputs:
            self._load(key.partition("/")[0])
        return {k: self._identities.get((k, v), f"version {v}") for k, v in inputs.items()}

    def require(self, table: str, days: Sequence[str], model: str = "") -> dict[str, int]:
        """Pins of partitions that are current; see `Lake.require`."""
        written = self.days(table, model)
        missing = [day for day in days if day not in written]
        if missing:
            raise MissingPartitionError(self.missing(table, missing, model))
        for day in days:
            found = self.stale(table, day, model)
            if found is not None:
                p = found.partition
                raise StalePartitionError(
                    f"{self._name(p.table, p.model)} {p.ds} (version {p.version}) {found.reason}: run make "
                    f"run DATASET={self.dataset.name}, which builds again what is not current, or "
                    f"{command(self.dataset.name, p.table, p.ds, p.model)}, and then what was made from it"
                )
        return pins({day: written[day] for day in days})

    def missing(self, table: str, days: Sequence[str], model: str = "") -> str:
        """The sentence that days of a table were not written, and what writes them."""
        shown = ", ".join(days[:5]) + (f" and {len(days) - 5} more" if len(days) > 5 else "")
        job = command(self.dataset.name, table, days[0] if days else "<day>", model)
        return f"{self._name(table, model)} has no partition for {shown or 'any day'}: run {job}"

    def check_inputs(self, table: str, ds: str, inputs: Mapping[str, int]) -> None:
        """Whether every partition that a new one is made from is still there and current.

        Raises:
            StalePartitionError: one was replaced, or is not current any more.
        """
        for key, version in inputs.items():
            replaced = self.replaced(key, version)
            if replaced:
                raise StalePartitionError(
                    f"{self.dataset.name}.{table} {ds} is made from {replaced}: build that first, and run "
                    "the same command again"
                )

    def _name(self, table: str, model: str) -> str:
        return f"{self.dataset.name}.{table}" + (f" of model {model}" if model else "")

    def stale_days(self, table: str, model: str = "") -> list[str]:
        """Days of a table that are written and not current, ascending."""
        return [ds for ds in self.days(table, model) if self.stale(table, ds, model)]

    def _pinned(self, key: str) -> Partition | None:
        table, _, rest = key.partition("/")
        model, _, ds = rest.rpartition("/")
        return self.get(table, ds, model)

    def _load(self, table: str) -> dict[tuple[str, str], Partition]:
        if table not in self._newest:
            self._newest[table] = {}
            for row in self._rows(table):
                self._newest[table][row.model, row.ds] = row
                self._identities[pin(row.table, row.ds, row.model), row.version] = row.identity
        return self._newest[table]


def feature_tables(dataset: Dataset) -> tuple[str, ...]:
    """The tables that the feature jobs write."""
    return tuple(t for t in FEATURES if t != "item_aggregates" or dataset.item_features)


def _sorted(values: Iterable[object]) -> list[object]:
    return sorted(map(_plain, values), key=repr)


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in fields(value)
            if f.name not in _NOT_IN_ROWS
        }
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
