"""Prefix jagged attention: one operation for target attention, pooling and causal self-attention.

R rows hold jagged queries and jagged keys. A query attends to a prefix of its row's keys, the
first `kv_end` of them: what was known when the query was asked.

    row                0              1    2
    keys               a b c d e      -    f g            kv_offsets  [0, 5, 5, 7]
    queries            x y z          w    u              q_offsets   [0, 3, 4, 5]
    kv_end             2 4 5          0    1
    attends to         ab abcd abcde  -    f

Target attention and pooling: queries are targets. Causal self-attention: queries are the events
themselves and `kv_end` is 1, 2, 3, ... within each row. Pooling by learned queries: one query per
row.

Shapes: Q queries, N keys, R rows, G query heads, H key heads (G a multiple of H: heads g with the
same g // (G // H) read one key head), d head dimension, P = sum(kv_end) pairs of a query and a key
that it sees. For query q and the i-th key n of its row, i < kv_end[q], and each bias that is given:

    score[q, g, n] = <query[q, g], key[n, h]> / sqrt(d)
                     + recency[recency_bucket(q_time[q] - kv_time[n]), g]
                     + position_bias[position_bucket(kv_end[q] - 1 - i), g]
                     + pair_bias[kv_end[0] + ... + kv_end[q - 1] + i, g]
    out[q, g]      = sum over n of softmax(score)[q, g, n] value[n, h]

or, pointwise (HSTU, arXiv 2402.17152, eq. 2): a weight says how much, and not how much of the whole,

    out[q, g]      = sum over n of SiLU(score[q, g, n]) / pointwise value[n, h]

The softmax also runs over a null slot, a learned key and value without bias, where one is given;
without one, a query with no key gets zeros. `prefix_attention` is the operation,
`prefix_attention_reference` the same in the plainest way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention_inputs import (
    RECENCY_BUCKETS,
    Null,
    Recency,
    check,
    first_pairs,
    position_bucket,
    recency_bucket,
)
from models.blocked_attention import blocked_prefix_attention
from models.kernels.prefix_attention import flash_prefix_attention


def prefix_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    kv_end: Tensor,
    recency: Recency | None = None,
    position_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    null: Null | None = None,
    pointwise: float | None = None,
) -> Tensor:
    """As `prefix_attention`, one query and one head at a time."""
    group = q.shape[1] // k.shape[1]
    first_pair = first_pairs(kv_end)
    out = torch.zeros_like(q)
    for row in range(len(q_offsets) - 1):
        start = int(kv_offsets[row])
        for i in range(int(q_offsets[row]), int(q_offsets[row + 1])):
            end, pair = int(kv_end[i]), int(first_pair[i])
            seen = slice(start, start + end)
            for g in range(q.shape[1]):
                h = g // group
                keys, values = k[seen, h], v[seen, h]
                scores = keys @ q[i, g] / q.shape[2] ** 0.5
                if recency is not None:
                    age = recency.q_time[i] - recency.kv_time[seen]
                    scores = scores + recency.table[recency_bucket(age), g]
                if position_bias is not None:
                    newer = torch.arange(end, device=q.device).flip(0)
                    scores = scores + position_bias[position_bucket(newer), g]
                if pair_bias is not None:
                    scores = scores + pair_bias[pair : pair + end, g]
                if null is not None:
                    null_score = (null.key[h] * q[i, g]).sum()[None] / q.shape[2] ** 0.5
                    scores = torch.cat([null_score, scores])
                    values = torch.cat([null.value[h][None], values])
                if pointwise is not None:
                    out[i, g] = F.silu(scores) / pointwise @ values
                elif len(values):
                    out[i, g] = torch.softmax(scores, 0) @ values
    return out


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    kv_end: Tensor,
    recency: Recency | None = None,
    position_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    null: Null | None = None,
    pointwise: float | None = None,
) -> Tensor:
    """Attention of jagged queries over prefixes of their rows' jagged keys.

    On a GPU a Triton kernel (`models.kernels.prefix_attention`), elsewhere dense attention over
    blocks of queries of like size (`models.blocked_attention`). Both know their gradients, and
    neither pads to the batch's longest row.

    Args:
        q: (Q, G, d) float.
        k, v: (N, H, d) float.
        q_offsets, kv_offsets: (R+1,) int64.
        kv_end: (Q,) int64, 0 up to the number of keys of the query's row.
        recency: bias by age.
        position_bias: (POSITION_BUCKETS, G) float, bias by how many visible keys are newer.
        pair_bias: (P, G) float, a bias for every query and visible key: query by query, in the order
            of the keys, as `models.history.visible_pairs` lays them out.
        null: null slot; not with `pointwise`.
        pointwise: weights are SiLU(score) / pointwise instead of a softmax; a usual length.

    Returns:
        (Q, G, d).
    """
    if q.is_cuda:
        return flash_prefix_attention(
            q, k, v, q_offsets=q_offsets, kv_offsets=kv_offsets, kv_end=kv_end, recency=recency,
            position_bias=position_bias, pair_bias=pair_bias, null=null, pointwise=pointwise,
        )  # fmt: skip
    check(
        q, k, kv_end=kv_end, position_bias=position_bias, pair_bias=pair_bias, null=null,
        pointwise=pointwise,
    )  # fmt: skip
    if q.shape[0] == 0:
        return q
    return blocked_prefix_attention(
        q, k, v, q_offsets=q_offsets, kv_offsets=kv_offsets, kv_end=kv_end, recency=recency,
        position_bias=position_bias, pair_bias=pair_bias, null=null, pointwise=pointwise,
    )  # fmt: skip


class RecencyBias(nn.Module):
    """The table of `Recency`, one bias per head and age bucket; starts at 0."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(RECENCY_BUCKETS, heads))

    def forward(self, q_time: Tensor, kv_time: Tensor) -> Recency:
        return Recency(q_time, kv_time, self.table)
