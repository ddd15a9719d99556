"""SUM, the upstream user model (arXiv 2311.09544).

    user features -> user tower, a pyramid of interaction modules -> K user embeddings
    K user embeddings + item and context features, no other user feature -> mix tower -> logits

The user tower runs once per row; only its K embeddings are expanded to the row's targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.axes import Blocks, numbered
from models.batch import Batch
from models.features import FeaturePlan
from models.interactions import Compress, InteractionConfig, Pyramid
from models.numbers import hinged, hinges
from models.outputs import Outputs
from models.tables import Lookup, TableConfig, Tables
from models.towers import (
    MixConfig,
    MixTower,
    TargetEncoder,
    TowerConfig,
    UserEncoder,
    of_targets,
)


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


def small() -> SumConfig:
    """Two modules of MLP and DCN, a mix tower of dot products, K=2, D=32: trains on a laptop's CPU."""
    return SumConfig()


def paper() -> SumConfig:
    """The production shape of the paper: four modules, all interactions, K=2, D=96."""
    everything = ("mlp", "dot", "dcn", "mixer")
    inside = InteractionConfig(hidden=512, compressed=16, cross_layers=3, cross_rank=128)
    return SumConfig(
        tables=TableConfig(dim=96),
        user=TowerConfig(sizes=(40, 30, 20, 10), interactions=everything, inside=inside),
        mix=MixConfig(sizes=(15, 10), interactions=everything, inside=inside),
        dense_tokens=8,
    )


PRESETS = {"small": small, "paper": paper}


class UserTower(nn.Module):
    """N_0 embeddings of user features to K user embeddings, each layer-normalised.

    The norm keeps what is published within the range of fp16 and on one scale from day to day.
    """

    def __init__(
        self, tokens: Sequence[str], dim: int, *, embeddings: int, config: TowerConfig
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(
            tokens, config.sizes, dim, interactions=config.interactions, config=config.inside
        )
        self.compress = Compress(self.pyramid.outputs, embeddings)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, dense: Tensor) -> Tensor:
        """(R, N_0, D) and (R, D) -> (R, K, D)."""
        return self.norm(self.compress(self.pyramid(tokens, dense)))


class UserSide(nn.Module):
    """The user tower for a mix tower that is not SUM's (`models.hybrid`).

    Args:
        plan: the features.
        dim: D.
        embeddings: L, that the nightly features become.
        config: the user tower's modules.
        dense_tokens: embeddings that the dense user features become.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        dim: int,
        *,
        embeddings: int,
        config: TowerConfig,
        dense_tokens: int,
    ) -> None:
        super().__init__()
        self.encoder = UserEncoder(plan, dim, dense_tokens=dense_tokens)
        self.tower = UserTower(self.encoder.tokens, dim, embeddings=embeddings, config=config)
        self.tokens = numbered("nightly", embeddings)
        self.inputs: Blocks = hinged(self.encoder.inputs)
        ids = [u.vocabulary for u in plan.user_ids]
        self.vocabularies = ids + [b.vocabulary for b in plan.bags]

    def lookups(self, batch: Batch) -> list[Lookup]:
        """One per user attribute and sparse feature, R embeddings each."""
        return self.encoder.lookups(batch)

    def forward(self, batch: Batch, embeddings: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of each target's user: the L embeddings (T, L, D), and numbers (T, F) float32."""
        numbers = self.encoder.numbers(batch)
        users = self.tower(*self.encoder(batch, embeddings, numbers))
        return of_targets(batch, users), hinges(numbers).index_select(0, batch.row_of_target)


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

    def user_embeddings(self, batch: Batch) -> Tensor:
        """The K embeddings of each row's user, (R, K, D) float32. Reads no target and no event."""
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
