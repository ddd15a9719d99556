"""What a run counts as done, from the runs that Airflow knows."""

from __future__ import annotations

from pathlib import Path

from feature_store import datasets
from jobs.local.client import DagRun
from jobs.local.launcher import Launcher
from jobs.local.plan import DONE, Pair, Plan

PLAN = Plan(datasets.get("simulated"), ("2024-03-01", "2024-03-02"))
INGEST, FEATURES = PLAN.dag_ids[:2]
LONG_AGO = "2024-03-03T00:00:00Z"


class Client:
    """A client that knows these runs."""

    def __init__(self, *runs: DagRun) -> None:
        self.known = list(runs)

    def runs(self, dag_ids, states=(), ended_since=None) -> list[DagRun]:
        return self.known


def run(
    pair: Pair, *, state: str = DONE, created: str = LONG_AGO, ended: str = "", number: int = 0
) -> DagRun:
    return DagRun(
        dag_id=pair[0], run_id=f"{pair}/{number}", day=pair[1], state=state, created=created,
        ended=ended or created, seconds=1.0,
    )  # fmt: skip


def test_a_success_of_before_does_not_count_where_what_it_made_is_stale() -> None:
    first, second, other = ((FEATURES, d) for d in (*PLAN.days, "2024-03-09"))
    client = Client(run(first), run(second), run(other))
    launcher = Launcher(PLAN, client, None, "", report=Path("none"), stale={second})
    launcher.look()
    assert launcher.states == {first: DONE}
    assert launcher.done_before == {second}
    client.known.append(run(second, created="2999-01-01T00:00:00Z", number=1))
    launcher.look()
    assert launcher.states == {first: DONE, second: DONE}


def test_a_stale_pair_that_failed_or_runs_already_is_not_started_beside_it() -> None:
    failed, running = (FEATURES, PLAN.days[0]), (INGEST, PLAN.days[1])
    client = Client(run(failed, state="failed"), run(running, state="running"))
    launcher = Launcher(PLAN, client, None, "", report=Path("none"), stale={failed, running})
    launcher.look()
    assert launcher.states == {failed: "failed", running: "running"}


def test_a_run_that_a_kill_interrupted_counts_when_it_ends() -> None:
    interrupted = (FEATURES, PLAN.days[0])
    client = Client(run(interrupted, state="running"))
    launcher = Launcher(PLAN, client, None, "", report=Path("none"), stale={interrupted})
    launcher.look()
    client.known = [run(interrupted, ended="2999-01-01T00:00:00Z")]
    launcher.look()
    assert launcher.states == {interrupted: DONE}
