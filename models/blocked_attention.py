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

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention_inputs import (
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
_BY_AGE, _BY_NEWER, _BY_PAIR = range(3)  # the tables of biases


class Group(NamedTuple):
    """Blocks of like size."""

    query: Tensor  # (b, t) int64; a shorter block repeats its last
    asked: Tensor  # (n,) int64, which of the b t are no repetition
    end: Tensor  # (b, t) int64, keys that each sees
    key: Tensor  # (b, l) int64, the first keys of the block's row; behind what is seen, any
    slot: Tensor  # (b, s + l) int64, the same where the null slot is row 0


def groups_of(q_offsets: Tensor, kv_offsets: Tensor, kv_end: Tensor, *, null: bool) -> list[Group]:
    """Every query once, in one of the groups."""
    tiles = cut(q_offsets.diff(), _COUNTS[-1])
    start = q_offsets[:-1].index_select(0, tiles.row) + tiles.start
    left = q_offsets[1:].index_select(0, tiles.row) - start
    count = left.clamp(max=_COUNTS[-1])
    longest = torch.segment_reduce(kv_end.to(torch.float32), "max", lengths=count).to(torch.int64)
    first_key = kv_offsets[:-1].index_select(0, tiles.row)
    last_key = (kv_offsets[-1] - 1).clamp(min=0)
    kind = torch.bucketize(longest, torch.tensor(_LENGTHS)) * len(_COUNTS)
    kind += torch.bucketize(count, torch.tensor(_COUNTS))
    found = []
    for value in kind.unique().tolist():
        chosen = (kind == value).nonzero().squeeze(1)
        mine = count.index_select(0, chosen)[:, None]
        within = torch.arange(int(mine.max()))
        query = start.index_select(0, chosen)[:, None] + torch.minimum(within, mine - 1)
        most = int(longest.index_select(0, chosen).max())
        key = first_key.index_select(0, chosen)[:, None] + torch.arange(most)
        key = torch.minimum(key, last_key)
        found.append(
            Group(
                query=query,
                asked=(within < mine).flatten().nonzero().squeeze(1),
                end=kv_end.index_select(0, query.flatten()).view(query.shape),
                key=key,
                slot=F.pad(key + 1, (1, 0)) if null else key,
            )
        )
    return found


class _Problem(NamedTuple):
    """What of a call has no gradient."""

    groups: list[Group]
    order: Tensor  # (Q,) int64, the place of each query in all groups' queries, without repetitions
    q_time: Tensor | None
    kv_time: Tensor | None
    first_pair: Tensor | None  # (Q,) int64
    pointwise: bool
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
    q = q * q.shape[2] ** -0.5
    if pointwise is not None:
        v = v / pointwise  # for the weights, which are more
    if null is not None:
        k, v = torch.cat([null.key[None], k]), torch.cat([null.value[None], v])
    groups = groups_of(q_offsets, kv_offsets, kv_end, null=null is not None)
    place = torch.cat([group.query.flatten()[group.asked] for group in groups])
    order = torch.empty_like(place)
    order[place] = torch.arange(len(place))
    problem = _Problem(
        groups=groups,
        order=order,
        q_time=None if recency is None else recency.q_time,
        kv_time=None if recency is None else recency.kv_time,
        first_pair=None if pair_bias is None else first_pairs(kv_end),
        pointwise=pointwise is not None,
        graded=torch.is_grad_enabled(),
    )
    by_newer = None
    if position_bias is not None:
        newer = position_bucket(torch.arange(int(kv_end.max())))
        by_newer = position_bias.index_select(0, newer)
    by_age = None if recency is None else recency.table
    return _Attention.apply(problem, q, k, v, by_age, by_newer, pair_bias)


class _Attention(torch.autograd.Function):
    """Of scaled queries, and of keys and values with the null slot in row 0 if there is one. Biases are
    three tables (n, G): by bucket of age, by how many visible keys are newer, by pair."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: _Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *biases: Tensor | None,
    ) -> Tensor:
        heads, d = k.shape[1:]
        many = q.shape[1] // heads
        queries, keys, values = (_heads_first(x, heads) for x in (q, k, v))
        tables = {i: x.t().contiguous() for i, x in enumerate(biases) if x is not None}
        pieces, kept = [], []
        for group in problem.groups:
            query = _taken(queries, group.query, d)
            scores = query @ _taken(keys, group.slot, d).transpose(1, 2)
            of_keys = _of_keys(scores, group, heads)
            places = _places(group, problem, tables)
            for i, place in places.items():
                bias = tables[i].index_select(1, place.flatten())
                of_keys += bias.view(heads, many, *place.shape).permute(0, 2, 3, 1, 4)
            behind = torch.arange(group.key.shape[1]) >= group.end[..., None]
            of_keys.masked_fill_(behind[:, :, None], _MASKED)
            if problem.pointwise:
                weights = F.silu(scores)
            else:
                weights = torch.softmax(scores, dim=-1)
                if group.slot is group.key and not bool(group.end.all()):
                    nothing = (group.end == 0)[..., None, None]
                    _of_keys(weights, group, heads).masked_fill_(nothing, 0.0)
            if problem.graded:
                kept.append((scores if problem.pointwise else weights, places))
            found = weights @ _taken(values, group.slot, d)
            pieces.append(found.view(heads, -1, many * d)[:, group.asked])
        out = torch.cat(pieces, dim=1).index_select(1, problem.order)
        ctx.save_for_backward(queries, keys, values, out)
        ctx.problem, ctx.kept = problem, kept
        ctx.rows = [None if x is None else len(x) for x in biases]
        return _heads_inside(out, d)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, out = ctx.saved_tensors
        heads, d = len(queries), keys.shape[2]
        problem, (grad,) = ctx.problem, gradients
        many = grad.shape[1] // heads
        # a last query of zeros, for the repetitions
        d_out = F.pad(_heads_first(grad, heads), (0, 0, 0, 1))
        d_keys, d_values = (x.new_zeros(x.shape[1], heads * d) for x in (keys, values))
        d_tables = [None if n is None else grad.new_zeros(grad.shape[1], n) for n in ctx.rows]
        pieces = []
        for group, (of_scores, places) in zip(problem.groups, ctx.kept, strict=True):
            query = _taken(queries, group.query, d)
            once = torch.full_like(group.query, queries.shape[1]).flatten()
            once[group.asked] = group.query.flatten()[group.asked]
            d_found = _taken(d_out, once.view(group.query.shape), d)
            d_weights = d_found @ _taken(values, group.slot, d).transpose(1, 2)
            if problem.pointwise:
                weights = F.silu(of_scores)
                d_scores = torch.ops.aten.silu_backward(d_weights, of_scores)
            else:
                weights = of_scores
                share = (d_found * _taken(out, group.query, d)).sum(2, keepdim=True)
                d_scores = d_weights.sub_(share).mul_(weights)
            _add_to(d_values, group.slot, weights.transpose(1, 2) @ d_found)
            _add_to(d_keys, group.slot, d_scores.transpose(1, 2) @ query)
            d_query = d_scores @ _taken(keys, group.slot, d)
            pieces.append(d_query.view(heads, -1, many * d)[:, group.asked])
            if places:
                of_keys = _of_keys(d_scores, group, heads)
                d_bias = of_keys.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)
                for i, place in places.items():
                    d_tables[i].scatter_add_(1, place.flatten().expand(len(d_bias), -1), d_bias)
        d_q = torch.cat(pieces, dim=1).index_select(1, problem.order)
        of_keys_and_values = (x.unflatten(1, (heads, d)) for x in (d_keys, d_values))
        of_tables = (None if x is None else x.t() for x in d_tables)
        return None, _heads_inside(d_q, d), *of_keys_and_values, *of_tables


def _heads_first(values: Tensor, heads: int) -> Tensor:
    """(Q, G, d) -> (H, Q, g d)."""
    return values.unflatten(1, (heads, -1)).flatten(2).transpose(0, 1).contiguous()


def _heads_inside(values: Tensor, d: int) -> Tensor:
    """(H, Q, g d) -> (Q, G, d)."""
    return values.transpose(0, 1).reshape(values.shape[1], -1, d)


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


def _places(group: Group, problem: _Problem, tables: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """For each of the tables that there are, (b, t, l) int64: which of its rows a query and key read."""
    nth = torch.arange(group.key.shape[1])
    found = {}
    if problem.q_time is not None and problem.kv_time is not None:
        asked, happened = problem.q_time[group.query], problem.kv_time[group.key]
        found[_BY_AGE] = recency_bucket(asked[:, :, None] - happened[:, None, :])
    if _BY_NEWER in tables:
        found[_BY_NEWER] = (group.end[:, :, None] - 1 - nth).clamp(min=0)
    if problem.first_pair is not None:
        pair = problem.first_pair[group.query][:, :, None] + nth
        found[_BY_PAIR] = pair.clamp(max=tables[_BY_PAIR].shape[1] - 1)
    return found
