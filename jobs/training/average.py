"""The average of the weights that a training goes through, which is what is scored and published.

A constant learning rate, which daily training needs, leaves weights that wander around where they
should be; their exponential moving average does not (Polyak and Juditsky, 1992). Embedding tables
take no part: a row is seldom updated, and its optimizer slows down by itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Average:
    """Parameters in two versions, as trained and averaged; one is in the parameters, one in `other`.

    average_n = d average_{n-1} + (1 - d) trained_n, d = min(decay, (1 + n) / (10 + n)).

    Args:
        parameters: by name.
        decay: 0 keeps no average: both versions are one.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters = {n: p.detach() for n, p in parameters.items()}  # views
        self.decay = decay
        self.other: dict[str, Tensor] = {}  # empty: as the parameters are
        self.training = False

    def train(self) -> None:
        """Put the trained version into the parameters."""
        if not self.training:
            self._swap()
        self.training = True

    def serve(self) -> None:
        """Put the averaged version into the parameters."""
        if self.training:
            self._swap()
        self.training = False

    def update(self, step: int) -> None:
        """The parameters are as trained after `step` steps in all, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.other:
            trained = [self.parameters[name] for name in self.other]
            torch._foreach_lerp_(list(self.other.values()), trained, 1.0 - decay)

    def trained(self) -> dict[str, Tensor]:
        """The trained version by name, where it differs from what `served` gives. Views."""
        return dict(self.parameters if self.training else self.other) if self.decay else {}

    def served(self) -> dict[str, Tensor]:
        """The averaged version by name. Views."""
        return dict(self.other if self.training and self.decay else self.parameters)

    def load(self, trained: Mapping[str, Tensor]) -> None:
        """The parameters hold the averaged version, and this is the trained one."""
        self.training = False
        self.other = {}
        if trained:
            both = ((n, p, trained.get(n, p)) for n, p in self.parameters.items())
            self.other = {n: t.to(p.device, copy=True) for n, p, t in both}

    def _swap(self) -> None:
        if not self.decay:
            return
        if not self.other:
            self.other = {n: p.clone() for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            held = parameter.clone()
            parameter.copy_(self.other[name])
            self.other[name] = held
