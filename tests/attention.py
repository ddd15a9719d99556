"""Attention problems of every jagged shape, for whatever implements `prefix_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import RECENCY_BUCKETS, Null, Recency


def problem(
    sizes: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 3,
    recency: bool = True,
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
        "null": Null(normal(h, width), normal(h, width)) if null and pointwise is None else None,
        "pointwise": pointwise,
    }  # fmt: skip


def gradients(function: Any, given_: dict[str, Any]) -> list[Tensor]:
    leaves = [given_["q"], given_["k"], given_["v"]]
    if given_["recency"] is not None:
        leaves.append(given_["recency"].table)
    if given_["null"] is not None:
        leaves += list(given_["null"])
    out = function(**given_)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    total = (out * weight).sum() + 0 * given_["q"].sum()  # has a graph even where nothing is seen
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    zero = [torch.zeros_like(leaf) for leaf in leaves]
    return [z if f is None else f for f, z in zip(found, zero, strict=True)]
