"""Timing what does the same work, in turns, so that whatever else the machine does falls on all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch


def in_turns(
    of: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Seconds of each, (rounds,) float64, by name; `warm_up` rounds before them are not counted."""
    taken = {name: np.empty(rounds) for name in of}
    for i in range(-warm_up, rounds):
        for name, run in of.items():
            begun = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 0:
                taken[name][i] = time.perf_counter() - begun
    return taken
