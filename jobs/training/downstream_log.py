"""One downstream day in MLflow: parameters, metrics, lineage, plots."""

from __future__ import annotations

import hashlib
import json
import pprint
from collections.abc import Mapping
from dataclasses import asdict

from feature_store.spec import Task
from jobs.context import JobContext
from jobs.training import plots, tracking
from jobs.training.results import RESULT, Compared, DownstreamResult
from jobs.training.scoring import Scored

_CURVES = ("context", "aggregates", "aggregates_all")


def log_day(
    context: JobContext,
    task: Task,
    result: DownstreamResult,
    compared: Compared,
    scored: Mapping[str, Scored],
) -> None:
    """Log a result that compares something, and the predictions of its arms."""
    dataset = context.dataset
    config = json.dumps(compared.config, sort_keys=True)
    key = hashlib.sha256(config.encode()).hexdigest()[:16]
    tags = {
        "dataset": dataset.name,
        "task": task.name,
        "ds": context.ds,
        "test_day": compared.test_day,
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
        run.params({"task": task.name, "ds": context.ds, **compared.config})
        run.metrics(metrics_of(result, compared))
        run.lineage(context.lake, result.inputs, "training")
        run.text(pprint.pformat(dataset, width=100), "spec.txt")
        run.text(json.dumps(asdict(result), indent=1), RESULT)
        made_up = " (simulated data)" if dataset.simulated else ""
        title = f"{dataset.name} {task.name}, {compared.test_day}{made_up}"
        rows = [
            (a.title, a.difference.mean, a.difference.low, a.difference.high)
            for a in result.arms.values()
            if a.difference
        ]
        if rows:
            reference = result.arms[compared.reference].title
            drawn = plots.ne_differences(
                {task.name: rows}, title=title, axis=f"NE minus that of '{reference}'"
            )
            run.figure(drawn, "ne_difference.png")
        curves = {n: (s.label, s.prediction) for n, s in scored.items() if n in _CURVES}
        run.figure(plots.calibration(curves, title=title), "calibration.png")


def metrics_of(result: DownstreamResult, compared: Compared) -> dict[str, float | None]:
    """A result as flat metrics."""
    flat: dict[str, float | None] = {"base_rate": compared.base_rate}
    for name, arm in result.arms.items():
        for metric in ("ne", "shifted_ne", "auc", "gauc", "calibration"):
            flat[f"{metric}_{name}"] = getattr(arm, metric)
        if arm.difference:
            flat[f"ne_difference_{name}"] = arm.difference.mean
            flat[f"ne_difference_low_{name}"] = arm.difference.low
            flat[f"ne_difference_high_{name}"] = arm.difference.high
    for row in compared.importance.ranking if compared.importance else ():
        if row.feature.endswith(" embeddings"):
            flat[f"importance_rank_{row.feature.removesuffix(' embeddings')}"] = row.rank
    for side, count in compared.targets.items():
        flat[f"{side}_targets"] = count
    return flat
