"""The stages of a day, derived from the spec: what each waits for, runs and emits.

`dags/` turns them into Airflow DAGs and `jobs/local/run.py` knows from them which days to wait for; both
read them here, so that a new task or model of a spec is in both at once.

    ingest                cron                                     -> events
    features              events[D] and sequences[D-1]             -> sequences, examples
    upstream              examples[D] and models[D-1]              -> models, user_embeddings
    downstream_<task>     user_embeddings[D]                   -> comparison_<task>
    report                comparison_<task>[D] of every task

What builds on the day before waits for the day before, so days go in order however they arrive.
"""

from __future__ import annotations

from dataclasses import dataclass

from feature_store.spec import Dataset

# What one process runs, one job after the other: of a day's features; of a model, a day.
FEATURE_JOBS = (
    "build_sequences",
    "build_aggregates",
    "build_item_aggregates",
    "build_examples",
    "build_labels",
)
MODEL_JOBS = ("train_upstream", "publish_embeddings")
JOBS = ("ingest", *FEATURE_JOBS, *MODEL_JOBS, "train_downstream", "report")


@dataclass(frozen=True, kw_only=True)
class Wait:
    """A stage of day D waits for `asset` of day `D - days_before`."""

    asset: str
    days_before: int = 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process: the jobs that it runs one after the other (`python -m jobs <job> [<job> ...]`).

    Args:
        name: the Airflow task's id.
        jobs: what runs in the process. Each process start costs seconds of imports, so a step is
            what somebody would want to retry or look at alone.
        model, task: what the jobs are limited to.
        hours: it is ended and tried again when it takes longer; many times what it should take.
        on_device: takes a slot of the pool of devices.
        after: names of the steps that it follows.
    """

    name: str
    jobs: tuple[str, ...]
    model: str = ""
    task: str = ""
    hours: float = 6
    on_device: bool = False
    after: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One DAG. No `waits`: it is started by the clock. It emits when all of its steps are done."""

    name: str
    dag_id: str
    waits: tuple[Wait, ...]
    steps: tuple[Step, ...]
    emits: tuple[str, ...]
    priority: int


def asset_name(dataset: Dataset, name: str) -> str:
    """The Airflow asset of `name` (`events`, `sequences`, `examples`, `models`, `user_embeddings`,
    `comparison_<task>`)."""
    return f"{dataset.name}.{name}"


def stages(dataset: Dataset) -> tuple[Stage, ...]:
    """The stages of a day of `dataset`, producers first."""

    def asset(name: str) -> str:
        return asset_name(dataset, name)

    ingest = Stage(
        name="ingest",
        dag_id=f"{dataset.name}_ingest",
        waits=(),
        steps=(Step(name="ingest", jobs=("ingest",)),),
        emits=(asset("events"),),
        priority=2,
    )
    features = Stage(
        name="features",
        dag_id=f"{dataset.name}_features",
        waits=(Wait(asset=asset("events")), Wait(asset=asset("sequences"), days_before=1)),
        steps=(
            Step(
                name="features",
                jobs=FEATURE_JOBS,
                hours=12,
            ),
        ),
        emits=(asset("sequences"), asset("examples")),
        priority=3,
    )
    upstream = Stage(
        name="upstream",
        dag_id=f"{dataset.name}_upstream",
        waits=(Wait(asset=asset("examples")), Wait(asset=asset("models"), days_before=1)),
        steps=tuple(
            Step(
                name=f"train_{model}",
                jobs=MODEL_JOBS,
                model=model,
                hours=24,
                on_device=True,
            )
            for model in dataset.models
        ),
        emits=(asset("models"), asset("user_embeddings")),
        priority=4,
    )
    downstream = tuple(
        Stage(
            name=f"downstream_{task.name}",
            dag_id=f"{dataset.name}_downstream_{task.name}",
            waits=(Wait(asset=asset("user_embeddings")),),
            steps=(
                Step(
                    name="train",
                    jobs=("train_downstream",),
                    task=task.name,
                    hours=12,
                    on_device=True,
                ),
            ),
            emits=(asset(f"comparison_{task.name}"),),
            priority=1,
        )
        for task in dataset.tasks
    )
    report = Stage(
        name="report",
        dag_id=f"{dataset.name}_report",
        waits=tuple(Wait(asset=name) for stage in downstream for name in stage.emits),
        steps=(Step(name="report", jobs=("report",)),),
        emits=(),
        priority=5,  # seconds, and what people wait for
    )
    return (ingest, features, upstream, *downstream, report)
