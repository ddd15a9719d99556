"""`item_aggregates`: what is counted about items by the hour; see `jobs/item_features.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from feature_store.days import shift
from jobs import item_features
from jobs.build_sequences import load_before
from jobs.frames import publish, read

if TYPE_CHECKING:
    from jobs.context import JobContext


def run(context: JobContext) -> None:
    """Build `item_aggregates` of the context's day, where the spec has item features.

    Raises:
        MissingPartitionError: the day's events, or item counts or histories of a day before, are
            missing.
    """
    dataset, ds = context.dataset, context.ds
    if dataset.item_features is None:
        return
    inputs: dict[str, int] = {}
    events = read(context, "events", [ds], inputs)
    earlier = item_features.load(context, shift(ds, -1), inputs)
    state = None if dataset.co_occurrence is None else load_before(context, inputs)
    frame = item_features.transform(events, earlier, state, dataset, ds)
    publish(context, "item_aggregates", frame, inputs)


if __name__ == "__main__":
    from jobs.context import main

    main("build_item_aggregates")
