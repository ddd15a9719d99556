"""Draws that depend on nothing but their keys: a hash of (seed, what is drawn, who, when)."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b

import numpy as np

Array = np.ndarray

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@cache
def _name(what: str) -> int:
    return int.from_bytes(blake2b(what.encode(), digest_size=8).digest(), "little")


def draw(seed: int, what: str, *keys: Array | int) -> Array:
    """Uniform uint64 of each combination of `keys`, which broadcast: splitmix64, chained over the keys."""
    state: Array = np.asarray(seed % 2**64, np.uint64)
    with np.errstate(over="ignore"):
        for key in (_name(what), *keys):
            bits = key.astype(np.uint64) if isinstance(key, np.ndarray) else np.uint64(key % 2**64)
            x = np.asarray(state + (bits + np.uint64(1)) * _MULTIPLIER)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = np.asarray(x ^ (x >> np.uint64(31)))
    return state


def uniform(seed: int, what: str, *keys: Array | int) -> Array:
    """Float64 in (0, 1) of each combination of `keys`."""
    return ((draw(seed, what, *keys) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(seed: int, what: str, *keys: Array | int) -> Array:
    """Standard normal float64 (Box and Muller) of each combination of `keys`."""
    radius = np.sqrt(-2.0 * np.log(uniform(seed, what + "/r", *keys)))
    return radius * np.cos(2.0 * np.pi * uniform(seed, what + "/a", *keys))


def identifier(seed: int, what: str, *keys: Array | int) -> Array:
    """A non-negative int64 id that tells nothing about its keys."""
    return (draw(seed, what, *keys) >> np.uint64(1)).astype(np.int64)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + np.exp(-x))
