"""Prefix jagged attention beside what PyTorch has for the same rows, forward and backward, in turns.

    python -m benchmarks.attention [--device cpu|cuda] [--lengths 30,200] [--rows 64] [--rounds 5]

Histories are log-normal in length around each median (sigma 1, at most 1,024 events) and shaped as in the
sequence model: 2 heads of 16, 4 pooling queries. Four kinds of work:

    self              every event over the events before it and itself
    self, biased      the same with learned biases by age and by position, as a self-attention layer has
    targets           some 4 targets of a row, 4 queries each, over the prefix that each sees
    targets, biased   the same with a learned bias by age and a null slot, as published embeddings
                      are pooled (a reader's pooling has a bias by pair too)

Peers are `torch.nn.functional.scaled_dot_product_attention`, which picks its kernel itself,

    padded    on all rows, padded to the longest, with a mask; `self` needs none, it says is_causal
    buckets   the same on rows of like length together, a power of two
    rows      on one row after the other, nothing padded

Before anything is timed, every peer's output and gradients are compared with ours. Not among them on a
CPU: nested tensors (no backend), FlexAttention (no backward), varlen_attn (no kernel). On a CPU one thread
and float32; on a GPU bfloat16, where outputs and gradients may be apart by as much as it rounds.

Below it what a self-attention layer costs under the pooling: a layer of each kind and attention pooling,
alone, on the same histories. The layer is O(N^2) in the length of a history, pooling O(M N).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.flags import listed, parser
from benchmarks.timing import in_turns
from feature_store.days import DAY_US
from models.attention import prefix_attention
from models.attention_inputs import (
    POSITION_BUCKETS,
    RECENCY_BUCKETS,
    Null,
    Recency,
    position_bucket,
    recency_bucket,
)
from models.encoders import Encoder, layer
from models.reader import AttentionPooling
from models.upstream.sequence import SequenceConfig

MOST = 1024  # events of a history
TARGETS = 4  # of a row, on average
SHAPE = SequenceConfig()
_APART = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest number


@dataclass(frozen=True, kw_only=True)
class Work:
    """What `prefix_attention` takes; and whether each query is an event that sees itself and all before,
    and nothing else counts."""

    name: str
    causal: bool
    q: Tensor
    k: Tensor
    v: Tensor
    q_offsets: Tensor
    kv_offsets: Tensor
    kv_end: Tensor
    recency: Recency | None = None
    position_bias: Tensor | None = None
    null: Null | None = None

    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        found = [self.q, self.k, self.v]
        found += [] if self.recency is None else [self.recency.table]
        found += [] if self.position_bias is None else [self.position_bias]
        return found + list(self.null or ())


@dataclass(frozen=True, kw_only=True)
class EventRows:
    """Histories alone, as `models.encoders` read them."""

    event_offsets: Tensor
    event_time: Tensor

    @property
    def rows(self) -> int:
        """R."""
        return len(self.event_offsets) - 1

    @property
    def events(self) -> int:
        """N."""
        return len(self.event_time)


def histories(median: int, rows: int, device: torch.device) -> EventRows:
    """Log-normal lengths of at least one event; times within 30 days, ascending in a row."""
    lengths = torch.exp(torch.randn(rows)).mul(median).round().clamp(1, MOST).long()
    age = torch.rand(int(lengths.sum()), dtype=torch.float64)
    row = torch.repeat_interleave(torch.arange(rows), lengths)
    order = torch.argsort(row + age)  # rows stay in order, ascending within
    return EventRows(
        event_offsets=F.pad(lengths.cumsum(0), (1, 0)).to(device),
        event_time=(age[order] * 30 * DAY_US).long().to(device),
    )


def works(events: EventRows, device: torch.device, dtype: torch.dtype) -> list[Work]:
    """The four kinds over these histories."""
    shape, lengths = (SHAPE.heads, SHAPE.head_dim), events.event_offsets.diff()

    def drawn(*of: int) -> Tensor:
        return torch.randn(of, device=device, dtype=dtype).requires_grad_()

    k, v = drawn(events.events, *shape), drawn(events.events, *shape)
    position = torch.arange(events.events, device=device)
    itself = position - torch.repeat_interleave(events.event_offsets[:-1], lengths) + 1
    alone = Work(
        name="self", causal=True, q=drawn(events.events, *shape), k=k, v=v,
        q_offsets=events.event_offsets, kv_offsets=events.event_offsets, kv_end=itself,
    )  # fmt: skip
    layered = replace(
        alone, name="self, biased", causal=False, position_bias=drawn(POSITION_BUCKETS, SHAPE.heads),
        recency=Recency(
            events.event_time, events.event_time, drawn(RECENCY_BUCKETS, SHAPE.heads)
        ),
    )  # fmt: skip
    asked = torch.randint(1, 2 * TARGETS, (events.rows,), device=device)
    most = torch.repeat_interleave(lengths, asked)
    end = (torch.rand(len(most), device=device) * most).long() + 1
    heads = SHAPE.heads * SHAPE.queries
    targets = Work(
        name="targets", causal=False, q=drawn(len(end), heads, SHAPE.head_dim), k=k, v=v,
        q_offsets=F.pad(asked.cumsum(0), (1, 0)), kv_offsets=events.event_offsets, kv_end=end,
    )  # fmt: skip
    table = drawn(RECENCY_BUCKETS, heads)
    at = torch.full_like(end, 30 * DAY_US)
    biased = replace(
        targets, name="targets, biased", kv_end=end - 1, recency=Recency(at, events.event_time, table),
        null=Null(drawn(*shape), drawn(*shape)),
    )  # fmt: skip
    return [alone, layered, targets, biased]


def ours(work: Work) -> Tensor:
    """`prefix_attention`, (Q, G, d)."""
    return prefix_attention(
        work.q, work.k, work.v, q_offsets=work.q_offsets, kv_offsets=work.kv_offsets,
        kv_end=work.kv_end, recency=work.recency, position_bias=work.position_bias, null=work.null,
    )  # fmt: skip


def together(work: Work) -> list[Tensor]:
    """All rows in one group."""
    return [torch.arange(len(work.kv_offsets) - 1, device=work.q.device)]


def alike(work: Work) -> list[Tensor]:
    """Rows of between 2^n and 2^(n+1) events in a group."""
    level = torch.log2(work.kv_offsets.diff().to(torch.float32)).floor()
    return [(level == value).nonzero().squeeze(1) for value in level.unique()]


def one_by_one(work: Work) -> list[Tensor]:
    """Each row in a group of its own."""
    return list(together(work)[0].split(1))


def by_torch(groups: Callable[[Work], list[Tensor]], work: Work) -> Tensor:
    """The same by `scaled_dot_product_attention`, a call for each group of rows; (Q, G, d)."""
    pieces, places = [], []
    for rows in groups(work):
        query, asked = _padded(work.q_offsets, rows)
        key, _ = _padded(work.kv_offsets, rows)
        q, k, v = (_taken(x, of) for x, of in ((work.q, query), (work.k, key), (work.v, key)))
        mask = None if work.causal else _mask(work, query, key)
        if work.null is not None:
            none = (len(rows), 1, -1, -1)
            k = torch.cat([work.null.key.expand(none), k], dim=1)
            v = torch.cat([work.null.value.expand(none), v], dim=1)
        heads, many = k.shape[2], q.shape[2] // k.shape[2]
        # (b, t, H g, d) -> (b, H, t g, d): the queries that share a head's keys are more queries
        q = q.unflatten(2, (heads, many)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        found = F.scaled_dot_product_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=work.causal
        )
        found = found.unflatten(2, (-1, many)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        pieces.append(found[asked])
        places.append(query[asked])
    order = torch.empty_like(work.kv_end)
    place = torch.cat(places)
    order[place] = torch.arange(len(place), device=place.device)
    return torch.cat(pieces).index_select(0, order)


def _padded(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of `rows`, (b, longest) int64, where a shorter row repeats its last; and which are real."""
    first, count = offsets[:-1][rows][:, None], offsets.diff()[rows][:, None]
    within = torch.arange(int(count.max()), device=offsets.device)
    return first + torch.minimum(within, count - 1), within < count


