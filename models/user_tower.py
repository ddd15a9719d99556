"""The user tower: nightly user features, through a pyramid of interactions, to a few embeddings.

SUM publishes what comes out (arXiv 2311.09544); a model that reads events as well takes it as tokens of its
mix tower (`UserSide`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.axes import Blocks, numbered
from models.batch import Batch
from models.features import FeaturePlan
from models.interactions import Compress, Pyramid
from models.numbers import hinged, hinges
from models.tables import Lookup
from models.towers import TowerConfig, UserEncoder, of_targets


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
    """The user tower for a mix tower that is not SUM's (`models/upstream/hybrid.py`).

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
