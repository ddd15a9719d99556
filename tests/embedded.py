"""User embeddings without a training, that say which day and which snapshot they are of; and what reads
them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from torch import nn

from benchmarks.progressive import Embedded
from feature_store.embeddings import EmbeddingKind, UserEmbeddings
from models.downstream import Downstream


def numbered(days: Sequence[str], *, users: int, held: float = 0.5) -> dict[str, Embedded]:
    """Every number of a day's embeddings is the day's place, and `held` more in the held ones."""

    def of(ds: str, value: float) -> UserEmbeddings:
        return UserEmbeddings(
            model="sum", ds=ds, kind=EmbeddingKind.RAW, snapshot=ds, ids=pa.array(range(users)),
            values=np.full((users, 2, 4), value, np.float16),
        )  # fmt: skip

    return {
        ds: Embedded(served=of(ds, i), held=of(ds, i + held) if i else None, ne={})
        for i, ds in enumerate(days)
    }


def reads_embeddings(model: Downstream) -> Downstream:
    """`model`, as if it had learned something from published embeddings, of which it reads nothing at first."""
    for matrix in model.published.values():
        nn.init.normal_(matrix.weight, std=0.2)
    return model