def _taken(values: Tensor, entries: Tensor) -> Tensor:
    """values (n, ...) at entries (b, t): a view where they are one row's."""
    if len(entries) == 1:
        return values[None, int(entries[0, 0]) : int(entries[0, -1]) + 1]
    return values.index_select(0, entries.flatten()).unflatten(0, entries.shape)


def _mask(work: Work, query: Tensor, key: Tensor) -> Tensor:
    """(b, 1 or H, t g, l or 1 + l): what is seen; or, with a bias, what is added to a score."""
    within = torch.arange(key.shape[1], device=key.device)
    seen = within < work.kv_end[query][:, :, None]  # (b, t, l)
    many = work.q.shape[1] // work.k.shape[1]
    if work.recency is None:
        return seen[:, None, :, None].expand(-1, -1, -1, many, -1).flatten(2, 3)
    q_time, kv_time, table = work.recency
    bucket = recency_bucket(q_time[query][:, :, None] - kv_time[key][:, None, :])
    bias = table.index_select(0, bucket.flatten()).unflatten(0, bucket.shape)
    if work.position_bias is not None:
        newer = position_bucket(work.kv_end[query][:, :, None] - 1 - within)
        bias = bias + work.position_bias.index_select(0, newer.flatten()).unflatten(0, newer.shape)
    bias = bias.masked_fill(~seen[..., None], float("-inf"))
    if work.null is not None:
        bias = F.pad(bias, (0, 0, 1, 0))  # 0 of the null slot
    return bias.unflatten(3, (-1, many)).permute(0, 3, 1, 4, 2).flatten(2, 3)


