"""Five users for five days through every job: what is too little to measure is said, and nothing fails.

The dataset is one of its own, made as docs/your-own-data.md describes: a spec and a source of CSV files.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from feature_store.days import day_range
from feature_store.spec import (
    Aggregate,
    Attribute,
    Dataset,
    DenseFeature,
    EventLabel,
    EventStream,
    GivenLabel,
    IdType,
    ItemFeatures,
    SparseFeature,
    Target,
    Task,
)
from jobs import (
    build_aggregates,
    build_examples,
    build_item_aggregates,
    build_labels,
    build_sequences,
    ingest,
    publish_embeddings,
    report,
    sources,
    train_downstream,
    train_upstream,
)
from jobs.context import JobContext
from jobs.settings import Settings
from jobs.sources import SourceDay
from jobs.sources.csv_files import read_csv
from jobs.training import tracking

DAYS = day_range("2024-05-01", "2024-05-05")
BOOK = Attribute(name="book", vocabulary="item")
SPEC = Dataset(
    name="handful",
    description="A shop that opened this week.",
    first_day=DAYS[0],
    utc_offset=timedelta(0),
    user_id_type=IdType.STRING,
    streams=(
        EventStream(
            name="views",
            attributes=(BOOK,),
            max_events=8,
            id_from=("user_id", "event_time", "book"),
        ),
    ),
    targets=(Target(name="tip", context=(Attribute(name="page"),)),),
    tasks=(
        Task(name="click", label=GivenLabel(column="clicked"), targets=("tip",)),
        Task(name="refund", label=GivenLabel(column="refunded"), targets=("tip",)),  # never happens
        Task(
            name="view",
            label=EventLabel(
                stream="views", within=timedelta(hours=20), match=(("item_id", "book"),)
            ),
            targets=("tip",),
            matures_after=1,
        ),
    ),
    domain="page",
    held_out_share=0.4,
    sparse_features=(
        SparseFeature(name="viewed", stream="views", attribute="book", window_days=2, max_ids=4),
    ),
    dense_features=(
        DenseFeature(name="views_2d", stream="views", aggregate=Aggregate.COUNT, window_days=2),
    ),
    item_features=ItemFeatures(streams=(("views", "book"),), windows_hours=(6,)),
)

JOBS = (
    ingest,
    build_sequences,
    build_aggregates,
    build_item_aggregates,
    build_examples,
    build_labels,
)
View, Tip = tuple[str, int], tuple[str, int, int]  # (user, book), (user, book, clicked)

WORLD: dict[int, tuple[list[View], list[Tip]]] = {
    0: ([], []),  # not one event, not one impression
    1: ([("ann", 1), ("gus", 2), ("cid", 1)], [("ann", 2, 0), ("gus", 1, 1), ("hal", 3, 0)]),
    2: ([("ann", 2), ("gus", 3), ("jon", 3)], []),  # no impressions
    3: (
        [],
        [("ann", 1, 1), ("gus", 2, 0), ("cid", 3, 1), ("hal", 2, 0), ("jon", 3, 1)],
    ),  # no events
    4: ([("hal", 1), ("jon", 3)], [("ann", 3, 0), ("hal", 1, 1), ("jon", 3, 0)]),
}


def _write(folder: Path) -> None:
    """The shop's files. A day without rows has no file of views, and one of tips with a header only."""
    folder.mkdir()
    for i, (views, tips) in WORLD.items():
        day = DAYS[i]
        lines = [f"{day}T08:{m:02}:00Z,{user},{book}" for m, (user, book) in enumerate(views)]
        if lines:
            (folder / f"views-{day}.csv").write_text("\n".join(["time,user,book", *lines]) + "\n")
        lines = [
            f"{i}{m:03},{day}T09:{m:02}:00Z,{user},{book},{m % 2},{clicked},0"
            for m, (user, book, clicked) in enumerate(tips)
        ]
        header = "id,time,user,book,page,clicked,refunded"
        (folder / f"tips-{day}.csv").write_text("\n".join([header, *lines]) + "\n")


