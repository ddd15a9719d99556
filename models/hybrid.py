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
from torch import Tensor, nn

from models.batch import Batch
from models.features import FeaturePlan
from models.numbers import HINGES, hinges
from models.sequence import Sequence, SequenceConfig
from models.sum import UserTower
from models.tables import Lookup
from models.towers import TowerConfig, UserEncoder, of_targets


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


class UserSide(nn.Module):
    """SUM's user tower, for a mix tower that is not SUM's.

    Args:
        plan: the features.
        config: its shape.
    """

    def __init__(self, plan: FeaturePlan, config: HybridConfig) -> None:
        super().__init__()
        self.encoder = UserEncoder(plan, config.dim, dense_tokens=config.dense_tokens)
        self.tower = UserTower(
            self.encoder.n_tokens, config.dim, embeddings=config.user_tokens, config=config.user
        )
        self.n_tokens = config.user_tokens
        self.width = HINGES * (len(plan.user_numbers) + 1)
        ids = [u.vocabulary for u in plan.user_ids]
        self.vocabularies = ids + [b.vocabulary for b in plan.bags]

    def lookups(self, batch: Batch) -> list[Lookup]:
        """One per user attribute and sparse feature, R embeddings each."""
        return self.encoder.lookups(batch)

    def forward(self, batch: Batch, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of each target's user: the L embeddings (T, L, D), and numbers (T, width) float32."""
        numbers = self.encoder.numbers(batch)
        users = self.tower(*self.encoder(batch, embeddings, numbers))
        return of_targets(batch, users), hinges(numbers).index_select(0, batch.row_of_target)


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
        super().__init__(plan, config, user_side=UserSide(plan, config), device=device)
