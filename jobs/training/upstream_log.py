"""One upstream day in MLflow: parameters, metrics, lineage, plots, and the registered model."""

from __future__ import annotations

import json
import pprint
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from feature_store.spec import Dataset
from jobs.context import JobContext
from jobs.training import plots, tracking
from jobs.training.checkpoints import Checkpoints, Snapshot
from jobs.training.results import (
    EVALUATION,
    RESULT,
    TaskMetrics,
    UpstreamResult,
    Verdict,
    upstream_results,
)

if TYPE_CHECKING:
    from jobs.training.loader import LabelledDay
    from jobs.training.presets import Preset


def experiment(dataset: str, model: str) -> str:
    """The experiment of an upstream model."""
    return f"{dataset}/upstream/{model}"


def run_key(dataset: Dataset, snapshot: Snapshot) -> str:
    """What finds the run of a snapshot's training again."""
    return f"{dataset.name}/{snapshot.model}/{snapshot.ds}/{snapshot.run_hash}"


def log_day(
    context: JobContext, *, model: str, preset: Preset, day: LabelledDay, result: UpstreamResult
) -> None:
    """Log `result` of `jobs/train_upstream.py`, register the candidate and move the aliases."""
    dataset, ds = context.dataset, context.ds
    root = context.settings.snapshot_dir(dataset.name, model, ds).parent
    checkpoints = Checkpoints(root)
    candidate = checkpoints.get(result.candidate)
    tags = {
        "dataset": dataset.name,
        "model": model,
        "ds": ds,
        "snapshot": candidate.id,
        "champion": result.champion,
        "parent": result.parent or "",
        "run_hash": candidate.run_hash,
        "state_hash": candidate.state_hash,
        "spec_hash": dataset.hash,
        "code_version": context.code_version,
        "simulated": str(dataset.simulated).lower(),
        "verdict": result.gate.verdict,
        "verdict_reason": result.gate.reason,
        "trained_on": ", ".join(result.trained_on),
        "lost_days": ", ".join(result.lost),
    }
    with tracking.Run(
        context.settings,
        experiment=experiment(dataset.name, model),
        name=f"{model} {ds}",
        key=run_key(dataset, candidate),
        tags=tags,
    ) as run:
        run.params({"model": model, "ds": ds, **preset.plain()})
        run.metrics(metrics_of(result))
        run.lineage(context.lake, day.inputs, "training")
        run.text(pprint.pformat(dataset, width=100), "spec.txt")
        run.text(json.dumps(preset.plain(), indent=1), "config.json")
        run.text(json.dumps(asdict(result), indent=1), RESULT)
        for path, figure in _figures(context, root, result).items():
            run.figure(figure, path)
        _register(context, checkpoints, run, model, result)


def metrics_of(result: UpstreamResult) -> dict[str, float | None]:
    """A day's result as flat metrics."""
    flat: dict[str, float | None] = {}
    for task, values in result.evaluation.items():
        flat |= _flat(f"{task}_live", values)
        for domain, inside in values.domains.items():
            flat |= _flat(f"{task}_live_domain_{domain}", inside)
    for task, sides in result.gate.tasks.items():
        flat |= _flat(f"{task}_held_out_candidate", sides.candidate)
        if sides.champion is not None:
            flat |= _flat(f"{task}_held_out_champion", sides.champion)
    for name in ("norm", "cosine", "l2", "l2_relative"):
        flat[f"drift_{name}"] = getattr(result.gate.drift, name)
    for task, loss in result.training.loss.items():
        flat[f"{task}_training_logloss"] = loss
    for name in ("targets", "rows", "events", "seconds", "targets_per_second", "steps"):
        flat[f"training_{name}"] = getattr(result.training, name)
    verdict = result.gate.verdict
    judged = verdict is not Verdict.NOT_JUDGED
    flat["judged"] = float(judged)
    flat["accepted"] = float(verdict is Verdict.ACCEPTED) if judged else None
    if result.gate.difference is not None:
        for name, value in asdict(result.gate.difference).items():
            flat["gate_ne_difference" if name == "mean" else f"gate_ne_difference_{name}"] = value
    return flat


def _flat(prefix: str, values: TaskMetrics) -> dict[str, float | None]:
    names = ("ne", "shifted_ne", "auc", "calibration", "labels", "base_rate")
    return {f"{prefix}_{n}": getattr(values, n) for n in names}


def _figures(context: JobContext, root: Path, result: UpstreamResult) -> dict[str, Any]:
    dataset, model, ds = context.dataset, result.model, result.ds
    days = upstream_results(context.settings, dataset.name, model).until(ds).values()
    figures: dict[str, Any] = {}
    made_up = " (simulated data)" if dataset.simulated else ""
    for task in dataset.tasks:
        live = [(r.ds, r.evaluation[task.name].ne) for r in days if task.name in r.evaluation]
        gates = [(r.ds, r.gate.tasks[task.name]) for r in days if task.name in r.gate.tasks]
        champions = [(ds, g.champion.ne) for ds, g in gates if g.champion is not None]
        curves = {
            "live champion, every user": live,
            "candidate, held-out users": [(ds, g.candidate.ne) for ds, g in gates],
            "previous champion, held-out users": champions,
        }
        series = {
            name: [(day, ne) for day, ne in points if ne is not None]
            for name, points in curves.items()
        }
        if any(series.values()):
            figures[f"ne_by_day_{task.name}.png"] = plots.ne_by_day(
                series,
                title=f"{dataset.name} {model}: {task.name} NE by day{made_up}",
                note="sampled negatives: a sampled metric" if task.sampled else "",
            )
    table = pq.read_table(root / ds / EVALUATION)
    task_of = np.array(table["task"].to_pylist(), dtype=object)
    by_task = {}
    for task in dataset.tasks:
        mine = task_of == task.name
        if mine.any():
            columns = (table[c].to_numpy()[mine] for c in ("label", "prediction"))
            by_task[task.name] = tuple(columns)
    if by_task:
        figures["calibration.png"] = plots.calibration(
            by_task, title=f"{dataset.name} {model}: live champion on {ds}{made_up}"
        )
    return figures


def _register(
    context: JobContext,
    checkpoints: Checkpoints,
    run: tracking.Run,
    model: str,
    result: UpstreamResult,
) -> None:
    """A version per snapshot; `candidate` and `champion` follow the newest day only."""
    name = f"{context.dataset.name}.{model}"
    candidate = result.candidate
    version = tracking.register(
        run.client,
        name,
        snapshot=candidate,
        path=checkpoints.path(candidate),
        run_id=run.id,
        tags={"ds": context.ds, "verdict": result.gate.verdict},
    )
    newest = checkpoints.champion_days()[-1]
    if newest == context.ds:
        run.client.set_registered_model_alias(name, tracking.CANDIDATE_ALIAS, version)
    champion = checkpoints.require_champion(newest)
    found = tracking.version_of(run.client, name, champion.id)
    if found is not None:
        run.client.set_registered_model_alias(name, tracking.CHAMPION_ALIAS, found)
