"""The shape of an event sequence model, as a whole: its parts read it too."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.encoders import Encoder
from models.tables import TableConfig
from models.towers import MixConfig


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
