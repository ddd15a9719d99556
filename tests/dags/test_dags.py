"""The DAGs follow from the spec, wait for and emit what DESIGN's table says, and are light to parse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from feature_store import datasets
from feature_store.errors import SpecError
from feature_store.pipeline import stages

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("pyspark", "torch", "torchrec", "mlflow", "great_expectations", "pandas")
PARSE = f"""
import json, sys, time
start = time.perf_counter()
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG, CronPartitionTimetable, PartitionedAssetTimetable
imported = time.perf_counter()
before = {{m for m in {HEAVY} if m in sys.modules}}
bag = DagBag({str(ROOT / "dags")!r})
done = time.perf_counter()
print("\\n" + json.dumps({{
    "import_s": imported - start, "parse_s": done - imported,
    "heavy": sorted({{m for m in {HEAVY} if m in sys.modules}} - before),
    "dags": sorted(bag.dags), "errors": bag.import_errors,
    "ends": {{d.dag_id: bool(d.end_date) for d in bag.dags.values()}},
    "hours": sorted({{t.execution_timeout.total_seconds() / 3600 for d in bag.dags.values()
                     for t in d.tasks if t.task_id != "publish"}}),
}}))
"""


def parse(home: Path, **environment: str) -> dict[str, Any]:
    """What a fresh process finds when it parses the DAG folder."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        env={**os.environ, "AIRFLOW_HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def bag() -> Any:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(ROOT / "dags"))
    assert not bag.import_errors
    return bag


def waits(dag: Any) -> dict[str, int]:
    """Asset name -> how many days before its run it is of."""
    timetable = dag.timetable
    mappers = {a.name: m for a, m in timetable.partition_mapper_config.items()}
    names = [a.name for a in timetable.asset_condition.objects] if hasattr(
        timetable.asset_condition, "objects"
    ) else [timetable.asset_condition.name]  # fmt: skip
    return {n: mappers[n].days for n in names}


def emits(dag: Any) -> dict[str, list[str]]:
    """Task -> names of the assets it emits, of tasks that emit any."""
    return {t.task_id: [o.name for o in t.outlets] for t in dag.tasks if t.outlets}


def test_every_dataset_has_the_dags_of_its_spec(bag: Any) -> None:
    wanted = set()
    for name in datasets.names():
        tasks = [f"downstream_{t.name}" for t in datasets.get(name).tasks]
        wanted |= {
            f"{name}_{stage}" for stage in ("ingest", "features", "upstream", *tasks, "report")
        }
    assert set(bag.dags) == wanted


@pytest.mark.parametrize("name", datasets.names())
def test_a_day_waits_for_its_inputs_and_for_the_day_before_where_it_builds_on_it(
    bag: Any, name: str
) -> None:
    assert waits(bag.dags[f"{name}_features"]) == {
        f"{name}.events": 0,
        f"{name}.sequences": 1,
    }
    assert waits(bag.dags[f"{name}_upstream"]) == {
        f"{name}.examples": 0,
        f"{name}.models": 1,
    }
    for task in datasets.get(name).tasks:
        dag = bag.dags[f"{name}_downstream_{task.name}"]
        assert waits(dag) == {f"{name}.user_embeddings": 0}
    comparisons = [f"{name}.comparison_{task.name}" for task in datasets.get(name).tasks]
    assert waits(bag.dags[f"{name}_report"]) == dict.fromkeys(comparisons, 0)


@pytest.mark.parametrize("name", datasets.names())
def test_a_backfill_has_a_run_for_each_day_both_ends_included_at_midnight_of_the_zone(
    bag: Any, name: str
) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    dag = DagSerialization.from_dict(DagSerialization.to_dict(bag.dags[f"{name}_ingest"]))
    first, last = (datetime(2024, 2, day, tzinfo=UTC) for day in (27, 29))
    infos = list(dag.timetable.iter_partition_dagrun_infos(earliest=first, latest=last))
    assert [i.partition_key for i in infos] == ["2024-02-27", "2024-02-28", "2024-02-29"]
    offset = datasets.get(name).utc_offset
    assert [i.partition_date + offset for i in infos] == [
        first + timedelta(days=d) for d in range(3)
    ]


