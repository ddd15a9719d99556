"""What the models share: encoders of a target and of a user, and the mix tower.

An encoder names its table lookups (`lookups`) and turns the embeddings that come back into tokens,
embeddings of dimension D, and one dense embedding. A model gathers the lookups of its encoders
and asks its tables once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from feature_store.errors import SpecError
from models.axes import TASK, Blocks, blocks, embedding, linear, numbered, roles
from models.batch import Batch
from models.clock import PHASES, phases
from models.features import Bag, Category, FeaturePlan
from models.history import candidate_ids
from models.interactions import INTERACTIONS, InteractionConfig, PairwiseDots, Pyramid
from models.numbers import Standardise, hinged, hinges
from models.tables import Lookup, bag_weights

_FIRST_WEIGHT = 0.3  # of a direct dot product


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Shape of a tower of interaction modules.

    Args:
        sizes: embeddings after each module.
        interactions: names in `models.interactions.INTERACTIONS`, run in parallel.
        inside: sizes inside the interactions.
    """

    sizes: tuple[int, ...]
    interactions: tuple[str, ...] = ("mlp", "dcn")
    inside: InteractionConfig = field(default_factory=InteractionConfig)

    def __post_init__(self) -> None:
        known = ", ".join(INTERACTIONS)
        for name in self.interactions:
            if name not in INTERACTIONS:
                raise SpecError(f"TowerConfig.interactions has {name!r}: known are {known}")


@dataclass(frozen=True, kw_only=True)
class MixConfig(TowerConfig):
    """Shape of a mix tower.

    Args:
        direct: the dot products of all pairs of its tokens are added to the logits as well.
    """

    direct: bool = False


def mlp(inputs: Blocks | int, hidden: int, outputs: Blocks | int) -> nn.Sequential:
    """Two linear layers with a ReLU between."""
    return nn.Sequential(linear(inputs, hidden), nn.ReLU(), linear(hidden, outputs))


def looked_up(role: str, features: Iterable[Category | Bag]) -> tuple[str, ...]:
    """Names of the tokens that are looked up for these: one that moves to another table is another."""
    return roles(role, (f"{f.name}@{f.vocabulary}" for f in features))


def of_targets(batch: Batch, users: Tensor) -> Tensor:
    """Each target's user's embeddings: (R, K, D) -> (T, K, D)."""
    expanded = users.flatten(1).index_select(0, batch.row_of_target)
    return expanded.unflatten(1, users.shape[1:])


def raw_numbers(batch: Batch, plan: FeaturePlan) -> Tensor:
    """(T, C + I) float32: context numbers and item features of the targets, NaN where missing."""
    context = [batch.context_floats[name][:, None] for name in plan.context_numbers]
    return torch.cat([*context, batch.item_features[:, : len(plan.item_numbers)]], dim=1)


class TargetEncoder(nn.Module):
    """Item and context features of a target. Nothing about its user.

    Tokens: one per candidate feature and one for the kind of target. Dense embedding: context
    numbers, item features, and the phase of day and week at `as_of`.

    Args:
        plan: the features.
        dim: D.
        hidden: width of the MLP of the numbers.
        standardise: of the numbers, where encoders share it.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        dim: int,
        *,
        hidden: int = 64,
        standardise: Standardise | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.kind = embedding(roles("target", plan.target_kinds), dim)
        nn.init.normal_(self.kind.weight, std=0.1)
        numbers = roles("context", plan.context_numbers) + roles("item", plan.item_numbers)
        self.standardise = standardise or Standardise(blocks(numbers))
        self.inputs: Blocks = (*hinged(blocks(numbers)), ("phases", PHASES))
        self.dense = mlp(self.inputs, hidden, dim)
        self.tokens = (*looked_up("candidate", plan.candidates), "kind")

    def lookups(self, batch: Batch) -> list[Lookup]:
        """One per candidate feature, T embeddings each."""
        return [Lookup(c.vocabulary, candidate_ids(batch, c.name)) for c in self.plan.candidates]

    def numbers(self, batch: Batch) -> Tensor:
        """(T, F) float32, as `inputs` says."""
        return self.scaled(raw_numbers(batch, self.plan), phases(batch.as_of))

    def scaled(self, raw: Tensor, phase: Tensor) -> Tensor:
        """The same of `raw_numbers` and `phases` of a batch."""
        return torch.cat([hinges(self.standardise(raw)), phase], dim=1)

    def forward(
        self, batch: Batch, embeddings: list[Tensor], numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (T, n, D) and the dense embedding (T, D); `numbers` where they are known."""
        kind = self.kind(batch.target_kind)
        numbers = self.numbers(batch) if numbers is None else numbers
        return torch.stack([*embeddings, kind], dim=1), self.dense(numbers)


