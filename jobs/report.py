"""The report: did the upstream models help the downstream tasks, by how much, and what did it cost.

Reads what the run left behind (the ledger, each day's upstream evaluation, each downstream day's
predictions) and writes `index.html` and the same figures as `report.json`; prints a table. Figures
over several test days are made from the predictions of those days together, not from means of
daily figures, so that their intervals are honest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from rich.console import Console

from feature_store.spec import Dataset, Task
from feature_store.tables import contracts
from jobs.context import JobContext, main
from jobs.paths import own
from jobs.report_page import html, terminal
from jobs.training import tracking
from jobs.training.checkpoints import write_atomically
from jobs.training.results import (
    EVALUATION,
    PREDICTIONS,
    Compared,
    DownstreamResult,
    Results,
    downstream_results,
    upstream_results,
)
from models import metrics

CONTEXT_ARM, AGGREGATES_ARM = "context", "aggregates"
TABLE_WIDTH = 124


def run(context: JobContext) -> None:
    """Write the report on everything up to the context's day, print it and log it to MLflow."""
    report = assemble(context)
    folder = context.settings.report_dir(context.dataset.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.html", html(report).encode())
    figures = context.settings.report_json(context.dataset.name)
    write_atomically(figures, json.dumps(report, indent=1).encode())
    _log(context, folder, report)
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    for table in terminal(report):
        console.print(table)
    print(own(f"report: {folder / 'index.html'}"), flush=True)


def assemble(context: JobContext) -> dict[str, Any]:
    """Every figure of the report as JSON-ready values; None where there is nothing to say."""
    dataset, ds = context.dataset, context.ds
    partitions = _partitions(context)
    built = [p for p in partitions if p["table"] == "events"] or partitions
    days = sorted({p["ds"] for p in built})
    tasks = [_task(context, task) for task in dataset.tasks]
    upstream, by_day = _upstream(context)
    ingested = [p["notes"] for p in partitions if p["table"] == "events"]
    return {
        "dataset": dataset.name,
        "description": dataset.description,
        "simulated": dataset.simulated,
        "sampled_tasks": [t.name for t in dataset.tasks if t.sampled],
        "first_day": days[0] if days else ds,
        "last_day": days[-1] if days else ds,
        "engines": engines(partitions),
        "code_versions": sorted({p["code_version"] for p in partitions}),
        "spec_hash": dataset.hash,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "tasks": tasks,
        "upstream": upstream,
        "upstream_by_day": by_day,
        "gates": _gates(context),
        "embeddings": _embeddings(partitions),
        "stages": _stages(dataset, partitions),
        "ingest_notes": _sum_notes(ingested),
    }


def engines(partitions: Sequence[Mapping[str, Any]]) -> list[str]:
    """What computed the tables, by name; a run that goes on with another engine has two."""
    return sorted({p["engine"] for p in partitions if p["table"] != "user_embeddings"})


def _partitions(context: JobContext) -> list[dict[str, Any]]:
    """The newest ledger row of every partition up to the context's day."""
    found = []
    for table in contracts(context.dataset).values():
        models = context.dataset.models if "model" in table.partitioned_by else ("",)
        for model in models:
            found += [asdict(p) for p in context.lake.partitions(table.name, model).values()]
    return sorted(
        (p for p in found if p["ds"] <= context.ds), key=lambda p: (p["table"], p["model"], p["ds"])
    )


# ---- downstream


def _task(context: JobContext, task: Task) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": task.name,
        "description": task.description,
        "sampled": task.sampled,
        "days": [],
        "arms": [],
        "kind": None,
        "oracle": None,
        "why_not": "no downstream model was trained",
    }
    written = downstream_results(context.settings, context.dataset.name, task.name)
    results = written.until(context.ds)
    reasons = [r.why_not for r in results.values() if r.compared is None]
    compared = {ds: r.compared for ds, r in results.items() if r.compared is not None}
    if not compared:
        return found | ({"why_not": reasons[-1]} if reasons else {})
    frames = {c.test_day: _predictions(written, ds, c) for ds, c in compared.items()}
    newest = results[max(compared)]
    return found | _compare(context, task, newest, compared[newest.ds], frames)


def _predictions(written: Results[DownstreamResult], ds: str, compared: Compared) -> pd.DataFrame:
    frame = written.rows(ds, PREDICTIONS)
    frame["test_day"] = compared.test_day
    frame["base_rate"] = compared.base_rate
    return frame


