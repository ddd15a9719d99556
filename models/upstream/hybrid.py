"""The hybrid: a user's events and their nightly features in one interaction.

    events -> the sequence model's M embeddings, pooled for the target
    nightly user features -> SUM's user tower -> L embeddings, once per row
    M + L embeddings, all unpooled, + item and context -> one mix tower -> logits
    nightly dense features -> what reads the numbers of the history and of the target

Rows of one vocabulary are shared by both sides: a clicked item, an item in a sparse feature and the
item that is scored.

What it publishes are the sequence side's K user embeddings, of learned queries over the served
prefix, with the mix tower and the loss that they have there. They read events only, so they are
published from `sequences` alone and are exactly what training saw; the nightly features reach them
through nothing but the rows and event embeddings that both sides train. What the user tower knows
is SUM's to publish.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from models.features import FeaturePlan
from models.towers import TowerConfig
from models.upstream import ModelKind
from models.upstream.sequence import Sequence, SequenceConfig
from models.user_tower import UserSide


@dataclass(frozen=True, kw_only=True)
class HybridConfig(SequenceConfig):
    """Shape of a hybrid: that of a sequence model, and of its user side.

    Args:
        user_tokens: L, embeddings that the nightly features become.
        user: the user tower's modules.
        dense_tokens: embeddings that the dense user features become.
    """

    user_tokens: int = 2
    user: TowerConfig = field(default_factory=lambda: TowerConfig(sizes=(12, 6)))
    dense_tokens: int = 4


class Hybrid(Sequence):
    """The event sequence model with SUM's user tower in its mix tower.

    Args:
        plan: the features.
        config: its shape.
        device: where it lives; fused tables cannot move later.
    """

    def __init__(
        self, plan: FeaturePlan, config: HybridConfig, *, device: torch.device | str = "cpu"
    ) -> None:
        user_side = UserSide(
            plan,
            config.dim,
            embeddings=config.user_tokens,
            config=config.user,
            dense_tokens=config.dense_tokens,
        )
        super().__init__(plan, config, user_side=user_side, device=device)


KIND = ModelKind(
    config=HybridConfig, module=Hybrid, history=True, user_features=True, user_table="sequences"
)
