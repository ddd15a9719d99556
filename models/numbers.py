"""Numeric features: whatever scale a log has, a model sees values of about unit size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.axes import Blocks, length, named

_KNOTS = (-1.5, -0.75, 0.0, 0.75, 1.5, 2.5)
HINGES = 1 + len(_KNOTS)


def squash(values: Tensor) -> Tensor:
    """sign(x) log(1 + |x|); NaN stays NaN."""
    return torch.sign(values) * torch.log1p(values.abs())


def hinges(values: Tensor) -> Tensor:
    """Each number x beside max(0, x - k) for six knots k: linear in these is piecewise linear in x.

    A boosted tree finds a threshold in a number at once, an MLP late (Gorishniy et al., "On
    embeddings for numerical features", arXiv 2203.05556).

    Args:
        values: (B, F), of about unit size.

    Returns:
        (B, HINGES F).
    """
    knots = torch.tensor(_KNOTS, dtype=values.dtype, device=values.device)
    return torch.cat([values, torch.relu(values[:, :, None] - knots).flatten(1)], dim=1)


def hinged(numbers: Blocks) -> Blocks:
    """The blocks of what `hinges` makes of numbers with these."""
    return (*numbers, *((f"{name} hinges", n * len(_KNOTS)) for name, n in numbers))


class Standardise(nn.Module):
    """Features standardised by running statistics, log-squashed before that, missing ones 0.

    The statistics are those of earlier batches, not of this one (but for the very first), so what
    comes out for a row does not depend on the rows beside it. They are part of the state.

    Args:
        features: blocks of F numbers.
        log: squash them first; not what is of one scale already.
        momentum: weight of a new batch once the average has warmed up.
        limit: values are clamped to +-limit standard deviations.
    """

    def __init__(
        self, features: Blocks, *, log: bool = True, momentum: float = 0.02, limit: float = 6.0
    ) -> None:
        super().__init__()
        self.log = log
        self.momentum = momentum
        self.limit = limit
        count = length(features)
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("square", torch.ones(count))
        self.register_buffer("batches", torch.zeros(count))
        named(self, mean={0: features}, square={0: features}, batches={0: features})

    def forward(self, values: Tensor, present: Tensor | None = None) -> Tensor:
        """Standardise.

        Args:
            values: (B, F) float32, NaN where missing.
            present: (B,) bool; rows that are False count as missing altogether.

        Returns:
            (B, F) float32.
        """
        values = squash(values) if self.log else values
        known = ~values.isnan()
        if present is not None:
            known = known & present[:, None]
        values = torch.where(known, values, torch.zeros_like(values))
        if self.training:
            self._update(values, known)
        scale = (self.square - self.mean.square()).clamp(min=1e-4).rsqrt()
        scaled = ((values - self.mean) * scale).clamp(-self.limit, self.limit)
        return torch.where(known, scaled, torch.zeros_like(scaled))

    @torch.no_grad()
    def _update(self, values: Tensor, known: Tensor) -> None:
        count = known.sum(0)
        some = count > 0
        divisor = count.clamp(min=1)
        self.batches += some
        rate = torch.where(
            some,
            (1.0 / self.batches.clamp(min=1)).clamp(min=self.momentum),
            torch.zeros_like(self.mean),
        )
        self.mean += rate * (values.sum(0) / divisor - self.mean)
        self.square += rate * (values.square().sum(0) / divisor - self.square)