def _compare(
    context: JobContext,
    task: Task,
    newest: DownstreamResult,
    compared: Compared,
    frames: Mapping[str, pd.DataFrame],
) -> dict[str, Any]:
    """Every arm of the newest result over all test days together."""
    names = [n for n in newest.arms if all(n in f for f in frames.values())]
    rows = pd.concat(frames.values(), ignore_index=True)
    truth = _truth(context, task, sorted(frames), rows)
    differences = _differences(rows, names)
    arms: list[dict[str, Any]] = [
        {
            "name": name,
            "title": newest.arms[name].title,
            **_metrics(rows, rows[name]),
            "to_context": differences.get((name, CONTEXT_ARM)),
            "to_aggregates": differences.get((name, AGGREGATES_ARM)),
            "by_day": {day: _metrics(f, f[name])["ne"] for day, f in frames.items()},
        }
        for name in names
    ]
    oracle = None if truth is None else _metrics(rows, truth)
    for arm in arms:
        arm["attainable"] = None if oracle is None else _share(arm["ne"], oracle["ne"])
        arm["best"] = arm["ne"] is not None and arm["ne"] == min(
            a["ne"] for a in arms if a["ne"] is not None
        )
    return {
        "days": sorted(frames),
        "targets": len(rows),
        "users": int(rows["user_id"].nunique()),
        "base_rate": float(rows["base_rate"].mean()),
        "test_rate": float(rows["label"].mean()),
        "train_days": compared.train_days,
        "users_share": compared.users_share,
        "kind": compared.config["kind"],
        "arms": arms,
        "oracle": oracle,
        "importance": [
            {
                "rank": i.rank,
                "name": i.feature,
                "loss": i.ne_increase,
                "embedding": i.feature.endswith(" embeddings"),
            }
            for i in (compared.importance.ranking if compared.importance else ())
        ],
        "importance_day": compared.test_day,
    }


def _metrics(rows: pd.DataFrame, predictions: pd.Series) -> dict[str, float | None]:
    """Of `rows` with `label` and `base_rate`: each row's NE is against the rate of its own day's model."""
    found = metrics.summary(
        rows["label"].to_numpy(), predictions.to_numpy(), rows["base_rate"].to_numpy()
    )
    return {
        name: metrics.finite_or_none(found[key])
        for name, key in (
            ("ne", "ne"),
            ("ne_shifted", "shifted_ne"),
            ("auc", "auc"),
            ("calibration", "calibration"),
        )
    }


def _share(ne: float | None, oracle_ne: float | None) -> float | None:
    """Which share of the gain that the truth has over the base rate."""
    if ne is None or oracle_ne is None or oracle_ne >= 1:
        return None
    return (1 - ne) / (1 - oracle_ne)


def _differences(
    rows: pd.DataFrame, arms: Sequence[str]
) -> dict[tuple[str, str], dict[str, float]]:
    """NE of each arm minus that of the two it is compared with, with intervals, by (arm, other)."""
    pairs = {
        (arm, other): (rows[arm], rows[other])
        for other in (CONTEXT_ARM, AGGREGATES_ARM)
        for arm in arms
        if arm != other and other in rows
    }
    found = metrics.bootstrap_ne_differences(
        rows["label"], pairs, rows["user_id"], rows["base_rate"]
    )
    return {pair: asdict(i) for pair, i in found.items() if isfinite(i.mean)}


def _truth(
    context: JobContext, task: Task, days: Sequence[str], rows: pd.DataFrame
) -> pd.Series | None:
    """The probability that each row's label was drawn with; None where nobody knows it."""
    if not context.dataset.simulated:
        return None
    known = context.lake.read(
        "truth", days=list(days), columns=["target_id", "task", "probability"]
    )
    frame = known.to_pandas()
    probability = frame[frame["task"] == task.name].set_index("target_id")["probability"]
    return rows["target_id"].map(probability)


# ---- upstream


def _upstream(
    context: JobContext,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, list[tuple[str, float]]]]]:
    """Progressive validation: per model and task over all days, and NE by day."""
    dataset = context.dataset
    table: list[dict[str, Any]] = []
    by_day: dict[str, dict[str, list[tuple[str, float]]]] = {t.name: {} for t in dataset.tasks}
    for model in dataset.models:
        written = upstream_results(context.settings, dataset.name, model)
        days = written.until(context.ds)
        for task in dataset.tasks:
            found = {
                ds: r.evaluation[task.name] for ds, r in days.items() if task.name in r.evaluation
            }
            why_not = [f.why_not for f in found.values() if f.why_not]
            found = {ds: f for ds, f in found.items() if f.ne is not None}
            if not found:
                table.append(_no_ne(model, task, why_not))
                continue
            by_day[task.name][model] = [
                (f.shown_ds, f.ne) for f in found.values() if f.ne is not None
            ]
            frames = []
            for ds, values in found.items():
                frame = written.rows(ds, EVALUATION, task=task.name)
                frames.append(frame.assign(base_rate=values.base_rate))
            rows = pd.concat(frames, ignore_index=True)
            shown = [f.shown_ds for f in found.values()]
            truth = _truth(context, task, shown, rows)
            oracle = None if truth is None else _metrics(rows, truth)["ne"]
            mine = _metrics(rows, rows["prediction"])
            table.append(
                {
                    "model": model,
                    "task": task.name,
                    "days": len(found),
                    **mine,
                    "oracle_ne": oracle,
                    "attainable": _share(mine["ne"], oracle),
                    "why_not": None,
                }
            )
    return table, {task: models for task, models in by_day.items() if models}