PEERS: Mapping[str, Callable[[Work], Tensor]] = {
    "padded": partial(by_torch, together),
    "buckets": partial(by_torch, alike),
    "rows": partial(by_torch, one_by_one),
}


def stepped(attend: Callable[[Work], Tensor], work: Work) -> list[Tensor]:
    """Output, and the gradients of a weighted sum of it."""
    out = attend(work)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight.view(out.shape)).sum(), work.leaves())]


def check_agreement(work: Work) -> None:
    """Nothing, where every peer computes what ours does.

    Raises:
        RuntimeError: one does not.
    """
    mine = stepped(ours, work)
    for name, attend in PEERS.items():
        for found, wanted in zip(stepped(attend, work), mine, strict=True):
            apart = float((found - wanted).abs().max() / wanted.abs().max())
            if not apart <= _APART[found.dtype]:
                raise RuntimeError(f"{work.name}: {name} is apart from ours by {apart:.1e}")


def of_layers(
    events: EventRows, work: Work, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Forward and backward of attention pooling, and of a layer of each kind."""
    pooling = AttentionPooling.of(SHAPE).to(device, dtype)
    layers = {kind: layer(kind, SHAPE.width, SHAPE.head_dim).to(device, dtype) for kind in Encoder}
    inputs = torch.randn(events.events, SHAPE.width, device=device, dtype=dtype).requires_grad_()
    query = work.q.detach().flatten(1).requires_grad_()
    at = torch.full_like(work.kv_end, 30 * DAY_US)

    def pooled() -> None:
        pooling(
            inputs, query, batch=events, q_offsets=work.q_offsets, end=work.kv_end, at=at
        ).sum().backward()

    def encoded(kind: Encoder) -> None:
        layers[kind](inputs, events).sum().backward()

    return {"pooling": pooled, **{str(kind): partial(encoded, kind) for kind in Encoder}}


def markdown(found: Mapping[tuple[int, str], Mapping[str, np.ndarray]], head: str) -> str:
    """Milliseconds of the first column, and how many times as long the others took, by round."""
    base, *others = next(iter(found.values()))
    out = [
        f"| {head} | {base}, ms | {' | '.join(f'{name} / {base}' for name in others)} |",
        f"|{'---|' * (2 + len(others))}",
    ]
    for (median, name), taken in found.items():
        ratios = (float(np.median(taken[x] / taken[base])) for x in others)
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        about = f"{name}, median {median}".removeprefix(", ")
        out.append(f"| {about} | {1e3 * float(np.median(taken[base])):.2f} | {cells} |")
    return "\n".join(out) + "\n"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    cli = parser("attention", __doc__)
    cli.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    cli.add_argument("--lengths", type=listed, default=["30", "200"], help="median events of a row")
    cli.add_argument("--rows", type=int, default=64, help="of a batch")
    cli.add_argument("--rounds", type=int, default=5, help="timed, after one to warm up")
    return cli.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, measure and print."""
    args = arguments(argv)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_num_threads(1)
    torch.manual_seed(0)
    attention: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    layers: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for median in map(int, args.lengths):
        events = histories(median, args.rows, device)
        of_kinds = works(events, device, dtype)
        for work in of_kinds:
            check_agreement(work)
            attention[median, work.name] = in_turns(
                {
                    n: partial(stepped, attend, work)
                    for n, attend in {"ours": ours, **PEERS}.items()
                },
                rounds=args.rounds,
                device=args.device,
            )
            print(f"  {work.name}, median {median}: done", flush=True)
        layers[median, ""] = in_turns(
            of_layers(events, of_kinds[-1], device, dtype),
            rounds=args.rounds,
            device=args.device,
        )
    about = "float32, one thread" if device.type == "cpu" else "bfloat16"
    print(f"\n{args.rows} rows, {device.type}, {about}; forward and backward\n")
    print(markdown(attention, "attention"))
    print(markdown(layers, "attention pooling, and one layer under it"))


if __name__ == "__main__":
    main()
