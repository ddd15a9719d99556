"""The multi-task loss: weighted binary cross-entropy over the labels that there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_store.tables import NO_LABEL


class Loss(NamedTuple):
    """total: () float32, to call backward on. per_task: (n_tasks,) mean logloss, NaN where no label.
    counts: (n_tasks,) int64 labels."""

    total: Tensor
    per_task: Tensor
    counts: Tensor


def multi_task_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Loss:
    """Sum over tasks of weight x mean logloss over the targets that have a label.

    Args:
        logits: (T, n_tasks) float.
        labels: (T, n_tasks) int; 1, 0 or NO_LABEL, which takes no part.
        weights: (n_tasks,) float; None: all 1.

    Returns:
        The loss; a batch without any label gives a total of 0 that still has a gradient (of 0).
    """
    known = labels != NO_LABEL
    answers = labels.clamp(min=0).to(torch.float32)
    losses = F.binary_cross_entropy_with_logits(logits.float(), answers, reduction="none")
    counts = known.sum(0)
    sums = torch.where(known, losses, torch.zeros_like(losses)).sum(0)
    means = sums / counts.clamp(min=1)
    total = (means if weights is None else means * weights.to(means)).sum()
    per_task = torch.where(counts > 0, means.detach(), torch.full_like(means, float("nan")))
    return Loss(total, per_task, counts)
