"""`labels`: the answers that became final on a day, negatives included, aligned with `examples`.

The answers to what was shown on a day are final `matures_after` days later, so that a day reads, for
each task, the examples of the day that matures now. Nothing that becomes available after the day's
end can change them, however late the job runs.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from feature_store.columns import NO_LABEL, context_column, label_column
from feature_store.days import add_days, day_range, end_us, micros
from feature_store.spec import Dataset, EventLabel, GivenLabel, Kind, Task
from feature_store.tables import contract
from jobs.frames import conform, is_id, publish, read, values

if TYPE_CHECKING:
    from jobs.context import JobContext


def maturing(dataset: Dataset, ds: str) -> dict[str, list[Task]]:
    """The tasks whose answers become final on `ds`, by the day that they were shown on."""
    shown: dict[str, list[Task]] = {}
    for task in dataset.tasks:
        shown.setdefault(add_days(ds, -task.matures_after), []).append(task)
    return shown


def transform(
    *,
    examples: dict[str, DataFrame],
    impressions: dict[str, DataFrame],
    events: DataFrame,
    dataset: Dataset,
    ds: str,
) -> DataFrame | None:
    """The labels that became final on `ds`.

    Args:
        examples, impressions: partitions by the day shown; days before the first are left out.
        events: partitions of `events` from the earliest of these days to `ds`.

    Returns:
        One row per row of examples and task that is asked of any of its targets; None where no day
        matures.
    """
    table = contract(dataset, "labels")
    answers = []
    for shown, tasks in maturing(dataset, ds).items():
        if shown not in examples:
            continue
        targets = _targets(examples[shown], dataset, tasks)
        given = [t for t in tasks if isinstance(t.label, GivenLabel)]
        if given:
            answers.append(_given(targets, impressions[shown], dataset, given))
        for task in tasks:
            if isinstance(task.label, EventLabel):
                since_shown = events.where(F.col("ds") >= shown)
                answers.append(_from_events(targets, since_shown, dataset, task, task.label, ds))
    if not answers:
        return None
    every = reduce(DataFrame.unionByName, answers)
    return conform(every.where(F.array_max("labels") > NO_LABEL), table, ds)


_ROW = ("user_id", "shown_ds", "part")


def _targets(examples: DataFrame, dataset: Dataset, tasks: list[Task]) -> DataFrame:
    """One row per target: its place (user_id, shown_ds, part, _position) and what tasks ask about it."""
    names = {"target_id": "targets__target_id", "target": "targets__target"}
    if any(isinstance(t.label, EventLabel) for t in tasks):
        names["time"] = "targets__time"
    context = {c.name for c in dataset.context_features}
    asked = {ours for t in tasks if isinstance(t.label, EventLabel) for ours, _ in t.label.match}
    if any(t.domain is not None for t in tasks):
        assert dataset.domain is not None
        asked.add(dataset.domain)
    for name in sorted(asked - {"target_id"}):
        names[_own(name)] = context_column(name) if name in context else f"targets__{name}"
    zipped = F.arrays_zip(*(F.col(column).alias(name) for name, column in names.items()))
    rows = examples.select(
        "user_id",
        F.col("ds").alias("shown_ds"),
        "part",
        F.posexplode(zipped).alias("_position", "_t"),
    )
    return rows.select(*_ROW, "_position", *(F.col("_t").getField(n).alias(n) for n in names))


def _own(name: str) -> str:
    """A target's column here: its context may have any name, also that of a column beside it."""
    return name if name in ("target_id", "item_id") else f"_context__{name}"


def _is_asked(task: Task, dataset: Dataset) -> Column:
    kinds = [i for i, t in enumerate(dataset.targets) if t.name in task.targets]
    asked = F.col("target").isin(kinds)
    if task.domain is not None:
        assert dataset.domain is not None
        asked = asked & (F.col(_own(dataset.domain)) == F.lit(task.domain))
    return asked


def _collect(answers: DataFrame, name: str) -> Column:
    pairs = F.sort_array(F.collect_list(F.struct("_position", name)))
    return values(pairs, name)


