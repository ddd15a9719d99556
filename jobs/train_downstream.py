"""What the published embeddings are worth to one task: the same small model with and without them.

Trains on the last matured days, each with the embeddings published the day before it, and tests on
the newest matured day. Arms differ in their inputs only. Written:

    <home>/downstream/<dataset>/<task>/<ds>/
        result.json           metrics, differences with intervals, importance, of every arm; where nothing
                              could be compared, no arms, and in why_not the reason
        predictions.parquet   user_id, target_id, label, domain, held_out, and one column per arm
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.days import shift
from feature_store.spec import Dataset, Task
from jobs.context import JobContext, main
from jobs.text import number
from jobs.training.results import PREDICTIONS, RESULT

if TYPE_CHECKING:
    from feature_store.lake import Lake
    from jobs.training.config import DownstreamTraining
    from jobs.training.scoring import Scored

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
            shift(shown, task.matures_after) in labels
            and shown in examples
            and all(shift(shown, -1) in p and p[shift(shown, -1)].rows for p in published)
        )

    test = shift(ds, -task.matures_after)
    training = [shift(test, -i) for i in range(TRAIN_DAYS, 0, -1)]
    return Days(
        test=test if usable(test) else None, training=tuple(d for d in training if usable(d))
    )


def run(context: JobContext) -> None:
    """Compare the arms of `context.task` on the newest day that matured by `context.ds`."""
    task = context.require_task()
    days = choose_days(context.lake, context.dataset, task, context.ds)
    if days.test is None or len(days.training) < MIN_TRAIN_DAYS:
        result = _nothing(
            context,
            task,
            f"not enough days yet with labels and embeddings (needs a test day and {MIN_TRAIN_DAYS} "
            f"before it, has {'a' if days.test else 'no'} test day and {len(days.training)})",
        )
    else:
        result = compare(context, task, days.test, days.training)
    if not result["arms"]:
        print(f"{task.name} {context.ds}: {result['why_not']}", flush=True)
    for name, arm in result["arms"].items():
        print(
            f"{task.name} {context.ds}: {name:22} NE {number(arm['ne'])} AUC {number(arm['auc'])}",
            flush=True,
        )


def _nothing(context: JobContext, task: Task, why_not: str) -> dict[str, Any]:
    """The result of a day on which nothing could be compared, written."""
    result = {
        "dataset": context.dataset.name, "task": task.name, "ds": context.ds, "arms": {},
        "why_not": why_not,
    }  # fmt: skip
    _write(context, task, result)
    return result


def _folder(context: JobContext, task: Task) -> Path:
    found = context.settings.downstream_dir(context.dataset.name, task.name) / context.ds
    found.mkdir(parents=True, exist_ok=True)
    return found


def _write(context: JobContext, task: Task, result: Mapping[str, Any]) -> None:
    from jobs.training.checkpoints import write_atomically

    write_atomically(_folder(context, task) / RESULT, json.dumps(result, indent=1).encode())


def compare(
    context: JobContext, task: Task, test_day: str, train_days: tuple[str, ...]
) -> dict[str, Any]:
    """Train and test every arm, write the result, log it. Without arms where there are too few labels."""
    from jobs.training.downstream import Comparison, arms
    from jobs.training.ids import seed_of
    from jobs.training.presets import downstream_training

    dataset = context.dataset
    config = downstream_training(dataset)
    inputs: dict[str, int] = {}
    snapshots: dict[str, dict[str, str]] = {}
    training, train_share = _load(context, task, train_days, config, inputs, snapshots, test=False)
    test, test_share = _load(context, task, (test_day,), config, inputs, snapshots, test=True)
    if not training or not test:
        empty = "on the days trained on" if not training else f"on the test day {test_day}"
        return _nothing(context, task, f"no label {empty}")
    comparison = Comparison(
        dataset=dataset,
        task=task,
        config=config,
        training=training,
        test=test,
        seed=seed_of("downstream", dataset.name, task.name, context.ds),
    )
    if not 0 < comparison.base_rate() < 1:
        answer = int(comparison.base_rate())
        return _nothing(
            context, task, f"every label trained on is {answer}: there is nothing to tell apart"
        )
    chosen = arms(dataset.models)
    found, scored = comparison.run(chosen)
    result = {
        "dataset": dataset.name,
        "task": task.name,
        "ds": context.ds,
        "test_day": test_day,
        "train_days": list(train_days),
        "sampled": task.sampled,
        "simulated": dataset.simulated,
        "users_share": {"training": train_share, "test": test_share},
        "targets": {
            "training": sum(x.batch.targets for x in training),
            "test": sum(x.batch.targets for x in test),
        },
        "users": len(set(scored["context"].user_id.tolist())),
        **found,
        "snapshots": snapshots,
        "config": asdict(config),
        "inputs": inputs,
    }
    write_predictions(dataset, scored, _folder(context, task) / PREDICTIONS)
    _write(context, task, result)
    _log(context, task, result, scored)
    return result


def _load(
    context: JobContext,
    task: Task,
    shown: tuple[str, ...],
    config: DownstreamTraining,
    inputs: dict[str, int],
    snapshots: dict[str, dict[str, str]],
    *,
    test: bool,
) -> tuple[list[Any], float]:
    """Batches of the days shown, with embeddings; and the share of users that was taken.

    Held-out users are tested and never trained on.
    """
    from feature_store.embeddings import read_embeddings
    from jobs.training.downstream import load
    from jobs.training.loader import Limits, Users, labelled_day, labelled_rows, share_within

    lake, dataset = context.lake, context.dataset
    labelled = [
        labelled_day(lake, dataset, shift(day, task.matures_after), tasks=[task.name])
        for day in shown
    ]
    cap = config.max_test_targets if test else config.max_train_targets
    share = share_within(labelled, task.name, cap)
    limits = Limits(max_targets=4096 if test else config.batch_targets)
    out = []
    for day, found in zip(shown, labelled, strict=True):
        inputs |= found.inputs
        embeddings = {}
        for model in dataset.models:
            before = shift(day, -1)
            embeddings[model] = read_embeddings(lake, model, before, config.kind)
            inputs |= {f"user_embeddings/{model}/{before}": embeddings[model].version or 0}
            snapshots.setdefault(model, {})[before] = embeddings[model].snapshot
        rows = labelled_rows(
            lake, dataset, found.shown, users=Users.ALL if test else Users.TRAINING,
            history=False, seed=1, limits=limits, share=share,
        )  # fmt: skip
        out += load(rows, embeddings, limits)
    return out, share


def write_predictions(dataset: Dataset, scored: dict[str, Scored], path: Path) -> None:
    """One row per test target, one column per arm."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from feature_store.columns import id_type
    from jobs.training.checkpoints import replacing
    from jobs.training.ids import held_out

    first = next(iter(scored.values()))
    columns = {
        "user_id": pa.array(first.stored_user_id.tolist(), id_type(dataset.user_id_type)),
        "target_id": pa.array(first.target_id.tolist(), id_type(dataset.target_id_type)),
        "label": first.label.astype(np.int32),
        "domain": first.domain,
        "held_out": held_out(first.user_id, dataset.held_out_share),
    }
    columns |= {name: found.prediction for name, found in scored.items()}
    with replacing(path) as staging:
        pq.write_table(pa.table(columns), staging, compression="zstd")


