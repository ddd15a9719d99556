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
same g // (G // H) read one key head), d head dimension.

    score[q, g, n] = <query[q, g], key[n, h]> / sqrt(d) + bias[bucket(q_time[q] - kv_time[n]), g]
    out[q, g]      = sum over n of softmax(score)[q, g, n] value[n, h]

or, pointwise (HSTU, arXiv 2402.17152, eq. 2): a weight says how much, and not how much of the whole,

    out[q, g]      = sum over n of SiLU(score[q, g, n]) / pointwise value[n, h]

The softmax also runs over a null slot, a learned key and value without bias, where one is given;
without one, a query with no key gets zeros. `prefix_attention` is the implementation for CPUs and
hands GPU tensors to a kernel; `prefix_attention_reference` is the same in the plainest way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RECENCY_BUCKETS = 64
_MASKED = -1e30  # finite: a row of nothing but -inf makes NaN
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_BLOCK = 16


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


def prefix_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    kv_end: Tensor,
    recency: Recency | None = None,
    null: Null | None = None,
    pointwise: float | None = None,
) -> Tensor:
    """As `prefix_attention`, one query and one head at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for row in range(len(q_offsets) - 1):
        start = int(kv_offsets[row])
        for i in range(int(q_offsets[row]), int(q_offsets[row + 1])):
            seen = slice(start, start + int(kv_end[i]))
            for g in range(q.shape[1]):
                h = g // group
                keys, values = k[seen, h], v[seen, h]
                scores = keys @ q[i, g] / q.shape[2] ** 0.5
                if recency is not None:
                    age = recency.q_time[i] - recency.kv_time[seen]
                    scores = scores + recency.table[recency_bucket(age), g]
                if null is not None:
                    null_score = (null.key[h] * q[i, g]).sum()[None] / q.shape[2] ** 0.5
                    scores = torch.cat([null_score, scores])
                    values = torch.cat([null.value[h][None], values])
                if pointwise is not None:
                    out[i, g] = F.silu(scores) / pointwise @ values
                elif len(values):
                    out[i, g] = torch.softmax(scores, 0) @ values
    return out


def check(q: Tensor, k: Tensor, *, null: Null | None, pointwise: float | None) -> None:
    """Raises ValueError where head counts do not divide, or `null` meets `pointwise`."""
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if pointwise is not None and null is not None:
        raise ValueError("null is for a softmax: a pointwise query needs no slot to look away to")


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    kv_end: Tensor,
    recency: Recency | None = None,
    null: Null | None = None,
    pointwise: float | None = None,
) -> Tensor:
    """Attention of jagged queries over prefixes of their rows' jagged keys.

    On a GPU a Triton kernel (`models.kernels.prefix_attention`). Elsewhere queries are cut into
    blocks of at most 16 of one row, blocks are grouped by the longest prefix in them, and each
    group is one dense attention, padded to that length alone: rows of very different length do not
    pay for each other. On CPUs this is several times faster than padding to the batch's longest
    row.

    Args:
        q: (Q, G, d) float.
        k, v: (N, H, d) float.
        q_offsets, kv_offsets: (R+1,) int64.
        kv_end: (Q,) int64, 0 up to the number of keys of the query's row.
        recency: bias by age.
        null: null slot; not with `pointwise`.
        pointwise: weights are SiLU(score) / pointwise instead of a softmax; a usual length.

    Returns:
        (Q, G, d).
    """
    check(q, k, null=null, pointwise=pointwise)
    if q.shape[0] == 0:
        return q
    if q.is_cuda:
        from models.kernels.prefix_attention import flash_prefix_attention

        return flash_prefix_attention(
            q, k, v, q_offsets=q_offsets, kv_offsets=kv_offsets, kv_end=kv_end,
            recency=recency, null=null, pointwise=pointwise,
        )  # fmt: skip
    # slot 0 of the padded keys is the null slot, or a masked one
    heads, width = k.shape[1], k.shape[2]
    null_key = k.new_zeros(1, heads, width) if null is None else null.key[None]
    null_value = v.new_zeros(1, heads, width) if null is None else null.value[None]
    kv = torch.cat([torch.cat([null_key, null_value], 2), torch.cat([k, v], 2)], 0)
    blocks = _blocks(q_offsets, kv_end)
    first_key = kv_offsets[:-1].index_select(0, blocks.row) + 1
    pieces, places = [], []
    for chosen, length, size in _groups(blocks):
        start = blocks.start.index_select(0, chosen)[:, None]
        count = blocks.count.index_select(0, chosen)[:, None]
        within = torch.arange(size, device=q.device)
        valid = within < count  # (b, t)
        query = start + torch.minimum(within, count - 1)
        key = torch.arange(length, device=q.device) + first_key.index_select(0, chosen)[:, None]
        key = F.pad(key.clamp(max=kv.shape[0] - 1), (1, 0))  # (b, 1 + l)
        out = _dense(
            q.index_select(0, query.flatten()).unflatten(0, query.shape),
            kv.index_select(0, key.flatten()).unflatten(0, key.shape),
            end=kv_end.index_select(0, query.flatten()).view(query.shape),
            bias=None if recency is None else _bias(recency, query, key),
            null=null is not None,
            pointwise=pointwise,
        )
        flat = valid.flatten().nonzero().squeeze(1)
        pieces.append(out.flatten(0, 1).index_select(0, flat))
        places.append(query.flatten().index_select(0, flat))
    order = torch.empty_like(kv_end)
    place = torch.cat(places)
    order[place] = torch.arange(len(place), device=q.device)
    return torch.cat(pieces).index_select(0, order)


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


class _Blocks(NamedTuple):
    row: Tensor  # (b,) row of each block
    start: Tensor  # (b,) its first query
    count: Tensor  # (b,) its queries, 1 up to _BLOCK
    longest: Tensor  # (b,) its longest prefix


def _blocks(q_offsets: Tensor, kv_end: Tensor) -> _Blocks:
    tiles = cut(q_offsets.diff(), _BLOCK)
    row = tiles.row
    start = q_offsets[:-1].index_select(0, row) + tiles.start
    count = torch.minimum(
        q_offsets[1:].index_select(0, row) - start, torch.full_like(start, _BLOCK)
    )
    longest = torch.segment_reduce(kv_end.to(torch.float32), "max", lengths=count).to(torch.int64)
    return _Blocks(row, start, count, longest)


def _groups(blocks: _Blocks) -> list[tuple[Tensor, int, int]]:
    """(blocks, padded prefix, padded queries) of each group; every block is in one of them."""
    edges = torch.tensor(_LENGTHS, device=blocks.row.device)
    level = torch.bucketize(blocks.longest, edges)
    narrow = (blocks.count * 4 <= _BLOCK).to(level.dtype)
    groups = []
    kind = level * 2 + narrow
    for value in kind.unique().tolist():
        chosen = (kind == value).nonzero().squeeze(1)
        nth = value // 2
        length = _LENGTHS[nth] if nth < len(_LENGTHS) else int(blocks.longest[chosen].max())
        groups.append((chosen, length, _BLOCK // 4 if value % 2 else _BLOCK))
    return groups


def _bias(recency: Recency, query: Tensor, key: Tensor) -> Tensor:
    """(b, t, 1 + l, G), for padded queries (b, t) and keys (b, 1 + l); of slot 0 it is 0."""
    asked = recency.q_time.index_select(0, query.flatten()).view(query.shape)
    times = F.pad(recency.kv_time, (1, 0))  # as the keys: slot 0 is the null slot
    happened = times.index_select(0, key[:, 1:].flatten()).view(key.shape[0], -1)
    bucket = recency_bucket(asked[:, :, None] - happened[:, None, :])
    return F.pad(F.embedding(bucket, recency.table), (0, 0, 1, 0))


def _dense(
    q: Tensor,
    kv: Tensor,
    *,
    end: Tensor,
    bias: Tensor | None,
    null: bool,
    pointwise: float | None,
) -> Tensor:
    """q (b, t, G, d) over padded kv (b, 1 + l, H, 2d) -> (b, t, G, d)."""
    b, t, heads, width = q.shape
    slots, kv_heads = kv.shape[1], kv.shape[2]
    group = heads // kv_heads
    k, v = kv.permute(0, 2, 1, 3).split(width, dim=3)  # (b, H, 1 + l, d)
    grouped = q.view(b, t, kv_heads, group, width).permute(0, 2, 3, 1, 4)  # (b, H, g, t, d)
    scores = grouped.reshape(b, kv_heads, group * t, width) * width**-0.5 @ k.transpose(2, 3)
    scores = scores.view(b, kv_heads, group, t, slots)
    slot = torch.arange(slots, device=q.device)
    seen = slot <= end[:, :, None]  # slot i + 1 holds key i
    if not null:
        seen = seen & (slot > 0)
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, _MASKED)
    mask = mask[:, None, None]  # (b, 1, 1, t, 1 + l)
    if bias is not None:
        # (b, t, 1 + l, G) -> (b, H, g, t, 1 + l)
        mask = mask + bias.permute(0, 3, 1, 2).unflatten(1, (kv_heads, group))
    if pointwise is not None:
        weights = F.silu(scores + mask) / pointwise  # of a masked key it is 0 x -1e30
    else:
        weights = torch.softmax(scores + mask, dim=-1)
    if not null and pointwise is None:
        weights = weights * (end > 0)[:, None, None, :, None]
    out = weights.view(b, kv_heads, group * t, slots) @ v
    out = out.view(b, kv_heads, group, t, width).permute(0, 3, 1, 2, 4)
    return out.reshape(b, t, heads, width)


class RecencyBias(nn.Module):
    """The table of `Recency`, one bias per head and age bucket; starts at 0."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(RECENCY_BUCKETS, heads))

    def forward(self, q_time: Tensor, kv_time: Tensor) -> Recency:
        return Recency(q_time, kv_time, self.table)
