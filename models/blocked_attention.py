"""Prefix jagged attention on CPUs: dense attention over blocks of queries of like size.

Queries are cut into blocks of at most 64 of one row. Blocks of about as many queries and about as long
a prefix are a group, padded to its largest, and a group is one dense attention: rows of very different
lengths do not pay for each other. The gradient is written out, so that a group costs a few products and
passes over its own scores, and never a pass over the batch.

What is computed, and Q, N, G, H, d and P, are defined in `models.attention`. Of a group: b blocks of t
queries and l keys; g = G / H query heads read one key head; s = 1 with a null slot, in front of the keys,
else 0. Heads come first, so that nothing moves between a gather and a product:

    queries   (H, b t, g d), which is (H b, t g, d)
    keys      (H, b (s + l), d), which is (H b, s + l, d)
    scores    (H b, t g, s + l), which is (H, b, t, g, s + l)
    biases    (G, b t l), which is (H, g, b, t, l)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import (
    Null,
    Recency,
    cut,
    first_pairs,
    position_bucket,
    recency_bucket,
)

_MASKED = -1e30  # finite: a row of nothing but -inf makes NaN
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_COUNTS = (4, 16, 64)


class Group(NamedTuple):
    """Blocks of like size."""

    query: Tensor  # (b, t) int64; a shorter block repeats its last
    asked: Tensor  # (n,) int64, which of the b t are no repetition
    end: Tensor  # (b, t) int64, keys that each sees
    key: Tensor  # (b, l) int64, the first keys of the block's row; behind what is seen, any


def groups_of(q_offsets: Tensor, kv_offsets: Tensor, kv_end: Tensor) -> list[Group]:
    """Every query once, in one of the groups."""
    tiles = cut(q_offsets.diff(), _COUNTS[-1])
    start = q_offsets[:-1].index_select(0, tiles.row) + tiles.start
    left = q_offsets[1:].index_select(0, tiles.row) - start
    count = left.clamp(max=_COUNTS[-1])
    longest = torch.segment_reduce(kv_end.to(torch.float32), "max", lengths=count).to(torch.int64)
    first_key = kv_offsets[:-1].index_select(0, tiles.row)
    last_key = (kv_offsets[-1] - 1).clamp(min=0)
    kind = torch.bucketize(longest, torch.tensor(_LENGTHS)) * (len(_COUNTS) + 1)
    kind += torch.bucketize(count, torch.tensor(_COUNTS))
    found = []
    for value in kind.unique().tolist():
        chosen = (kind == value).nonzero().squeeze(1)
        mine = count.index_select(0, chosen)[:, None]
        within = torch.arange(int(mine.max()))
        query = start.index_select(0, chosen)[:, None] + torch.minimum(within, mine - 1)
        most = int(longest.index_select(0, chosen).max())
        key = first_key.index_select(0, chosen)[:, None] + torch.arange(most)
        found.append(
            Group(
                query=query,
                asked=(within < mine).flatten().nonzero().squeeze(1),
                end=kv_end.index_select(0, query.flatten()).view(query.shape),
                key=torch.minimum(key, last_key),
            )
        )
    return found


class _Problem(NamedTuple):
    """What of a call has no gradient."""

    groups: list[Group]
    q_time: Tensor | None
    kv_time: Tensor | None
    first_pair: Tensor | None  # (Q,) int64
    pointwise: float | None
    graded: bool  # whether there will be a backward pass


def blocked_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    kv_end: Tensor,
    recency: Recency | None,
    position_bias: Tensor | None,
    pair_bias: Tensor | None,
    null: Null | None,
    pointwise: float | None,
) -> Tensor:
    """As `models.attention.prefix_attention`, whose arguments these are."""
    problem = _Problem(
        groups_of(q_offsets, kv_offsets, kv_end),
        None if recency is None else recency.q_time,
        None if recency is None else recency.kv_time,
        None if pair_bias is None else first_pairs(kv_end),
        pointwise,
        torch.is_grad_enabled(),
    )
    by_age = None if recency is None else recency.table
    by_newer = None
    if position_bias is not None:
        newer = torch.arange(int(kv_end.max()) if len(kv_end) else 0)
        by_newer = position_bias.index_select(0, position_bucket(newer))
    null_key, null_value = (None, None) if null is None else null
    return _Attention.apply(problem, q, k, v, by_age, by_newer, pair_bias, null_key, null_value)


class _Attention(torch.autograd.Function):
    """Biases are three tables (n, G): by bucket of age, by how many visible keys are newer, by pair."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: _Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        by_age: Tensor | None,
        by_newer: Tensor | None,
        by_pair: Tensor | None,
        null_key: Tensor | None,
        null_value: Tensor | None,
    ) -> Tensor:
        heads, d = k.shape[1:]
        many = q.shape[1] // heads
        queries = _heads_first(q * d**-0.5, heads)
        unit = problem.pointwise or 1.0  # of a weight; the values take it, which are fewer
        keys, values = _with_null(k, null_key), _with_null(v / unit, null_value)
        tables = [None if x is None else x.t().contiguous() for x in (by_age, by_newer, by_pair)]
        pieces, kept = [], []
        for group in problem.groups:
            query, slots = _taken(queries, group.query, d), _slots(group, null_key)
            scores = query @ _taken(keys, slots, d).transpose(1, 2)
            of_keys = _of_keys(scores, group, heads)
            places = _places(group, problem, tables)
            for table, place in zip(tables, places, strict=True):
                if table is not None and place is not None:
                    bias = table.index_select(1, place.flatten())
                    of_keys += bias.view(heads, many, *place.shape).permute(0, 2, 3, 1, 4)
            behind = torch.arange(group.key.shape[1]) >= group.end[..., None]
            of_keys.masked_fill_(behind[:, :, None], _MASKED)
            if problem.pointwise is None:
                weights = torch.softmax(scores, dim=-1)
                if null_key is None and not bool(group.end.all()):
                    nothing = (group.end == 0)[..., None, None]
                    _of_keys(weights, group, heads).masked_fill_(nothing, 0.0)
            else:
                weights = F.silu(scores)
            if problem.graded:
                kept.append((weights if problem.pointwise is None else scores, places))
            found = weights @ _taken(values, slots, d)
            pieces.append(found.view(heads, -1, many * d)[:, group.asked])
        out = _in_order(pieces, problem.groups)
        ctx.save_for_backward(queries, keys, values, out)
        ctx.problem, ctx.kept, ctx.null = problem, kept, null_key
        ctx.rows = [None if x is None else len(x) for x in (by_age, by_newer, by_pair)]
        return _heads_inside(out, d)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, out = ctx.saved_tensors
        heads, d = len(queries), keys.shape[2]
        problem, (grad,) = ctx.problem, gradients
        many = grad.shape[1] // heads
        # a last query of zeros, for the repetitions
        d_out = F.pad(_heads_first(grad, heads), (0, 0, 0, 1))
        share = (d_out[:, :-1] * out).unflatten(2, (-1, d)).sum(3)
        share = F.pad(share, (0, 0, 0, 1))  # (H, Q + 1, g)
        d_keys, d_values = (x.new_zeros(x.shape[1], heads * d) for x in (keys, values))
        d_tables = [None if n is None else grad.new_zeros(grad.shape[1], n) for n in ctx.rows]
        pieces = []
        for group, (of_scores, places) in zip(problem.groups, ctx.kept, strict=True):
            query, slots = _taken(queries, group.query, d), _slots(group, ctx.null)
            once = torch.full_like(group.query, queries.shape[1]).flatten()
            once[group.asked] = group.query.flatten()[group.asked]
            d_found = _taken(d_out, once.view(group.query.shape), d)
            d_weights = d_found @ _taken(values, slots, d).transpose(1, 2)
            if problem.pointwise is None:
                weights = of_scores
                mine = share.index_select(1, once).view(*d_found.shape[:2], 1)
                d_scores = d_weights.sub_(mine).mul_(weights)
            else:
                weights = F.silu(of_scores)
                d_scores = torch.ops.aten.silu_backward(d_weights, of_scores)
            _add_to(d_values, slots, weights.transpose(1, 2) @ d_found)
            _add_to(d_keys, slots, d_scores.transpose(1, 2) @ query)
            d_query = d_scores @ _taken(keys, slots, d)
            pieces.append(d_query.view(heads, -1, many * d)[:, group.asked])
            if any(place is not None for place in places):
                of_keys = _of_keys(d_scores, group, heads)
                d_bias = of_keys.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)
                for table, place in zip(d_tables, places, strict=True):
                    if table is not None and place is not None:
                        table.scatter_add_(1, place.flatten().expand(len(table), -1), d_bias)
        d_q = _heads_inside(_in_order(pieces, problem.groups), d) * d**-0.5
        d_k, d_v = d_keys.unflatten(1, (heads, d)), d_values.unflatten(1, (heads, d))
        d_v = d_v / (problem.pointwise or 1.0)
        d_nulls: list[Tensor | None] = [None, None]
        if ctx.null is not None:
            d_nulls, d_k, d_v = [d_k[0], d_v[0]], d_k[1:], d_v[1:]
        of_tables = (None if x is None else x.t() for x in d_tables)
        return None, d_q, d_k, d_v, *of_tables, *d_nulls