def _no_ne(model: str, task: Task, why_not: Sequence[str]) -> dict[str, Any]:
    """The line of a task that a model has no NE for on any day; `why_not` of the days that had labels."""
    empty = dict.fromkeys(("ne", "ne_shifted", "auc", "calibration", "oracle_ne", "attainable"))
    reason = why_not[-1] if why_not else "no labels of what was shown since the first model"
    return {"model": model, "task": task.name, "days": 0, **empty, "why_not": reason}


def _gates(context: JobContext) -> list[dict[str, Any]]:
    """Each day's decision on each model's candidate."""
    settings, dataset = context.settings, context.dataset
    return [
        {
            "model": model,
            "ds": ds,
            "champion": r.champion,
            "verdict": r.gate.verdict,
            "reason": r.gate.reason,
            "candidate_ne": r.gate.ne["candidate"],
            "champion_ne": r.gate.ne["champion"],
            "difference": r.gate.difference and asdict(r.gate.difference),
            "trained_on": r.trained_on,
            "lost": r.lost,
            "targets": r.training.targets,
            "rate": r.training.targets_per_second,
        }
        for model in dataset.models
        for ds, r in upstream_results(settings, dataset.name, model).until(context.ds).items()
    ]


def _embeddings(partitions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each published partition: coverage, norm and drift as the publisher recorded them."""
    return [
        {
            "model": p["model"],
            "ds": p["ds"],
            "snapshot": p["notes"].get("snapshot", ""),
            "users": p["rows"],
            "coverage": p["notes"].get("coverage"),
            "norm": p["notes"].get("norm_mean"),
            "cosine_raw": p["notes"].get("cosine"),
            "cosine_pooled": p["notes"].get("cosine_pooled"),
        }
        for p in partitions
        if p["table"] == "user_embeddings"
    ]


# ---- cost


def _stages(dataset: Dataset, partitions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows, bytes and seconds of each table, in the order in which a day builds them."""
    order = ["events", "impressions", "truth", "sequences", "aggregates", "item_aggregates"]
    order += ["examples", "labels"]
    names = [n for n in order if n in contracts(dataset)] + ["user_embeddings"]
    found = []
    for name in names:
        mine = [p for p in partitions if p["table"] == name]
        if mine:
            found.append(
                {
                    "table": name,
                    "partitions": len(mine),
                    "rows": sum(p["rows"] for p in mine),
                    "bytes": sum(p["bytes"] for p in mine),
                    "seconds": sum(p["seconds"] for p in mine),
                    "median_seconds": median(p["seconds"] for p in mine),
                }
            )
    return found


def _sum_notes(notes: Sequence[Mapping[str, Any]]) -> str:
    """Counts of all days added up, as text."""
    total: dict[str, float] = {}
    for note in notes:
        for key, value in note.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                total[key] = total.get(key, 0) + value
    return ", ".join(f"{k.replace('_', ' ')} {v:,.0f}" for k, v in sorted(total.items())) or "none"


def _log(context: JobContext, folder: Path, report: Mapping[str, Any]) -> None:
    """Keep the page and its figures in MLflow, in the dataset's experiment `<dataset>/report`."""
    dataset = context.dataset
    with tracking.Run(
        context.settings,
        experiment=f"{dataset.name}/report",
        name=f"{report['first_day']} to {report['last_day']}",
        key=f"{dataset.name}/report/{report['first_day']}/{report['last_day']}",
        tags={"dataset": dataset.name, "ds": context.ds, "code_version": context.code_version},
    ) as run:
        for name in ("index.html", "report.json"):
            run.client.log_artifact(run.id, str(folder / name))
        run.metrics(
            {
                f"{task['name']}_{metric}_{arm['name']}": arm[metric]
                for task in report["tasks"]
                for arm in task["arms"]
                for metric in ("ne", "auc", "attainable")
            }
        )


if __name__ == "__main__":
    main("report")
