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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from feature_store.errors import MissingPartitionError, StalePartitionError
from feature_store.ledger import Partition, command, pin, pins
from feature_store.spec import Dataset
from feature_store.tables import KINDS, SOURCES, definition, digest


@dataclass(frozen=True)
class Stale:
    """A partition that is not current, and why, in words that follow its name."""

    partition: Partition
    reason: str


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
        return digest(definition(self.dataset, table), made_from)

    def sources(self, table: str, ds: str) -> str:
        """Hash of the source partitions that partition `ds` of a table can depend on."""
        return digest([(pin(p.table, p.ds), p.identity) for p in self._reached(table, ds)])

    def _reached(self, table: str, ds: str) -> list[Partition]:
        found = KINDS[table].reach(self.dataset, ds)
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
