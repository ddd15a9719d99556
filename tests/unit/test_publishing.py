"""What is computed of all users is computed some users at a time: the same figures, in little memory."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_store import embeddings
from feature_store.embeddings import EmbeddingKind, UserEmbeddings, pooled
from jobs.publish_embeddings import pooled_cosine, statistics
from jobs.training.judge import drift

SHAPE = (4, 32)


def context() -> Any:
    """Of a day without impressions."""
    return SimpleNamespace(
        ds="2024-05-02", model="sum", lake=SimpleNamespace(partitions=lambda _: {})
    )


def day(users: int, seed: int, first: int = 0) -> UserEmbeddings:
    """Embeddings of the users from `first` on."""
    values = np.random.default_rng(seed).normal(size=(users, *SHAPE)).astype(np.float16)
    return UserEmbeddings(
        model="sum",
        ds="2024-05-01",
        snapshot="one",
        kind=EmbeddingKind.RAW,
        ids=pa.array(np.arange(first, first + users)),
        values=values,
    )


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_figures_do_not_depend_on_how_many_users_are_taken_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    today, yesterday, before = day(40, 1), day(30, 2, first=15), day(50, 3, first=3)
    monkeypatch.setattr(embeddings, "_USERS", at_once)
    notes = statistics(context(), today.ids, today.values, yesterday)
    mean, days = pooled(today.ids, today.values, [yesterday, before])

    flat = today.values.reshape(40, -1).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1)
    assert notes["norm_mean"] == norms.mean() and notes["norm_max"] == norms.max()
    ours, theirs = flat[15:], yesterday.values[:25].reshape(25, -1).astype(np.float64)
    lengths = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
    assert notes["common_users"] == 25
    assert notes["cosine"] == pytest.approx(
        ((ours * theirs).sum(1) / lengths[0] / lengths[1]).mean()
    )
    assert notes["l2"] == pytest.approx(np.linalg.norm(ours - theirs, axis=1).mean())
    whole = drift(today.values[15:], yesterday.values[:25])
    assert (whole.cosine, whole.l2) == (notes["cosine"], notes["l2"])

    wanted, counts = today.values.astype(np.float32), np.ones(40, int)
    for other, first in ((yesterday, 15), (before, 3)):
        for i in range(40):
            if first <= i < first + len(other.values):
                wanted[i] += other.values[i - first]
                counts[i] += 1
    np.testing.assert_array_equal(days, counts)
    np.testing.assert_array_equal(mean, (wanted / counts[:, None, None]).astype(np.float16))
    rows = pa.table({"user_id": today.ids, "pooled": embeddings.encode(mean)})
    assert pooled_cosine(rows, yesterday) == drift(mean[15:], yesterday.values[:25]).cosine


def test_statistics_and_pooling_take_little_memory_beside_the_embeddings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embeddings, "_USERS", 4096)
    users = 60_000
    today, yesterday = day(users, 1), day(users, 2)
    tracemalloc.start()
    statistics(context(), today.ids, today.values, yesterday)
    mean, _ = pooled(today.ids, today.values, [yesterday])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    beside = (peak - mean.nbytes) / users  # 8 bytes a number, of a float64 copy, would be 1024
    assert beside < 500
