"""Which champion a day of training starts from, and which days it does not know yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from feature_store.days import add_days, day_range
from feature_store.errors import MissingPartitionError, StalePartitionError
from feature_store.tables import definition

if TYPE_CHECKING:
    from feature_store.lake import Lake
    from jobs.training.checkpoints import Checkpoints, Snapshot


def parent_of(lake: Lake, checkpoints: Checkpoints, ds: str) -> Snapshot | None:
    """The champion of the newest day before `ds`; None before the first.

    Raises:
        MissingPartitionError: a day between has labels and was not trained on.
        StalePartitionError: it was chosen by tables that were replaced since. Tables of another
            definition do not matter: a model outlives a change of the spec, weight by name.
    """
    lineage, model = lake.lineage(), checkpoints.root.name
    days = [day for day in checkpoints.champion_days() if day < ds]
    if not days:
        return None
    remedy = (
        f"run make run DATASET={lake.dataset.name}, or train_upstream and publish_embeddings of"
    )
    between = [day for day in lineage.days("labels") if days[-1] < day < ds]
    if between:
        raise MissingPartitionError(
            f"champion of {model} on {between[0]} is missing and that day has labels, so that {ds} would "
            f"be trained on without them: {remedy} {between[0]}"
        )
    made_of, identity = checkpoints.decided_from(days[-1])
    replaced = identity != lineage.identity("user_embeddings", days[-1])
    if made_of == definition(lake.dataset, "user_embeddings") and replaced:
        raise StalePartitionError(
            f"champion of {model} on {days[-1]} was chosen by tables that were replaced since: {remedy} "
            f"{days[-1]}"
        )
    return checkpoints.champion(days[-1])


def untrained(lake: Lake, parent: Snapshot | None, ds: str) -> list[str]:
    """Days before `ds` that have labels which the parent was not trained on, ascending: their candidates
    were rejected."""
    if parent is None:
        return []
    known = lake.partitions("labels")
    return [day for day in day_range(add_days(parent.ds, 1), add_days(ds, -1)) if day in known]
