"""The biases of attention scores on the tiles of `models.kernels.prefix_attention`: by the age of a
key, by its position, and of a pair.

They are defined in `models.attention`. BM tile rows, each one query and head, BN keys, G query heads.
The tables of the first two are small and many scores add to one number of their gradients; a pair
belongs to one tile.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from models.attention_inputs import POSITION_BUCKETS, RECENCY_BUCKETS, recency_bucket

_AGES = tl.constexpr(RECENCY_BUCKETS)
_POSITIONS = tl.constexpr(POSITION_BUCKETS)


@triton.jit
def age_bucket(age, edges):
    """`recency_bucket` of int64 microseconds: a guess by float32, put right by the exact edges."""
    seconds = tl.maximum(age.to(tl.float32) * 1e-6, 0.5)
    guess = tl.minimum((2.0 * tl.log2(seconds) + 2.0).to(tl.int32), 63)
    guess = tl.maximum(guess, 0)
    guess = tl.where(age >= tl.load(edges + guess + 1), guess + 1, guess)
    return tl.where(age < tl.load(edges + guess), guess - 1, guess)


@triton.jit
def newer_bucket(newer):
    """`position_bucket` of integers. From 32 up a float's exponent and the two bits below it count
    four buckets per doubling."""
    far = tl.minimum(tl.maximum(newer, 32), 8191).to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(newer < 32, tl.maximum(newer, 0), (far >> 21) - 496)  # 32.0 is 528 << 21


@triton.jit
def add_biases(score, mask, nth, head, end, asked, happened, pair, edges, recency, position, pairs,
               G: tl.constexpr, RECENCY: tl.constexpr, POSITION: tl.constexpr,
               PAIRS: tl.constexpr):  # fmt: skip
    """Scores (BM, BN) and the biases that there are.

    Of tile rows (BM,): the head, how many keys are seen, when it asks, and its query's first pair.
    Of keys (BN,): the place in their row, and when they happened.
    """
    if RECENCY:
        bucket = age_bucket(asked[:, None] - happened[None, :], edges)
        score += tl.load(recency + bucket * G + head[:, None], mask=mask, other=0.0)
    if POSITION:
        bucket = newer_bucket(end[:, None] - 1 - nth[None, :])
        score += tl.load(position + bucket * G + head[:, None], mask=mask, other=0.0)
    if PAIRS:
        place = (pair[:, None] + nth[None, :]) * G + head[:, None]
        score += tl.load(pairs + place, mask=mask, other=0.0).to(tl.float32)
    return score


@triton.jit
def store_gradients(d_score, mask, nth, head, end, asked, happened, pair, edges, copy, d_recency,
                    d_position, d_pairs, G: tl.constexpr, RECENCY: tl.constexpr,
                    POSITION: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Adds to copy `copy` of d_recency and d_position (copies, buckets, G); writes d_pairs (P, G)."""
    if RECENCY:
        bucket = age_bucket(asked[:, None] - happened[None, :], edges)
        cell = (copy * _AGES + bucket) * G + head[:, None]
        tl.atomic_add(d_recency + cell, d_score, mask=mask)
    if POSITION:
        bucket = newer_bucket(end[:, None] - 1 - nth[None, :])
        cell = (copy * _POSITIONS + bucket) * G + head[:, None]
        tl.atomic_add(d_position + cell, d_score, mask=mask)
    if PAIRS:
        place = (pair[:, None] + nth[None, :]) * G + head[:, None]
        tl.store(d_pairs + place, d_score.to(d_pairs.dtype.element_ty), mask=mask)


@cache
def age_edges(device: torch.device) -> Tensor:
    """(RECENCY_BUCKETS + 1,) int64: the least age in microseconds of each bucket; nothing reaches the last."""
    bucket = torch.arange(RECENCY_BUCKETS, dtype=torch.float64)
    guess = (torch.exp2((bucket - 2) / 2) * 1e6).to(torch.int64)
    near = guess[:, None] + torch.arange(-64, 65)
    reached = (recency_bucket(near) >= bucket[:, None]).to(torch.int64)
    edges = near.gather(1, reached.argmax(1, keepdim=True)).squeeze(1)
    edges[0] = torch.iinfo(torch.int64).min
    return F.pad(edges, (0, 1), value=torch.iinfo(torch.int64).max).to(device)
