"""A downstream task model: a DLRM (arXiv 1906.00091) that can take published user embeddings.

The arms of a comparison are such models side by side: context and item features only; with the
legacy user features; with published embeddings, which enter as dense inputs with an explicit flag
where a user has none. They have no weight in common, and train as they would alone; but a batch is
looked up in one call, and its numbers are standardised once, whose statistics are those of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.axes import blocks, linear, numbered, roles
from models.batch import Batch
from models.clock import phases
from models.features import FeaturePlan, member
from models.history import bag_match_blocks, bag_match_numbers
from models.interactions import DENSE, PairwiseDots
from models.numbers import Standardise
from models.tables import Keyed, Lookup, TableConfig, Tables
from models.towers import TargetEncoder, UserEncoder, of_targets, raw_numbers


class Published(NamedTuple):
    """A batch's published embeddings of one upstream model.

    values (R, K, D) float32, anything where missing; present (R,) bool.
    """

    values: Tensor
    present: Tensor


class Inputs(NamedTuple):
    """What a model reads of a batch, before any weight: the same in every pass.

    batch; keyed: the lookups of all arms; numbers (T, F) float32, NaN where missing; phases (T, PHASES)
    float32; matches (T, M) float32, of candidates with their users' sparse features, None where no arm reads
    them.
    """

    batch: Batch
    keyed: Keyed
    numbers: Tensor
    phases: Tensor
    matches: Tensor | None


class Scaled(NamedTuple):
    """Numbers of a batch, standardised: of targets (T, F), of users (R, U), of matches (T, M); and by source
    the published embeddings (R, K, D), 0 where missing, beside which are there (R, 1, 1). None where no arm
    reads them."""

    target: Tensor
    user: Tensor | None
    matches: Tensor | None
    published: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class PublishedSource:
    """One upstream model whose embeddings are read: its name, K and D."""

    name: str
    embeddings: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class DownstreamConfig:
    """Shape of one arm.

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
    """One task's model, or several arms of it.

    Args:
        plan: the features.
        arms: their shapes, by name; of one `tables`. Each starts from the same draw of torch's generator, as
            if it were alone.
        device: where it lives; fused tables cannot move later.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        arms: Mapping[str, DownstreamConfig],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.plan, self.configs = plan, dict(arms)
        drawn = torch.get_rng_state()
        configs = list(arms.values())
        names = {
            arm: {v: f"{arm} {v}" for v in _vocabularies(plan, config)}
            for arm, config in arms.items()
        }
        self.tables = Tables(
            {table: v for of in names.values() for v, table in of.items()},
            config=configs[0].tables,
            device=device,
        )
        numbers = roles("context", plan.context_numbers) + roles("item", plan.item_numbers)
        self.target_numbers = Standardise(blocks(numbers))
        self.user_numbers = Standardise(blocks(roles("dense", plan.user_numbers)))
        self.match_numbers = Standardise(bag_match_blocks(plan))
        sources = {s.name: s for c in configs if c.standardise for s in c.sources}
        self.published_numbers = nn.ModuleDict(
            {
                member(s.name): Standardise(((s.name, s.embeddings * s.dim),), log=False)
                for s in sources.values()
            }
        )
        self.arms = nn.ModuleDict()
        for arm, config in arms.items():
            torch.set_rng_state(drawn)
            self.tables.draw(names[arm].values())
            self.arms[member(arm)] = Arm(
                plan,
                config,
                tables=names[arm],
                target_numbers=self.target_numbers,
                user_numbers=self.user_numbers,
            )
        self.to(device)

    def inputs(self, batch: Batch) -> Inputs:
        """What `forward` reads of R rows and their T targets."""
        lookups = [lookup for arm in self.arms.values() for lookup in arm.lookups(batch)]
        users = any(config.use_user_features for config in self.configs.values())
        return Inputs(
            batch,
            self.tables.keyed(lookups),
            raw_numbers(batch, self.plan),
            phases(batch.as_of),
            bag_match_numbers(batch, self.plan) if users and self.plan.bag_matches else None,
        )

    def forward(
        self,
        inputs: Inputs | Batch,
        published: Mapping[str, Published] | None = None,
        *,
        only: str | None = None,
    ) -> Tensor:
        """Logits of the task.

        Args:
            inputs: R rows, T targets.
            published: by upstream model, for each source of the arms.
            only: one arm.

        Returns:
            (T, A) float32, of A arms.

        Raises:
            ValueError: a source is not in `published`, or has another shape than configured.
        """
        read = inputs if isinstance(inputs, Inputs) else self.inputs(inputs)
        embeddings = iter(self.tables(read.keyed))
        chosen = {n: list(islice(embeddings, arm.count)) for n, arm in self.arms.items()}
        if only is not None:
            chosen = {member(only): chosen[member(only)]}
        arms = {name: self.arms[name] for name in chosen}
        scaled = self._scaled(read, published or {}, [arm.config for arm in arms.values()])
        return torch.stack(
            [arm(read.batch, chosen[name], scaled) for name, arm in arms.items()], dim=1
        )

    def reading(self) -> list[str]:
        """Names of the parameters that read the published embeddings."""
        return [
            f"arms.{arm}.{part}.{name}"
            for arm, model in self.arms.items()
            for part in ("published", "missing")
            for name, _ in getattr(model, part).named_parameters()
        ]

    def _scaled(
        self, read: Inputs, published: Mapping[str, Published], configs: list[DownstreamConfig]
    ) -> Scaled:
        arms = list(self.arms.values())
        target = arms[0].target.scaled(read.numbers, read.phases)
        user = next((arm.user.numbers(read.batch) for arm in arms if arm.user is not None), None)
        matches = None if read.matches is None else self.match_numbers(read.matches)
        found = {}
        for source, standardise in {s: c.standardise for c in configs for s in c.sources}.items():
            values, known = _checked(source, read.batch, published)
            if standardise:
                flat = self.published_numbers[member(source.name)](values.flatten(1), known)
                values = flat.view(values.shape)
            there = known[:, None, None]
            found[source.name] = torch.where(there, values, torch.zeros_like(values)), there
        return Scaled(target, user, matches, found)


class Arm(nn.Module):
    """One model, but for its tables and the scaling of numbers.

    The tokens (candidates, user features, published embeddings, the dense embedding) meet in their
    pairwise dot products; those, the tokens themselves and the dense embedding go through an MLP.
    What all users have in common is half of a layer-normalised embedding and more, and where there is
    little to learn from drowns the rest in its dot products with a candidate: standardised, it is gone.
    Nothing is read of an embedding at the start: its matrix is zero, as of a low-rank adapter (arXiv
    2106.09685), since a random one is noise beside user features that say as much already.

    Args:
        plan: the features.
        config: its shape.
        tables: by vocabulary, the name of the table to look up in.
        target_numbers, user_numbers: what all arms share.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        config: DownstreamConfig,
        *,
        tables: Mapping[str, str],
        target_numbers: Standardise,
        user_numbers: Standardise,
    ) -> None:
        super().__init__()
        self.plan, self.config, self.named_tables = plan, config, dict(tables)
        dim = config.dim
        self.target = TargetEncoder(plan, dim, standardise=target_numbers)
        tokens = self.target.tokens
        self.count = len(plan.candidates)  # of lookups
        self.user: UserEncoder | None = None
        if config.use_user_features:
            self.user = UserEncoder(plan, dim, standardise=user_numbers)
            self.user_dense = nn.Linear(dim, dim)
            if plan.bag_matches:
                self.match_dense = linear(bag_match_blocks(plan), dim, bias=False)
            tokens += self.user.tokens
            self.count += len(plan.user_ids) + len(plan.bags)
        self.published = nn.ModuleDict(
            {member(s.name): nn.Linear(s.dim, dim, bias=False) for s in config.sources}
        )
        for matrix in self.published.values():
            nn.init.zeros_(matrix.weight)
        self.missing = nn.ParameterDict(
            {member(s.name): nn.Parameter(torch.zeros(s.embeddings, dim)) for s in config.sources}
        )
        for source in config.sources:
            tokens += numbered(source.name, source.embeddings)
        tokens = (*tokens, DENSE)
        self.dots = PairwiseDots(tokens)
        wide, narrow = config.hidden
        self.top = nn.Sequential(
            linear((*blocks(tokens, dim), *self.dots.outputs), wide),
            nn.ReLU(),
            nn.Linear(wide, narrow),
            nn.ReLU(),
            nn.Linear(narrow, 1),
        )

    def lookups(self, batch: Batch) -> list[Lookup]:
        """`count` of them, whose embeddings `forward` takes."""
        found = self.target.lookups(batch)
        if self.user is not None:
            found += self.user.lookups(batch)
        return [lookup._replace(table=self.named_tables[lookup.table]) for lookup in found]

    def forward(self, batch: Batch, embeddings: list[Tensor], scaled: Scaled) -> Tensor:
        """Logits (T,) float32."""
        of_target = len(self.plan.candidates)
        tokens, dense = self.target(batch, embeddings[:of_target], scaled.target)
        of_user = []
        if self.user is not None:
            user_tokens, user_dense = self.user(batch, embeddings[of_target:], scaled.user)
            of_user.append(torch.cat([user_tokens, self.user_dense(user_dense)[:, None]], dim=1))
        for source in self.config.sources:
            values, there = scaled.published[source.name]
            name = member(source.name)
            of_user.append(torch.where(there, self.published[name](values), self.missing[name]))
        if of_user:
            expanded = of_targets(batch, torch.cat(of_user, dim=1))
            if self.user is not None:
                # the user's dense embedding joins the target's: both are one token
                last = len(self.user.tokens)
                dense = dense + expanded[:, last]
                if scaled.matches is not None:
                    dense = dense + self.match_dense(scaled.matches)
                expanded = torch.cat([expanded[:, :last], expanded[:, last + 1 :]], dim=1)
            tokens = torch.cat([tokens, expanded], dim=1)
        x = torch.cat([tokens, dense[:, None]], dim=1)
        return self.top(torch.cat([x.flatten(1), self.dots(x)], dim=1)).squeeze(1)


def _vocabularies(plan: FeaturePlan, config: DownstreamConfig) -> list[str]:
    found = [c.vocabulary for c in plan.candidates]
    if config.use_user_features:
        found += [u.vocabulary for u in plan.user_ids] + [b.vocabulary for b in plan.bags]
    return list(dict.fromkeys(found))


def _checked(
    source: PublishedSource, batch: Batch, published: Mapping[str, Published]
) -> tuple[Tensor, Tensor]:
    """Values (R, K, D), and (R,) bool which are there."""
    if source.name not in published:
        raise ValueError(f"published is {sorted(published)}: give the source {source.name!r}")
    values, present = published[source.name]
    shape = (batch.rows, source.embeddings, source.dim)
    if values.shape != shape:
        raise ValueError(f"{source.name} has shape {tuple(values.shape)}, expected {shape}")
    return values, present.to(torch.bool)