def _given(
    targets: DataFrame, impressions: DataFrame, dataset: Dataset, tasks: list[Task]
) -> DataFrame:
    labels = list(
        dict.fromkeys(
            label_column(t.label.column) for t in tasks if isinstance(t.label, GivenLabel)
        )
    )
    key = contract(dataset, "impressions").key
    kinds = F.array(*(F.lit(t.name) for t in dataset.targets))
    target = (F.array_position(kinds, F.col("target")) - 1).cast("int").alias("target")
    given = impressions.select(*(target if n == "target" else n for n in key), *labels)
    answers = targets.join(given, list(key), "left")
    columns, names = [], {task.name: f"_{i}" for i, task in enumerate(tasks)}
    for task in tasks:
        assert isinstance(task.label, GivenLabel)
        answer = F.when(_is_asked(task, dataset), F.col(label_column(task.label.column)))
        columns.append(F.coalesce(answer, F.lit(NO_LABEL)).cast("int").alias(names[task.name]))
    answers = answers.select(*_ROW, "_position", *columns)
    rows = answers.groupBy(*_ROW).agg(
        F.sort_array(F.collect_list(F.struct("_position", *names.values()))).alias("answers")
    )
    per_task = [
        F.struct(F.lit(task).alias("task"), values(F.col("answers"), name).alias("labels"))
        for task, name in names.items()
    ]
    return rows.select(*_ROW, F.explode(F.array(*per_task)).alias("a")).select(
        *_ROW, "a.task", "a.labels"
    )


def _from_events(
    targets: DataFrame, events: DataFrame, dataset: Dataset, task: Task, label: EventLabel, ds: str
) -> DataFrame:
    """Answers by the first matching event after each target's time.

    Targets and events with the same keys go into one line, newest first, in which the running
    minimum of event times is the next event's: no join of all of a user's targets with their events.
    """
    stream = dataset.stream(label.stream)
    keys = [f"key_{i}" for i in range(len(label.match))]
    ours = [F.col(_own(name)).alias(key) for key, (name, _) in zip(keys, label.match, strict=True)]
    theirs = [F.col(name).alias(key) for key, (_, name) in zip(keys, label.match, strict=True)]
    came = events.where(
        (F.col("stream") == stream.name)
        & (F.col("available_time") < end_us(ds, dataset.utc_offset))
    )
    for _, name in label.match:
        attribute = stream.attribute(name)
        if attribute.kind is Kind.CATEGORICAL:
            came = came.where(is_id(F.col(name), attribute.id_type))
    # Newest first, a target precedes an event of the same instant, which so is not after it. `order` is
    # one number: on one core Sail cannot plan a sort by a column that is constant in half of a union.
    line = targets.select(
        *_ROW,
        "_position",
        *ours,
        F.col("time").alias("at"),
        (F.col("time") * 2 + 1).alias("order"),
        _is_asked(task, dataset).alias("asked"),
        F.lit(None).cast("bigint").alias("next"),
    )
    line = line.unionByName(
        came.select(
            "user_id",
            *theirs,
            (F.col("event_time") * 2).alias("order"),
            F.col("event_time").alias("next"),
        ),
        allowMissingColumns=True,
    )
    newest_first = Window.partitionBy("user_id", *keys).orderBy(F.col("order").desc())
    so_far = newest_first.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    line = line.withColumn("next", F.min("next").over(so_far)).where(F.col("_position").isNotNull())
    positive = F.coalesce(F.col("next") <= F.col("at") + micros(label.within), F.lit(False))
    answer = F.when(F.col("asked"), positive.cast("int")).otherwise(F.lit(NO_LABEL))
    answers = line.select(*_ROW, "_position", answer.alias("label"))
    return (
        answers.groupBy(*_ROW)
        .agg(_collect(answers, "label").alias("labels"))
        .withColumn("task", F.lit(task.name))
    )


def run(context: JobContext) -> None:
    """Build the labels that became final on the context's day.

    Raises:
        MissingPartitionError: a day shown that has examples before it has none itself, or its
            impressions or events are missing.
    """
    dataset, ds = context.dataset, context.ds
    inputs: dict[str, int] = {}
    first = min(context.lake.partitions("examples"), default=ds)
    days = [shown for shown in sorted(maturing(dataset, ds)) if shown == ds or shown >= first]
    frame = None
    if days:
        frame = transform(
            examples={day: read(context, "examples", [day], inputs) for day in days},
            impressions={day: read(context, "impressions", [day], inputs) for day in days},
            events=read(context, "events", day_range(days[0], ds), inputs),
            dataset=dataset,
            ds=ds,
        )
    if frame is not None:
        publish(context, "labels", frame, inputs)
        return
    nothing = contract(dataset, "labels").schema.empty_table()
    context.lake.publish_arrow("labels", ds, nothing, inputs={}, code_version=context.code_version)


if __name__ == "__main__":
    from jobs.context import main

    main("build_labels")