@pytest.mark.parametrize("name", datasets.names())
def test_assets_are_emitted_when_everything_that_they_promise_is_done(bag: Any, name: str) -> None:
    assert emits(bag.dags[f"{name}_ingest"]) == {"ingest": [f"{name}.events"]}
    assert emits(bag.dags[f"{name}_features"]) == {
        "features": [f"{name}.sequences", f"{name}.examples"]
    }
    upstream = bag.dags[f"{name}_upstream"]
    assert emits(upstream) == {"publish": [f"{name}.models", f"{name}.user_embeddings"]}
    models = {f"train_{m}" for m in datasets.get(name).models}
    assert upstream.get_task("publish").upstream_task_ids == models


@pytest.mark.parametrize("name", datasets.names())
def test_tasks_run_jobs_about_the_day_of_the_key(bag: Any, name: str) -> None:
    from feature_store.pipeline import JOBS

    ran = []
    for dag in bag.dags.values():
        if not dag.dag_id.startswith(f"{name}_"):
            continue
        for task in dag.tasks:
            if task.task_id == "publish":
                continue
            python, flag, package, *rest = task.command
            assert (python, flag, package) == (sys.executable, "-m", "jobs")
            cut = rest.index("--dataset")
            ran += rest[:cut]
            assert rest[cut + 1] == name
            assert rest[rest.index("--ds") + 1] == "{{ dag_run.partition_key }}"
            trains = any(job.startswith("train") for job in rest[:cut])
            assert task.pool == ("devices" if trains else "default_pool")
    assert set(ran) == set(JOBS)


def test_a_new_task_or_model_of_a_spec_is_a_new_stage_or_step() -> None:
    dataset = datasets.get("simulated")
    extra = replace(dataset.tasks[0], name="hide")
    wider = replace(dataset, tasks=(*dataset.tasks, extra), models=(*dataset.models, "sum_distil"))
    before, after = {s.name: s for s in stages(dataset)}, {s.name: s for s in stages(wider)}
    assert set(after) - set(before) == {"downstream_hide"}
    steps = {s.name for s in after["upstream"].steps} - {s.name for s in before["upstream"].steps}
    assert steps == {"train_sum_distil"}


@pytest.mark.parametrize("name", datasets.names())
def test_no_task_may_take_for_ever(bag: Any, name: str) -> None:
    for stage in stages(datasets.get(name)):
        for step in stage.steps:
            task = bag.dags[stage.dag_id].get_task(step.name)
            assert task.execution_timeout == timedelta(hours=step.hours)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_hours_that_are_none_are_refused(text: str) -> None:
    from headwater_dags import task_hours

    with pytest.raises(SpecError, match=f"HEADWATER_TASK_HOURS is '{text}'"):
        task_hours(text)


def test_every_dag_has_a_page(bag: Any) -> None:
    for dag in bag.dags.values():
        assert (dag.doc_md and "make run" in dag.doc_md) or "Clear" in dag.doc_md


def test_parsing_imports_nothing_heavy_and_costs_less_than_importing_airflow(
    tmp_path: Path,
) -> None:
    found = parse(tmp_path)
    assert found["errors"] == {}
    assert found["heavy"] == []
    assert found["parse_s"] < found["import_s"]
    assert not any(found["ends"].values())


def test_the_environment_limits_datasets_and_turns_off_the_clock(tmp_path: Path) -> None:
    found = parse(
        tmp_path, HEADWATER_DATASETS="globo", HEADWATER_SCHEDULED="0", HEADWATER_TASK_HOURS="2.5"
    )
    assert found["errors"] == {}
    assert found["hours"] == [2.5]
    assert {d.split("_")[0] for d in found["dags"]} == {"globo"}
    assert {d for d, ended in found["ends"].items() if ended} == {"globo_ingest"}
