"""User embeddings of days without a training, that say which day and which snapshot they are of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from benchmarks.progressive import Embedded
from feature_store.embeddings import EmbeddingKind, UserEmbeddings


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