class UserEncoder(nn.Module):
    """The legacy user features: attributes, sparse features and dense features of `aggregates`.

    Tokens: one per attribute, one per sparse feature (a weighted mean of its ids) and
    `dense_tokens` of the dense features. Where a user has no aggregates the tokens are zeros and
    the dense embedding says so.

    Args:
        plan: the features.
        dim: D.
        dense_tokens: tokens that the dense features become.
        hidden: width of the MLP of the dense features.
        standardise: of the dense features, where encoders share it.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        dim: int,
        *,
        dense_tokens: int = 2,
        hidden: int = 64,
        standardise: Standardise | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.dim, self.dense_tokens = plan, dim, dense_tokens
        numbers = blocks(roles("dense", plan.user_numbers))
        self.standardise = standardise or Standardise(numbers)
        self.inputs: Blocks = (*numbers, ("has_aggregates", 1))
        self.dense = mlp(self.inputs, hidden, (dense_tokens + 1) * dim)
        self.tokens = (
            *looked_up("user", plan.user_ids),
            *looked_up("sparse", plan.bags),
            *numbered("numbers", dense_tokens),
        )

    def lookups(self, batch: Batch) -> list[Lookup]:
        """One per user attribute and sparse feature, R embeddings each."""
        found = [Lookup(u.vocabulary, batch.user_ids[u.name]) for u in self.plan.user_ids]
        for bag in self.plan.bags:
            values, offsets, scores = batch.sparse[bag.name]
            found.append(Lookup(bag.vocabulary, values, offsets, bag_weights(offsets, scores)))
        return found

    def numbers(self, batch: Batch) -> Tensor:
        """(R, numbers + 1) float32: standardised dense features, and whether there are any."""
        scaled = self.standardise(batch.dense, batch.has_aggregates > 0)
        return torch.cat([scaled, batch.has_aggregates[:, None]], dim=1)

    def forward(
        self, batch: Batch, embeddings: list[Tensor], numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (R, n, D) and the dense embedding (R, D); `numbers` where they are known."""
        numbers = self.numbers(batch) if numbers is None else numbers
        outputs = self.dense(numbers).unflatten(1, (self.dense_tokens + 1, self.dim))
        looked_up = [e[:, None] for e in embeddings]
        return torch.cat([*looked_up, outputs[:, 1:]], dim=1), outputs[:, 0]


class MixTower(nn.Module):
    """DHEN-style (arXiv 2203.11014): tokens of a target and of its user interact into logits.

    Direct dot products are a factorization machine over the same tokens, with a weight for each pair and
    task (DeepFM, arXiv 1703.04247): that a user and a candidate match is then learned from the first
    steps on, where it would have to pass the modules in both directions before.

    Args:
        tokens: names of the n_in tokens.
        dim: D.
        tasks: names of the n_tasks logits of a target.
        config: the interaction modules.
        hidden: width of the layer before the logits.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        dim: int,
        tasks: Sequence[str],
        *,
        config: MixConfig,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(
            tokens, config.sizes, dim, interactions=config.interactions, config=config.inside
        )
        logits = blocks(roles(TASK, tasks))
        self.head = mlp(len(self.pyramid.outputs) * dim, hidden, logits)
        self.pairs: nn.Linear | None = None
        if config.direct:
            self.dots = PairwiseDots(tokens)
            self.pairs = linear(self.dots.outputs, logits, bias=False)
            nn.init.constant_(self.pairs.weight, _FIRST_WEIGHT)

    def forward(self, tokens: Tensor, dense: Tensor) -> Tensor:
        """(T, n_in, D) and (T, D) -> logits (T, n_tasks)."""
        logits = self.head(self.pyramid(tokens, dense).flatten(1))
        if self.pairs is not None:
            logits = logits + self.pairs(self.dots(tokens) * tokens.shape[2] ** -0.5)
        return logits
