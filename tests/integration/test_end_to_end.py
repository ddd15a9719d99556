"""The whole loop through the real scheduler, on a small simulated world: it has to show learning.

The first day has no embeddings before it and three days are the least that a downstream model is
trained on, so five days are the fewest that end in a comparison.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from feature_store import datasets
from feature_store.days import day_range
from feature_store.embeddings import read_embeddings
from feature_store.errors import StalePartitionError
from feature_store.lake import Lake
from jobs.local.plan import Plan, check_current
from jobs.local.stale import not_current, stale_days
from jobs.settings import Settings

ROOT = Path(__file__).parents[2]
FIRST, LAST = "2024-03-01", "2024-03-05"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "jobs.local.run", "--dataset", "simulated"]
    command += ["--first", FIRST, "--last", LAST, "--source", "users=2500", "--backwards"]
    environment = {**os.environ, "HEADWATER_HOME": str(home), "HEADWATER_ENGINE": "sail"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = process.communicate(timeout=1500)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # it stops Airflow and the engine, which a kill would leave behind
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said[-8000:]
    return home


@pytest.fixture(scope="module")
def report(home: Path) -> dict[str, Any]:
    return json.loads((home / "report" / "simulated" / "report.json").read_text())


def test_a_days_key_reaches_every_table_though_the_last_day_came_first(home: Path) -> None:
    dataset = datasets.get("simulated")
    lake = Lake(home / "lake", dataset)
    days = {f"2024-03-{d:02}" for d in range(1, 6)}
    for table in ("events", "impressions", "sequences", "aggregates", "examples", "labels"):
        assert set(lake.partitions(table)) == days, table
    for model in dataset.models:
        assert set(lake.partitions("user_embeddings", model)) == days
        assert len(read_embeddings(lake, model, LAST)) > 1000


def test_the_sequence_model_learns_what_can_be_learned(report: dict[str, Any]) -> None:
    """Progressive validation: each day is scored before it is trained on.

    Seen: click NE 0.934 over the four days scored, the best possible 0.793, so 32 % of the attainable
    gain; 0.953 on the worst of them. The limits leave what another machine's sums may change.
    """
    found = {u["model"]: u for u in report["upstream"] if u["task"] == "click"}
    whole = found["sequence"]
    days = dict(report["upstream_by_day"]["click"]["sequence"])
    assert len(days) == 4 and all(ne < 0.99 for ne in days.values()), days
    assert whole["ne"] < 0.96
    assert whole["ne"] < found["sum"]["ne"] - 0.02, "order and recency carry signal"
    assert whole["oracle_ne"] < 0.85
    assert (1 - whole["ne"]) / (1 - whole["oracle_ne"]) > 0.2, "share of the attainable gain"


def test_the_report_compares_downstream_models_with_and_without_embeddings(
    report: dict[str, Any],
) -> None:
    click = next(t for t in report["tasks"] if t["name"] == "click")
    assert click["days"] == [LAST]
    arms = {a["name"]: a for a in click["arms"]}
    assert {"context", "aggregates", "aggregates_sum", "aggregates_sequence"} <= set(arms)
    for arm in arms.values():
        assert click["oracle"]["ne"] < arm["ne"] < 1.1  # 1.04 seen, from three days of examples
        assert arm["name"] == "context" or arm["to_context"]["low"] <= arm["to_context"]["high"]
    assert any(i["embedding"] for i in click["importance"])


def test_the_page_is_whole(home: Path) -> None:
    page = (home / "report" / "simulated" / "index.html").read_text()
    assert page.count("<svg") >= 4
    assert "simulated data" in page
    assert "Downstream models read raw ones." in page


def test_a_full_run_leaves_nothing_stale_and_a_corrected_day_everything_after_it(
    home: Path,
) -> None:
    dataset = datasets.get("simulated")
    settings = Settings.from_env({"HEADWATER_HOME": str(home)})
    plan = Plan(dataset, tuple(day_range(FIRST, LAST)))
    assert not_current(plan, settings) == set()
    lake, day = Lake(home / "lake", dataset), "2024-03-03"
    rows = lake.read("events", days=[day])
    again = {"inputs": {}, "code_version": "test"}
    lake.publish_arrow("events", day, rows.take(list(range(rows.num_rows))[::-1]), **again)
    assert not_current(plan, settings) == set(), "the same events in another order"
    lake.publish_arrow("events", day, rows.slice(1), **again)
    stale = not_current(plan, settings)
    assert {d for _, d in stale} == {"2024-03-03", "2024-03-04", LAST}
    assert {s.dag_id for s in plan.stages} - {d for d, _ in stale} == {plan.stages[0].dag_id}
    with pytest.raises(StalePartitionError, match="FROM is 2024-03-04"):
        check_current(dataset, "2024-03-04", stale_days(dataset, settings))
    lake.publish_arrow("events", day, rows, **again)
    assert not_current(plan, settings) == set()
    result = settings.downstream_dir("simulated", "click") / LAST / "result.json"
    whole = result.read_bytes()
    result.write_bytes(whole[:-9])
    late = ("simulated_downstream_click", "simulated_report")
    assert not_current(plan, settings) == {(dag_id, LAST) for dag_id in late}
    result.write_bytes(whole)


def test_nothing_is_written_but_under_the_home(home: Path) -> None:
    assert {p.name for p in home.iterdir()} <= {
        "airflow", "cache", "downstream", "lake", "mlflow", "models", "quality", "report", "spark", "tmp",
    }  # fmt: skip
