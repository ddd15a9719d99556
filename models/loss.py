"""The multi-task loss, and what keeps user embeddings where the snapshot before had them.

A model that is trained on gives other embeddings for the same user, and what reads them was trained
on the old ones (arXiv 2311.09544, embedding distribution shift). Pooling over days is the paper's
answer; the two that it names beside it are terms of the loss, given here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_store.columns import NO_LABEL
from models.outputs import Outputs


class Loss(NamedTuple):
    """total: () float32, to call backward on. per_task: (n_tasks,) mean logloss, NaN where no label.
    counts: (n_tasks,) int64 labels."""

    total: Tensor
    per_task: Tensor
    counts: Tensor


def multi_task_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    answers: Tensor | None = None,
) -> Loss:
    """Sum over tasks of weight x mean logloss over the targets that have a label.

    Args:
        logits: (T, n_tasks) float, or (S, T, n_tasks) of S members, whose losses are averaged.
        labels: (T, n_tasks) int; 1, 0 or NO_LABEL, which takes no part.
        weights: (n_tasks,) float; None: all 1.
        answers: (T, n_tasks) float in [0, 1], what the logits should say where there is a label;
            None: the label itself.

    Returns:
        The loss; a batch without any label gives a total of 0 that still has a gradient (of 0).
    """
    known = labels != NO_LABEL
    if answers is None:
        answers = labels.clamp(min=0).to(torch.float32)
    answers = answers.expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits.float(), answers, reduction="none")
    losses = losses.mean(0) if losses.dim() == 3 else losses
    counts = known.sum(0)
    sums = torch.where(known, losses, torch.zeros_like(losses)).sum(0)
    means = sums / counts.clamp(min=1)
    total = (means if weights is None else means * weights.to(means)).sum()
    per_task = torch.where(counts > 0, means.detach(), torch.full_like(means, float("nan")))
    return Loss(total, per_task, counts)


def embedding_shift(users: Tensor, before: Tensor) -> Tensor:
    """Mean over rows of |u - u'|^2 / (K D): how far the embeddings are from the snapshot before's.

    Args:
        users, before: (R, K, D) float, of the same rows; `before` is a constant.

    Returns:
        () float32; 0 without rows.
    """
    distance = (users.float() - before.detach().float()).square()
    return distance.sum() / max(distance.numel(), 1)


def distillation(now: Outputs, before: Outputs, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of the predictions p against the snapshot before's, p', where there is a label.

    - p' log p - (1 - p') log(1 - p), averaged and weighted as in `multi_task_loss`, and added up
    over the model's kinds of logits.

    Args:
        now, before: of the same batch; `before` is a constant.
        labels: (T, n_tasks) int; only which of them are NO_LABEL matters.
        weights: (n_tasks,) float.

    Returns:
        () float32.
    """
    total = now.logits.new_zeros((), dtype=torch.float32)
    for ours, theirs in ((now.logits, before.logits), (now.user_logits, before.user_logits)):
        if ours is not None and theirs is not None:
            answers = torch.sigmoid(theirs.detach().float())
            total = total + multi_task_loss(ours, labels, weights, answers=answers).total
    return total