def _read(spark: Any, source: str, day: str, dataset: Dataset) -> SourceDay:
    views = {"user": "user_id", "time": "event_time", "book": "book"}
    tips = {"id": "target_id", "user": "user_id", "time": "time", "book": "item_id"}
    tips |= {name: name for name in ("page", "clicked", "refunded")}
    return SourceDay(
        events={"views": read_csv(spark, source, f"views-{day}.csv", views, may_be_absent=True)},
        impressions=read_csv(spark, source, f"tips-{day}.csv", tips),
    )


@pytest.fixture
def ran(tmp_path, spark, settings_of, monkeypatch, capfd) -> tuple[Settings, str]:
    """A home in which every job of every day has run, and the report; and what they printed."""
    monkeypatch.setattr(sources, "get", lambda _: SimpleNamespace(NEEDS_SOURCE=True, read=_read))
    monkeypatch.setattr(train_downstream, "MIN_TRAIN_DAYS", 1)
    home, logs = tmp_path / "home", tmp_path / "logs"
    found = replace(
        settings_of("sail"), home=home, lake_root=str(home / "lake"),
        mlflow_uri=f"sqlite:///{home}/mlflow/mlflow.db",
    )  # fmt: skip
    _write(logs)
    for ds in DAYS:
        context = JobContext(dataset=SPEC, ds=ds, settings=found, source=logs)
        context.__dict__["spark"] = spark
        for job in JOBS:
            job.run(context)
        for model in SPEC.models:
            train_upstream.run(replace(context, model=model))
            publish_embeddings.run(replace(context, model=model))
        for task in SPEC.tasks:
            train_downstream.run(replace(context, task=task.name))
    report.run(JobContext(dataset=SPEC, ds=DAYS[-1], settings=found))
    return found, capfd.readouterr().out


def _strict(path: Path) -> Any:
    """JSON without NaN or infinity, which are none of JSON's."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_five_users_for_five_days_get_through_every_job(ran):
    settings, said = ran
    assert "nan" not in said
    assert "0 users published" in said and "no impressions to cover" in said
    assert "refund no NE (no base rate: " in said

    client = tracking.client(settings)
    for model in SPEC.models:
        runs = client.search_runs(
            [client.get_experiment_by_name(f"handful/upstream/{model}").experiment_id]
        )
        assert len(runs) == len(DAYS)
        for run in runs:
            assert run.data.tags["verdict"] == "not judged" and run.data.tags["verdict_reason"]
            assert run.data.metrics["judged"] == 0 and "accepted" not in run.data.metrics
        for ds in DAYS:
            folder = settings.snapshot_dir("handful", model, ds)
            result = _strict(folder / "result.json")
            assert result["gate"]["verdict"] == "not judged"
            assert result["champion"] == result["candidate"], "who was not judged becomes champion"
            assert f"{ds}, " in said and "(candidate not judged: no champion is before it)" in said
        assert "held-out users (200 labels of 20 users are needed)" in result["gate"]["reason"]
        assert result["gate"]["tasks"]["click"]["candidate"]["labels"] == 1, "ann is held out"

    click, refund, view = (
        _strict(settings.downstream_dir("handful", task.name) / DAYS[-1] / "result.json")
        for task in SPEC.tasks
    )
    assert click["compared"]["test_day"] == DAYS[4] and click["arms"]["aggregates_all"]["ne"] > 0
    assert refund["why_not"] == "every label trained on is 0: there is nothing to tell apart"
    assert view["why_not"] == "no label on the days trained on"

    folder = settings.report_dir("handful")
    written, page = _strict(folder / "report.json"), (folder / "index.html").read_text()
    assert [t["why_not"] for t in written["tasks"][1:]] == [refund["why_not"], view["why_not"]]
    assert all(t["why_not"] in page for t in written["tasks"][1:])
    assert {g["verdict"] for g in written["gates"]} == {"not judged"}
    text = re.sub(r"<(svg|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "not judged: no champion is before it" in text and "accepted" not in text
    assert not re.search(r"\b(nan|None)\b", text)
