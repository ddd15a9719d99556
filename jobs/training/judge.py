"""How a snapshot did, and whether a candidate may become champion. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from math import prod

import numpy as np

from feature_store.embeddings import user_slices
from feature_store.spec import Dataset
from jobs.text import interval
from jobs.training.config import GateConfig
from jobs.training.learner import Learner
from jobs.training.loader import Limits, cuts
from jobs.training.results import Drift, Gate, Judged, TaskMetrics, Verdict
from jobs.training.rows import Rows
from jobs.training.scoring import Scored, concat, labelled_predictions
from models import metrics


def metrics_of(labels: np.ndarray, predictions: np.ndarray, base_rate: float | None) -> TaskMetrics:
    """NE, AUC, calibration and counts.

    Args:
        labels, predictions: (n,).
        base_rate: share of positives among the labels that the predictions were trained on.
    """
    values = metrics.summary(labels, predictions, base_rate)
    return TaskMetrics(
        ne=metrics.finite_or_none(values["ne"]),
        shifted_ne=metrics.finite_or_none(values["shifted_ne"]),
        auc=metrics.finite_or_none(values["auc"]),
        calibration=metrics.finite_or_none(values["calibration"]),
        why_not=metrics.why_no_ne(labels, base_rate),
        labels=len(labels),
        positives=int(labels.sum()),
        base_rate=base_rate,
    )


def task_metrics(
    dataset: Dataset, scored: Scored, base_rates: Mapping[str, float]
) -> dict[str, TaskMetrics]:
    """Metrics per task that has labels, and in them per value of the dataset's domain."""
    of_tasks = {}
    for index, task in enumerate(dataset.tasks):
        mine = scored.where(scored.task == index)
        if len(mine):
            of_tasks[task.name] = with_domains(dataset, mine, base_rates.get(task.name))
    return of_tasks


def with_domains(dataset: Dataset, scored: Scored, base_rate: float | None) -> TaskMetrics:
    """Metrics of one task, and per value of the dataset's domain where it has one."""
    whole = metrics_of(scored.label, scored.prediction, base_rate)
    if dataset.domain is None:
        return whole
    domains = {
        str(value): metrics_of(part.label, part.prediction, base_rate)
        for value in np.unique(scored.domain)
        for part in [scored.where(scored.domain == value)]
    }
    return replace(whole, domains=domains)


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
                predicted = learner.probabilities(batch).numpy()
                scored[name].append(labelled_predictions(dataset, rows, lo, hi, batch, predicted))
                embedded[name].append(learner.user_embeddings(batch).numpy())
    nobody = np.empty((0, 0, 0), np.float32)
    return {
        name: (concat(parts), np.concatenate(embedded[name]) if parts else nobody)
        for name, parts in scored.items()
    }


def drift(candidate: np.ndarray, champion: np.ndarray | None) -> Drift:
    """How far the embeddings of the same users moved.

    Args:
        candidate, champion: (R, K, D) float, rows aligned.
    """
    if champion is not None and len(candidate) and champion.shape == candidate.shape:
        return moved((candidate[part], champion[part]) for part in user_slices(len(candidate)))
    lengths = norms(candidate)
    return Drift(
        users=len(lengths),
        finite=bool(np.isfinite(lengths).all()),
        norm=metrics.finite_or_none(lengths.mean()) if len(lengths) else None,
        cosine=None,
        l2=None,
        l2_relative=None,
    )


