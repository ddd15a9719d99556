"""MovieLens-1M as sequences: the log, the held-out items, and jagged batches of them.

A user's interactions, whatever the rating, lie in one run of the log in chronological order (by
timestamp, ties in the order of the file). The last is the test item, the one before it the
validation item:

    log of a user     a b c d e f        start 0, end 6
    held out 2        train on a b c d: inputs a b c, targets b c d
    validation        inputs a b c d, target e; a b c d filtered
    test              inputs a b c d e, target f; a b c d e filtered

A batch has R rows (a window of one user each) and N inputs; the target of an input is what came next.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from feature_store.errors import DataError

VALIDATION, TEST = 2, 1  # a held-out item's place, from a user's end
MIN_INTERACTIONS = 4  # two held out, and an input with its target
REBUILT_USER = 3000  # the first whose timestamps are partly rebuilt in that copy
# of the uncompressed file, as a known copy has it
_REBUILT = "02ebd240fc9121d0d9fbb7f89b863e3f7bc2693d8f5d5210beeeeb40bc715967"
_FILE, _COLUMNS = "ratings.dat", ("UserID", "MovieID", "Rating", "Timestamp")


class Batch(NamedTuple):
    """What the model reads; the encoders of `models` read the last three fields and `rows`, `events`.

    item, target: (N,) int64. asked: (N,) int64 microseconds, when the target happened.
    event_time: (N,) int64 microseconds. event_offsets: (R+1,) int64.
    """

    item: Tensor
    target: Tensor
    asked: Tensor
    event_time: Tensor
    event_offsets: Tensor

    @property
    def rows(self) -> int:
        """R."""
        return len(self.event_offsets) - 1

    @property
    def events(self) -> int:
        """N."""
        return len(self.item)


@dataclass(frozen=True, kw_only=True)
class Log:
    """Every interaction, by user and then in chronological order.

    Args:
        user: (U,) int64, their ids in the file, ascending.
        offsets: (U+1,) int64, where each user's interactions start.
        item: (I,) int64, 0 up to `items` - 1 in the order of the file's movie ids.
        time: (I,) int64, microseconds.
        items: the catalogue, every movie that was rated.
        rebuilt: whether this is the copy of which 15.5 % of the timestamps were interpolated.
    """

    user: Tensor
    offsets: Tensor
    item: Tensor
    time: Tensor
    items: int
    rebuilt: bool

    def to(self, device: torch.device) -> Log:
        """The same log on `device`."""
        names = ("user", "offsets", "item", "time")
        moved = {name: getattr(self, name).to(device) for name in names}
        return Log(**moved, items=self.items, rebuilt=self.rebuilt)

    def batch(self, first: Tensor, length: Tensor) -> Batch:
        """Rows of `length` inputs from `first` on, (R,) int64 each, places in the log."""
        offsets = F.pad(length.cumsum(0), (1, 0))
        shift = torch.repeat_interleave(first - offsets[:-1], length)
        at = torch.arange(len(shift), device=shift.device) + shift
        return Batch(
            item=self.item[at],
            target=self.item[at + 1],
            asked=self.time[at + 1],
            event_time=self.time[at],
            event_offsets=offsets,
        )

    def training_batch(
        self, users: Tensor, *, held_out: int, window: int, generator: torch.Generator
    ) -> Batch:
        """At most `window` inputs of each user (R,), from a random place, none of it held out."""
        start, end = self.offsets[users], self.offsets[users + 1] - held_out
        length = (end - start - 1).clamp(max=window)
        spare = end - start - length  # places that the window can start at
        at = torch.rand(len(users), generator=generator).to(start.device)
        return self.batch(start + (at * spare).to(torch.int64), length)

    def evaluation_batch(self, users: Tensor, *, place: int, window: int) -> Batch:
        """The `window` inputs before the held-out item at `place`; its row's last target is that."""
        end = self.offsets[users + 1] - place
        length = (end - self.offsets[users]).clamp(max=window)
        return self.batch(end - length, length)

    def seen(self, users: Tensor, *, place: int, last: int | None = None) -> tuple[Tensor, Tensor]:
        """(row, item) int64 of everything before the held-out item at `place`, or the `last` of it."""
        start, end = self.offsets[users], self.offsets[users + 1] - place
        if last is not None:
            start = torch.maximum(start, end - last)
        before = self.batch(start, end - start)
        rows = torch.arange(len(users), device=users.device)
        return torch.repeat_interleave(rows, before.event_offsets.diff()), before.item


def read(source: Path) -> Log:
    """The log of a folder with `ratings.dat` or `ratings.dat.gz`, as GroupLens distributes it.

    Raises:
        DataError: no such file, a line that is not UserID::MovieID::Rating::Timestamp, or a user
            with too few interactions to hold two out.
    """
    raw = _raw(source)
    try:
        table = pd.read_csv(
            io.BytesIO(raw.replace(b"::", b"\t")), sep="\t", names=_COLUMNS, dtype=np.int64
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(
            f"source is {str(source)!r}: a line of {_FILE} is not {'::'.join(_COLUMNS)} "
            f"in whole numbers ({error}); give the file as GroupLens distributes it"
        ) from error
    if table.empty or not table.Rating.between(1, 5).all():
        raise DataError(
            f"source is {str(source)!r}: {_FILE} has no ratings, or some outside 1 to 5; "
            "give the file as GroupLens distributes it"
        )
    order = np.lexsort((table.Timestamp, table.UserID))  # stable: ties stay in the file's order
    table = table.iloc[order]
    user, count = np.unique(table.UserID, return_counts=True)
    if count.min() < MIN_INTERACTIONS:
        raise DataError(
            f"UserID is {user[count.argmin()]}: {count.min()} interactions, and a user needs "
            f"{MIN_INTERACTIONS}; take out users with fewer"
        )
    movies, item = np.unique(table.MovieID, return_inverse=True)
    return Log(
        user=torch.from_numpy(user),
        offsets=F.pad(torch.from_numpy(count).cumsum(0), (1, 0)),
        item=torch.from_numpy(item.astype(np.int64)),
        time=torch.tensor(table.Timestamp.to_numpy()) * 1_000_000,
        items=len(movies),
        rebuilt=hashlib.sha256(raw).hexdigest() == _REBUILT,
    )


def _raw(source: Path) -> bytes:
    plain, packed = source / _FILE, source / f"{_FILE}.gz"
    try:
        if plain.is_file():
            return plain.read_bytes()
        return gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"source is {str(source)!r}: no readable {_FILE} or {_FILE}.gz in it ({error}); "
            "give the folder of an unpacked MovieLens-1M"
        ) from error
