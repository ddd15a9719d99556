"""The event sequence model: a user's events, summarised for the item that is to be ranked.

    events -> event model -> (layers of models.encoders, optional) -> event embeddings, once per row
    target and its visible prefix of them -> readers (models.reader) -> logits

and for publishing, at a cutoff instead of for a target:

    the prefix at the cutoff -> K user embeddings (models.publishing)
    K user embeddings + item and context -> a mix tower of their own -> user_logits

Pooling is O(M N) and not O(N N). Engineering at Meta, "Sequence learning", 2024-11-19.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.axes import Blocks, blocks, numbered
from models.batch import Batch
from models.clock import DAY_US
from models.encoders import Encoder, layer
from models.event import EventEncoder, event_rows
from models.features import FeaturePlan
from models.history import target_pairs
from models.outputs import Outputs
from models.publishing import UserHead
from models.reader import HistoryNumbers, HistoryReader, Read, newest_events
from models.tables import TableConfig, Tables
from models.towers import MixConfig, MixTower, TargetEncoder, of_targets
from models.upstream import ModelKind
from models.user_tower import UserSide


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """Shape of an event sequence model.

    Args:
        embeddings: K, published per user.
        tables: dimension D and sizes of the embedding tables.
        width: E, of an event embedding.
        queries: M, embeddings that the history is pooled to.
        heads: attention heads of each of them.
        head_dim: of a head.
        layers: causal self-attention layers under the pooling; 0 is the base, O(M N).
        encoder: what kind of layer.
        newest: of the visible events, so many are read as they are too, beside the attention.
        numbers: width of the MLP that reads what is counted and known beside the attention.
        bags: the published embeddings begin in the direction of bags of the ids that candidates share
            (`models.publishing`).
        members: readers of the history, whose logits are averaged; the cost grows with them.
        mix, user_mix: the interaction modules over the M, and over the K embeddings.
    """

    embeddings: int = 2
    tables: TableConfig = field(default_factory=TableConfig)
    width: int = 64
    queries: int = 4
    heads: int = 2
    head_dim: int = 16
    layers: int = 0
    encoder: Encoder = Encoder.SOFTMAX
    newest: int = 2
    numbers: int = 192
    bags: bool = False
    members: int = 1
    mix: MixConfig = field(default_factory=lambda: MixConfig(sizes=(6,)))
    user_mix: MixConfig = field(default_factory=lambda: MixConfig(sizes=(4,)))

    @property
    def dim(self) -> int:
        """D."""
        return self.tables.dim


class Sequence(nn.Module):
    """The event sequence model.

    Args:
        plan: the features.
        config: its shape.
        user_side: what of the nightly user features joins the mix tower (`models/upstream/hybrid.py`).
        device: where it lives; fused tables cannot move later.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        config: SequenceConfig,
        *,
        user_side: UserSide | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if config.members < 1:
            raise ValueError(f"members is {config.members}: a history has one reader or more")
        self.plan, self.config = plan, config
        dim, width = config.dim, config.width
        self.user_side = user_side
        vocabularies = [f.vocabulary for f in (*plan.event_ids, *plan.candidates)]
        if user_side is not None:
            vocabularies += user_side.vocabularies
        self.tables = Tables(vocabularies, config=config.tables, device=device)
        self.event = EventEncoder(plan, dim, width)
        self.layers = nn.ModuleList(
            layer(config.encoder, width, config.head_dim) for _ in range(config.layers)
        )
        self.target = TargetEncoder(plan, dim)

        self.history = HistoryNumbers(plan)
        newest = blocks(numbered("newest", config.newest), width)
        known: Blocks = self.target.inputs + self.history.inputs
        known += blocks(self.target.tokens, dim) + newest
        known += () if user_side is None else user_side.inputs
        self.readers = nn.ModuleList(
            HistoryReader(
                plan,
                config,
                target=self.target,
                history=self.history,
                known=known,
                user_tokens=() if user_side is None else user_side.tokens,
            )
            for _ in range(config.members)
        )

        self.user_head = UserHead(plan, config)
        published = numbered("embedding", config.embeddings)
        self.user_mix_tower = MixTower(
            self.target.tokens + published, dim, plan.tasks, config=config.user_mix
        )
        self.to(device)

    def forward(self, batch: Batch) -> Outputs:
        """Logits of the M embeddings and of the K published ones, (T, n_tasks) each."""
        of_events, of_items = self.event.lookups(batch), self.target.lookups(batch)
        of_users = [] if self.user_side is None else self.user_side.lookups(batch)
        embeddings = self.tables([*of_events, *of_items, *of_users])
        first, last = len(of_events), len(of_events) + len(of_items)
        ids = embeddings[:first]
        events = self._encode(batch, ids)
        of_target = self.target.numbers(batch)
        tokens, dense = self.target(batch, embeddings[first:last], of_target)
        pairs = target_pairs(batch)
        of_history, of_pairs = self.history(batch, pairs)
        newest = newest_events(events, batch, self.config.newest)
        known, nightly = [of_target, of_history, tokens.flatten(1), newest], None
        if self.user_side is not None:
            nightly, of_user = self.user_side(batch, embeddings[last:])
            known.append(of_user)
        read = Read(
            events, tokens, dense, nightly, newest, torch.cat(known, dim=1), pairs, of_pairs
        )
        members = torch.stack([reader(batch, read) for reader in self.readers])
        users = self.user_head(batch, events, ids, *served_prefix(batch, self.plan))
        expanded = of_targets(batch, users)
        user_logits = self.user_mix_tower(torch.cat([tokens, expanded], dim=1), dense)
        return Outputs(members.mean(0), user_logits, users, members)

    def user_embeddings(self, batch: Batch, at: Tensor | None = None) -> Tensor:
        """The K embeddings of each row's user at an instant. Reads no target.

        Args:
            batch: rows and their events.
            at: (R,) int64 microseconds, UTC; every event of a row was available then. None: what served
                the day of the row's targets (`served_prefix`).

        Returns:
            (R, K, D) float32.
        """
        if at is None:
            end, at = served_prefix(batch, self.plan)
        else:
            end = batch.event_offsets.diff()
        ids = self.tables(self.event.lookups(batch))
        return self.user_head(batch, self._encode(batch, ids), ids, end, at)

    def _encode(self, batch: Batch, embeddings: list[Tensor]) -> Tensor:
        events = self.event(batch, embeddings)
        for encode in self.layers:
            events = encode(events, batch)
        return events


def served_prefix(batch: Batch, plan: FeaturePlan) -> tuple[Tensor, Tensor]:
    """What the embedding that serves a row's day was made from.

    The nightly job stopped reading `serve_delay` before the midnight that begins the day of the
    row's targets. A row without targets gets an empty prefix.

    Returns:
        end (R,) int64, events of the row available before that cutoff; at (R,) int64, the cutoff.
    """
    counts = batch.target_offsets.diff()
    if batch.targets == 0:
        return torch.zeros_like(counts), torch.zeros_like(counts)
    first = batch.target_offsets[:-1].clamp(max=batch.targets - 1)
    as_of = batch.as_of.index_select(0, first)
    cutoff = as_of - (as_of + plan.utc_offset_us) % DAY_US - plan.serve_delay_us
    row = event_rows(batch)
    early = batch.event_available < cutoff.index_select(0, row)
    seen = F.pad(early.to(torch.int64).cumsum(0), (1, 0))
    end = seen.index_select(0, batch.event_offsets).diff()
    return torch.where(counts > 0, end, torch.zeros_like(end)), cutoff


KIND = ModelKind(
    config=SequenceConfig,
    module=Sequence,
    history=True,
    user_features=False,
    user_table="sequences",
)