def moved(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Drift:
    """The drift of at least one user, given some users after the others.

    Args:
        parts: embeddings now and before, (c, K, D) floats each, rows aligned.
    """
    rows = []
    for now, before in parts:
        ours, theirs = flat(now), flat(before)
        ours_norm, theirs_norm = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
        cosine = (ours * theirs).sum(1) / np.maximum(ours_norm * theirs_norm, 1e-12)
        distance = np.linalg.norm(ours - theirs, axis=1)
        rows.append(np.stack([ours_norm, theirs_norm, distance, cosine]))
    lengths, others, distance, cosine = np.concatenate(rows, axis=1)
    return Drift(
        users=len(lengths),
        finite=bool(np.isfinite(lengths).all()),
        norm=metrics.finite_or_none(lengths.mean()),
        cosine=metrics.finite_or_none(cosine.mean()),
        l2=metrics.finite_or_none(distance.mean()),
        l2_relative=metrics.finite_or_none(distance.mean() / max(others.mean(), 1e-12)),
    )


def norms(embeddings: np.ndarray) -> np.ndarray:
    """(R,) float64: the L2 norm of each user's K*D values."""
    lengths = np.empty(len(embeddings))
    for part in user_slices(len(embeddings)):
        lengths[part] = np.linalg.norm(flat(embeddings[part]), axis=1)
    return lengths


def flat(embeddings: np.ndarray) -> np.ndarray:
    """(R, K, D) as (R, K*D) float64, where R, K and D may be 0."""
    return embeddings.reshape(len(embeddings), prod(embeddings.shape[1:])).astype(np.float64)


def decide(
    dataset: Dataset,
    candidate: Scored,
    champion: Scored | None,
    base_rates: Mapping[str, float],
    moved: Drift,
    gate: GateConfig,
) -> Gate:
    """Whether the candidate is rejected, and why; or that there is too little to judge it by.

    It is rejected where its NE less the champion's, averaged over the tasks that have enough held-out
    labels, is worse than tolerated: where the whole interval of a paired bootstrap over users lies above
    `gate.ne_tolerance`. Also where a prediction or an embedding is not a number, or embeddings moved
    beyond the gate's bounds.

    Args:
        candidate, champion: of the same labels of held-out users, in the same order; None: there is no
            champion yet.
        base_rates: by task, for both sides.
        moved: what `drift` says of both sides' embeddings.
    """
    tasks: dict[str, Judged] = {}
    pairs = []
    for index, task in enumerate(dataset.tasks):
        ours, rate = candidate.where(candidate.task == index), base_rates.get(task.name)
        why_not, other = _too_little(ours, rate, gate), None
        theirs = None if champion is None else champion.where(champion.task == index)
        if theirs is not None and len(ours) and not len(theirs):
            why_not = "the champion does not know the task"
        elif theirs is not None:
            assert np.array_equal(ours.target_id, theirs.target_id)
            other = metrics_of(theirs.label, theirs.prediction, rate)
            if why_not is None:
                both = ours.prediction, theirs.prediction
                pairs.append(metrics.Paired(ours.label, *both, ours.user_id, rate))
        mine = metrics_of(ours.label, ours.prediction, rate)
        tasks[task.name] = Judged(candidate=mine, champion=other, why_not=why_not)
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
    judged = [t for t in tasks.values() if t.why_not is None]
    sides = {
        "candidate": [t.candidate.ne for t in judged],
        "champion": [t.champion.ne for t in judged if t.champion],
    }
    return Gate(
        verdict=verdict,
        reason=reason,
        ne={
            side: float(np.mean(np.array(ne, np.float64))) if compared else None
            for side, ne in sides.items()
        },
        difference=difference if compared else None,
        tasks=tasks,
        drift=moved,
    )


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


def _why_not_judged(champion: Scored | None, tasks: Mapping[str, Judged]) -> str:
    if champion is None:
        return "no champion is before it"
    names: dict[str, list[str]] = {}
    for name, task in tasks.items():
        if task.why_not:
            names.setdefault(task.why_not, []).append(name)
    return "; ".join(f"{', '.join(of)}: {why_not}" for why_not, of in names.items()) or (
        "fewer than two held-out users"
    )


def _out_of_bounds(candidate: Scored, moved: Drift, gate: GateConfig) -> list[str]:
    reasons = []
    if not np.isfinite(candidate.prediction).all():
        reasons.append("a prediction is not a number")
    if not moved.finite:
        reasons.append("an embedding is not a number")
    if moved.cosine is not None and moved.cosine < gate.min_cosine:
        reasons.append(f"embeddings turned: mean cosine {moved.cosine:.3f} < {gate.min_cosine}")
    if moved.l2_relative is not None and moved.l2_relative > gate.max_l2:
        reasons.append(
            f"embeddings moved: L2 {moved.l2_relative:.2f} of their norm > {gate.max_l2}"
        )
    return reasons
