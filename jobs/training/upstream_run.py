"""One upstream day in MLflow: parameters, metrics, lineage, plots, and the registered model."""

from __future__ import annotations

import json
import pprint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.spec import Dataset
from jobs.context import JobContext
from jobs.training import tracking
from jobs.training.checkpoints import Checkpoints, Snapshot
from jobs.training.judge import Verdict
from jobs.training.results import EVALUATION, RESULT, Results

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
    context: JobContext, *, model: str, preset: Preset, day: LabelledDay, result: dict[str, Any]
) -> None:
    """Log `result` of `jobs/train_upstream.py`, register the candidate and move the aliases."""
    dataset, ds = context.dataset, context.ds
    root = context.settings.snapshot_dir(dataset.name, model, ds).parent
    checkpoints = Checkpoints(root)
    candidate = checkpoints.get(result["candidate"])
    tags = {
        "dataset": dataset.name,
        "model": model,
        "ds": ds,
        "snapshot": candidate.id,
        "champion": result["champion"],
        "parent": result["parent"] or "",
        "run_hash": candidate.run_hash,
        "state_hash": candidate.state_hash,
        "spec_hash": dataset.hash,
        "code_version": context.code_version,
        "simulated": str(dataset.simulated).lower(),
        "verdict": result["gate"]["verdict"],
        "verdict_reason": result["gate"]["reason"],
        "trained_on": ", ".join(result["trained_on"]),
        "lost_days": ", ".join(result["lost"]),
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
        run.text(json.dumps(result, indent=1), RESULT)
        for path, figure in _figures(context, root, result).items():
            run.figure(figure, path)
        _register(context, checkpoints, run, model, result)


def metrics_of(result: dict[str, Any]) -> dict[str, float | None]:
    """A day's result as flat metrics."""
    found: dict[str, float | None] = {}
    for task, values in result["evaluation"].items():
        found |= _flat(f"{task}_live", values)
        for domain, inside in values.get("domains", {}).items():
            found |= _flat(f"{task}_live_domain_{domain}", inside)
    for task, sides in result["gate"]["tasks"].items():
        for side in ("candidate", "champion"):
            if sides[side] is not None:
                found |= _flat(f"{task}_held_out_{side}", sides[side])
    for name in ("norm", "cosine", "l2", "l2_relative"):
        found[f"drift_{name}"] = result["gate"]["drift"][name]
    for task, loss in result["training"]["loss"].items():
        found[f"{task}_training_logloss"] = loss
    for name in ("targets", "rows", "events", "seconds", "targets_per_second", "steps"):
        found[f"training_{name}"] = result["training"][name]
    verdict = result["gate"]["verdict"]
    found["judged"] = float(verdict != Verdict.NOT_JUDGED)
    found["accepted"] = float(verdict == Verdict.ACCEPTED) if found["judged"] else None
    for name, value in (result["gate"]["difference"] or {}).items():
        found["gate_ne_difference" if name == "mean" else f"gate_ne_difference_{name}"] = value
    return found


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, float | None]:
    names = ("ne", "shifted_ne", "auc", "calibration", "labels", "base_rate")
    return {f"{prefix}_{n}": values[n] for n in names}


def _figures(context: JobContext, root: Path, result: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import pyarrow.parquet as pq

    from jobs.training import plots

    dataset, model, ds = context.dataset, result["model"], result["ds"]
    days = Results.upstream(context.settings, dataset.name, model).until(ds).values()
    figures: dict[str, Any] = {}
    made_up = " (simulated data)" if dataset.simulated else ""
    for task in dataset.tasks:
        series = {
            "live champion, every user": [
                (r["ds"], r["evaluation"][task.name]["ne"])
                for r in days
                if (r["evaluation"].get(task.name) or {}).get("ne") is not None
            ]
        }
        for side, name in (("candidate", "candidate, held-out users"),
                           ("champion", "previous champion, held-out users")):  # fmt: skip
            series[name] = [
                (r["ds"], r["gate"]["tasks"][task.name][side]["ne"])
                for r in days
                if (r["gate"]["tasks"].get(task.name, {}).get(side) or {}).get("ne") is not None
            ]
        if any(series.values()):
            figures[f"ne_by_day_{task.name}.png"] = plots.ne_by_day(
                series,
                title=f"{dataset.name} {model}: {task.name} NE by day{made_up}",
                note="sampled negatives: a sampled metric" if task.sampled else "",
            )
    table = pq.read_table(root / ds / EVALUATION)
    task_of = np.array(table["task"].to_pylist(), dtype=object)
    curves = {}
    for task in dataset.tasks:
        mine = task_of == task.name
        if mine.any():
            columns = (table[c].to_numpy()[mine] for c in ("label", "prediction"))
            curves[task.name] = tuple(columns)
    if curves:
        figures["calibration.png"] = plots.calibration(
            curves, title=f"{dataset.name} {model}: live champion on {ds}{made_up}"
        )
    return figures


def _register(
    context: JobContext,
    checkpoints: Checkpoints,
    run: tracking.Run,
    model: str,
    result: dict[str, Any],
) -> None:
    """A version per snapshot; `candidate` and `champion` follow the newest day only."""
    name = f"{context.dataset.name}.{model}"
    candidate = result["candidate"]
    version = tracking.register(
        run.client,
        name,
        snapshot=candidate,
        path=checkpoints.path(candidate),
        run_id=run.id,
        tags={"ds": context.ds, "verdict": result["gate"]["verdict"]},
    )
    newest = checkpoints.champion_days()[-1]
    if newest == context.ds:
        run.client.set_registered_model_alias(name, tracking.CANDIDATE_ALIAS, version)
    champion = checkpoints.require_champion(newest)
    found = tracking.version_of(run.client, name, champion.id)
    if found is not None:
        run.client.set_registered_model_alias(name, tracking.CHAMPION_ALIAS, found)
