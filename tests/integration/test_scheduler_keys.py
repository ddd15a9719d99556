"""Through Airflow's real scheduler: keys reach the last DAG, days go in order, a failed day goes on.

The DAGs are ours, with commands that write down what they were called with.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from feature_store import datasets
from feature_store.days import add_days
from jobs.local.client import ACTIVE, AirflowClient
from jobs.local.launcher import Launcher, instant
from jobs.local.plan import DONE, FAILED, Plan
from jobs.local.run import DEVICES_POOL
from jobs.local.services import AirflowServices

RETRIES = 2  # of `headwater_dags`, which only Airflow can import
DATASET = datasets.get("simulated")
DAYS = ("2024-03-01", "2024-03-02", "2024-03-03")
DAG_FILE = '''
"""A DAG file for Airflow with our plugins."""
import sys
from feature_store.datasets import get
from feature_store.pipeline import stages
from headwater_dags import build

CODE = """
import pathlib, sys, time
trace, broken, day, step = sys.argv[1:]
if pathlib.Path(broken).exists() and pathlib.Path(broken).read_text() == step + " " + day:
    print("error: the day is broken: mend it")
    sys.exit(2)
if pathlib.Path(trace + ".hang").exists() and pathlib.Path(trace + ".hang").read_text() == step + " " + day:
    pathlib.Path(trace + ".hangs").touch()
    time.sleep(600)
with open(trace, "a") as out:
    out.write(step + " " + day + chr(10))
"""

def command(dataset, step):
    name = "/".join(x for x in (step.name, step.task) if x)
    return [sys.executable, "-c", CODE, TRACE, BROKEN, "{{ dag_run.partition_key }}", name]

for stage in stages(get("simulated")):
    build(get("simulated"), stage, None, command=command)
'''


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., AirflowServices]]:
    """A function that starts Airflow's services anew in the same folder."""
    dags = tmp_path / "dags"
    dags.mkdir()
    constants = f"TRACE, BROKEN = {str(tmp_path / 'trace')!r}, {str(tmp_path / 'broken')!r}\n"
    (dags / "traced.py").write_text(DAG_FILE.replace("CODE =", constants + "CODE =", 1))
    made: list[AirflowServices] = []

    def start(*, keep_waits: bool = False) -> AirflowServices:
        services = AirflowServices(
            home=tmp_path / "airflow",
            dags=dags,
            environment={"HEADWATER_SCHEDULED": "0"},
            parallelism=2,
            keep_waits=keep_waits,
        )
        services.acquire()
        made.append(services)
        services.migrate()
        return services

    yield start
    for services in made:
        services.stop()


def started(services: AirflowServices, plan: Plan) -> AirflowClient:
    client = services.start_api()
    client.set_pool(DEVICES_POOL, 1, "test")
    services.wait_parsed(client, plan.dag_ids)
    return client


def test_days_delivered_backwards_run_in_order_and_a_failed_day_goes_on_when_mended(
    launch: Callable[..., AirflowServices], tmp_path: Path
) -> None:
    plan, services = Plan(DATASET, DAYS), launch()
    client = started(services, plan)
    ingest, features, upstream = plan.dag_ids[:3]
    (tmp_path / "broken").write_text(f"features {DAYS[1]}")
    for day in reversed(DAYS):  # delivered backwards: the newest first
        client.trigger(ingest, day)

    first = Launcher(plan, client, services, "", report=tmp_path / "none")
    assert not first.run()
    assert {p for p, s in first.states.items() if s == FAILED} == {(features, DAYS[1])}
    assert (features, DAYS[2]) not in first.states
    assert first.states[upstream, DAYS[0]] == DONE

    (tmp_path / "broken").unlink()
    second = Launcher(plan, client, services, "", report=tmp_path / "none")
    assert second.run()

    trace = [line.split() for line in (tmp_path / "trace").read_text().splitlines()]
    steps = {
        f"{s.name}/{s.task}" if s.task else s.name for stage in plan.stages for s in stage.steps
    }
    assert sorted(map(tuple, trace)) == sorted((step, day) for step in steps for day in DAYS)
    for step in ("features", *(f"train_{m}" for m in DATASET.models)):
        assert [day for name, day in trace if name == step] == list(DAYS)


