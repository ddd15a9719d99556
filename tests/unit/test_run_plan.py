"""A run starts what is missing, in order of days, goes on from any state, and stops for what cannot come."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store import datasets
from feature_store.days import add_days, day_range
from feature_store.errors import MissingPartitionError, SpecError
from jobs.local.plan import DONE, FAILED, Pair, Plan, check_history, choose_days

SIMULATED = datasets.get("simulated")
DAYS = tuple(day_range("2024-03-01", "2024-03-04"))
PLAN = Plan(SIMULATED, DAYS)
INGEST, FEATURES, UPSTREAM = PLAN.dag_ids[:3]


class Scheduler:
    """What Airflow does: a run ends, its events fill waits, a full wait is a run. `ends` chooses which."""

    def __init__(self, plan: Plan, states: dict[Pair, str], failing: frozenset[Pair] = frozenset()):
        self.plan, self.states, self.failing = plan, dict(states), failing
        self.waits: dict[Pair, set[str]] = {}
        self.started: list[Pair] = []
        self.queue: list[Pair] = []

    def start(self, pair: Pair) -> None:
        self.started.append(pair)
        self.states[pair] = "running"
        self.queue.append(pair)

    def event(self, asset: str, day: str) -> None:
        for stage in self.plan.stages:
            for wait in stage.waits:
                if wait.asset != asset:
                    continue
                pair = (stage.dag_id, add_days(day, wait.days_before))
                have = self.waits.setdefault(pair, set())
                have.add(asset)
                if have == {w.asset for w in stage.waits}:
                    del self.waits[pair]
                    self.start(pair)

    def begin(self) -> None:
        """As the launcher does, from what it saw."""
        seen = dict(self.states)
        for pair in self.plan.failed(seen):
            self.start(pair)
        seen = dict(self.states)
        for day in self.plan.by_clock(seen):
            self.start((INGEST, day))
        for pair in self.plan.ready(seen):
            self.start(pair)
        for asset, day in self.plan.announcements(seen):
            self.event(asset, day)

    def finish(self, choose: st.DataObject) -> None:
        while self.queue:
            pair = self.queue.pop(choose.draw(st.integers(0, len(self.queue) - 1)))
            self.states[pair] = FAILED if pair in self.failing else DONE
            if self.states[pair] == DONE:
                stage = next(s for s in self.plan.stages if s.dag_id == pair[0])
                for asset in stage.emits:
                    self.event(asset, pair[1])


@given(st.data())
def test_from_nothing_every_pair_runs_once_and_days_that_build_on_days_in_order(
    data: st.DataObject,
) -> None:
    scheduler = Scheduler(PLAN, {})
    scheduler.begin()
    scheduler.finish(data)
    inside = [p for p in scheduler.started if p[1] in DAYS]
    assert sorted(inside) == sorted(PLAN.pairs)
    for dag_id in (FEATURES, UPSTREAM):
        assert [day for d, day in inside if d == dag_id] == list(DAYS)


@given(st.data())
def test_from_any_state_that_a_stopped_run_leaves_every_pair_gets_done_and_none_done_runs_again(
    data: st.DataObject,
) -> None:
    stopped = Scheduler(PLAN, {})
    stopped.begin()
    for _ in range(data.draw(st.integers(0, len(PLAN.pairs)))):
        pair = stopped.queue.pop(data.draw(st.integers(0, len(stopped.queue) - 1)))
        stopped.states[pair] = data.draw(st.sampled_from([DONE, DONE, DONE, FAILED]))
        if stopped.states[pair] == DONE:
            stage = next(s for s in PLAN.stages if s.dag_id == pair[0])
            for asset in stage.emits:
                stopped.event(asset, pair[1])
        if not stopped.queue:
            break
    left = {p: s for p, s in stopped.states.items() if p[1] in DAYS}
    lost = data.draw(st.sets(st.sampled_from(sorted(left)), max_size=3)) if left else set()
    left = {p: s for p, s in left.items() if s != "running" or p not in lost}  # a run never made

    going_on = Scheduler(PLAN, left)
    going_on.begin()
    going_on.queue += [p for p, s in left.items() if s == "running"]  # its tasks start again
    going_on.finish(data)
    states = {p: going_on.states.get(p) for p in PLAN.pairs}
    assert set(states.values()) == {DONE}
    again = [p for p in going_on.started if left.get(p) == DONE]
    assert again == []
    assert len(set(going_on.started)) == len(going_on.started)


@given(st.data())
def test_what_a_failure_keeps_from_coming_is_known_and_nothing_else_waits(
    data: st.DataObject,
) -> None:
    failing = frozenset(data.draw(st.sets(st.sampled_from(PLAN.pairs), min_size=1, max_size=2)))
    scheduler = Scheduler(PLAN, {}, failing)
    scheduler.begin()
    scheduler.finish(data)
    states = {p: s for p, s in scheduler.states.items() if p[1] in DAYS}
    assert PLAN.over(states)
    assert PLAN.blocked(states) == {p for p in PLAN.pairs if p not in states}


def test_a_failed_day_stops_the_days_after_it_but_not_the_ingests() -> None:
    states = {(INGEST, d): DONE for d in DAYS} | {
        (FEATURES, DAYS[0]): DONE,
        (FEATURES, DAYS[1]): FAILED,
    }
    states[UPSTREAM, DAYS[0]] = DONE
    blocked = PLAN.blocked(states)
    assert {p for p in blocked if p[0] == FEATURES} == {(FEATURES, d) for d in DAYS[2:]}
    assert {p for p in blocked if p[0] == UPSTREAM} == {(UPSTREAM, d) for d in DAYS[1:]}
    assert not PLAN.over(states)  # the first day's downstream tasks are still to come


def test_a_first_day_is_seeded_and_an_extended_run_announces_the_last_day_that_is_done() -> None:
    assert set(PLAN.announcements({})) == {
        ("simulated.sequences", "2024-02-29"),
        ("simulated.models", "2024-02-29"),
    }
    done = dict.fromkeys(PLAN.pairs, DONE)
    longer = Plan(SIMULATED, (*DAYS, "2024-03-05"))
    assert longer.by_clock(done) == ["2024-03-05"]
    assert set(longer.announcements(done)) == {
        ("simulated.sequences", "2024-03-04"),
        ("simulated.models", "2024-03-04"),
    }


def test_days_default_for_simulated_data_and_are_asked_for_otherwise() -> None:
    assert choose_days(SIMULATED, None, None)[0] == SIMULATED.first_day
    assert len(choose_days(SIMULATED, None, None)) == 10
    real = replace(SIMULATED, simulated=False)
    with pytest.raises(SpecError, match="TO is missing"):
        choose_days(real, None, None)
    with pytest.raises(SpecError, match="FROM is 2020-01-01"):
        choose_days(SIMULATED, "2020-01-01", None)
    with pytest.raises(SpecError, match="TO is 2024-03-01"):
        choose_days(SIMULATED, "2024-03-02", "2024-03-01")


def test_a_run_may_begin_a_history_go_on_from_it_or_redo_it_but_not_leave_a_gap() -> None:
    built = ["2024-03-03", "2024-03-04"]
    check_history(SIMULATED, "2024-03-09", [])
    for first in ("2024-03-01", "2024-03-03", "2024-03-04", "2024-03-05"):
        check_history(SIMULATED, first, built)
    with pytest.raises(MissingPartitionError, match="choose FROM=2024-03-05"):
        check_history(SIMULATED, "2024-03-07", built)
