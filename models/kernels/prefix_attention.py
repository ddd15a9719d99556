"""Flash attention of jagged queries over prefixes of their rows' jagged keys, as Triton kernels.

What is computed is defined in `models.attention`. Scores are never stored: they are made again tile
by tile, as in FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2), and nothing is padded: a tile
belongs to one row, and a row of the batch costs what its own queries and keys cost (Jagged Flash
Attention, arXiv 2409.15373).

The G / H query heads that read one key head are laid side by side in a tile: 4 targets with 4 pooling
queries fill a tile of 16 that loads its keys once.

    tile row t of a tile that starts at entry s of its row:  entry s + t
    entry e of a row:  query q_offsets[row] + e // group,  head h * group + e % group

Shapes: Q queries, N keys, R rows, G query heads, H key heads, group = G / H, d head dimension; BM
tile rows, BN keys of a tile, BD = d up to a power of two. Scores, sums and gradients are float32
whatever the inputs are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.attention_inputs import (
    POSITION_BUCKETS,
    RECENCY_BUCKETS,
    Null,
    Recency,
    check,
    cut,
    first_pairs,
)
from models.kernels.biases import add_biases, age_edges, store_gradients

_TILE_ROWS, _TILE_KEYS = 16, 32
_COPIES = 64  # of a bias table's gradient, so that fewer programs add to one number


@triton.jit
def _entries(tile_row, tile_start, tile, q_offsets, h, GROUP: tl.constexpr, BM: tl.constexpr):
    """Of a tile: its row, and per tile row (BM,) the query, the query head, and whether it is one."""
    row = tl.load(tile_row + tile)
    first = tl.load(q_offsets + row)
    last = tl.load(q_offsets + row + 1)
    entry = tl.load(tile_start + tile) + tl.arange(0, BM)
    query = first + entry // GROUP
    return row, query, h * GROUP + entry % GROUP, query < last


@triton.jit
def _asks(q, kv_end, q_time, first_pair, query, head, is_query, G: tl.constexpr, D: tl.constexpr,
          BD: tl.constexpr, RECENCY: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Of a tile's queries: where their vectors lie and which numbers are theirs (BM, BD), the
    vectors, how many keys they see, when they ask and what their first pair is (BM,)."""
    column = tl.arange(0, BD)
    place = (query * G + head)[:, None] * D + column[None, :]
    inside = is_query[:, None] & (column < D)[None, :]
    asks = tl.load(q + place, mask=inside, other=0.0)
    end = tl.load(kv_end + query, mask=is_query, other=0)
    asked = tl.load(q_time + query, mask=is_query, other=0) if RECENCY else query
    pair = tl.load(first_pair + query, mask=is_query, other=0) if PAIRS else query
    return place, inside, asks, end, asked, pair


@triton.jit
def _keys(k, v, kv_time, key, is_key, h, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
          RECENCY: tl.constexpr):  # fmt: skip
    """Of a tile's keys: where they lie and which numbers are theirs (BN, BD), keys, values, and when
    they happened (BN,)."""
    column = tl.arange(0, BD)
    place = (key * H + h)[:, None] * D + column[None, :]
    inside = is_key[:, None] & (column < D)[None, :]
    keys = tl.load(k + place, mask=inside, other=0.0)
    values = tl.load(v + place, mask=inside, other=0.0)
    happened = tl.load(kv_time + key, mask=is_key, other=0) if RECENCY else key
    return place, inside, keys, values, happened


@triton.jit
def _scores(q, k, mask, scale, nth, head, end, asked, happened, pair, edges, recency, position, pairs,
            G: tl.constexpr, RECENCY: tl.constexpr, POSITION: tl.constexpr, PAIRS: tl.constexpr,
            UPCAST: tl.constexpr):  # fmt: skip
    """(BM, BN) float32 scores of q (BM, BD) and k (BN, BD), -inf where `mask` is False."""
    if UPCAST:  # Triton's interpreter multiplies bfloat16 wrongly
        q, k = q.to(tl.float32), k.to(tl.float32)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    score = add_biases(score, mask, nth, head, end, asked, happened, pair, edges, recency, position,
                       pairs, G, RECENCY, POSITION, PAIRS)  # fmt: skip
    return tl.where(mask, score, float("-inf"))


