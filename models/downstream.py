"""A downstream task model: a DLRM (arXiv 1906.00091) that can take published user embeddings.

All arms of a comparison come from one configuration: context and item features only; with the
legacy user features; with published embeddings, which enter as dense inputs with an explicit flag
where a user has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.batch import Batch
from models.features import FeaturePlan, member
from models.history import bag_match_numbers, bag_match_width
from models.interactions import PairwiseDots
from models.numbers import Standardise
from models.tables import TableConfig, Tables
from models.towers import TargetEncoder, UserEncoder, of_targets


class Published(NamedTuple):
    """A batch's published embeddings of one upstream model.

    values (R, K, D) float32, anything where missing; present (R,) bool.
    """

    values: Tensor
    present: Tensor


@dataclass(frozen=True, kw_only=True)
class PublishedSource:
    """One upstream model whose embeddings are read: its name, K and D."""

    name: str
    embeddings: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class DownstreamConfig:
    """Shape of a downstream model.

    Args:
        use_user_features: read the legacy user features: attributes, sparse and dense.
        sources: upstream models whose embeddings are read.
        standardise: take the mean and the scale of each number of a published embedding out.
        tables: dimension and sizes of the embedding tables.
        hidden: widths of the top MLP.
    """

    use_user_features: bool = True
    sources: tuple[PublishedSource, ...] = ()
    standardise: bool = True
    tables: TableConfig = field(default_factory=lambda: TableConfig(dim=16))
    hidden: tuple[int, int] = (128, 64)

    @property
    def dim(self) -> int:
        """D of this model's own embeddings."""
        return self.tables.dim


class Downstream(nn.Module):
    """One task's model.

    The tokens (candidates, user features, published embeddings, the dense embedding) meet in their
    pairwise dot products; those, the tokens themselves and the dense embedding go through an MLP.
    What all users have in common is half of a layer-normalised embedding and more, and where there is
    little to learn from drowns the rest in its dot products with a candidate: standardised, it is gone.
    Nothing is read of an embedding at the start: its matrix is zero, as of a low-rank adapter (arXiv
    2106.09685), since a random one is noise beside user features that say as much already.

    Args:
        plan: the features.
        config: its shape.
        device: where it lives; fused tables cannot move later.
    """

    def __init__(
        self, plan: FeaturePlan, config: DownstreamConfig, *, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.plan, self.config = plan, config
        dim = config.dim
        vocabularies = [c.vocabulary for c in plan.candidates]
        if config.use_user_features:
            vocabularies += [u.vocabulary for u in plan.user_ids]
            vocabularies += [b.vocabulary for b in plan.bags]
        self.tables = Tables(vocabularies, config=config.tables, device=device)
        self.target = TargetEncoder(plan, dim)
        n_tokens = self.target.n_tokens + 1
        self.user: UserEncoder | None = None
        if config.use_user_features:
            self.user = UserEncoder(plan, dim)
            self.user_dense = nn.Linear(dim, dim)
            if plan.bag_matches:
                self.matches = Standardise(bag_match_width(plan))
                self.match_dense = nn.Linear(bag_match_width(plan), dim, bias=False)
            n_tokens += self.user.n_tokens
        standardised = config.sources if config.standardise else ()
        self.scaled = nn.ModuleDict(
            {member(s.name): Standardise(s.embeddings * s.dim, log=False) for s in standardised}
        )
        self.published = nn.ModuleDict(
            {member(s.name): nn.Linear(s.dim, dim, bias=False) for s in config.sources}
        )
        for matrix in self.published.values():
            nn.init.zeros_(matrix.weight)
        self.missing = nn.ParameterDict(
            {member(s.name): nn.Parameter(torch.zeros(s.embeddings, dim)) for s in config.sources}
        )
        n_tokens += sum(s.embeddings for s in config.sources)
        self.dots = PairwiseDots(n_tokens)
        wide, narrow = config.hidden
        self.top = nn.Sequential(
            nn.Linear(n_tokens * dim + self.dots.width, wide),
            nn.ReLU(),
            nn.Linear(wide, narrow),
            nn.ReLU(),
            nn.Linear(narrow, 1),
        )
        self.to(device)

    def forward(self, batch: Batch, published: Mapping[str, Published] | None = None) -> Tensor:
        """Logits of the task.

        Args:
            batch: R rows, T targets.
            published: by upstream model, for each of `config.sources`.

        Returns:
            (T,) float32.

        Raises:
            ValueError: a source is not in `published`, or has another shape than configured.
        """
        lookups = self.target.lookups(batch)
        user_lookups = [] if self.user is None else self.user.lookups(batch)
        embeddings = self.tables([*lookups, *user_lookups])
        tokens, dense = self.target(batch, embeddings[: len(lookups)])
        of_user = []
        if self.user is not None:
            user_tokens, user_dense = self.user(batch, embeddings[len(lookups) :])
            of_user.append(torch.cat([user_tokens, self.user_dense(user_dense)[:, None]], dim=1))
        of_user += [self._published(s, batch, published or {}) for s in self.config.sources]
        if of_user:
            joined = torch.cat(of_user, dim=1)
            expanded = of_targets(batch, joined)
            if self.user is not None:
                # the user's dense embedding joins the target's: both are one token
                last = self.user.n_tokens
                dense = dense + expanded[:, last]
                if self.plan.bag_matches:
                    numbers = self.matches(bag_match_numbers(batch, self.plan))
                    dense = dense + self.match_dense(numbers)
                expanded = torch.cat([expanded[:, :last], expanded[:, last + 1 :]], dim=1)
            tokens = torch.cat([tokens, expanded], dim=1)
        x = torch.cat([tokens, dense[:, None]], dim=1)
        return self.top(torch.cat([x.flatten(1), self.dots(x)], dim=1)).squeeze(1)

    def reading(self) -> list[nn.Parameter]:
        """Parameters of what reads the published embeddings."""
        return [*self.published.parameters(), *self.missing.parameters()]

    def _published(
        self, source: PublishedSource, batch: Batch, published: Mapping[str, Published]
    ) -> Tensor:
        if source.name not in published:
            raise ValueError(f"published is {sorted(published)}: give the source {source.name!r}")
        values, present = published[source.name]
        shape = (batch.rows, source.embeddings, source.dim)
        if values.shape != shape:
            raise ValueError(f"{source.name} has shape {tuple(values.shape)}, expected {shape}")
        known = present.to(torch.bool)
        name = member(source.name)
        if self.config.standardise:
            values = self.scaled[name](values.flatten(1), known).view(shape)
        seen = known[:, None, None]
        values = torch.where(seen, values, torch.zeros_like(values))
        return torch.where(seen, self.published[name](values), self.missing[name])
