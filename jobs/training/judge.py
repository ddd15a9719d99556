"""How a snapshot did, and whether a candidate may become champion. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from enum import StrEnum
from math import prod
from typing import Any

import numpy as np

from feature_store.spec import Dataset
from jobs.text import interval
from jobs.training.config import GateConfig
from jobs.training.learner import Learner
from jobs.training.loader import Limits, cuts
from jobs.training.rows import Rows
from jobs.training.scoring import Scored, concat, labelled_predictions
from models import metrics

Metrics = dict[str, Any]


class Verdict(StrEnum):
    """What the gate says of a candidate. One that could not be judged becomes champion."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    NOT_JUDGED = "not judged"


def metrics_of(labels: np.ndarray, predictions: np.ndarray, base_rate: float | None) -> Metrics:
    """NE, AUC, calibration and counts; None where a metric is not defined.

    Args:
        labels, predictions: (n,).
        base_rate: share of positives among the labels that the predictions were trained on.

    Returns:
        ne, shifted_ne, auc, calibration; why_not, in words where there is no NE; labels, positives,
        base_rate.
    """
    found = metrics.summary(labels, predictions, base_rate)
    defined = {n: metrics.finite_or_none(found[n]) for n in _DEFINED}
    return defined | {
        "why_not": metrics.why_no_ne(labels, base_rate),
        "labels": len(labels),
        "positives": int(labels.sum()),
        "base_rate": base_rate,
    }


_DEFINED = ("ne", "shifted_ne", "auc", "calibration")


def task_metrics(
    dataset: Dataset, scored: Scored, base_rates: Mapping[str, float], *, domains: bool = True
) -> dict[str, Metrics]:
    """Metrics per task that has labels, and under "domains" per value of the dataset's domain.

    A value is named as batches hold it, an integer: text is hashed, so that a metric's name is one that
    MLflow takes whatever the text holds.
    """
    found = {}
    for index, task in enumerate(dataset.tasks):
        mine = scored.where(scored.task == index)
        if not len(mine):
            continue
        rate = base_rates.get(task.name)
        found[task.name] = metrics_of(mine.label, mine.prediction, rate)
        if domains and dataset.domain is not None:
            found[task.name]["domains"] = {
                str(value): metrics_of(part.label, part.prediction, rate)
                for value in np.unique(mine.domain)
                for part in [mine.where(mine.domain == value)]
            }
    return found


def score_and_embed(
    dataset: Dataset, learners: Mapping[str, Learner], decoded: Iterable[Rows], limits: Limits
) -> dict[str, tuple[Scored, np.ndarray]]:
    """By learner, predictions for every label and user embeddings (R, K, D) float32 of the same rows, which
    are decoded once. What is not a number is returned as it is: the gate judges it."""
    scored: dict[str, list[Scored]] = {name: [] for name in learners}
    embedded: dict[str, list[np.ndarray]] = {name: [] for name in learners}
    for rows in decoded:
        for lo, hi in cuts(rows, limits):
            batch = rows.batch(lo, hi)
            for name, learner in learners.items():
                found = learner.probabilities(batch).numpy()
                scored[name].append(labelled_predictions(dataset, rows, lo, hi, batch, found))
                embedded[name].append(learner.user_embeddings(batch).numpy())
    nobody = np.empty((0, 0, 0), np.float32)
    return {
        name: (concat(parts), np.concatenate(embedded[name]) if parts else nobody)
        for name, parts in scored.items()
    }


def drift(candidate: np.ndarray, champion: np.ndarray | None) -> Metrics:
    """How far the embeddings of the same users moved.

    Args:
        candidate, champion: (R, K, D) float, rows aligned.

    Returns:
        users; finite; norm (mean L2 norm of the K*D values by the candidate); cosine (mean); l2 (mean
        distance); l2_relative (that over the champion's mean norm). None where there is nothing to
        measure, or nothing to compare with.
    """
    ours = flat(candidate)
    norms = np.linalg.norm(ours, axis=1)
    found: Metrics = {
        "users": len(ours),
        "finite": bool(np.isfinite(ours).all()),
        "norm": metrics.finite_or_none(norms.mean()) if len(ours) else None,
        "cosine": None,
        "l2": None,
        "l2_relative": None,
    }
    if champion is None or not len(ours) or champion.shape != candidate.shape:
        return found
    theirs = flat(champion)
    others = np.linalg.norm(theirs, axis=1)
    distance = np.linalg.norm(ours - theirs, axis=1)
    cosine = (ours * theirs).sum(1) / np.maximum(norms * others, 1e-12)
    return found | {
        "cosine": metrics.finite_or_none(cosine.mean()),
        "l2": metrics.finite_or_none(distance.mean()),
        "l2_relative": metrics.finite_or_none(distance.mean() / max(others.mean(), 1e-12)),
    }


def flat(embeddings: np.ndarray) -> np.ndarray:
    """(R, K, D) as (R, K*D) float64, where R, K and D may be 0."""
    return embeddings.reshape(len(embeddings), prod(embeddings.shape[1:])).astype(np.float64)


