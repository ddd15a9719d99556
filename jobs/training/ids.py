"""Stable hashes of ids: strings to int64, the held-out share of users, the seeded order of rows.

None of them is the hash that a model finds its table rows by, so that no user's side of a split and
no row's place in an epoch says anything about the embedding it reads.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.columns import MISSING_ID, MISSING_STRING

_HELD_OUT = np.uint64(0x68656C642D6F7574)


def int64_ids(values: pa.Array) -> np.ndarray:
    """`values` (int64 or string) as int64 (n,): a string is 63 bits of its BLAKE2b, "" and null are -1."""
    if not pa.types.is_string(values.type) and not pa.types.is_large_string(values.type):
        if values.null_count:
            values = pc.fill_null(values, MISSING_ID)
        return values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    if values.null_count:
        values = pc.fill_null(values, MISSING_STRING)
    encoded = values.dictionary_encode()
    table = np.fromiter((_string_id(s) for s in encoded.dictionary.to_pylist()), np.int64)
    return table[encoded.indices.to_numpy()] if len(table) else np.empty(0, np.int64)


def _string_id(text: str) -> int:
    if text == MISSING_STRING:
        return MISSING_ID
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mix(values: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of int64 `values` (n,) under `seed`: uint64 (n,) that look uniform."""
    with np.errstate(over="ignore"):
        x = values.astype(np.int64, copy=False).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ np.uint64(seed & 0xFFFFFFFFFFFFFFFF)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def held_out(user_ids: np.ndarray, share: float) -> np.ndarray:
    """Which of int64 `user_ids` (n,) are never trained on: bool (n,), the same for every day and model."""
    return in_share(user_ids, share, int(_HELD_OUT))


def in_share(ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which of int64 `ids` (n,) are in the sample of `share` of all that `seed` draws: bool (n,)."""
    if share >= 1.0:
        return np.ones(len(ids), bool)
    return mix(ids, seed) < np.uint64(int(share * 2.0**64))


def seed_of(*parts: object) -> int:
    """A non-negative 63-bit seed fixed by `parts`."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