def _heads_first(values: Tensor, heads: int) -> Tensor:
    """(Q, G, d) -> (H, Q, g d)."""
    return values.reshape(len(values), heads, -1).transpose(0, 1).contiguous()


def _heads_inside(values: Tensor, d: int) -> Tensor:
    """(H, Q, g d) -> (Q, G, d)."""
    return values.transpose(0, 1).reshape(values.shape[1], -1, d)


def _with_null(values: Tensor, null: Tensor | None) -> Tensor:
    """(N, H, d) -> (H, s + N, d)."""
    whole = values if null is None else torch.cat([null[None], values])
    return whole.transpose(0, 1).contiguous()


def _slots(group: Group, null: Tensor | None) -> Tensor:
    """(b, s + l) int64, rows of `_with_null`."""
    return group.key if null is None else F.pad(group.key + 1, (1, 0))


def _taken(values: Tensor, entries: Tensor, d: int) -> Tensor:
    """values (H, n, x d) at entries (b, t) -> (H b, t x, d)."""
    found = values.index_select(1, entries.flatten())
    many = values.shape[2] // d
    return found.view(len(values) * len(entries), entries.shape[1] * many, d)


def _of_keys(scores: Tensor, group: Group, heads: int) -> Tensor:
    """A view of scores (H b, t g, s + l) without the null slot, (H, b, t, g, l)."""
    (b, t), keys = group.query.shape, group.key.shape[1]
    spread = scores.view(heads, b, t, scores.shape[1] // t, scores.shape[2])
    return spread[..., scores.shape[2] - keys :]


def _add_to(total: Tensor, slots: Tensor, values: Tensor) -> None:
    """Adds values (H b, s + l, d) to total (s + N, H d)."""
    heads = total.shape[1] // values.shape[2]
    by_slot = values.view(heads, slots.numel(), values.shape[2]).transpose(0, 1)
    total.index_add_(0, slots.flatten(), by_slot.reshape(slots.numel(), total.shape[1]))


def _places(
    group: Group, problem: _Problem, tables: list[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """For each of the tables that there are, (b, t, l) int64: which of its rows a query and key read."""
    nth = torch.arange(group.key.shape[1])
    by_age = by_newer = by_pair = None
    if problem.q_time is not None and problem.kv_time is not None:
        asked, happened = problem.q_time[group.query], problem.kv_time[group.key]
        by_age = recency_bucket(asked[:, :, None] - happened[:, None, :])
    if tables[1] is not None:
        by_newer = (group.end[:, :, None] - 1 - nth).clamp(min=0)
    if problem.first_pair is not None and tables[2] is not None:
        by_pair = problem.first_pair[group.query][:, :, None] + nth
        by_pair = by_pair.clamp(max=tables[2].shape[1] - 1)
    return by_age, by_newer, by_pair


def _in_order(pieces: list[Tensor], groups: list[Group]) -> Tensor:
    """(H, n, x) of each group's queries -> (H, Q, x)."""
    place = torch.cat([group.query.flatten()[group.asked] for group in groups])
    order = torch.empty_like(place)
    order[place] = torch.arange(len(place))
    return torch.cat(pieces, dim=1).index_select(1, order)