def decide(
    dataset: Dataset,
    candidate: Scored,
    champion: Scored | None,
    base_rates: Mapping[str, float],
    moved: Metrics,
    gate: GateConfig,
) -> Metrics:
    """Whether the candidate is rejected, and why; or that there is too little to judge it by.

    It is rejected where its NE less the champion's, averaged over the tasks that have enough held-out
    labels, is worse than tolerated: where the whole interval of a paired bootstrap over users lies above
    `gate.ne_tolerance`. Also where a prediction or an embedding is not a number, or embeddings moved
    beyond the gate's bounds.

    Args:
        candidate, champion: of the same labels of held-out users, in the same order; None: there is no
            champion yet.
        base_rates: by task, for both sides.
        moved: what `drift` found.

    Returns:
        verdict; reason, "" where it is accepted; ne of each side and difference (mean, low, high) over
        the tasks judged, None where none was; tasks: per task candidate, champion (`metrics_of`), and
        why_not, None where it was judged; drift.
    """
    tasks: dict[str, Metrics] = {}
    pairs = []
    for index, task in enumerate(dataset.tasks):
        ours, rate = candidate.where(candidate.task == index), base_rates.get(task.name)
        why_not = _too_little(ours, rate, gate)
        tasks[task.name] = {
            "candidate": metrics_of(ours.label, ours.prediction, rate),
            "champion": None,
            "why_not": why_not,
        }
        if champion is None:
            continue
        theirs = champion.where(champion.task == index)
        if len(ours) and not len(theirs):
            tasks[task.name]["why_not"] = "the champion does not know the task"
            continue
        assert np.array_equal(ours.target_id, theirs.target_id)
        tasks[task.name]["champion"] = metrics_of(theirs.label, theirs.prediction, rate)
        if why_not is None:
            pairs.append(
                metrics.Paired(ours.label, ours.prediction, theirs.prediction, ours.user_id, rate)
            )
    difference = metrics.bootstrap_mean_ne_difference(
        pairs, samples=gate.bootstrap_samples, confidence=gate.confidence
    )
    compared = bool(np.isfinite(difference.mean))
    reasons = _out_of_bounds(candidate, moved, gate)
    if compared and difference.low > gate.ne_tolerance:
        reasons.append(
            f"held-out NE is worse by {interval(asdict(difference))}, {gate.ne_tolerance} is tolerated"
        )
    verdict, reason = Verdict.ACCEPTED, "; ".join(reasons)
    if reasons:
        verdict = Verdict.REJECTED
    elif not compared:
        verdict, reason = Verdict.NOT_JUDGED, _why_not_judged(champion, tasks)
    return {
        "verdict": verdict,
        "reason": reason,
        "ne": {side: _mean_ne(tasks, side) if compared else None for side in _SIDES},
        "difference": asdict(difference) if compared else None,
        "tasks": tasks,
        "drift": moved,
    }


_SIDES = ("candidate", "champion")


def _too_little(held_out: Scored, base_rate: float | None, gate: GateConfig) -> str | None:
    """Why a task cannot be judged by these labels; None where it can."""
    labels, users = len(held_out), len(np.unique(held_out.user_id))
    if not labels or labels < gate.min_labels or users < gate.min_users:
        return (
            f"{labels} labels of {users} held-out users ({gate.min_labels} labels of {gate.min_users} "
            "users are needed)"
        )
    if not 0 < held_out.label.sum() < labels:
        return f"all {labels} held-out labels are {held_out.label[0]}"
    return metrics.why_no_ne(held_out.label, base_rate)


def _why_not_judged(champion: Scored | None, tasks: Mapping[str, Metrics]) -> str:
    if champion is None:
        return "no champion is before it"
    names: dict[str, list[str]] = {}
    for name, task in tasks.items():
        if task["why_not"]:
            names.setdefault(task["why_not"], []).append(name)
    return "; ".join(f"{', '.join(of)}: {why_not}" for why_not, of in names.items()) or (
        "fewer than two held-out users"
    )


def _out_of_bounds(candidate: Scored, moved: Metrics, gate: GateConfig) -> list[str]:
    found = []
    if not np.isfinite(candidate.prediction).all():
        found.append("a prediction is not a number")
    if not moved["finite"]:
        found.append("an embedding is not a number")
    if moved["cosine"] is not None and moved["cosine"] < gate.min_cosine:
        found.append(f"embeddings turned: mean cosine {moved['cosine']:.3f} < {gate.min_cosine}")
    if moved["l2_relative"] is not None and moved["l2_relative"] > gate.max_l2:
        found.append(
            f"embeddings moved: L2 {moved['l2_relative']:.2f} of their norm > {gate.max_l2}"
        )
    return found


def _mean_ne(tasks: Mapping[str, Metrics], side: str) -> float:
    return float(np.mean([t[side]["ne"] for t in tasks.values() if t["why_not"] is None]))
