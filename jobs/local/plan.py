"""What a run has to do: which (stage, day) pairs, what starts them, and which of them cannot come.

Airflow's asset conditions say what follows a run that ends; they cannot say which days are missing, which
input has to be announced for a run to go on, or that nothing more will come.

Pure: states in, decisions out. A pair is (DAG id, day); its state is that of its newest run.

| newest run | at the start of a run |
|---|---|
| none, started by the clock | backfilled |
| none, everything that it waits for is done | triggered |
| none, something that it waits for is not done | what is done is announced again; the rest will be when it is |
| failed | its failed tasks run again |
| queued, running | waited for |
| success | done, unless what it made is not current: then as where there is none |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from feature_store.days import add_days, day_range
from feature_store.errors import MissingPartitionError, SpecError, StalePartitionError
from feature_store.pipeline import Stage, stages
from feature_store.spec import Dataset

Pair = tuple[str, str]
States = Mapping[Pair, str]

DONE, FAILED, WAITING = "success", "failed", "waiting"
SIMULATED_DAYS = 10


def choose_days(dataset: Dataset, first: str | None, last: str | None) -> list[str]:
    """The days of a run. By default it begins where the data do; simulated data have a default end.

    Raises:
        SpecError: no last day, the last before the first, or the first before the data begin.
    """
    first = first or dataset.first_day
    if first < dataset.first_day:
        raise SpecError(
            f"FROM is {first}: {dataset.name} begins on {dataset.first_day}; choose that day or a later one"
        )
    if not last:
        if not dataset.simulated:
            raise SpecError(
                f"TO is missing: name the last day to build, as in TO={add_days(first, 6)}"
            )
        last = add_days(first, SIMULATED_DAYS - 1)
    days = day_range(first, last)
    if not days:
        raise SpecError(f"TO is {last}: choose {first} (FROM) or a later day")
    return days


def check_history(dataset: Dataset, first: str, built: Collection[str]) -> None:
    """Whether a run may begin on `first` when the lake holds the days `built`.

    Raises:
        MissingPartitionError: it would leave a gap, over which histories cannot be carried.
    """
    if not built or first <= min(built) or add_days(first, -1) in built:
        return
    last = max(day for day in built if day < first)
    raise MissingPartitionError(
        f"FROM is {first}, but {dataset.name} is built up to {last}: its histories would have a gap; "
        f"choose FROM={add_days(last, 1)} or earlier"
    )


def check_current(dataset: Dataset, first: str, stale: Collection[str]) -> None:
    """Whether what a run from `first` on builds on is current, when the days `stale` are not.

    Raises:
        StalePartitionError: a day before is not.
    """
    before = [day for day in sorted(stale) if day < first]
    if before:
        raise StalePartitionError(
            f"FROM is {first}, but {len(before)} days before it, from {before[0]} on, were built from "
            f"sources that were replaced, or under a spec that has changed: choose FROM={before[0]}, "
            "or leave it out"
        )


@dataclass(frozen=True)
class Plan:
    """The pairs of a run over consecutive `days`, and the rules between them."""

    dataset: Dataset
    days: tuple[str, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Producers first."""
        return stages(self.dataset)

    @property
    def dag_ids(self) -> list[str]:
        """DAG ids, producers first."""
        return [s.dag_id for s in self.stages]

    @property
    def pairs(self) -> list[Pair]:
        """Every pair that has to be done, by day, producers first."""
        return [(s.dag_id, day) for day in self.days for s in self.stages]

    def inputs(self, pair: Pair) -> list[tuple[str, str, Pair]]:
        """What a pair waits for: (asset, day, the pair that emits it)."""
        dag_id, day = pair
        stage = next(s for s in self.stages if s.dag_id == dag_id)
        producers = {asset: s.dag_id for s in self.stages for asset in s.emits}
        found = []
        for wait in stage.waits:
            wanted = add_days(day, -wait.days_before)
            found.append((wait.asset, wanted, (producers[wait.asset], wanted)))
        return found

    def met(self, pair: Pair, states: States) -> list[tuple[str, str]]:
        """Those inputs (asset, day) of a pair that are there. What is before the first day counts as there:
        the lake was found to hold it, or nothing comes before it."""
        return [
            (asset, day)
            for asset, day, producer in self.inputs(pair)
            if day < self.days[0] or states.get(producer) == DONE
        ]

    def without_run(self, states: States) -> list[Pair]:
        """Pairs that no run was made for."""
        return [p for p in self.pairs if p not in states]

    def by_clock(self, states: States) -> list[str]:
        """Days to backfill."""
        first = self.stages[0].dag_id
        return [day for dag_id, day in self.without_run(states) if dag_id == first]

    def ready(self, states: States) -> list[Pair]:
        """Pairs without a run that have all that they wait for: nothing is going to start them."""
        return [
            p
            for p in self.without_run(states)
            if self.inputs(p) and len(self.met(p, states)) == len(self.inputs(p))
        ]

    def announcements(self, states: States) -> list[tuple[str, str]]:
        """Assets (name, day) to announce so that pairs start when the rest of their inputs come."""
        ready = set(self.ready(states))
        found = [a for p in self.without_run(states) if p not in ready for a in self.met(p, states)]
        return list(dict.fromkeys(found))

    def failed(self, states: States) -> list[Pair]:
        """Pairs whose newest run failed."""
        return [p for p in self.pairs if states.get(p) == FAILED]

    def blocked(self, states: States) -> set[Pair]:
        """Pairs without a run that cannot come, as something that they wait for failed or cannot come."""
        lost: set[Pair] = set(self.failed(states))
        blocked: set[Pair] = set()
        for pair in self.pairs:  # by day, producers first: one pass finds all
            if pair not in states and any(producer in lost for _, _, producer in self.inputs(pair)):
                lost.add(pair)
                blocked.add(pair)
        return blocked

    def over(self, states: States) -> bool:
        """Whether every pair is done, failed or cannot come."""
        blocked = self.blocked(states)
        return all(p in blocked or states.get(p) in (DONE, FAILED) for p in self.pairs)