def _log(
    context: JobContext, task: Task, result: dict[str, Any], scored: dict[str, Scored]
) -> None:
    import hashlib
    import pprint

    from jobs.training import plots, tracking

    dataset = context.dataset
    config = json.dumps(result["config"], sort_keys=True)
    key = hashlib.sha256(config.encode()).hexdigest()[:16]
    tags = {
        "dataset": dataset.name,
        "task": task.name,
        "ds": context.ds,
        "test_day": result["test_day"],
        "config_hash": key,
        "spec_hash": dataset.hash,
        "code_version": context.code_version,
        "simulated": str(dataset.simulated).lower(),
        "sampled_metric": str(task.sampled).lower(),
    }
    with tracking.Run(
        context.settings,
        experiment=f"{dataset.name}/downstream/{task.name}",
        name=f"{task.name} {context.ds}",
        key=f"{dataset.name}/{task.name}/{context.ds}/{key}",
        tags=tags,
    ) as run:
        run.params({"task": task.name, "ds": context.ds, **result["config"]})
        run.metrics(metrics_of(result))
        run.lineage(context.lake, result["inputs"], "training")
        run.text(pprint.pformat(dataset, width=100), "spec.txt")
        run.text(json.dumps(result, indent=1), RESULT)
        made_up = " (simulated data)" if dataset.simulated else ""
        title = f"{dataset.name} {task.name}, {result['test_day']}{made_up}"
        rows = [
            (a["title"], a["difference"]["mean"], a["difference"]["low"], a["difference"]["high"])
            for a in result["arms"].values()
            if a["difference"]
        ]
        if rows:
            reference = result["arms"][result["reference"]]["title"]
            drawn = plots.ne_differences(
                {task.name: rows}, title=title, axis=f"NE minus that of '{reference}'"
            )
            run.figure(drawn, "ne_difference.png")
        curves = {n: (s.label, s.prediction) for n, s in scored.items() if n in _CURVES}
        run.figure(plots.calibration(curves, title=title), "calibration.png")


_CURVES = ("context", "aggregates", "aggregates_all")


def metrics_of(result: dict[str, Any]) -> dict[str, float | None]:
    """A result as flat metrics."""
    found: dict[str, float | None] = {"base_rate": result["base_rate"]}
    for name, arm in result["arms"].items():
        for metric in ("ne", "shifted_ne", "auc", "gauc", "calibration"):
            found[f"{metric}_{name}"] = arm[metric]
        if arm["difference"]:
            found[f"ne_difference_{name}"] = arm["difference"]["mean"]
            found[f"ne_difference_low_{name}"] = arm["difference"]["low"]
            found[f"ne_difference_high_{name}"] = arm["difference"]["high"]
    for row in result.get("importance", {}).get("ranking", []):
        if row["feature"].endswith(" embeddings"):
            found[f"importance_rank_{row['feature'].removesuffix(' embeddings')}"] = row["rank"]
    for side, count in result["targets"].items():
        found[f"{side}_targets"] = count
    return found


if __name__ == "__main__":
    main("train_downstream")
