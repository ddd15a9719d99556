"""Which stages of which days are no longer what the sources and the spec would give.

Airflow remembers that a run succeeded, not what it read: a source that was replaced changes no run.
"""

from __future__ import annotations

from collections.abc import Iterator

from feature_store.errors import DataError
from feature_store.lake import Lake
from feature_store.lineage import Lineage
from feature_store.pipeline import Stage
from feature_store.spec import Dataset
from feature_store.tables import feature_tables
from jobs.local.plan import Pair, Plan
from jobs.settings import Settings
from jobs.training.checkpoints import Checkpoints
from jobs.training.results import downstream_results


def not_current(plan: Plan, settings: Settings) -> set[Pair]:
    """The pairs of a plan whose tables, champions or results are missing, or were made from sources or
    under a spec that are not those of now. Whether they were ever run is not asked."""
    lineage = Lake(settings.lake_root, plan.dataset).lineage()
    found: set[Pair] = set()
    for day in plan.days:
        for stage in plan.stages:
            wrong = any(_wrong(stage, plan.dataset, settings, lineage, day))
            if wrong or _producers(plan, stage, day) & found:
                found.add((stage.dag_id, day))
    return found


def stale_days(dataset: Dataset, settings: Settings) -> list[str]:
    """Days whose sequences or examples are written and not current, ascending."""
    lineage = Lake(settings.lake_root, dataset).lineage()
    tables = ("events", "impressions", *feature_tables(dataset))
    return sorted({day for table in tables for day in lineage.stale_days(table)})


def _producers(plan: Plan, stage: Stage, day: str) -> set[Pair]:
    """What a stage waits for, of the same day: what it makes is not current before that is."""
    inputs = plan.inputs((stage.dag_id, day))
    return {pair for _, wanted, pair in inputs if wanted == day}


def _wrong(
    stage: Stage, dataset: Dataset, settings: Settings, lineage: Lineage, day: str
) -> Iterator[bool]:
    """Of each thing that the stage makes of the day, whether it is not current."""

    def lacks(table: str, model: str = "") -> bool:
        return lineage.get(table, day, model) is None or bool(lineage.stale(table, day, model))

    if stage.name == "ingest":
        yield from map(lacks, ("events", "impressions"))
    elif stage.name == "features":
        yield from map(lacks, feature_tables(dataset))
    elif stage.name == "upstream":
        for model in dataset.models:
            root = settings.snapshot_dir(dataset.name, model, day).parent
            yield _decided_from(Checkpoints(root), day) != lineage.identity("user_embeddings", day)
            yield lacks("user_embeddings", model)
    elif stage.name == "report":
        yield not settings.report_json(dataset.name).exists()
    else:
        results = downstream_results(settings, dataset.name, stage.steps[0].task)
        try:
            result = results.of(day)
        except DataError:  # it is damaged: training the day again writes it anew
            yield True
            return
        inputs = result.inputs if result else {}  # none where it compares nothing
        yield any(lineage.replaced(key, version) for key, version in inputs.items())


def _decided_from(checkpoints: Checkpoints, day: str) -> str:
    try:
        return checkpoints.decided_from(day)[1]
    except DataError:  # the record is damaged: training the day again writes it anew
        return ""
