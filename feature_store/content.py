"""A hash of rows that does not depend on their order, nor on how files or batches hold them."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

_MASK = (1 << 64) - 1
_STEP = np.uint64(0x9E3779B97F4A7C15)
_NULL = np.uint64(0x6E756C6C)
_BATCH_ROWS = 65_536


def content_hash(rows: pads.Dataset) -> str:
    """48 hex digits of a bag of rows: two sums of row hashes, and how many rows there are.

    Two bags of equal rows (floats to the bit, but any NaN equals any other) have one hash, whatever
    the order of rows and columns.
    """
    names = sorted(rows.schema.names)
    first = second = count = 0
    for batch in rows.scanner(columns=names, batch_size=_BATCH_ROWS).to_batches():
        hashed = np.full(batch.num_rows, _STEP, np.uint64)
        for name in names:
            hashed = _mix(hashed * _STEP + _values(batch.column(name)))
        first = (first + int(hashed.sum(dtype=np.uint64))) & _MASK
        second = (second + int(_mix(hashed).sum(dtype=np.uint64))) & _MASK
        count += batch.num_rows
    return f"{first:016x}{second:016x}{count:016x}"


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _values(column: pa.Array) -> np.ndarray:
    """One uint64 per value of a column of numbers, texts or lists of them."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        hashed = _lists(column)
    elif pa.types.is_floating(column.type):
        floats = column.fill_null(0.0).to_numpy(zero_copy_only=False).astype(np.float64)
        floats = np.where(np.isnan(floats), np.nan, floats)  # one NaN for all
        hashed = floats.view(np.uint64)
    elif pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        hashed = column.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        hashed = hashed.view(np.uint64)
    else:
        hashed = _texts(column)
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return np.where(valid, _mix(hashed ^ _STEP), _NULL)


def _texts(column: pa.Array) -> np.ndarray:
    """One uint64 per text or binary value, each distinct one hashed once."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    distinct = column.dictionary.cast(pa.binary()).to_pylist()
    hashes = [hashlib.blake2b(t, digest_size=8).digest() for t in distinct] or [bytes(8)]
    table = np.frombuffer(b"".join(hashes), np.uint64)
    return table[column.indices.fill_null(0).to_numpy(zero_copy_only=False)]


def _lists(column: pa.ListArray) -> np.ndarray:
    """One uint64 per list, of its elements in their order and of its length."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    inner = _values(column.values.slice(offsets[0], offsets[-1] - offsets[0]))
    lengths = np.diff(offsets)
    place = np.arange(len(inner)) - np.repeat(offsets[:-1] - offsets[0], lengths)
    inner = _mix(inner + (place.astype(np.uint64) + np.uint64(1)) * _STEP)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(inner, dtype=np.uint64)])
    ends = offsets - offsets[0]
    return sums[ends[1:]] - sums[ends[:-1]] + lengths.astype(np.uint64) * _STEP