@triton.jit
def _pointwise(score, mask, share):
    """SiLU(score) x share where `mask`, else 0; and its derivative in the score."""
    score = tl.where(mask, score, 0.0)
    gate = tl.sigmoid(score)
    slope = tl.where(mask, gate * (1.0 + score * (1.0 - gate)) * share, 0.0)
    return tl.where(mask, score * gate * share, 0.0), slope


@triton.jit
def _weights(score, mask, d_weight, log_total, deltas, share, POINTWISE: tl.constexpr):
    """The weights that scores gave, made again, and the gradient of the scores, (BM, BN) each."""
    if POINTWISE:
        weight, slope = _pointwise(score, mask, share)
        d_score = slope * d_weight
    else:
        weight = tl.exp(score - log_total[:, None])
        d_score = weight * (d_weight - deltas[:, None])
    return weight, d_score


@triton.jit
def _forward(q, k, v, out, lse, q_offsets, kv_offsets, kv_end, q_time, kv_time, first_pair, edges,
             recency, position, pairs, null_score, null_value, tile_row, tile_start, scale, share,
             G: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BD: tl.constexpr, RECENCY: tl.constexpr, POSITION: tl.constexpr, PAIRS: tl.constexpr,
             NULL: tl.constexpr, POINTWISE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One program per tile of queries and key head. Writes out (Q, G, D) and lse (Q, G)."""
    tile, h = tl.program_id(0), tl.program_id(1)
    row, query, head, is_query = _entries(tile_row, tile_start, tile, q_offsets, h, G // H, BM)
    place, inside, asks, end, asked, pair = _asks(
        q, kv_end, q_time, first_pair, query, head, is_query, G, D, BD, RECENCY, PAIRS
    )
    first_key = tl.load(kv_offsets + row)

    if NULL:  # the softmax starts from the null slot
        top = tl.load(null_score + query * G + head, mask=is_query, other=0.0)
        total = tl.full((BM,), 1.0, tl.float32)
        column = tl.arange(0, BD)
        value = tl.load(null_value + h * D + column, mask=column < D, other=0.0)
        sums = tl.zeros((BM, BD), tl.float32) + value.to(tl.float32)[None, :]
    else:
        top = tl.full((BM,), -1e30, tl.float32)  # finite: -inf less -inf is NaN
        total = tl.zeros((BM,), tl.float32)
        sums = tl.zeros((BM, BD), tl.float32)

    for begin in range(0, tl.max(end, 0), BN):
        nth = begin + tl.arange(0, BN)
        mask = nth[None, :] < end[:, None]
        some = nth < tl.max(end, 0)
        _, _, keys, values, happened = _keys(
            k, v, kv_time, first_key + nth, some, h, H, D, BD, RECENCY
        )
        score = _scores(asks, keys, mask, scale, nth, head, end, asked, happened, pair, edges,
                        recency, position, pairs, G, RECENCY, POSITION, PAIRS,
                        UPCAST)  # fmt: skip
        if POINTWISE:
            weight, _ = _pointwise(score, mask, share)
        else:
            new_top = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp(score - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(weight, 1)
            sums = sums * shrink[:, None]
            top = new_top
        if UPCAST:
            values = values.to(tl.float32)
        sums += tl.dot(weight.to(values.dtype), values, input_precision="ieee")

    if POINTWISE:
        total = tl.full((BM,), 1.0, tl.float32)
    nothing = total == 0.0  # no key and no null slot: zeros, and a lse that makes every weight 0
    safe = tl.where(nothing, 1.0, total)
    tl.store(out + place, (sums / safe[:, None]).to(out.dtype.element_ty), mask=inside)
    found = tl.where(nothing, float("inf"), top + tl.log(safe))
    tl.store(lse + query * G + head, found, mask=is_query)


@triton.jit
def _backward_q(q, k, v, d_out, lse, delta, d_q, d_recency, d_position, d_pairs, q_offsets,
                kv_offsets, kv_end, q_time, kv_time, first_pair, edges, recency, position, pairs,
                tile_row, tile_start, scale, share,
                G: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, BD: tl.constexpr, COPIES: tl.constexpr, RECENCY: tl.constexpr,
                POSITION: tl.constexpr, PAIRS: tl.constexpr, POINTWISE: tl.constexpr,
                UPCAST: tl.constexpr):  # fmt: skip
    """One program per tile of queries and key head. Writes d_q and the gradients of the biases."""
    tile, h = tl.program_id(0), tl.program_id(1)
    row, query, head, is_query = _entries(tile_row, tile_start, tile, q_offsets, h, G // H, BM)
    place, inside, asks, end, asked, pair = _asks(
        q, kv_end, q_time, first_pair, query, head, is_query, G, D, BD, RECENCY, PAIRS
    )
    d_outs = tl.load(d_out + place, mask=inside, other=0.0)
    log_total = tl.load(lse + query * G + head, mask=is_query, other=float("inf"))
    deltas = tl.load(delta + query * G + head, mask=is_query, other=0.0)
    first_key = tl.load(kv_offsets + row)
    if UPCAST:
        d_outs = d_outs.to(tl.float32)
    sums = tl.zeros((BM, BD), tl.float32)
    for begin in range(0, tl.max(end, 0), BN):
        nth = begin + tl.arange(0, BN)
        mask = nth[None, :] < end[:, None]
        some = nth < tl.max(end, 0)
        _, _, keys, values, happened = _keys(
            k, v, kv_time, first_key + nth, some, h, H, D, BD, RECENCY
        )
        score = _scores(asks, keys, mask, scale, nth, head, end, asked, happened, pair, edges,
                        recency, position, pairs, G, RECENCY, POSITION, PAIRS,
                        UPCAST)  # fmt: skip
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        d_weight = tl.dot(d_outs, tl.trans(values), input_precision="ieee")
        _, d_score = _weights(score, mask, d_weight, log_total, deltas, share, POINTWISE)
        store_gradients(d_score, mask, nth, head, end, asked, happened, pair, edges, tile % COPIES,
                        d_recency, d_position, d_pairs, G, RECENCY, POSITION, PAIRS)  # fmt: skip
        sums += tl.dot(d_score.to(keys.dtype), keys, input_precision="ieee") * scale
    tl.store(d_q + place, sums.to(d_q.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kv(q, k, v, d_out, lse, delta, d_k, d_v, q_offsets, kv_offsets, kv_end, q_time,
                 kv_time, first_pair, edges, recency, position, pairs, tile_row, tile_start, scale,
                 share, G: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, BD: tl.constexpr, RECENCY: tl.constexpr, POSITION: tl.constexpr,
                 PAIRS: tl.constexpr, POINTWISE: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One program per tile of keys and key head, over all queries of its row. Writes d_k and d_v."""
    tile, h = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = G // H
    row = tl.load(tile_row + tile)
    nth = tl.load(tile_start + tile) + tl.arange(0, BN)
    first_key, last_key = tl.load(kv_offsets + row), tl.load(kv_offsets + row + 1)
    key = first_key + nth
    is_key = key < last_key
    where, loaded, keys, values, happened = _keys(k, v, kv_time, key, is_key, h, H, D, BD, RECENCY)
    if UPCAST:
        values = values.to(tl.float32)
    d_keys = tl.zeros((BN, BD), tl.float32)
    d_values = tl.zeros((BN, BD), tl.float32)
    first, last = tl.load(q_offsets + row), tl.load(q_offsets + row + 1)
    for begin in range(0, (last - first) * GROUP, BM):
        entry = begin + tl.arange(0, BM)
        query = first + entry // GROUP
        head = h * GROUP + entry % GROUP
        is_query = query < last
        place, inside, asks, end, asked, pair = _asks(
            q, kv_end, q_time, first_pair, query, head, is_query, G, D, BD, RECENCY, PAIRS
        )
        d_outs = tl.load(d_out + place, mask=inside, other=0.0)
        log_total = tl.load(lse + query * G + head, mask=is_query, other=float("inf"))
        deltas = tl.load(delta + query * G + head, mask=is_query, other=0.0)
        mask = (nth[None, :] < end[:, None]) & is_key[None, :]
        score = _scores(asks, keys, mask, scale, nth, head, end, asked, happened, pair, edges,
                        recency, position, pairs, G, RECENCY, POSITION, PAIRS,
                        UPCAST)  # fmt: skip
        if UPCAST:
            asks, d_outs = asks.to(tl.float32), d_outs.to(tl.float32)
        d_weight = tl.dot(d_outs, tl.trans(values), input_precision="ieee")
        weight, d_score = _weights(score, mask, d_weight, log_total, deltas, share, POINTWISE)
        d_values += tl.dot(tl.trans(weight.to(d_outs.dtype)), d_outs, input_precision="ieee")
        d_keys += tl.dot(tl.trans(d_score.to(asks.dtype)), asks, input_precision="ieee") * scale
    tl.store(d_k + where, d_keys.to(d_k.dtype.element_ty), mask=loaded)
    tl.store(d_v + where, d_values.to(d_v.dtype.element_ty), mask=loaded)


class _PrefixAttention(torch.autograd.Function):
    """Everything but the null slot's own gradients, which are plain: its score comes in as a tensor."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, recency: Tensor | None,
                position: Tensor | None, pairs: Tensor | None, null_score: Tensor | None,
                null_value: Tensor | None, q_offsets: Tensor, kv_offsets: Tensor, kv_end: Tensor,
                q_time: Tensor | None, kv_time: Tensor | None,
                pointwise: float | None) -> Tensor:  # fmt: skip
        queries, heads, width = q.shape
        group = heads // k.shape[1]
        out = torch.zeros_like(q)
        lse = q.new_full((queries, heads), float("inf"), dtype=torch.float32)
        first_pair = None if pairs is None else first_pairs(kv_end)
        biases = (*_or(q_offsets, q_time, kv_time, first_pair), age_edges(q.device),
                  *_or(q, recency, position, pairs))  # fmt: skip
        tiles = cut(q_offsets.diff() * group, _TILE_ROWS)
        ctx.scale, ctx.share = width**-0.5, 1.0 / (pointwise or 1.0)
        ctx.shape = {
            "G": heads, "H": k.shape[1], "D": width, "BM": _TILE_ROWS, "BN": _TILE_KEYS,
            "BD": max(16, triton.next_power_of_2(width)), "RECENCY": recency is not None,
            "POSITION": position is not None, "PAIRS": pairs is not None,
            "POINTWISE": pointwise is not None, "UPCAST": q.device.type == "cpu",
        }  # fmt: skip
        if len(tiles.row):
            _forward[(len(tiles.row), k.shape[1])](
                q, k, v, out, lse, q_offsets, kv_offsets, kv_end, *biases,
                *_or(q, null_score, null_value), tiles.row, tiles.start, ctx.scale, ctx.share,
                **ctx.shape, NULL=null_score is not None,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, null_score, null_value, q_offsets, kv_offsets,
                              kv_end, *tiles, *biases)  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse, null_score, null_value, q_offsets, kv_offsets, kv_end, row, start,
         *biases) = ctx.saved_tensors  # fmt: skip
        heads, kv_heads = q.shape[1], k.shape[1]
        d_out = d_out.contiguous()
        delta = (out.float() * d_out.float()).sum(2)
        d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_recency = d_position = d_pairs = None
        if ctx.shape["RECENCY"]:
            d_recency = q.new_zeros((_COPIES, RECENCY_BUCKETS, heads), dtype=torch.float32)
        if ctx.shape["POSITION"]:
            d_position = q.new_zeros((_COPIES, POSITION_BUCKETS, heads), dtype=torch.float32)
        if ctx.shape["PAIRS"]:
            d_pairs = torch.empty_like(biases[-1])  # each pair is of one tile, which writes it
        if len(row):
            _backward_q[(len(row), kv_heads)](
                q, k, v, d_out, lse, delta, d_q, *_or(q, d_recency, d_position, d_pairs), q_offsets,
                kv_offsets, kv_end, *biases, row, start, ctx.scale, ctx.share, **ctx.shape,
                COPIES=_COPIES,
            )  # fmt: skip
        tiles = cut(kv_offsets.diff(), _TILE_KEYS)
        if len(tiles.row):
            _backward_kv[(len(tiles.row), kv_heads)](
                q, k, v, d_out, lse, delta, d_k, d_v, q_offsets, kv_offsets, kv_end, *biases,
                tiles.row, tiles.start, ctx.scale, ctx.share, **ctx.shape,
            )  # fmt: skip
        d_score = d_value = None
        if null_score is not None:
            weight = torch.exp(null_score - lse)  # (Q, G)
            wide = d_out.float().unflatten(1, (kv_heads, -1))
            d_value = torch.einsum("qhgd,qhg->hd", wide, weight.unflatten(1, (kv_heads, -1)))
            d_weight = torch.einsum("qhgd,hd->qhg", wide, null_value.float()).flatten(1)
            d_score = weight * (d_weight - delta)
        return (
            d_q, d_k, d_v, None if d_recency is None else d_recency.sum(0),
            None if d_position is None else d_position.sum(0), d_pairs, d_score, d_value,
            None, None, None, None, None, None,
        )  # fmt: skip


def _or(stand_in: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """`tensors` with a pointer that is never read in place of each None."""
    return [stand_in if t is None else t for t in tensors]


def flash_prefix_attention(
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
    """As `models.attention.prefix_attention`, forward and backward, float32 or bfloat16.

    The gradients of the tables of `recency` and `position_bias` are added up by atomics: they do not
    repeat to the last bit. All others do.

    Args:
        q: (Q, G, d).
        k, v: (N, H, d), of q's dtype.
        q_offsets, kv_offsets: (R+1,) int64.
        kv_end: (Q,) int64, 0 up to the number of keys of the query's row.
        recency: bias by age.
        position_bias: (POSITION_BUCKETS, G) float, bias by how many visible keys are newer.
        pair_bias: (P, G) float, a bias for every query and visible key.
        null: null slot; not with `pointwise`.
        pointwise: weights are SiLU(score) / pointwise instead of a softmax.

    Returns:
        (Q, G, d) of q's dtype.
    """
    kv_heads = k.shape[1]
    check(
        q, k, kv_end=kv_end, position_bias=position_bias, pair_bias=pair_bias, null=null,
        pointwise=pointwise,
    )  # fmt: skip
    null_score = null_value = None
    if null is not None:
        grouped = q.float().unflatten(1, (kv_heads, -1))  # (Q, H, group, d)
        score = torch.einsum("qhgd,hd->qhg", grouped, null.key.float())
        null_score = (score.flatten(1) * q.shape[2] ** -0.5).contiguous()
        null_value = null.value.float().contiguous()
    return _PrefixAttention.apply(
        q.contiguous(), k.contiguous(), v.contiguous(),
        None if recency is None else recency.table.float().contiguous(),
        None if position_bias is None else position_bias.float().contiguous(),
        None if pair_bias is None else pair_bias.contiguous(),
        null_score, null_value, q_offsets, kv_offsets, kv_end,
        None if recency is None else recency.q_time, None if recency is None else recency.kv_time,
        pointwise,
    )  # fmt: skip
