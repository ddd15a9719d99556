"""Time as a model sees it: the phase of the day and week, and gaps on a logarithmic scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DAY_US = 86_400_000_000
PHASES = 6
_CYCLES = ((DAY_US, 1), (DAY_US, 2), (7 * DAY_US, 1))


def phases(time_us: Tensor) -> Tensor:
    """Sine and cosine of the time of day (two harmonics) and of the week.

    In UTC: a zone is a rotation of these, which the linear layer that reads them learns.

    Args:
        time_us: (B,) int64 microseconds.

    Returns:
        (B, 6) float32.
    """
    columns = []
    for period, harmonic in _CYCLES:
        angle = (time_us % period).to(torch.float64) * (2 * math.pi * harmonic / period)
        columns += [angle.sin(), angle.cos()]
    return torch.stack(columns, dim=1).to(torch.float32)


def gap_bucket(gap_us: Tensor, *, buckets: int = 32) -> Tensor:
    """One bucket per doubling from a second up; 0 below it. int64 of the same shape."""
    seconds = gap_us.clamp(min=0).to(torch.float64) * 1e-6
    return torch.log2(seconds.clamp(min=0.5)).add(1.0).to(torch.int64).clamp(max=buckets - 1)