def test_a_killed_run_goes_on_at_once_and_what_waited_in_it_is_forgotten(
    launch: Callable[..., AirflowServices], tmp_path: Path
) -> None:
    """A task is killed with its scheduler, while the last day's events wait for the sequences before them."""
    whole, plan = Plan(DATASET, DAYS), Plan(DATASET, DAYS[:2])
    services = launch()
    client = started(services, whole)
    ingest, features = whole.dag_ids[:2]
    hang = tmp_path / "trace.hang"
    hang.write_text(f"features {DAYS[0]}")
    services.start_scheduler(client, whole.dag_ids)
    client.trigger(ingest, DAYS[0])
    client.post_event("simulated.sequences", add_days(DAYS[0], -1))
    client.post_event("simulated.events", DAYS[2])
    wait = Retrying(
        retry=retry_if_result(operator.not_), wait=wait_fixed(0.2), stop=stop_after_delay(120)
    )
    wait((tmp_path / "trace.hangs").exists)
    (before,) = (t for t in client.tasks([features]) if t.task_id == "features")
    services.stop()
    hang.unlink()

    services = launch(keep_waits=True)
    client = started(services, whole)
    services.start_scheduler(client, [])
    time.sleep(3)
    assert client.waits([features], until=datetime.now(UTC)) == 1, "pages alone drop nothing"
    services.stop()

    services = launch()
    client = started(services, whole)
    begun = time.monotonic()
    assert client.waits([features], until=datetime.now(UTC)) == 1
    assert Launcher(plan, client, services, "", report=tmp_path / "none").run()
    seconds = time.monotonic() - begun
    trace = (tmp_path / "trace").read_text().splitlines()
    for step in ("ingest", "features"):
        assert [line for line in trace if line.startswith(f"{step} ")] == [
            f"{step} {d}" for d in DAYS[:2]
        ]
    (task,) = client.request("GET", f"/dags/{features}/dagRuns/{before.run_id}/taskInstances")[
        "task_instances"
    ]
    assert task["try_number"] == 2 and task["max_tries"] == 1 + RETRIES
    assert seconds < 120, "the next scheduler does not wait for the one before it"


def test_a_run_of_before_does_not_hand_its_day_to_one_that_is_built_again(
    launch: Callable[..., AirflowServices], tmp_path: Path
) -> None:
    plan, services = Plan(DATASET, DAYS[:1]), launch()
    client = started(services, plan)
    features = plan.dag_ids[1]
    client.trigger(features, DAYS[0])  # as a killed run left it
    (before,) = client.runs([features])
    assert Launcher(plan, client, services, instant(), report=tmp_path / "none").run()
    (ended,) = (run for run in client.runs([features]) if run.run_id == before.run_id)
    assert ended.state == FAILED
    trace = (tmp_path / "trace").read_text().splitlines()
    assert [line for line in trace if line.startswith("features ")] == [f"features {DAYS[0]}"]


def test_a_run_whose_last_task_was_done_when_the_scheduler_was_killed_is_followed_by_what_waits_for_it(
    launch: Callable[..., AirflowServices], tmp_path: Path
) -> None:
    plan, services = Plan(DATASET, DAYS[:1]), launch()
    client = started(services, plan)
    ingest = plan.dag_ids[0]
    client.trigger(ingest, DAYS[0])
    (left,) = client.runs([ingest])
    task = f"/dags/{ingest}/dagRuns/{left.run_id}/taskInstances/ingest"
    client.request("PATCH", task, json={"new_state": "success"})  # its asset went to another launch
    (left,) = client.runs([ingest])
    assert left.state in ACTIVE
    launcher = Launcher(plan, client, services, "", report=tmp_path / "none", stale=set(plan.pairs))
    assert launcher.run()
    assert not [s for s in (tmp_path / "trace").read_text().splitlines() if s.startswith("ingest ")]
