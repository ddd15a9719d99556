"""SUM, the upstream user model (arXiv 2311.09544).

    user features -> user tower, a pyramid of interaction modules -> K user embeddings
    K user embeddings + item and context features, no other user feature -> mix tower -> logits

The user tower runs once per row; only its K embeddings are expanded to the row's targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.axes import numbered
from models.batch import Batch
from models.features import FeaturePlan
from models.outputs import Outputs
from models.tables import TableConfig, Tables
from models.towers import MixConfig, MixTower, TargetEncoder, TowerConfig, UserEncoder, of_targets
from models.upstream import ModelKind
from models.user_tower import UserTower


@dataclass(frozen=True, kw_only=True)
class SumConfig:
    """Shape of a SUM model.

    Args:
        embeddings: K, published per user.
        tables: dimension D and sizes of the embedding tables.
        user: the user tower's modules.
        mix: the mix tower's modules. Few and plain: what reads the published embeddings has to find in
            them what this tower finds. On the simulated world dot products match a user with a candidate
            hundreds of steps before MLP and DCN do (docs/decisions.md).
        dense_tokens: embeddings that the dense user features become.
    """

    embeddings: int = 2
    tables: TableConfig = field(default_factory=TableConfig)
    user: TowerConfig = field(default_factory=lambda: TowerConfig(sizes=(12, 6)))
    mix: MixConfig = field(default_factory=lambda: MixConfig(sizes=(4,), interactions=("dot",)))
    dense_tokens: int = 4

    @property
    def dim(self) -> int:
        """D."""
        return self.tables.dim


class Sum(nn.Module):
    """The upstream user model.

    Args:
        plan: the features.
        config: its shape.
        device: where it lives; fused tables cannot move later.
    """

    def __init__(
        self, plan: FeaturePlan, config: SumConfig, *, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.plan, self.config = plan, config
        self.tables = Tables(
            [f.vocabulary for f in (*plan.user_ids, *plan.candidates)]
            + [b.vocabulary for b in plan.bags],
            config=config.tables,
            device=device,
        )
        self.user = UserEncoder(plan, config.dim, dense_tokens=config.dense_tokens)
        self.target = TargetEncoder(plan, config.dim)
        self.user_tower = UserTower(
            self.user.tokens, config.dim, embeddings=config.embeddings, config=config.user
        )
        self.mix_tower = MixTower(
            self.target.tokens + numbered("embedding", config.embeddings),
            config.dim,
            plan.tasks,
            config=config.mix,
        )
        self.to(device)

    def user_embeddings(self, batch: Batch, at: Tensor | None = None) -> Tensor:
        """The K embeddings of each row's user, (R, K, D) float32, of its nightly features: the same at
        every instant. Reads no target and no event."""
        return self._user(batch, self.tables(self.user.lookups(batch)))

    def mix(self, batch: Batch, user_embeddings: Tensor) -> Tensor:
        """Logits (T, n_tasks) of the targets, given the embeddings (R, K, D) of their users."""
        return self._mix(batch, self.tables(self.target.lookups(batch)), user_embeddings)

    def forward(self, batch: Batch) -> Outputs:
        """Logits (T, n_tasks) and the embeddings that they come from: there are no other logits."""
        lookups = self.user.lookups(batch)
        embeddings = self.tables([*lookups, *self.target.lookups(batch)])
        users = self._user(batch, embeddings[: len(lookups)])
        logits = self._mix(batch, embeddings[len(lookups) :], users)
        return Outputs(logits, user_logits=None, users=users)

    def _user(self, batch: Batch, embeddings: list[Tensor]) -> Tensor:
        return self.user_tower(*self.user(batch, embeddings))

    def _mix(self, batch: Batch, embeddings: list[Tensor], users: Tensor) -> Tensor:
        tokens, dense = self.target(batch, embeddings)
        return self.mix_tower(torch.cat([tokens, of_targets(batch, users)], dim=1), dense)


KIND = ModelKind(
    config=SumConfig, module=Sum, history=False, user_features=True, user_table="aggregates"
)
