"""Published user embeddings: how they are stored, pooled and read.

A partition of `user_embeddings` holds, per user, K embeddings of dimension D of one model's
snapshot, as little-endian float16 in a binary of K*D*2 bytes (Delta has no half type):

    found = read_embeddings(lake, "sum", "2024-05-02")
    found.user_ids                     # (n,)
    found.numpy()                      # (n, K, D) float16, a view of what was read
    found.torch(); found.arrow(); found.pandas()
    values, present = found.lookup(some_user_ids)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.errors import DataError
from feature_store.ledger import pin
from feature_store.tables import contract

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from feature_store.lake import Lake
    from feature_store.spec import Dataset

_USERS = 65_536  # whose embeddings are widened to float32 or float64 at once
_HALF = np.dtype("<f2")
_CHUNK_BYTES = 1 << 30  # an Arrow binary array ends at 2 GiB


class EmbeddingKind(StrEnum):
    """Which of the published embeddings."""

    RAW = "raw"  # of the day's snapshot
    POOLED = "pooled"  # the mean over the days that the user has of ds, ds - 1 and ds - 2


@dataclass(frozen=True, kw_only=True, eq=False)
class UserEmbeddings:
    """One model's embeddings of one day, from one snapshot.

    Args:
        model, ds, kind, snapshot: what they are.
        ids: user ids, unique, int64 or string.
        values: (n, K, D) float16, as published.
        version: Delta version that they were read at; None where they were not read from a lake.
    """

    model: str
    ds: str
    kind: EmbeddingKind
    snapshot: str
    ids: pa.Array = field(repr=False)
    values: np.ndarray = field(repr=False)
    version: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def user_ids(self) -> np.ndarray:
        """(n,) int64, or objects where ids are strings."""
        return self.ids.to_numpy(zero_copy_only=False)

    def numpy(self, dtype: np.typing.DTypeLike = np.float16) -> np.ndarray:
        """(n, K, D); a read-only view of what was read where `dtype` is float16."""
        return self.values.astype(dtype, copy=False)

    def torch(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(n, K, D) tensor of its own memory, float16 by default."""
        import torch

        return torch.from_numpy(self.values.copy()).to(dtype or torch.float16)

    def arrow(self) -> pa.Table:
        """`user_id` and `embedding`, a fixed-size list of K*D halffloat (embedding by embedding)."""
        flat = pa.array(self.values.reshape(-1))
        width = self.values.shape[1] * self.values.shape[2]
        return pa.table(
            {"user_id": self.ids, "embedding": pa.FixedSizeListArray.from_arrays(flat, width)}
        )

    def pandas(self) -> pd.DataFrame:
        """One float32 column per number, named `e<k>_<d>`, indexed by `user_id`."""
        import pandas as pd

        n, count, dim = self.values.shape
        names = [f"e{k}_{d}" for k in range(count) for d in range(dim)]
        index = pd.Index(self.user_ids, name="user_id")
        return pd.DataFrame(
            self.values.reshape(n, -1).astype(np.float32), index=index, columns=names
        )

    def lookup(
        self, user_ids: Sequence[int] | Sequence[str] | np.ndarray | pa.Array
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values (m, K, D), of the type of `values`, of the named users, and a mask (m,) of who has any.

        Users may repeat. Who has none gets zeros: use the mask, not the zeros.
        """
        at = self.places(user_ids)
        present = at >= 0
        values = np.zeros((len(present), *self.values.shape[1:]), dtype=self.values.dtype)
        values[present] = self.values[at[present]]
        return values, present

    def places(self, user_ids: Sequence[int] | Sequence[str] | np.ndarray | pa.Array) -> np.ndarray:
        """(m,) int64: where in `values` the named users are; -1 for who is not."""
        wanted = (
            user_ids
            if isinstance(user_ids, pa.Array | pa.ChunkedArray)
            else pa.array(user_ids, self.ids.type)
        )
        at = pc.index_in(wanted.cast(self.ids.type), value_set=self.ids).fill_null(-1)
        if isinstance(at, pa.ChunkedArray):
            at = at.combine_chunks()
        return at.to_numpy().astype(np.int64)

    def beside(
        self, user_ids: pa.Array, values: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Other embeddings `values` (m, K, D) of the named users beside those here, (c, K, D) each, for some
        users after the others; who is not here is left out."""
        at = self.places(user_ids)
        for part in user_slices(len(at)):
            here = at[part] >= 0
            yield values[part][here], self.values[at[part][here]]


def read_embeddings(
    lake: Lake, model: str, ds: str, kind: str = EmbeddingKind.POOLED, *, version: int | None = None
) -> UserEmbeddings:
    """The embeddings that `model` published for `ds`: made from events before the end of that day less
    `serve_delay`, to be used on the day after.

    Args:
        kind: "pooled" or "raw".
        version: a pinned Delta version; None is the one that the ledger names.

    Raises:
        MissingPartitionError: nothing was published.
        DataError: the partition is empty, or mixes snapshots, counts or dimensions.
    """
    if kind not in set(EmbeddingKind):
        raise DataError(f"kind is {kind!r}: use {' or '.join(EmbeddingKind)}")
    kind = EmbeddingKind(kind)
    if version is None:
        version = lake.require("user_embeddings", [ds], model)[pin("user_embeddings", ds, model)]
    columns = ["user_id", "snapshot", "embeddings", "dim", kind.value]
    rows = lake.read("user_embeddings", days=[ds], model=model, columns=columns, version=version)
    where = f"user_embeddings of {model} on {ds} (version {version})"
    if rows.num_rows == 0:
        raise DataError(
            f"{where} has no users: publish a day that has events in the window before it"
        )
    single = {}
    for column in ("snapshot", "embeddings", "dim"):
        found = pc.unique(rows.column(column)).to_pylist()
        if len(found) != 1:
            raise DataError(
                f"{where} mixes {column} {found[0]} and {found[1]}: publish the day again"
            )
        single[column] = found[0]
    ids = rows.column("user_id").combine_chunks()
    return UserEmbeddings(
        model=model,
        ds=ds,
        kind=kind,
        snapshot=single["snapshot"],
        ids=ids,
        values=decode(rows.column(kind.value), single["embeddings"], single["dim"]),
        version=version,
    )


def encode(values: np.ndarray) -> pa.ChunkedArray:
    """(n, K, D) floats as n binaries of K*D little-endian float16.

    Raises:
        DataError: a value is not finite, or beyond float16's 65504.
    """
    if values.ndim != 3:
        raise DataError(f"embeddings have shape {values.shape}: give (users, K, D)")
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(values, dtype=_HALF)
    if not np.isfinite(half).all():
        row = int(np.flatnonzero(~np.isfinite(half).all(axis=(1, 2)))[0])
        raise DataError(
            f"embedding of row {row} is not finite in float16: look at the snapshot's training"
        )
    width = half.shape[1] * half.shape[2] * _HALF.itemsize
    step = max(1, _CHUNK_BYTES // max(width, 1))
    chunks = []
    for start in range(0, max(len(half), 1), step):
        part = half[start : start + step]
        offsets = np.arange(len(part) + 1, dtype=np.int32) * np.int32(width)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(part)]
        chunks.append(pa.Array.from_buffers(pa.binary(), len(part), buffers))
    return pa.chunked_array(chunks, pa.binary())


def decode(column: pa.ChunkedArray | pa.Array, count: int, dim: int) -> np.ndarray:
    """(n, K, D) float16 of binaries, a view of Arrow's memory where the column is one chunk.

    Raises:
        DataError: a binary is null or has another length than `count * dim * 2`.
    """
    width = count * dim * _HALF.itemsize
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = []
    for chunk in chunks:
        lengths = pc.binary_length(chunk)
        if chunk.null_count or (not pc.all(pc.equal(lengths, width)).as_py() and len(chunk)):
            raise DataError(
                f"an embedding is not {width} bytes long, as {count} x {dim} float16 are: publish again"
            )
        if not len(chunk):
            continue
        first = np.frombuffer(chunk.buffers()[1], dtype=np.int32)[chunk.offset]
        flat = np.frombuffer(
            chunk.buffers()[2], dtype=_HALF, count=len(chunk) * count * dim, offset=int(first)
        )
        parts.append(flat.reshape(len(chunk), count, dim))
    if not parts:
        return np.empty((0, count, dim), dtype=_HALF)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def pooled(
    user_ids: np.ndarray | pa.Array, raw: np.ndarray, before: Sequence[UserEmbeddings]
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of what each of today's users has today and on the days `before`.

    Args:
        user_ids: (n,) today's users.
        raw: (n, K, D) today's embeddings; they enter as they are stored, in float16.
        before: raw embeddings of the one or two days before; a day that was not published is left out.

    Returns:
        (n, K, D) float16 computed in float32, and (n,) int32: of how many days it is the mean.

    Raises:
        DataError: a day before has another K or D, or is pooled already.
    """
    days = np.ones(len(raw), dtype=np.int32)
    for day in before:
        if day.kind is not EmbeddingKind.RAW:
            raise DataError(f"embeddings of {day.ds} are {day.kind}: pool raw ones")
        if day.values.shape[1:] != raw.shape[1:]:
            raise DataError(
                f"embeddings of {day.model} on {day.ds} are {day.values.shape[1:]}, today's {raw.shape[1:]}: "
                "publish a model of another shape under a name of its own"
            )
    places = [day.places(user_ids) for day in before]
    for at in places:
        days += at >= 0
    mean = np.empty(raw.shape, _HALF)
    for part in user_slices(len(raw)):
        total = raw[part].astype(_HALF).astype(np.float32)
        for day, at in zip(before, places, strict=True):
            here = at[part] >= 0
            total[here] += day.values[at[part][here]].astype(np.float32)
        mean[part] = total / days[part, None, None]
    return mean, days


def user_slices(users: int) -> Iterator[slice]:
    """Slices of at most `_USERS` users each, so that what is computed of all takes little memory."""
    for first in range(0, users, _USERS):
        yield slice(first, min(first + _USERS, users))


def published_rows(
    dataset: Dataset,
    *,
    model: str,
    ds: str,
    snapshot: str,
    user_ids: np.ndarray | pa.Array,
    raw: np.ndarray,
    before: Sequence[UserEmbeddings] = (),
) -> pa.Table:
    """The rows of one partition of `user_embeddings`, ready for `Lake.publish_arrow`.

    Args:
        snapshot: names the trained model that they come from.
        user_ids: (n,); raw: (n, K, D) floats.
        before: what the model published on `ds - 1` and `ds - 2`, raw.
    """
    shape = contract(dataset, "user_embeddings").schema
    n, count, dim = raw.shape
    mean, days = pooled(user_ids, raw, before)
    columns = {
        "user_id": user_ids,
        "snapshot": pa.repeat(snapshot, n),
        "embeddings": pa.repeat(pa.scalar(count, pa.int32()), n),
        "dim": pa.repeat(pa.scalar(dim, pa.int32()), n),
        "raw": encode(raw),
        "pooled": encode(mean),
        "pooled_days": days,
        "model": pa.repeat(model, n),
        "ds": pa.repeat(ds, n),
    }
    return pa.table([columns[f.name] for f in shape], schema=shape) if n else shape.empty_table()
