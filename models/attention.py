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
without one, a query with no key gets zeros. `prefix_attention` is the implementation for CPUs and
hands GPU tensors to a kernel; `prefix_attention_reference` is the same in the plainest way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RECENCY_BUCKETS = 64
POSITION_BUCKETS = 64
# the least position of each bucket but the first: 1, 2, ... 31, 32, 40, 48, 56, 64, 80, ... 7168
_POSITION_EDGES = (*range(1, 32), *((4 + i % 4) << (3 + i // 4) for i in range(32)))
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
        position_bias: (POSITION_BUCKETS, G) float, bias by how many visible keys are newer.
        pair_bias: (P, G) float, a bias for every query and visible key: query by query, in the order
            of the keys, as `models.history.visible_pairs` lays them out.
        null: null slot; not with `pointwise`.
        pointwise: weights are SiLU(score) / pointwise instead of a softmax; a usual length.

    Returns:
        (Q, G, d).
    """
    if q.is_cuda:
        from models.kernels.prefix_attention import flash_prefix_attention

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
    # slot 0 of the padded keys is the null slot, or a masked one
    heads, width = k.shape[1], k.shape[2]
    null_key = k.new_zeros(1, heads, width) if null is None else null.key[None]
    null_value = v.new_zeros(1, heads, width) if null is None else null.value[None]
    kv = torch.cat([torch.cat([null_key, null_value], 2), torch.cat([k, v], 2)], 0)
    groups = _groups(q_offsets, kv_offsets, kv_end, kv.shape[0])
    pairs = [None] * len(groups) if pair_bias is None else _padded(pair_bias, groups, kv_end)
    pieces, places = [], []
    for group, pair in zip(groups, pairs, strict=True):
        query, key = group.query, group.key
        end = kv_end.index_select(0, query.flatten()).view(query.shape)
        out = _dense(
            q.index_select(0, query.flatten()).unflatten(0, query.shape),
            kv.index_select(0, key.flatten()).unflatten(0, key.shape),
            end=end,
            bias=_bias(group, end, recency=recency, position_bias=position_bias, pair_bias=pair),
            null=null is not None,
            pointwise=pointwise,
        )
        pieces.append(out.flatten(0, 1).index_select(0, group.asked))
        places.append(query.flatten().index_select(0, group.asked))
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


class _Group(NamedTuple):
    query: Tensor  # (b, t) the queries of b blocks; a shorter block repeats its last
    asked: Tensor  # which of the b t are no repetition
    key: Tensor  # (b, 1 + l) their row's first keys as rows of the padded keys, slot 0 in front


def _groups(
    q_offsets: Tensor, kv_offsets: Tensor, kv_end: Tensor, padded_keys: int
) -> list[_Group]:
    """Blocks of like prefixes, padded; every block is in one of them."""
    device = kv_end.device
    blocks = _blocks(q_offsets, kv_end)
    first_key = kv_offsets[:-1].index_select(0, blocks.row) + 1
    level = torch.bucketize(blocks.longest, torch.tensor(_LENGTHS, device=device))
    narrow = (blocks.count * 4 <= _BLOCK).to(level.dtype)
    groups = []
    kind = level * 2 + narrow
    for value in kind.unique().tolist():
        chosen = (kind == value).nonzero().squeeze(1)
        nth = value // 2
        length = _LENGTHS[nth] if nth < len(_LENGTHS) else int(blocks.longest[chosen].max())
        start = blocks.start.index_select(0, chosen)[:, None]
        count = blocks.count.index_select(0, chosen)[:, None]
        within = torch.arange(_BLOCK // 4 if value % 2 else _BLOCK, device=device)
        asked = (within < count).flatten().nonzero().squeeze(1)
        key = torch.arange(length, device=device) + first_key.index_select(0, chosen)[:, None]
        key = F.pad(key.clamp(max=padded_keys - 1), (1, 0))
        groups.append(_Group(start + torch.minimum(within, count - 1), asked, key))
    return groups


def _padded(pair_bias: Tensor, groups: list[_Group], kv_end: Tensor) -> list[Tensor]:
    """(b, t, l, G) of each group. All pairs are written at once and each to one place, so that the
    gradient is a plain read."""
    shapes = [(*group.query.shape, group.key.shape[1] - 1) for group in groups]
    sizes = [b * t * length for b, t, length in shapes]
    start = torch.empty_like(kv_end)  # (Q,) where each query's pairs go
    before = 0
    for group, (_, _, length), size in zip(groups, shapes, sizes, strict=True):
        start[group.query.flatten().index_select(0, group.asked)] = before + group.asked * length
        before += size
    place = torch.repeat_interleave(start - first_pairs(kv_end), kv_end)
    place = place + torch.arange(len(place), device=place.device)
    padded = pair_bias.new_zeros(before, pair_bias.shape[1]).index_copy(0, place, pair_bias)
    return [p.unflatten(0, s) for p, s in zip(padded.split(sizes), shapes, strict=True)]


def _bias(
    group: _Group,
    end: Tensor,
    *,
    recency: Recency | None,
    position_bias: Tensor | None,
    pair_bias: Tensor | None,
) -> Tensor | None:
    """(b, t, 1 + l, G), the sum of what is given; of slot 0 it is 0. `pair_bias`: (b, t, l, G)."""
    given = [] if pair_bias is None else [pair_bias]
    if recency is not None:
        query, key = group.query, group.key[:, 1:]
        asked = recency.q_time.index_select(0, query.flatten()).view(query.shape)
        times = F.pad(recency.kv_time, (1, 0))  # as the keys: slot 0 is the null slot
        happened = times.index_select(0, key.flatten()).view(key.shape)
        bucket = recency_bucket(asked[:, :, None] - happened[:, None, :])
        given.append(_rows(recency.table, bucket))
    if position_bias is not None:
        slot = torch.arange(1, group.key.shape[1], device=end.device)
        given.append(_rows(position_bias, position_bucket(end[:, :, None] - slot)))
    return F.pad(sum(given[1:], start=given[0]), (0, 0, 1, 0)) if given else None


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """table (B, G) at int64 `rows`; the gradient of `index_select` costs a tenth of `embedding`'s."""
    return table.index_select(0, rows.flatten()).unflatten(0, rows.shape)


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
    out = weights.to(v.dtype).view(b, kv_heads, group * t, slots) @ v
    out = out.view(b, kv_heads, group, t, width).permute(0, 3, 1, 2, 4)
    return out.reshape(b, t, heads, width)


class RecencyBias(nn.Module):
    """The table of `Recency`, one bias per head and age bucket; starts at 0."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(RECENCY_BUCKETS, heads))

    def forward(self, q_time: Tensor, kv_time: Tensor) -> Recency:
        return Recency(q_time, kv_time, self.table)
