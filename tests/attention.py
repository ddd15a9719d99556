"""Attention problems of every jagged shape, for whatever implements `prefix_attention`."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from models.attention_inputs import POSITION_BUCKETS, RECENCY_BUCKETS, Null, Recency

FLAGS = st.fixed_dictionaries(
    {name: st.booleans() for name in ("recency", "position", "pairs", "null")}
)


def problem(
    sizes: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 3,
    recency: bool = True,
    position: bool = True,
    pairs: bool = True,
    null: bool = True,
    prefix: str = "random",
    pointwise: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Rows of (queries, keys); `prefix` is random, none or all of a row's keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    counts = torch.tensor(sizes)
    q_offsets, kv_offsets = (F.pad(counts[:, i].cumsum(0), (1, 0)) for i in (0, 1))
    queries, keys = int(q_offsets[-1]), int(kv_offsets[-1])
    most = torch.repeat_interleave(counts[:, 1], counts[:, 0])
    share = {"random": torch.rand(queries, generator=generator), "none": torch.zeros(queries)}
    end = most if prefix == "all" else (share[prefix] * (most + 1)).long()
    times = torch.randint(0, 10**12, (queries + keys,), generator=generator)
    g, h = heads
    return {
        "q": normal(queries, g, width),
        "k": normal(keys, h, width),
        "v": normal(keys, h, width),
        "q_offsets": q_offsets,
        "kv_offsets": kv_offsets,
        "kv_end": end,
        "recency": Recency(times[:queries], times[queries:], normal(RECENCY_BUCKETS, g)) if recency else None,
        "position_bias": normal(POSITION_BUCKETS, g) if position else None,
        "pair_bias": normal(int(end.sum()), g) if pairs else None,
        "null": Null(normal(h, width), normal(h, width)) if null and pointwise is None else None,
        "pointwise": pointwise,
    }  # fmt: skip


def leaves(given_: dict[str, Any]) -> list[Tensor]:
    """What has a gradient: q, k, v, and the biases and null slot that there are."""
    recency = given_["recency"]
    optional = (given_["position_bias"], given_["pair_bias"], recency and recency.table)
    found = [given_[x] for x in "qkv"] + [x for x in optional if x is not None]
    return found + list(given_["null"] or ())


def gradients(function: Any, given_: dict[str, Any]) -> list[Tensor]:
    wanted = leaves(given_)
    out = function(**given_)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    total = (out * weight).sum() + 0 * given_["q"].sum()  # has a graph even where nothing is seen
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    zero = [torch.zeros_like(leaf) for leaf in wanted]
    return [z if f is None else f for f, z in zip(found, zero, strict=True)]
