"""One module per dataset, from its raw logs (or its simulator) to events and impressions.

`jobs/sources/<dataset>.py` has

    NEEDS_SOURCE: bool
        True: the run has to name where the logs are (SOURCE=<dir>, --source <dir>).

    def read(spark, source: str | None, day: str, dataset: Dataset) -> SourceDay
        What belongs to `day`, a YYYY-MM-DD in the dataset's zone: the events that became available
        then (`available_time = max(event_time, ingest_time) + the stream's delay`) and the targets
        whose `as_of` lies in it. Raises DataError where a file is missing or unreadable.

It only reads and renames; `jobs/ingest.py` casts, checks, makes ids and publishes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

from feature_store.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame


@dataclass(frozen=True, kw_only=True)
class SourceDay:
    """What a source gives for one day. Times are UTC int64 microseconds.

    What lies in memory is an Arrow table, of any size; everything else is a frame of `spark`.

    Args:
        events: stream -> frame with `user_id`, `event_time`, the stream's attributes, optionally
            `ingest_time` (absent or null: the event time), and `event_id`, which counts within a
            user, unless the spec's `id_from` says what it is hashed from. Every stream of the spec
            has a frame, if an empty one.
        impressions: `target` (name of the kind; may be absent where the spec has one kind),
            `user_id`, `time`, optionally `as_of` (absent or null: the time), `item_id` where a
            kind has an item, the context features, the given labels (1, 0 or null; named as in
            `GivenLabel.column`), and `target_id`, which counts within a user and a kind, unless the
            spec's `id_from` says what it is hashed from. None: nothing was scored that day.
        truth: simulated datasets only: `target_id`, `task`, `probability`, in memory.
        overlapping: the source's files reach over into other days, so that rows of other days are
            dropped and counted; otherwise such rows are an error.
        notes: counts to keep in the ledger beside those of the ingestion (say, lines skipped).
    """

    events: Mapping[str, DataFrame | pa.Table]
    impressions: DataFrame | pa.Table | None = None
    truth: pa.Table | None = None
    overlapping: bool = False
    notes: dict[str, int | float | str] = field(default_factory=dict)


def get(name: str) -> ModuleType:
    """The source module of dataset `name`.

    Raises:
        DataError: there is none.
    """
    known = sorted(m.name for m in pkgutil.iter_modules(__path__))
    if name not in known:
        raise DataError(f"dataset is {name!r}: it has no source; add jobs/sources/{name}.py")
    return importlib.import_module(f"jobs.sources.{name}")
