"""What the tables have to hold, written from the documentation alone: plain Python, one row at a time.

Here: `events` and `impressions` from what a source gives; in `oracle_tables.py` what is built of them.
Nothing here is fast, and nothing is shared with the jobs. Every value is found anew from the day's
events and targets by going through all of them. Rows are dicts by column name; a float32 is a Python
float of that value.

Ids that the pipeline hashes are tuples here (`events`, `impressions`); `tests/differential.py` finds
out which hash stands for which tuple before it asks for the tables that are ordered by them.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from feature_store.days import end_us, micros, start_us
from feature_store.spec import (
    Attribute,
    Dataset,
    EventStream,
    IdType,
    Kind,
)

Row = dict[str, Any]
ByDay = dict[str, list[Row]]


class Refused(Exception):
    """The rows contradict themselves: `ingest` has to stop with an error."""


def f32(number: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def typed(attribute: Attribute, value: Any) -> Any:
    """A source's value as the tables hold it; an empty text is a missing value."""
    if value is None or value == "":
        return None
    if attribute.kind is Kind.VECTOR:
        return [f32(x) for x in value]
    if attribute.kind is Kind.NUMERIC:
        return f32(value)
    return value


def packed(attribute: Attribute, value: Any) -> Any:
    """A value inside a packed array, where nothing is null."""
    if value is not None:
        return value
    if attribute.kind is Kind.VECTOR:
        return [0.0] * (attribute.dim or 0)
    if attribute.kind is Kind.NUMERIC:
        return math.nan
    return no_id(attribute.id_type)


def no_id(kind: IdType) -> Any:
    return -1 if kind is IdType.INT64 else ""


def bounds(dataset: Dataset, ds: str) -> tuple[int, int]:
    """The first instant of a day and the first after it."""
    return start_us(ds, dataset.utc_offset), end_us(ds, dataset.utc_offset)


def event_id(stream: EventStream, raw: Row) -> tuple[Any, ...]:
    """What identifies an event: its stream and user, and what the spec names or its own id."""
    own = stream.id_from or ("event_id",)
    return (stream.name, raw["user_id"], *(raw[c] for c in own))


def arrival(raw: Row) -> int:
    """When the log had the event."""
    return int(raw["event_time"] if raw.get("ingest_time") is None else raw["ingest_time"])


def available_time(stream: EventStream, raw: Row) -> int:
    """When features may use the event."""
    return max(raw["event_time"], arrival(raw)) + micros(stream.delay)


def events(dataset: Dataset, given: dict[str, list[Row]], ds: str) -> list[Row]:
    """`events(ds)` from what a source gives, by stream.

    Raises:
        Refused: two rows of one id reached the log together and differ.
    """
    start, end = bounds(dataset, ds)
    found: list[Row] = []
    for stream in dataset.streams:
        first: dict[Any, Row] = {}
        for raw in given[stream.name]:
            available = available_time(stream, raw)
            if not start <= available < end:
                continue
            row = {
                "event_id": event_id(stream, raw),
                "stream": stream.name,
                "user_id": raw["user_id"],
                "event_time": raw["event_time"],
                "ingest_time": arrival(raw),
                "available_time": available,
                **{a.name: None for a in dataset.event_attributes},
                **{a.name: typed(a, raw[a.name]) for a in stream.attributes},
                "ds": ds,
            }
            known = first.setdefault(row["event_id"], row)
            if known["ingest_time"] == row["ingest_time"] and not same(known, row):
                raise Refused(f"{stream.name}: two rows of id {row['event_id']}")
            if row["ingest_time"] < known["ingest_time"]:
                first[row["event_id"]] = row
        found += first.values()
    return found


def same(one: Any, other: Any) -> bool:
    """Equality by which a NaN equals itself."""
    return repr(one) == repr(other)


def impressions(dataset: Dataset, given: list[Row], ds: str) -> list[Row]:
    """`impressions(ds)` from what a source gives.

    Raises:
        Refused: two targets of one key differ.
    """
    start, end = bounds(dataset, ds)
    kinds = {t.name: t for t in dataset.targets}
    found: dict[Any, Row] = {}
    for raw in given:
        kind = kinds[raw.get("target") or dataset.targets[0].name]
        time = raw["time"]
        as_of = time if raw.get("as_of") is None else raw["as_of"]
        if not start <= as_of < end:
            continue
        own = {**raw, "as_of": as_of}
        row = {
            "target_id": (kind.name, *(own[c] for c in kind.id_from))
            if kind.id_from
            else raw["target_id"],
            "target": kind.name,
            "user_id": raw["user_id"],
            "time": time,
            "as_of": as_of,
            "item_id": raw["item_id"] if kind.has_item else None,
            **{c.name: None for c in dataset.context_features},
            **{c.name: typed(c, raw[c.name]) for c in kind.context},
            **{f"label__{n}": raw[n] for n in dataset.given_labels},
            "ds": ds,
        }
        known = found.setdefault((row["user_id"], kind.name, row["target_id"]), row)
        if not same(known, row):
            raise Refused(f"{kind.name}: two rows of id {row['target_id']}")
    return list(found.values())
