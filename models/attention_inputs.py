"""What prefix attention is asked, for all that implement it: biases, the null slot, rows cut into tiles.

`models.attention` defines the operation, and what Q, N, R, G, H, d and P are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RECENCY_BUCKETS = 64
POSITION_BUCKETS = 64
# the least position of each bucket but the first: 1, 2, ... 31, 32, 40, 48, 56, 64, 80, ... 7168
_POSITION_EDGES = (*range(1, 32), *((4 + i % 4) << (3 + i // 4) for i in range(32)))


class Recency(NamedTuple):
    """A learned bias by the age of a key: q_time (Q,), kv_time (N,) int64 microseconds,
    table (RECENCY_BUCKETS, G)."""

    q_time: Tensor
    kv_time: Tensor
    table: Tensor


class Null(NamedTuple):
    """The slot that a query can attend to instead of any key: key and value (H, d)."""

    key: Tensor
    value: Tensor


def recency_bucket(age_us: Tensor) -> Tensor:
    """Two buckets per doubling from one second up: 0 below 1 s, 63 above 90 years; int64."""
    seconds = age_us.clamp(min=0).to(torch.float64) * 1e-6
    return (2.0 * torch.log2(seconds.clamp(min=0.5)) + 2.0).to(torch.int64).clamp(max=63)


def position_bucket(newer: Tensor) -> Tensor:
    """Exact below 32, then four buckets per doubling; 63 from 7168 up; int64.

    Args:
        newer: int64, how many of the visible keys come after a key: 0 is the newest.
    """
    edges = torch.tensor(_POSITION_EDGES, device=newer.device)
    return torch.bucketize(newer, edges, right=True)


def first_pairs(kv_end: Tensor) -> Tensor:
    """(Q,) int64, the first row of each query in `pair_bias`."""
    return kv_end.cumsum(0) - kv_end


def check(
    q: Tensor,
    k: Tensor,
    *,
    kv_end: Tensor,
    position_bias: Tensor | None,
    pair_bias: Tensor | None,
    null: Null | None,
    pointwise: float | None,
) -> None:
    """Raises ValueError where head counts do not divide, a bias has another shape than the queries
    and keys ask for, or `null` meets `pointwise`."""
    heads = q.shape[1]
    if heads % k.shape[1]:
        raise ValueError(f"{heads} query heads are no multiple of {k.shape[1]} key heads")
    if position_bias is not None and position_bias.shape != (POSITION_BUCKETS, heads):
        shape = tuple(position_bias.shape)
        raise ValueError(f"position_bias is {shape}, give ({POSITION_BUCKETS}, {heads})")
    if pair_bias is not None and pair_bias.shape != (pairs := int(kv_end.sum()), heads):
        raise ValueError(f"pair_bias is {tuple(pair_bias.shape)}, give ({pairs}, {heads})")
    if pointwise is not None and null is not None:
        raise ValueError("null is for a softmax: a pointwise query needs no slot to look away to")


class Tiles(NamedTuple):
    """Pieces of rows: their row, and where in it they start, (n,) int64 each."""

    row: Tensor
    start: Tensor


def cut(lengths: Tensor, size: int) -> Tiles:
    """Rows of these lengths, (R,) int64, into pieces of at most `size`."""
    per_row = (lengths + size - 1) // size
    rows = torch.arange(len(lengths), device=lengths.device)
    row = torch.repeat_interleave(rows, per_row)
    first = F.pad(per_row.cumsum(0), (1, 0))[:-1]
    nth = torch.arange(len(row), device=row.device) - first.index_select(0, row)
    return Tiles(row, nth * size)
