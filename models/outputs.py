"""What an upstream model answers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """logits (T, n_tasks) float32, the mean of members (S, T, n_tasks), each of which has a loss of its
    own, or None of a model that has no members; user_logits, of the published user embeddings' own mix tower,
    (T, n_tasks), or None where `logits` are those already; users (R, K, D) float32, the embeddings
    that would be published, as they were served to the rows' day."""

    logits: Tensor
    user_logits: Tensor | None
    users: Tensor
    members: Tensor | None = None
