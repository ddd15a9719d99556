"""How a snapshot did, and whether a candidate may become champion. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from feature_store.spec import Dataset
from jobs.training.config import GateConfig
from jobs.training.loop import Scored
from models import metrics

Metrics = dict[str, Any]


def metrics_of(labels: np.ndarray, predictions: np.ndarray, base_rate: float | None) -> Metrics:
    """NE, AUC, calibration and counts; None where a metric is not defined (one class, no base rate).

    Args:
        labels, predictions: (n,).
        base_rate: share of positives among the labels that the predictions were trained on.
    """
    both = 0 < labels.sum() < len(labels)
    ne = shifted = None
    if base_rate is not None and len(labels):
        ne = metrics.finite_or_none(metrics.normalized_entropy(labels, predictions, base_rate))
        shifted = metrics.finite_or_none(
            metrics.shifted_normalized_entropy(labels, predictions, base_rate)
        )
    return {
        "ne": ne,
        "shifted_ne": shifted,
        "auc": metrics.finite_or_none(metrics.auc(labels, predictions)) if both else None,
        "calibration": metrics.finite_or_none(metrics.calibration(labels, predictions))
        if both
        else None,
        "labels": len(labels),
        "positives": int(labels.sum()),
        "base_rate": base_rate,
    }


def task_metrics(
    dataset: Dataset, scored: Scored, base_rates: Mapping[str, float], *, domains: bool = True
) -> dict[str, Metrics]:
    """Metrics per task that has labels, and under "domains" per value of the dataset's domain."""
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


def drift(candidate: np.ndarray, champion: np.ndarray | None) -> Metrics:
    """How far the embeddings of the same users moved.

    Args:
        candidate, champion: (R, K, D) float, rows aligned.

    Returns:
        users; norm (mean L2 norm of the K*D values by the candidate); cosine (mean); l2 (mean
        distance); l2_relative (that over the champion's mean norm).
    """
    flat = candidate.reshape(len(candidate), -1).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1)
    found: Metrics = {
        "users": len(flat),
        "finite": bool(np.isfinite(flat).all()),
        "norm": float(norms.mean()) if len(flat) else None,
        "cosine": None,
        "l2": None,
        "l2_relative": None,
    }
    if champion is None or not len(flat) or champion.shape != candidate.shape:
        return found
    other = champion.reshape(len(champion), -1).astype(np.float64)
    others = np.linalg.norm(other, axis=1)
    distance = np.linalg.norm(flat - other, axis=1)
    cosine = (flat * other).sum(1) / np.maximum(norms * others, 1e-12)
    return found | {
        "cosine": float(cosine.mean()),
        "l2": float(distance.mean()),
        "l2_relative": float(distance.mean() / max(others.mean(), 1e-12)),
    }


def decide(
    candidate: Mapping[str, Metrics],
    champion: Mapping[str, Metrics] | None,
    moved: Metrics,
    gate: GateConfig,
) -> dict[str, Any]:
    """Whether the candidate is accepted, and why not.

    Args:
        candidate, champion: metrics per task on the same held-out users, by the same base rates.
        moved: what `drift` found.
        gate: the bounds.
    """
    reasons = []
    if not moved["finite"]:
        reasons.append("an embedding is not a number")
    means: dict[str, float | None] = {"candidate": None, "champion": None}
    if champion is not None:
        judged = [
            t
            for t, found in candidate.items()
            if found["ne"] is not None
            and found["labels"] >= gate.min_labels
            and champion.get(t, {}).get("ne") is not None
        ]
        if judged:
            ours = sum(candidate[t]["ne"] for t in judged) / len(judged)
            theirs = sum(champion[t]["ne"] for t in judged) / len(judged)
            means, worse = {"candidate": ours, "champion": theirs}, ours - theirs
            if worse > gate.ne_tolerance:
                reasons.append(
                    f"held-out NE is worse by {worse:.4f}, {gate.ne_tolerance} is tolerated"
                )
        if moved["cosine"] is not None and moved["cosine"] < gate.min_cosine:
            reasons.append(
                f"embeddings turned: mean cosine {moved['cosine']:.3f} < {gate.min_cosine}"
            )
        if moved["l2_relative"] is not None and moved["l2_relative"] > gate.max_l2:
            reasons.append(
                f"embeddings moved: L2 {moved['l2_relative']:.2f} of their norm > {gate.max_l2}"
            )
    return {
        "accepted": not reasons,
        "reason": "; ".join(reasons),
        "ne": means,
        "tasks": {
            t: {"candidate": found, "champion": None if champion is None else champion.get(t)}
            for t, found in candidate.items()
        },
        "drift": moved,
    }
