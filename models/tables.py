"""Embedding tables: one TorchRec collection per model, one fused lookup per step.

The collection is a `FusedEmbeddingBagCollection`: its optimizer (row-wise Adagrad) runs inside
the backward pass and touches only the rows that were looked up. It does pooled features as bags
and event sequences as bags of one id, so that history, candidate and sparse features of one
vocabulary are one key of one KeyedJaggedTensor:

    table `item`   | history, N bags of 1 | candidates, T bags of 1 | clicked items, R bags | empty |
    table `region` | history, N bags of 1 | user's region, R bags of at most 1  | empty ........... |

All keys have as many bags as the longest; the rest are empty and cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.features import member

_MULTIPLIER = -7046029254386353131  # 2**64 / golden ratio, as int64 (Knuth, TAOCP 3, 6.4)
_BITS_31 = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """How embedding tables are sized and trained.

    Args:
        dim: D, of every table.
        rows: vocabulary -> rows of its table, where it differs from the default.
        default_rows: of the other tables.
        item_rows: of the `item` table. 1: no item is told from another by its id.
        learning_rate: of row-wise Adagrad.
        init_scale: rows start uniform in +-init_scale. Large: what is learned from embeddings is
            mostly products of two of them, which start flat where both are near 0.
        item_init_scale: of the `item` table. Small: many scored items are new, and the row of an
            item never trained on is noise.
    """

    dim: int = 32
    rows: Mapping[str, int] = field(default_factory=dict)
    default_rows: int = 2**14
    item_rows: int = 2**16
    learning_rate: float = 0.05
    init_scale: float = 0.3
    item_init_scale: float = 0.05

    def rows_of(self, vocabulary: str) -> int:
        """Rows of the table of `vocabulary`."""
        return self.rows.get(
            vocabulary, self.item_rows if vocabulary == "item" else self.default_rows
        )

    def init_scale_of(self, vocabulary: str) -> float:
        """Where the rows of the table of `vocabulary` start."""
        return self.item_init_scale if vocabulary == "item" else self.init_scale


class Lookup(NamedTuple):
    """A request for B embeddings from one table.

    ids (L,) int64 raw ids, -1 missing. Without offsets B = L and each id gives one embedding.
    With offsets (B+1,) int64 the embeddings of a bag are added up, each times its weight (L,).
    A missing id, and an empty bag, give zeros.
    """

    table: str
    ids: Tensor
    offsets: Tensor | None = None
    weights: Tensor | None = None


class Keyed(NamedTuple):
    """Lookups as the fused kernel takes them; the same for any weights of tables of these sizes.

    jagged: with a key per table; its keys have as many bags as the longest. wanted: by table, which lookups
    are its bags, and how many of them. lookups: how many there are.
    """

    jagged: KeyedJaggedTensor
    wanted: dict[str, list[tuple[int, int]]]
    lookups: int


def table_rows(ids: Tensor, rows: int) -> Tensor:
    """Row of each id: the id itself where it lies in [0, rows), else a multiplicative hash.

    Small vocabularies therefore have no collisions. Missing ids (-1) get a row too: drop them.

    Args:
        ids: int64, any shape.
        rows: of the table, 1 up to 2**31.

    Returns:
        int64 of the same shape, in [0, rows).
    """
    hashed = ((ids * _MULTIPLIER) >> 32 & _BITS_31) % rows
    return torch.where((ids >= 0) & (ids < rows), ids, hashed)


class Tables(nn.Module):
    """One embedding table per vocabulary, with its optimizer inside.

    `to()` does not move it: fused tables live where they were built.

    Args:
        vocabularies: names of the tables; duplicates are one table. Or the vocabulary of each table, by name.
        config: sizes and training, by vocabulary.
        device: where the tables live.
    """

    def __init__(
        self,
        vocabularies: Iterable[str] | Mapping[str, str],
        *,
        config: TableConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        named = vocabularies if isinstance(vocabularies, Mapping) else {v: v for v in vocabularies}
        self.names = tuple(named)
        if not self.names:
            raise ValueError("vocabularies is empty: a model needs one categorical feature or more")
        self.rows = {name: config.rows_of(of) for name, of in named.items()}
        self.scales = {name: config.init_scale_of(of) for name, of in named.items()}
        self.collection = FusedEmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=member(name),
                    feature_names=[name],
                    num_embeddings=self.rows[name],
                    embedding_dim=config.dim,
                    weight_init_min=-self.scales[name],
                    weight_init_max=self.scales[name],
                )
                for name in self.names
            ],
            optimizer_type=RowWiseAdagrad,
            optimizer_kwargs={"lr": config.learning_rate, "eps": 1e-6},
            is_weighted=True,
            device=torch.device(device),
        )

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        return self

    def forward(self, lookups: Sequence[Lookup] | Keyed) -> list[Tensor]:
        """The embeddings of each lookup, (B, D) float32 each, in one call of the fused kernel."""
        keyed = lookups if isinstance(lookups, Keyed) else self.keyed(lookups)
        device = keyed.jagged.values().device
        found = [torch.zeros(0, self.config.dim, device=device)] * keyed.lookups
        if not keyed.jagged.stride():
            return found
        embeddings = self.collection(keyed.jagged).values()
        columns = embeddings.split(self.config.dim, dim=1)
        for name, column in zip(self.names, columns, strict=True):
            wanted = keyed.wanted[name]
            sizes = [bags for _, bags in wanted]
            for (i, _), piece in zip(wanted, column[: sum(sizes)].split(sizes), strict=True):
                found[i] = piece
        return found

    def keyed(self, lookups: Sequence[Lookup]) -> Keyed:
        """The lookups for `forward`: ids hashed, missing ones dropped. Done once, it serves many passes."""
        parts: dict[str, list[Lookup]] = {name: [] for name in self.names}
        wanted: dict[str, list[tuple[int, int]]] = {name: [] for name in self.names}
        for i, lookup in enumerate(lookups):
            parts[lookup.table].append(lookup)
            wanted[lookup.table].append((i, _bags(lookup)))
        stride = max(sum(bags for _, bags in of) for of in wanted.values())
        values, lengths, weights = [], [], []
        for name in self.names:
            for lookup in parts[name]:
                present = lookup.ids != -1
                kept = table_rows(lookup.ids[present], self.rows[name])
                values.append(kept)
                if lookup.offsets is None:
                    lengths.append(present)
                else:
                    seen = torch.nn.functional.pad(present.cumsum(0), (1, 0))
                    lengths.append(seen[lookup.offsets].diff())
                if lookup.weights is None:
                    weights.append(kept.new_ones(kept.shape, dtype=torch.float32))
                else:
                    weights.append(lookup.weights[present])
            empty = stride - sum(bags for _, bags in wanted[name])
            lengths.append(torch.zeros(empty, dtype=torch.int32, device=lookups[0].ids.device))
        jagged = KeyedJaggedTensor(
            keys=list(self.names),
            values=torch.cat(values),
            lengths=torch.cat([x.to(torch.int32) for x in lengths]),
            weights=torch.cat(weights),
            stride=stride,
        )
        return Keyed(jagged, wanted, len(lookups))

    @torch.no_grad()
    def draw(self, names: Iterable[str]) -> None:
        """First weights for these tables, from torch's generator."""
        for name in names:
            weight = self.collection.embedding_bags[member(name)].weight
            weight.uniform_(-self.scales[name], self.scales[name])

    def optimizer_state(self) -> dict[str, Tensor]:
        """Table name -> row-wise Adagrad's sum of squares, (rows,) float32. Views, not copies."""
        state = self.collection.fused_optimizer().state_dict()["state"]
        found = {}
        for key, slots in state.items():
            table = key.removesuffix(".weight").rsplit(".", 1)[-1]
            (found[table.removeprefix(member(""))],) = slots.values()
        return found

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> list[str]:
        """Copy the state of every table that is in `state` with the same rows.

        Returns:
            Names of our tables that were not in it and keep what they have.
        """
        missing = []
        for name, ours in self.optimizer_state().items():
            if name in state and state[name].shape == ours.shape:
                ours.copy_(state[name])
            else:
                missing.append(name)
        return missing


def _bags(lookup: Lookup) -> int:
    return len(lookup.ids) if lookup.offsets is None else len(lookup.offsets) - 1


def bag_weights(offsets: Tensor, scores: Tensor | None) -> Tensor:
    """Weights that make the sum of a bag a weighted mean: equal ones, or by log(1 + score).

    Args:
        offsets: (B+1,) int64.
        scores: (L,) float32, at least 0, or None.

    Returns:
        (L,) float32; within a bag they add up to 1 (to 0 where all scores are 0).
    """
    lengths = offsets.diff()
    bags = torch.arange(len(lengths), device=offsets.device)
    bag_of_id = torch.repeat_interleave(bags, lengths)
    if scores is None:
        return 1.0 / lengths.to(torch.float32).index_select(0, bag_of_id)
    raw = torch.log1p(scores.nan_to_num(0.0).clamp(min=0.0))
    total = raw.new_zeros(len(lengths)).index_add_(0, bag_of_id, raw)
    return raw / total.index_select(0, bag_of_id).clamp(min=1e-6)
