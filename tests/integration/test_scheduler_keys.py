"""Through Airflow's real scheduler: keys reach the last DAG, days go in order, a failed day goes on.

The DAGs are ours, with commands that write down what they were called with.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_store import datasets
from jobs.local.client import AirflowClient
from jobs.local.launcher import Launcher
from jobs.local.plan import DONE, FAILED, Plan
from jobs.local.run import DEVICES_POOL
from jobs.local.services import AirflowServices

DATASET = datasets.get("simulated")
DAYS = ("2024-03-01", "2024-03-02", "2024-03-03")
DAG_FILE = '''
"""A DAG file for Airflow with our plugins."""
import sys
from feature_store.datasets import get
from feature_store.pipeline import stages
from headwater_dags import build

CODE = """
import pathlib, sys
trace, broken, day, step = sys.argv[1:]
if pathlib.Path(broken).exists() and pathlib.Path(broken).read_text() == step + " " + day:
    print("error: the day is broken: mend it")
    sys.exit(2)
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
def services(tmp_path: Path) -> Iterator[AirflowServices]:
    dags = tmp_path / "dags"
    dags.mkdir()
    constants = f"TRACE, BROKEN = {str(tmp_path / 'trace')!r}, {str(tmp_path / 'broken')!r}\n"
    (dags / "traced.py").write_text(DAG_FILE.replace("CODE =", constants + "CODE =", 1))
    services = AirflowServices(
        home=tmp_path / "airflow",
        dags=dags,
        environment={"HEADWATER_SCHEDULED": "0"},
        parallelism=2,
    )
    services.acquire()
    try:
        services.migrate()
        yield services
    finally:
        services.stop()


def started(services: AirflowServices, plan: Plan) -> AirflowClient:
    client = services.start_api()
    client.set_pool(DEVICES_POOL, 1, "test")
    services.wait_parsed(client, plan.dag_ids)
    return client


def test_days_delivered_backwards_run_in_order_and_a_failed_day_goes_on_when_mended(
    services: AirflowServices, tmp_path: Path
) -> None:
    plan = Plan(DATASET, DAYS)
    client = started(services, plan)
    ingest, features, upstream = plan.dag_ids[:3]
    (tmp_path / "broken").write_text(f"features {DAYS[1]}")
    for day in reversed(DAYS):  # delivered backwards: the newest first
        client.trigger(ingest, day)

    first = Launcher(plan, client, services, "")
    assert not first.run()
    assert {p for p, s in first.states.items() if s == FAILED} == {(features, DAYS[1])}
    assert (features, DAYS[2]) not in first.states
    assert first.states[upstream, DAYS[0]] == DONE

    (tmp_path / "broken").unlink()
    second = Launcher(plan, client, services, "")
    assert second.run()

    trace = [line.split() for line in (tmp_path / "trace").read_text().splitlines()]
    steps = {
        f"{s.name}/{s.task}" if s.task else s.name for stage in plan.stages for s in stage.steps
    }
    assert sorted(map(tuple, trace)) == sorted((step, day) for step in steps for day in DAYS)
    for step in ("features", *(f"train_{m}" for m in DATASET.models)):
        assert [day for name, day in trace if name == step] == list(DAYS)
