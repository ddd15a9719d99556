"""What the published embeddings are worth to one task: the same small model with and without them.

Trains on the last matured days, each with the embeddings published the day before it, and tests on
the newest matured day. Arms differ in their inputs only. Written:

    <home>/downstream/<dataset>/<task>/<ds>/
        result.json           metrics, differences with intervals, importance, of every arm; where nothing
                              could be compared, no arms, and in why_not the reason
        predictions.parquet   user_id, target_id, label, domain, held_out, and one column per arm
"""

from __future__ import annotations

from dataclasses import dataclass

from feature_store.days import add_days
from feature_store.lake import Lake
from feature_store.spec import Dataset, Task
from jobs.context import JobContext, main
from jobs.text import number
from jobs.training.results import DownstreamResult, downstream_results

TRAIN_DAYS, MIN_TRAIN_DAYS = 5, 3  # most, and fewest, days trained on


@dataclass(frozen=True, kw_only=True)
class Days:
    """Days shown: the test's, and those to train on, ascending; None where they are too few."""

    test: str | None
    training: tuple[str, ...]


def choose_days(lake: Lake, dataset: Dataset, task: Task, ds: str) -> Days:
    """Which days have labels, examples, and every model's embeddings of the day before.

    The newest matured day is `ds` less the task's days until its labels are final.
    """
    labels, examples = lake.partitions("labels"), lake.partitions("examples")
    published = [lake.partitions("user_embeddings", m) for m in dataset.models]

    def usable(shown: str) -> bool:
        return (
            add_days(shown, task.matures_after) in labels
            and shown in examples
            and all(add_days(shown, -1) in p and p[add_days(shown, -1)].rows for p in published)
        )

    test = add_days(ds, -task.matures_after)
    training = [add_days(test, -i) for i in range(TRAIN_DAYS, 0, -1)]
    return Days(
        test=test if usable(test) else None, training=tuple(d for d in training if usable(d))
    )


def run(context: JobContext) -> None:
    """Compare the arms of `context.task` on the newest day that matured by `context.ds`."""
    task, ds = context.require_task(), context.ds
    days = choose_days(context.lake, context.dataset, task, ds)
    if days.test is None or len(days.training) < MIN_TRAIN_DAYS:
        result = DownstreamResult(
            dataset=context.dataset.name,
            task=task.name,
            ds=ds,
            why_not=f"not enough days yet with labels and embeddings (needs a test day and {MIN_TRAIN_DAYS} "
            f"before it, has {'a' if days.test else 'no'} test day and {len(days.training)})",
        )
        downstream_results(context.settings, context.dataset.name, task.name).write(result)
    else:
        from jobs.training.downstream_day import DownstreamDay  # noqa: PLC0415 it imports torch

        result = DownstreamDay(
            context=context, task=task, test_day=days.test, train_days=days.training
        ).run()
    if not result.arms:
        print(f"{task.name} {ds}: {result.why_not}", flush=True)
    for name, arm in result.arms.items():
        print(f"{task.name} {ds}: {name:22} NE {number(arm.ne)} AUC {number(arm.auc)}", flush=True)


if __name__ == "__main__":
    main("train_downstream")
